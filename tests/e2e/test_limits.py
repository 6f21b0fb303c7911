"""Limits as a client, an operator and a webhook's receiver meet them."""

import base64
import hashlib
import hmac
import http.server
import json
import threading

import openai
import pytest
from harness import Stack, call, wait_for

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


class Receiver:
    """A webhook's receiver: refuses the first message, takes the rest."""

    def __init__(self):
        messages = self.messages = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                messages.append((dict(self.headers.items()), self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(503 if len(messages) == 1 else 204)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alarms"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def genuine(headers, body, secret):
    """The check of standardwebhooks.com, written from its text."""
    headers = {name.lower(): value for name, value in headers.items()}
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return headers["webhook-signature"] == "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


@pytest.fixture(scope="module")
def stack():
    with Stack(concurrency=2) as stack:
        yield stack


def test_a_webhook_is_told_of_a_spent_budget_until_it_takes_it(stack):
    receiver = Receiver()
    stack.admin("PATCH", "/v1/organisation", {"webhook": receiver.url})
    secret = stack.admin("GET", "/v1/organisation/webhook-secret")["secret"]
    # An answer of 100 tokens costs more than half of it, and is held at less than all.
    key_id, token = stack.new_key("0.0001")
    assert stack.chat(token, "[[sim tokens=100]]", max_tokens=100)[0] == 200
    wait_for("the second try", lambda: len(receiver.messages) >= 2, 30)
    assert receiver.messages[0][1] == receiver.messages[1][1], "the same alarm again"
    assert all(genuine(headers, body, secret) for headers, body in receiver.messages)
    assert not genuine(receiver.messages[0][0], receiver.messages[0][1] + b" ", secret)
    alarm = json.loads(receiver.messages[0][1])
    spent = stack.key(key_id)["spent_nanodollars"]
    assert alarm["type"] == "keyward.budget" and alarm["data"]["key"] == key_id
    assert (alarm["data"]["spent_nanodollars"], alarm["data"]["budget_nanodollars"]) == (spent, 100_000)
    told = [entry for entry in stack.audit(key_id) if entry["event"] == "ALARM"]
    assert [json.loads(entry["detail"])["percent"] for entry in told] == [alarm["data"]["percent"]]
    stack.admin("PATCH", "/v1/organisation", {"webhook": None})


def test_the_rate_headers_tell_what_is_left_and_sdks_wait(stack):
    _, token = stack.new_key(rates={"rpm": 2, "tpm": 100_000})
    status, headers, _ = stack.chat(token, max_tokens=20)
    assert status == 200 and headers["x-ratelimit-limit-requests"] == "2" and headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-limit-tokens"] == "100000" and int(headers["x-ratelimit-remaining-tokens"]) < 100_000
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert stack.chat(token, max_tokens=20)[0] == 200
    status, headers, body = stack.chat(token, max_tokens=20)
    assert (status, headers["x-keyward-reason"], headers["x-ratelimit-remaining-requests"]) == (429, "rate_limited", "0")
    # SDKs wait up to a minute; what takes a little longer they are told not to try.
    assert 50_000 < int(headers["retry-after-ms"]) <= 60_020
    assert headers.get("x-should-retry") == ("false" if int(headers["retry-after-ms"]) > 60_000 else None)
    assert int(headers["retry-after"]) == -(-int(headers["retry-after-ms"]) // 1000), "whole seconds, rounded up"
    client = openai.OpenAI(base_url=f"{stack.base}/v1", api_key=token, max_retries=0)
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(**CHAT)
    assert raised.value.code == "rate_limited"


def test_a_quota_is_the_teams_and_nobody_waits_for_tomorrow(stack):
    stack.admin("PUT", "/v1/teams/small", {"quotas": [{"requests": 3, "window": "day"}]})
    keys = [stack.new_key(team="small")[1] for _ in range(2)]
    assert [stack.chat(keys[n % 2], max_tokens=5)[0] for n in range(3)] == [200, 200, 200]
    status, headers, _ = stack.chat(keys[1], max_tokens=5)
    assert (status, headers["x-keyward-reason"], headers["x-should-retry"]) == (429, "quota_exhausted", "false")
    assert 0 < int(headers["retry-after"]) <= 86_400
    team = stack.admin("GET", "/v1/teams/small")
    assert {window["window"]: window["requests"] for window in team["windows"]} == {"day": 3, "month": 3, "total": 3}


def test_shadow_mode_shows_what_enforcement_would_do(stack):
    key_id, token = stack.new_key("0.000001", enforce="shadow", allow={"models": ["gpt-4o"]}, tags={"run": "trial"})
    assert [stack.chat(token, max_tokens=20)[0] for _ in range(3)] == [200, 200, 200]
    stack.settled(key_id)
    denied = stack.admin("GET", f"/v1/usage/would-deny?by=reason,key&key={key_id}")["data"]
    assert denied == [{"by": {"reason": "model_not_allowed", "key": key_id}, "requests": 3}]
    used = stack.admin("GET", f"/v1/usage?by=tag:run&key={key_id}")["data"]
    assert [(row["by"], row["requests"]) for row in used] == [({"tag:run": "trial"}, 3)]
    assert used[0]["spent_nanodollars"] == sum(entry["cost_nanodollars"] for entry in stack.calls_of(key_id))
    events = [entry["event"] for entry in stack.audit(key_id) if "req" in entry]
    assert events.count("WOULD_REFUSE") == events.count("ADMITTED") == 3
    stack.admin("PATCH", f"/v1/keys/{key_id}", {"enforce": "enforce"})
    assert stack.chat(token, max_tokens=20)[1]["x-keyward-reason"] == "model_not_allowed"


def test_a_policys_limits_are_live(stack):
    stack.admin("PUT", "/v1/policies/thrifty", {"budgets": [{"usd": "1.00", "window": "day"}]})
    _, token = stack.new_key("5.00", policy="thrifty")
    assert stack.chat(token, max_tokens=5)[0] == 200
    stack.admin("PUT", "/v1/policies/thrifty", {"budgets": [{"usd": "0.00", "window": "day"}]})
    status, headers, body = stack.chat(token, max_tokens=5)
    assert (status, headers["x-keyward-reason"]) == (429, "cap_exhausted") and "for the day" in json.loads(body)["error"]["message"]
    assert call(stack.base, "GET", "/v1/models", None, {"authorization": f"Bearer {token}"})[0] == 200, "what costs nothing goes on"
