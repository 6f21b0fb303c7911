"""The promise: what a provider says of a key, every Envoy knows within a second and an operator sees; a key that it rejected is used
again only when an operator says so or gives it a new secret."""

import json
import subprocess
import time
from datetime import datetime, timezone

import pytest
from fleet import Fleet
from harness import KEYWARD_BIN, Stack, call, pool, wait_for

MODEL = "gpt-4o-mini"


@pytest.fixture
def start():
    """A system of one's own with a pool of so many keys."""
    stacks = []

    def begin(size, kind=Stack, concurrency=2, credentials=None, **options):
        stacks.append(kind(concurrency=concurrency, credentials=credentials or pool(size), **options))
        return stacks[-1].__enter__()

    yield begin
    for stack in stacks:
        stack.__exit__(None, None, None)


def shown(stack, name):
    """A credential as the API shows it, by the simulator's name."""
    return stack.admin("GET", f"/v1/credentials/{stack.credential_ids[name]}")


def asked(stack, since=0):
    """The credentials that the provider was asked with, in order."""
    return [call["credential"] for call in stack.sim.ledger(since)]


def organisation_alarms(stack):
    return [(entry["what"], json.loads(entry["detail"])) for entry in stack.audit("adm_org_default") if entry["event"] == "ALARM"]


def keyward(stack, *arguments):
    environment = {"KEYWARD_ADMIN": stack.admin_base, "KEYWARD_ADMIN_TOKEN": stack.admin_token, "PATH": ""}
    done = subprocess.run([KEYWARD_BIN, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def known(stack, key_id, name, state):
    """Waits until the service knows the state of a credential. A gate tells it before the records of the requests that met it: when
    those are there, so is the alarm."""
    wait_for("the service to know", lambda: shown(stack, name)["state"] == state, 10)
    stack.settled(key_id)


def reject_first(stack, key):
    """Has the provider reject one key of two, and waits until the service knows."""
    stack.sim.patch("openai-1", state="invalid")
    wait_for("its turn", lambda: stack.chat(key[1])[0] == 200 and "openai-1" in asked(stack))
    known(stack, key[0], "openai-1", "rejected")


def test_a_rejected_key_is_out_until_an_operator_has_it_used_again(start):
    stack = start(2)
    key_id, token = stack.new_key("1.00")
    reject_first(stack, (key_id, token))
    view = shown(stack, "openai-1")
    assert (view["until"], [state["remaining_ms"] for state in view["states"]]) == (None, [None])
    assert shown(stack, "openai-2")["state"] == "ok"

    # A person is told which, in the chain and in the metrics, and not what its secret is.
    (what, detail), = organisation_alarms(stack)
    own = stack.credential_ids["openai-1"]
    assert what == "credential_rejected" and detail["credentials"] == [{"id": own, "name": own}] and detail["provider"] == "openai"
    expected = {'keyward_alarms_total{what="credential_rejected"}': 1, 'keyward_credentials_unusable{provider="openai",state="rejected"}': 1,
                'keyward_tries_total{provider="openai",status="401"}': 1, "keyward_rotated_requests_total": 1}
    # Counts follow what is written down.
    wait_for("the metrics", lambda: {name: stack.metrics().get(name) for name in expected} == expected, 5)
    seen = json.dumps(organisation_alarms(stack)) + stack.service.log.read_text() + json.dumps(view)
    assert not any(secret in seen for secret in stack.secrets)

    # It is in no plan any more, also after a restart of the service.
    for restarts in (False, True):
        if restarts:
            stack.service.terminate()
            stack.start_service()
            assert shown(stack, "openai-1")["state"] == "rejected"
        since = stack.last_seq()
        for _ in range(6):
            wait_for("an answer", lambda: stack.chat(token)[0] == 200)
        assert set(asked(stack, since)) == {"openai-2"}
        last = [entry for entry in stack.audit(key_id) if entry["event"] == "ADMITTED"][-1]
        assert last["credentials"] == [{"id": stack.credential_ids["openai-2"]}]

    # An operator has repaired it at the provider, and says so.
    stack.sim.patch("openai-1", state="ok")
    table = keyward(stack, "credentials", "reset", own)
    assert own in table and " ok " in table
    since = stack.last_seq()
    wait_for("its next turn", lambda: stack.chat(token)[0] == 200 and "openai-1" in asked(stack, since), 5)
    assert shown(stack, "openai-1")["state"] == "ok"
    assert [entry["target"] for entry in stack.audit("adm_org_default") if entry.get("action") == "reset"] == [f"credentials/{own}"]


def test_with_every_key_rejected_the_provider_is_not_asked_and_a_new_secret_helps(start):
    stack = start(1)
    key_id, token = stack.new_key("1.00")
    stack.sim.patch("openai-1", state="invalid")
    assert stack.chat(token)[0] == 502
    known(stack, key_id, "openai-1", "rejected")
    since = stack.last_seq()
    status, headers, _ = stack.chat(token)
    assert (status, headers["x-keyward-reason"]) == (502, "provider_credential_rejected") and stack.last_seq() == since
    assert stack.audit(key_id)[-1]["event"] == "REFUSED" and stack.audit(key_id)[-1]["code"] == "provider_credential_rejected"
    secret = pool(2)[1]["secret"]
    stack.sim.put("/control/credentials", [{"id": "new", "provider": "openai", "secret": secret}])
    stack.admin("PATCH", f"/v1/credentials/{stack.credential_ids['openai-1']}", {"secret": secret})
    # Without being told it would know after 5 s, when its question for news is answered anyhow.
    wait_for("the Envoy to know", lambda: stack.chat(token)[0] == 200, 3)
    assert shown(stack, "openai-1")["state"] == "ok"


def test_another_envoy_hears_of_a_cooled_key_within_a_second(start):
    stack = start(2, kind=Fleet, concurrency=4)
    _, token = stack.new_key("1.00")

    def chat(port):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
        return call(f"http://127.0.0.1:{port}", "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {token}"})[0]

    for port in stack.ports:
        assert chat(port) == 200
    stack.sim.patch("openai-1", limited_for_ms=60_000)
    since = stack.last_seq()
    wait_for("its turn at the first Envoy", lambda: chat(stack.ports[0]) == 200 and "openai-1" in asked(stack, since))
    time.sleep(2.0)
    view = shown(stack, "openai-1")
    assert (view["state"], view["states"][0]["model"]) == ("rate_limited", MODEL)
    assert 50_000 < view["states"][0]["remaining_ms"] <= 60_000
    left = (datetime.fromisoformat(view["until"]) - datetime.now(timezone.utc)).total_seconds()
    assert 45 < left <= 61
    since = stack.last_seq()
    for port in (stack.ports[1], stack.ports[0]):
        for _ in range(24):
            assert chat(port) == 200
    assert set(asked(stack, since)) == {"openai-2"}
    # Nor does one that starts now have to find out by itself.
    stack.second.kill()
    stack.second.spawn(stack.second.command)
    wait_for("the second Envoy", lambda: call(f"http://127.0.0.1:{stack.second_admin_port}", "GET", "/ready")[0] == 200)
    wait_for("it to serve", lambda: chat(stack.ports[1]) == 200)
    time.sleep(2.0)
    since = stack.last_seq()
    for _ in range(12):
        assert chat(stack.ports[1]) == 200
    assert set(asked(stack, since)) == {"openai-2"}
    # Back again: both hear of that as well.
    stack.sim.patch("openai-1", limited_for_ms=0)
    keyward(stack, "credentials", "reset", stack.credential_ids["openai-1"])
    for port in stack.ports:
        since = stack.last_seq()
        wait_for("its turn", lambda: chat(port) == 200 and "openai-1" in asked(stack, since), 5)


def test_keys_of_one_account_are_limited_together(start):
    """What one of them is told holds for the other: it is not asked."""
    keys = [{**key, "account": "acme"} for key in pool(2)] + [pool(3)[2]]
    stack = start(3, credentials=keys)
    _, token = stack.new_key("1.00")
    for name in ("openai-1", "openai-2"):
        stack.sim.fault("status=429 retry_after=60", count=100, credential=name)
    wait_for("their turn", lambda: stack.chat(token)[0] == 200 and {"openai-1", "openai-2"} & set(asked(stack)))
    for _ in range(8):
        assert stack.chat(token)[0] == 200
    assert len([one for one in asked(stack) if one != "openai-3"]) == 1
    wait_for("the service to know", lambda: shown(stack, "openai-1")["state"] == "rate_limited", 5)
    assert shown(stack, "openai-2")["state"] == "rate_limited" and shown(stack, "openai-3")["state"] == "ok"


def test_an_exhausted_key_raises_an_alarm(start):
    stack = start(2)
    key_id, token = stack.new_key("1.00")
    stack.sim.patch("openai-1", state="insufficient_quota")
    wait_for("its turn", lambda: stack.chat(token)[0] == 200 and "openai-1" in asked(stack))
    known(stack, key_id, "openai-1", "exhausted")
    assert [what for what, _ in organisation_alarms(stack)] == ["credential_exhausted"]
    assert 0 < shown(stack, "openai-1")["states"][0]["remaining_ms"]


def test_the_list_shows_what_is_left(start):
    stack = start(2, credentials=pool(2, rpm=50))
    _, token = stack.new_key("1.00")
    for _ in range(6):
        assert stack.chat(token)[0] == 200
    used = {name: asked(stack).count(name) for name in stack.credential_ids}
    assert all(used.values()), "both had their turn"

    def rooms():
        listed = {one["id"]: one for one in stack.admin("GET", "/v1/credentials")["data"]}
        return {name: [room for room in listed[own]["headroom"] if room["model"] == MODEL] for name, own in stack.credential_ids.items()}

    # The figures are told once a second.
    expected = {name: 50 - count for name, count in used.items()}
    wait_for("the last figures", lambda: {name: room[0]["requests"]["remaining"] for name, room in rooms().items() if room} == expected, 5)
    assert all(room[0]["requests"]["limit"] == 50 for room in rooms().values())
    table = keyward(stack, "credentials", "list")
    assert all(f"{MODEL}: {left}/50 requests" in table for left in expected.values()), table
    assert "STATE" in table and "UNTIL" in table and "LEFT" in table


def test_a_key_stays_with_its_credential_where_the_pool_says_so(start):
    stack = start(4)
    names = list(stack.credential_ids.values())
    stack.admin("PUT", "/v1/pools/sticky", {"provider": "openai", "credentials": names, "affinity": "key"})
    stack.admin("PUT", "/v1/policies/sticky", {"pools": {"openai": "sticky"}})
    first = set()
    for _ in range(6):
        _, token = stack.new_key("1.00", policy="sticky")
        since = stack.last_seq()
        for _ in range(6):
            assert stack.chat(token)[0] == 200
        used = set(asked(stack, since))
        assert len(used) == 1, "one credential, whatever the others have left"
        first |= used
    assert len(first) > 1, "keys spread over the pool"


def test_a_request_waits_for_a_key_as_long_as_its_policy_says(start):
    stack = start(1)
    stack.admin("PUT", "/v1/policies/patient", {"wait_ms": 5_000})
    (_, hasty), (_, patient) = stack.new_key("1.00"), stack.new_key("1.00", policy="patient")
    stack.sim.patch("openai-1", limited_for_ms=1_500)
    status, headers, _ = stack.chat(hasty)
    assert (status, headers["x-keyward-reason"]) == (429, "pool_exhausted")
    assert stack.chat(patient)[0] == 200
    # A body that comes in many parts waits as well, and none of it leaves with the caller's own headers.
    stack.sim.patch("openai-1", limited_for_ms=1_500)
    assert stack.chat(hasty)[0] == 429
    status, headers, _ = stack.chat(patient, "Hello " * 50_000, max_tokens=10)
    assert status == 200, headers
    assert [one for one in stack.sim.ledger() if one["credential"] != "openai-1"] == []
