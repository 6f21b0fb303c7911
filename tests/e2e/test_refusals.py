"""The promise: whatever is not admitted is refused with one code, in the caller's dialect, and nothing of it leaves.
The table is DESIGN section 7."""

import base64
import binascii
import contextlib
import http.client
import json
import random
import re
import signal
import socket
import string
import threading
import time

import h2.connection
import h2.events
import pytest
from harness import CREDENTIALS, NOT_STORED, Stack, as_asked, call, wait_for

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
OPENAI, ANTHROPIC = "openai", "anthropic"
DIALECTS = [OPENAI, ANTHROPIC]
PATHS = {OPENAI: "/v1/chat/completions", ANTHROPIC: "/v1/messages"}
MODELS = {OPENAI: "gpt-4o-mini", ANTHROPIC: "claude-haiku-4-5"}
# Typed in from DESIGN section 7.
STATUS = {
    "missing_key": 401, "unknown_key": 401, "revoked": 401, "expired": 401, "model_not_allowed": 403, "endpoint_not_allowed": 403,
    "unknown_provider": 404, "bad_request": 400, "unbounded_input": 400, "body_too_large": 413, "cap_exhausted": 429, "cap_reserved": 429,
    "pool_exhausted": 429, "provider_credential_rejected": 502, "policy_unavailable": 503,
}
# Anthropic's own names (docs: API errors).
ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                   413: "request_too_large", 429: "rate_limit_error", 502: "api_error", 503: "api_error"}
OPENAI_TYPES = {400: {"invalid_request_error"}, 401: {"invalid_request_error"}, 403: {"invalid_request_error"}, 404: {"invalid_request_error"},
                413: {"invalid_request_error"}, 429: {"insufficient_quota", "rate_limit_error"}, 502: {"server_error"}, 503: {"server_error"}}
RETRY_HELPS = {"cap_reserved", "pool_exhausted", "policy_unavailable"}


def body_of(dialect, content="Hello", **more):
    limit = {"max_tokens": 50} if dialect == ANTHROPIC else {}
    return {"model": MODELS[dialect], **limit, "messages": [{"role": "user", "content": content}], **more}


def ask(stack, dialect, token, body=None, headers=None, path=None, method="POST", timeout=30):
    """One request as the dialect's SDK would send it: status, headers, body."""
    auth = {} if token is None else {"authorization": f"Bearer {token}"} if dialect == OPENAI else {"x-api-key": token}
    version = {"anthropic-version": "2023-06-01"} if dialect == ANTHROPIC else {}
    body = body_of(dialect) if body is None and method == "POST" else body
    return call(stack.base, method, path or PATHS[dialect], body, {**auth, **version, "content-type": "application/json", **(headers or {})}, timeout)


def check(answer, dialect, code):
    """The answer says `code`, as section 7 has it, in the dialect of the endpoint."""
    status, headers, data = answer
    assert (headers.get("x-keyward-reason"), status) == (code, STATUS[code]), (status, headers, data)
    assert headers["content-type"] == "application/json"
    assert headers.get("x-should-retry") == (None if code in RETRY_HELPS else "false"), headers
    if code in RETRY_HELPS:
        assert int(headers["retry-after"]) >= 1
    else:
        assert "retry-after" not in headers
    document = json.loads(data)
    if dialect == OPENAI:
        assert set(document) == {"error"} and set(document["error"]) == {"message", "type", "param", "code"}
        assert document["error"]["code"] == code and document["error"]["type"] in OPENAI_TYPES[status]
    else:
        assert document["type"] == "error" and set(document["error"]) == {"type", "message"}
        assert document["error"]["type"] == ANTHROPIC_TYPES[status]
        assert document["request_id"] == headers.get("x-keyward-request-id")
    assert document["error"]["message"]
    assert not set(headers) & {"server-timing", "x-envoy-upstream-service-time", "set-cookie"}
    return document["error"]["message"]


def counted(stack, code):
    return sum(stack.stats(f"keyward_refused_by_reason.{code}.total").values())


def counts_up_to(stack, code, count):
    """The filter tells its counts every 50 ms."""
    wait_for(f"{count} refusals as {code}", lambda: counted(stack, code) == count, 5)


@contextlib.contextmanager
def refusing(stack, code, times=1):
    """Around refusals: nothing reached the provider, and Envoy counted each."""
    seq, before = stack.last_seq(), counted(stack, code)
    yield
    counts_up_to(stack, code, before + times)
    assert stack.last_seq() == seq, "something reached the provider"


def last_entry(stack, key_id):
    return stack.audit(key_id)[-1]


def check_recorded(stack, key_id, dialect, code, provider=None):
    """The key's chain, checked by its MACs, ends with this refusal: of the provider that the model leads to."""
    entry, provider = last_entry(stack, key_id), provider or dialect
    assert (entry["event"], entry["code"], entry["provider"], entry["endpoint"]) == ("REFUSED", code, provider, f"POST {PATHS[dialect]}"), entry
    assert stack.key(key_id)["reserved_nanodollars"] == stack.key(key_id)["in_flight"] == 0


def well_formed(seed):
    """A key in the exact form, CRC and all, that nobody issued."""
    secret = "".join(random.Random(seed).choices(BASE62, k=43))
    crc, digits = binascii.crc32(secret.encode()), ""
    for _ in range(6):
        crc, digit = divmod(crc, 62)
        digits = BASE62[digit] + digits
    return f"vk_{secret}{digits}"


# --- who asks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_key(stack, dialect):
    with refusing(stack, "missing_key"):
        check(ask(stack, dialect, None), dialect, "missing_key")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_malformed_and_unknown_keys_get_one_answer(stack, dialect):
    """Nobody learns from the answer whether a key has the right form: they differ in request id and date alone."""
    _, real = stack.new_key()
    wrong_crc = real[:-1] + ("0" if real[-1] != "0" else "1")
    wrong = ["vk_", "vk_x", "sk-proj-notavirtualkey", real[:-1], real + "0", wrong_crc, real.upper(), well_formed(1)]
    assert len(well_formed(1)) == len(real)
    with refusing(stack, "unknown_key", len(wrong)):
        answers = [ask(stack, dialect, token) for token in wrong]
    same = set()
    for answer in answers:
        check(answer, dialect, "unknown_key")
        status, headers, data = answer
        document = json.loads(data)
        document.pop("request_id", None)
        # `connection`: a key refused by its form is refused before the body was read, and HTTP/1.1 then has to close.
        headers = {name: value for name, value in headers.items() if name not in ("date", "x-keyward-request-id", "content-length", "connection")}
        same.add((status, json.dumps(headers, sort_keys=True), json.dumps(document, sort_keys=True)))
    assert len(same) == 1


@pytest.mark.parametrize("case", ["missing_key", "unknown_key", "bad_request", "unknown_provider", "revoked"])
def test_every_refusal_names_its_request(stack, case):
    """Section 7: each refusal carries x-keyward-request-id, so that a caller can tell which one to look into. It is also
    what would still tell a malformed key's answer from an unknown key's."""
    for dialect in DIALECTS:
        key_id, token = stack.new_key()
        if case == "revoked":
            stack.admin("DELETE", f"/v1/keys/{key_id}")
        # Counted before the next test looks at the counts.
        with refusing(stack, case):
            answer = {
                "missing_key": lambda d=dialect: ask(stack, d, None),
                "unknown_key": lambda d=dialect: ask(stack, d, "vk_x"),
                "bad_request": lambda d=dialect, t=token: ask(stack, d, t, b"{"),
                "unknown_provider": lambda d=dialect, t=token: ask(stack, d, t, path="/Nobody" + PATHS[d]),
                "revoked": lambda d=dialect, t=token: ask(stack, d, t),
            }[case]()
        assert answer[1]["x-keyward-reason"] == case
        assert re.fullmatch(r"req_[0-9a-f]{32}", answer[1].get("x-keyward-request-id", "")), answer[1]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_revoked_key(stack, dialect):
    key_id, token = stack.new_key("1.00")
    assert ask(stack, dialect, token)[0] == 200
    stack.settled(key_id)
    stack.admin("DELETE", f"/v1/keys/{key_id}")
    with refusing(stack, "revoked"):
        check(ask(stack, dialect, token), dialect, "revoked")
    check_recorded(stack, key_id, dialect, "revoked")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_expired_key(stack, dialect):
    key_id, token = stack.new_key("1.00", expires_in="1s")
    wait_for("the expiry", lambda: time.time() * 1000 > stack.key(key_id)["expires_ms"])
    with refusing(stack, "expired"):
        check(ask(stack, dialect, token), dialect, "expired")
    check_recorded(stack, key_id, dialect, "expired")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_two_different_keys(stack, dialect):
    """Which of the two would pay must not depend on who reads the headers."""
    _, one = stack.new_key()
    _, other = stack.new_key()
    pairs = [{"authorization": f"Bearer {one}", "x-api-key": other}, {"x-api-key": one, "api-key": other}, {"x-goog-api-key": other, "x-api-key": one}]
    with refusing(stack, "bad_request", len(pairs) + 1):
        for headers in pairs:
            check(ask(stack, dialect, None, headers=headers), dialect, "bad_request")
        check(ask(stack, dialect, one, path=f"{PATHS[dialect]}?key={other}"), dialect, "bad_request")
    with refusing(stack, "bad_request"):
        lines = [f"authorization: Bearer {other}", f"x-api-key: {other}", "connection: close", "content-length: 0"]
        check(raw(stack, head(dialect, one, *lines), []), dialect, "bad_request")
    assert ask(stack, dialect, one, headers={"api-key": one}, path=f"{PATHS[dialect]}?key={one}")[0] == 200


# --- what may be asked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_model_not_allowed(stack, dialect):
    key_id, token = stack.new_key("1.00", allow={"models": ["gpt-4o-m*", "claude-haiku-4-5"]})
    assert ask(stack, dialect, token)[0] == 200
    stack.settled(key_id)
    for other in ["gpt-4o", "claude-haiku-4-5-20251001", "GPT-4O-MINI", " gpt-4o-mini", "gpt-4o-\u043cini"]:
        with refusing(stack, "model_not_allowed"):
            check(ask(stack, dialect, token, {**body_of(dialect), "model": other}), dialect, "model_not_allowed")
        makers = {"gpt": "openai", "cla": "anthropic"}
        check_recorded(stack, key_id, dialect, "model_not_allowed", makers.get(other[:3]))
        assert last_entry(stack, key_id)["model"] == other


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("endpoints", [["GET /v1/models"], ["stripe:POST *"], ["POST /v1/chat"]])
def test_endpoint_not_allowed_by_the_key(stack, dialect, endpoints):
    key_id, token = stack.new_key("1.00", allow={"endpoints": endpoints})
    with refusing(stack, "endpoint_not_allowed"):
        check(ask(stack, dialect, token), dialect, "endpoint_not_allowed")
    check_recorded(stack, key_id, dialect, "endpoint_not_allowed")


@pytest.mark.parametrize(("dialect", "method", "path"), [
    (OPENAI, "POST", "/v1/files"), (OPENAI, "GET", "/v1/chat/completions"), (OPENAI, "POST", "/openai/v1/realtime"),
    (OPENAI, "POST", "/v1/chat/completions/"), (OPENAI, "DELETE", "/v1/models/gpt-4o"), (OPENAI, "POST", "/openai"),
    (OPENAI, "POST", "/v1/organization/admin_api_keys"),
    (ANTHROPIC, "POST", "/v1/messages/batches"), (ANTHROPIC, "POST", "/anthropic/v1/complete"), (ANTHROPIC, "PUT", "/v1/messages"),
])
def test_endpoints_outside_the_table(stack, dialect, method, path):
    _, token = stack.new_key()
    with refusing(stack, "endpoint_not_allowed"):
        check(ask(stack, dialect, token, body_of(dialect), path=path, method=method), dialect, "endpoint_not_allowed")


@pytest.mark.parametrize("path", ["/Nobody/v1/chat/completions", "/api.openai.com/v1/chat/completions", "/OpenAI/v1/chat/completions",
                                  "/edge/v1/admit", "/keyward_policy/edge/v1/admit", "/", "/v2/chat/completions"])
def test_unknown_provider(stack, path):
    """The host comes from the table alone: no path leads to the policy service, or anywhere else."""
    _, token = stack.new_key()
    with refusing(stack, "unknown_provider"):
        check(ask(stack, OPENAI, token, path=path), OPENAI, "unknown_provider")


def test_unknown_provider_in_anthropics_dialect(stack):
    _, token = stack.new_key()
    with refusing(stack, "unknown_provider"):
        check(ask(stack, ANTHROPIC, token, path="/Nobody/v1/messages"), ANTHROPIC, "unknown_provider")


@pytest.mark.parametrize("path", ["/v1/chat/../chat/completions", "//v1//chat/completions", "/openai/../v1/./chat/completions"])
def test_the_path_that_goes_on_is_the_tables(stack, path):
    """Dots and double slashes are read once, by Envoy; what the provider sees does not depend on them."""
    key_id, token = stack.new_key()
    assert ask(stack, OPENAI, token, path=path)[0] == 200
    stack.settled(key_id)
    assert [entry["path"] for entry in stack.calls_of(key_id)] == ["/v1/chat/completions"]


@pytest.mark.parametrize("path", ["/v1%2fchat%2fcompletions", "/openai%2fv1/chat/completions", "/v1/chat%2f..%2fchat/completions"])
def test_escaped_slashes_reach_nobody(stack, path):
    _, token = stack.new_key()
    seq = stack.last_seq()
    assert ask(stack, OPENAI, token, path=path)[0] in (400, 403, 404)
    assert stack.last_seq() == seq


# --- the body ----------------------------------------------------------------------------------------------------------

GOOD = '"messages":[{"role":"user","content":"Hi"}]'
BAD_BODIES = {
    "empty": b"",
    "not json": b"hello",
    "no object": b"[]",
    "a string": b'"x"',
    "truncated": b'{"model":"M",%s' % GOOD.encode(),
    "truncated in a string": b'{"model":"M","messages":"x',
    "trailing data": b'{"model":"M",%s}{}' % GOOD.encode(),
    "trailing garbage": b'{"model":"M",%s} x' % GOOD.encode(),
    "trailing NUL": b'{"model":"M",%s}\0' % GOOD.encode(),
    "trailing comma": b'{"model":"M",%s,}' % GOOD.encode(),
    "comment": b'{"model":"M",/* */%s}' % GOOD.encode(),
    "single quotes": b"{'model':'M',%s}" % GOOD.encode(),
    "NaN": b'{"model":"M",%s,"temperature":NaN}' % GOOD.encode(),
    "leading zero": b'{"model":"M",%s,"max_tokens":010}' % GOOD.encode(),
    "BOM": b'\xef\xbb\xbf{"model":"M",%s}' % GOOD.encode(),
    "UTF-16": ('{"model":"M",%s}' % GOOD).encode("utf-16"),
    "invalid UTF-8": b'{"model":"M","messages":[{"role":"user","content":"\xff"}]}',
    "overlong UTF-8": b'{"model":"M","messages":[{"role":"user","content":"\xc0\xaf"}]}',
    "surrogate in UTF-8": b'{"model":"M","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    "lone surrogate": b'{"model":"M","messages":[{"role":"user","content":"\\ud83e"}]}',
    "raw control character": b'{"model":"M","messages":[{"role":"user","content":"a\nb"}]}',
    "nested too deep": b'{"model":"M",%s,"metadata":%s%s}' % (GOOD.encode(), b"[" * 5000, b"]" * 5000),
    "no model": b"{%s}" % GOOD.encode(),
    "empty model": b'{"model":"",%s}' % GOOD.encode(),
    "null model": b'{"model":null,%s}' % GOOD.encode(),
    "model is a number": b'{"model":4,%s}' % GOOD.encode(),
    "model is an object": b'{"model":{},%s}' % GOOD.encode(),
    "model too long": b'{"model":"%s",%s}' % (b"m" * 5000, GOOD.encode()),
    **{f"{name}: {value}": f'{{"model":"M",{GOOD},"{name}":{value}}}'.encode() for name, value in [
        ("stream", '"true"'), ("stream", "1"), ("stream", "[]"), ("max_tokens", '"9"'), ("max_tokens", "-1"), ("max_tokens", "1.5"),
        ("max_tokens", "1e3"), ("max_tokens", "99999999999999999999999"), ("max_tokens", "{}"), ("max_completion_tokens", "true"),
        ("n", '"2"'), ("n", "-1"), ("n", "[2]"), ("stream_options", '"x"'), ("stream_options", '{"include_usage":1}'),
        ("stream_options", '{"include_usage":false,"include_usage":true}'), ("stream_options", '{"Include_Usage":false}')]},
    **{f"duplicate {name}": f'{{"model":"M",{GOOD},"{name}":{one},"{name}":{two}}}'.encode() for name, one, two in [
        ("model", '"M"', '"o1-pro"'), ("messages", "[]", "[]"), ("stream", "false", "true"), ("max_tokens", "1", "100000"),
        ("max_completion_tokens", "1", "2"), ("n", "1", "128"), ("tools", "[]", "[]"), ("stream_options", "null", "null")]},
    **{f"variant {name}": f'{{"model":"M",{GOOD},"{name}":{value}}}'.encode() for name, value in [
        ("Model", '"o1-pro"'), ("MODEL", '"o1-pro"'), ("Max_Tokens", "9"), ("N", "9"), ("Stream", "true"), ("\u017ftream", "true"),
        ("Tools", "[]"), ("max_to\u212aens", "9")]},
    **{f"escaped duplicate {number}": f'{{"model":"M",{GOOD},{member}}}'.encode() for number, member in enumerate([
        '"\\u006dodel":"o1-pro"', '"mod\\u0065l":"o1-pro"', '"max_tokens":1,"max\\u005ftokens":9', '"n":1,"\\u006E":9', '"\\u004dodel":"x"'])},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_bad_bodies(stack, dialect):
    """What two readers could read differently is turned away before anybody is asked: no callout, nothing forwarded."""
    _, token = stack.new_key("1.00")
    wrong = []
    callouts, seq = stack.callouts(), stack.last_seq()
    before = counted(stack, "bad_request")
    for name, body in BAD_BODIES.items():
        answer = ask(stack, dialect, token, body.replace(b'"M"', f'"{MODELS[dialect]}"'.encode()))
        try:
            check(answer, dialect, "bad_request")
        except (AssertionError, ValueError) as error:
            wrong.append((name, str(error).splitlines()[0]))
    assert not wrong, wrong
    assert stack.last_seq() == seq
    counts_up_to(stack, "bad_request", before + len(BAD_BODIES))
    # The rest of the interval's settlements may still be reported: an admission for each body would be far more.
    assert stack.callouts() - callouts < len(BAD_BODIES) / 2


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "identity, gzip", "x-unknown"])
def test_encoded_request_bodies(stack, dialect, coding):
    _, token = stack.new_key()
    with refusing(stack, "bad_request"):
        check(ask(stack, dialect, token, headers={"content-encoding": coding}), dialect, "bad_request")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_body_where_none_belongs(stack, dialect):
    _, token = stack.new_key()
    with refusing(stack, "bad_request"):
        check(ask(stack, dialect, token, b"{}", path="/v1/models", method="GET"), dialect, "bad_request")


def test_what_looks_odd_but_is_one_document_passes(stack):
    """Strictness has to stop somewhere: keys inside messages and schemas are the caller's own, and an escape alone is no crime."""
    _, token = stack.new_key("1.00")
    good = [
        b' \t\r\n{"model":"gpt-4o-mini",%s} \r\n' % GOOD.encode(),
        b'{"mod\\u0065l":"gpt-4o-mini",%s}' % GOOD.encode(),
        b'{"model":"gpt-4o\\u002dmini",%s}' % GOOD.encode(),
        b'{"model":"gpt-4o-mini",%s,"metadata":{"Model":"x","model":"y","n":"1"}}' % GOOD.encode(),
        b'{"model":"gpt-4o-mini",%s,"stream":null,"n":null,"max_tokens":null,"stream_options":null}' % GOOD.encode(),
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"\\ud83e\\udd80 {\\"model\\":\\"x\\"}"}]}',
    ]
    for body in good:
        assert ask(stack, OPENAI, token, body)[0] == 200, body


def raw(stack, head, pieces):
    """Sends a head and then pieces, whatever the server thinks of it: status, headers, body."""
    with socket.create_connection(("127.0.0.1", stack.listen_port), timeout=30) as connection:
        def send():
            with contextlib.suppress(OSError):
                connection.sendall(head)
                for piece in pieces:
                    connection.sendall(piece)
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        response = http.client.HTTPResponse(connection, method="POST")
        response.begin()
        answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        sender.join(10)
        return answer


def head(dialect, token, *lines):
    auth = f"authorization: Bearer {token}" if dialect == OPENAI else f"x-api-key: {token}"
    return "\r\n".join([f"POST {PATHS[dialect]} HTTP/1.1", "host: keyward", auth, "content-type: application/json", *lines, "", ""]).encode()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_body_too_large_as_announced(stack, dialect):
    """Refused on its announcement: no byte of it has to be sent."""
    _, token = stack.new_key()
    with refusing(stack, "body_too_large"):
        check(raw(stack, head(dialect, token, f"content-length: {10 * 1024 * 1024 + 1}"), []), dialect, "body_too_large")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_body_too_large_without_announcement(stack, dialect):
    _, token = stack.new_key()
    start = b'{"model":"%s","messages":[{"role":"user","content":"' % MODELS[dialect].encode()
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    pieces = [b"%x\r\n%s\r\n" % (len(start), start), *[chunk] * 176]
    with refusing(stack, "body_too_large"):
        check(raw(stack, head(dialect, token, "transfer-encoding: chunked"), pieces), dialect, "body_too_large")


@pytest.mark.parametrize("more", [0, 1])
def test_the_limit_on_bodies_is_exact(stack, more):
    key_id, token = stack.new_key("1.00")
    body = json.dumps(body_of(OPENAI)).encode()
    body += b" " * (10 * 1024 * 1024 + more - len(body))
    status, headers, data = raw(stack, head(OPENAI, token, f"content-length: {len(body)}", "connection: close"), [body])
    assert (status, headers.get("x-keyward-reason")) == ((413, "body_too_large") if more else (200, None)), data
    true, charged, ends = stack.books(key_id)
    assert true == charged and len(ends) == 1 - more


def test_a_caller_that_waits_for_100_continue_gets_it(stack):
    """curl does, before larger bodies."""
    key_id, token = stack.new_key("1.00")
    body = json.dumps(body_of(OPENAI)).encode()
    with socket.create_connection(("127.0.0.1", stack.listen_port), timeout=20) as connection:
        connection.sendall(head(OPENAI, token, f"content-length: {len(body)}", "expect: 100-continue"))
        assert b" 100 " in connection.recv(4096)
        connection.sendall(body)
        response = http.client.HTTPResponse(connection, method="POST")
        response.begin()
        assert response.status == 200, response.read()
    true, charged, _ = stack.books(key_id)
    assert true == charged > 0


def test_a_large_body_below_the_limit_passes_whole(stack):
    key_id, token = stack.new_key()
    content = "é" * 2_000_000
    body = json.dumps(body_of(OPENAI, content + "[[sim tokens=1]]", model="gpt-4.1-mini", stream=True), ensure_ascii=False).encode()
    status, _, data = ask(stack, OPENAI, token, body)
    # Too long for the model: the provider's answer, which proves that all of it arrived.
    assert status in (200, 400), data
    entry = stack.calls_of(key_id)[0]
    assert entry["body_bytes"] == len(body) + len(NOT_STORED + b'"stream_options":{"include_usage":true},')


@pytest.mark.parametrize("stream", [False, True])
def test_a_chunked_body_in_single_bytes_passes_whole(stack, stream):
    """Without an announced length, in the smallest pieces, and with something written into it."""
    key_id, token = stack.new_key("1.00")
    body = json.dumps(body_of(OPENAI, "Grüße 🦀", stream=stream), ensure_ascii=False).encode()
    pieces = [*(b"1\r\n%c\r\n" % byte for byte in body), b"0\r\n\r\n"]
    status, _, data = raw(stack, head(OPENAI, token, "transfer-encoding: chunked", "connection: close"), pieces)
    assert status == 200, data
    true, charged, _ = stack.books(key_id)
    sent = stack.sim.body(stack.calls_of(key_id)[0]["seq"])
    assert as_asked(sent).replace(b'"stream_options":{"include_usage":true},', b"").replace(b'"max_completion_tokens":16384,', b"") == body and true == charged > 0


class Http2:
    """One request over HTTP/2, frame by frame."""

    def __init__(self, stack):
        self.socket = socket.create_connection(("127.0.0.1", stack.listen_port), timeout=20)
        self.h2 = h2.connection.H2Connection()
        self.h2.initiate_connection()

    def send(self, headers, pieces, trailers=None):
        self.h2.send_headers(1, headers)
        for number, piece in enumerate(pieces):
            self.h2.send_data(1, piece, end_stream=trailers is None and number == len(pieces) - 1)
        if trailers is not None:
            self.h2.send_headers(1, trailers, end_stream=True)
        self.socket.sendall(self.h2.data_to_send())

    def answer(self):
        headers, data = {}, b""
        with self.socket:
            while True:
                received = self.socket.recv(65536)
                assert received, "closed without an answer"
                for event in self.h2.receive_data(received):
                    if isinstance(event, h2.events.ResponseReceived):
                        text = lambda value: value if isinstance(value, str) else value.decode()  # noqa: E731
                        headers = {text(name): text(value) for name, value in event.headers}
                    elif isinstance(event, h2.events.DataReceived):
                        data += event.data
                    elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)):
                        return int(headers.pop(":status", 0)), headers, data
                self.socket.sendall(self.h2.data_to_send())


@pytest.mark.parametrize("stream", [False, True], ids=["untouched", "written into"])
@pytest.mark.parametrize("trailers", [None, [("x-checksum", "abc")]], ids=["plain", "trailers"])
def test_a_body_that_ends_in_trailers_is_read_like_any_other(stack, trailers, stream):
    """Trailers end the body: nothing waits for ever, nothing goes on unread."""
    key_id, token = stack.new_key("1.00")
    body = json.dumps(body_of(OPENAI, stream=stream)).encode()
    request = [(":method", "POST"), (":scheme", "http"), (":authority", "keyward"), (":path", PATHS[OPENAI]), ("authorization", f"Bearer {token}"),
               ("content-type", "application/json")]
    client = Http2(stack)
    client.send(request, [body[:7], body[7:]], trailers)
    status, _, data = client.answer()
    assert status == 200, data
    true, charged, _ = stack.books(key_id)
    sent = stack.sim.body(stack.calls_of(key_id)[0]["seq"])
    assert as_asked(sent).replace(b'"stream_options":{"include_usage":true},', b"").replace(b'"max_completion_tokens":16384,', b"") == body and true == charged > 0


@pytest.mark.parametrize("piece", [b'{"model":', b'{"model":"gpt-4o-mini"} x', b'{"model":"gpt-4o-mini","model":"o3"}'])
def test_a_bad_body_that_ends_in_trailers_is_refused(stack, piece):
    _, token = stack.new_key("1.00")
    request = [(":method", "POST"), (":scheme", "http"), (":authority", "keyward"), (":path", PATHS[OPENAI]), ("authorization", f"Bearer {token}")]
    with refusing(stack, "bad_request"):
        client = Http2(stack)
        client.send(request, [piece], [("x-checksum", "abc")])
        check(client.answer(), OPENAI, "bad_request")


# --- money -------------------------------------------------------------------------------------------------------------

UNBOUNDED = {
    OPENAI: [
        {"web_search_options": {}}, {"audio": {"voice": "alloy", "format": "mp3"}}, {"modalities": ["text", "audio"]}, {"background": True},
        {"models": ["o1-pro"]}, {"plugins": [{"id": "web"}]}, {"prompt": {"id": "pmpt_1"}}, {"service_tier": "priority"}, {"service_tier": 5},
        {"tools": [{"type": "web_search"}]}, {"tools": [{"type": "code_interpreter"}]}, {"tools": [{"type": "mcp"}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
        {"messages": [{"role": "assistant", "audio": {"id": "a"}}, {"role": "user", "content": "x"}]},
        {"model": "no-such-model-has-a-price"},
    ],
    ANTHROPIC: [
        {"mcp_servers": [{"type": "url"}]}, {"container": "c"}, {"speed": "fast"}, {"inference_geo": "us"}, {"service_tier": "priority"},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, {"tools": [{"type": "code_execution_20250825", "name": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "u"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "f"}]}]},
        {"model": "no-such-model-has-a-price"},
    ],
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_has_no_bound_is_refused_on_a_key_with_a_budget(stack, dialect):
    key_id, token = stack.new_key("100.00")
    wrong = []
    with refusing(stack, "unbounded_input", len(UNBOUNDED[dialect])):
        for more in UNBOUNDED[dialect]:
            answer = ask(stack, dialect, token, {**body_of(dialect), **more})
            try:
                check(answer, dialect, "unbounded_input")
                check_recorded(stack, key_id, dialect, "unbounded_input")
            except AssertionError as error:
                wrong.append((more, str(error).splitlines()[0]))
        assert not wrong, wrong


@pytest.mark.parametrize("name", ["web_search_options", "audio", "modalities", "prompt"])
def test_an_explicit_null_asks_for_nothing(stack, name):
    """The gate's own rule: unbounded is what is present and not null. SDKs send null for what a program left at None."""
    _, token = stack.new_key("1.00")
    answer = ask(stack, OPENAI, token, {**body_of(OPENAI), name: None})
    assert answer[1].get("x-keyward-reason") is None, answer


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("budget", ["0.00", "0.000001"])
def test_cap_exhausted(stack, dialect, budget):
    key_id, token = stack.new_key(budget)
    with refusing(stack, "cap_exhausted"):
        check(ask(stack, dialect, token), dialect, "cap_exhausted")
    check_recorded(stack, key_id, dialect, "cap_exhausted")


@pytest.mark.parametrize("numbers", [{"n": 2**64 - 1}, {"n": 2**63, "max_tokens": 2**63}, {"n": 2**32, "best_of": 2**32}], ids=str)
def test_numbers_beyond_all_money_are_refused_and_break_nothing(stack, numbers):
    _, token = stack.new_key("1000000.00")
    with refusing(stack, "bad_request"):
        check(ask(stack, OPENAI, token, {**body_of(OPENAI), **numbers}), OPENAI, "bad_request")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_cap_reserved_then_free_again(stack, dialect):
    """What is held is not spent: refused for now, with a time to come back, and admitted when the money is free again."""
    key_id, token = stack.new_key("0.001")
    holder = []
    body = body_of(dialect, "[[sim tokens=2 first_ms=3000]]")
    body["max_tokens"] = 16_000
    seq = stack.last_seq()
    thread = threading.Thread(target=lambda: holder.append(ask(stack, dialect, token, body)))
    thread.start()
    wait_for("the first request under way", lambda: stack.sim.ledger(seq))
    before = counted(stack, "cap_reserved")
    check(ask(stack, dialect, token), dialect, "cap_reserved")
    entry = last_entry(stack, key_id)
    assert (entry["event"], entry["code"]) == ("REFUSED", "cap_reserved")
    assert stack.key(key_id)["in_flight"] == 1
    thread.join()
    counts_up_to(stack, "cap_reserved", before + 1)
    assert holder[0][0] == 200
    true, charged, _ = stack.books(key_id)
    assert true == charged
    assert ask(stack, dialect, token)[0] == 200


# --- what carries the key, and what never goes on ------------------------------------------------------------------------


def schemes(token):
    basic = lambda text: "Basic " + base64.b64encode(text.encode()).decode()  # noqa: E731
    return {
        "bearer": ({"authorization": f"Bearer {token}"}, ""), "bearer, lower case": ({"authorization": f"bearer {token}"}, ""),
        "bare": ({"authorization": token}, ""),
        "basic user": ({"authorization": basic(f"{token}:")}, ""), "basic user and password": ({"authorization": basic(f"{token}:x")}, ""),
        "basic password": ({"authorization": basic(f"api:{token}")}, ""),
        "x-api-key": ({"x-api-key": token}, ""), "api-key": ({"api-key": token}, ""), "x-goog-api-key": ({"x-goog-api-key": token}, ""),
        "query": ({}, f"?key={token}"), "query among others": ({}, f"?alt=sse&key={token}&beta=true"),
        "dummy beside it": ({"authorization": "Bearer dummy", "x-api-key": token}, ""),
    }


FORBIDDEN = {
    "proxy-authorization": "Basic eDp5", "x-shopify-access-token": "shpat", "x-postmark-server-token": "pm", "x-postmark-account-token": "pm",
    "cookie": "session=1", "openai-organization": "org-other", "openai-project": "proj-other", "x-goog-user-project": "p",
    "stripe-account": "acct_1", "stripe-context": "c", "x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-retry-on": "5xx",
    "x-envoy-original-path": "/x", "x-envoy-max-retries": "9", "x-keyward-reason": "x", "x-keyward-flight": "x", "X-Keyward-Key": "x",
    "x-forwarded-for": "10.0.0.1", "x-forwarded-host": "evil", "forwarded": "for=10.0.0.1", "via": "1.1 agent", "x-real-ip": "10.0.0.1",
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_scheme_carries_the_key_and_none_goes_on(stack, dialect):
    """Only the stored credential authenticates at the provider, only the caller's harmless headers pass."""
    key_id, token = stack.new_key("1.00")
    violations = stack.sim.totals()["violation_count"]
    own = {OPENAI: ("authorization", "Bearer <credential:openai-1>"), ANTHROPIC: ("x-api-key", "<credential:anthropic-1>")}
    hosts = {OPENAI: "api.openai.com", ANTHROPIC: "api.anthropic.com"}
    for name, (headers, query) in schemes(token).items():
        seq = stack.last_seq()
        headers = {**FORBIDDEN, "x-own": "stays", "accept-encoding": "gzip, br", **headers}
        answer = ask(stack, dialect, None, headers=headers, path=PATHS[dialect] + query)
        assert answer[0] == 200, (name, answer)
        entry = stack.sim.ledger(seq)[0]
        assert entry["path"] == PATHS[dialect]
        got = [(header, value) for header, value in stack.sim.headers(entry["seq"])]
        names = [n.lower() for n, _ in got]
        assert not {n.lower() for n in FORBIDDEN} & set(names), (name, names)
        assert not [n for n in names if n.startswith(("x-envoy-", "x-keyward-"))], names
        auth = [(n, v) for n, v in got if n in ("authorization", "x-api-key", "api-key", "x-goog-api-key")]
        assert auth == [own[dialect]], (name, auth)
        values = dict(got)
        assert values["x-own"] == "stays" and values["accept-encoding"] == "identity"
        assert values.get("host", values.get(":authority")) == hosts[dialect]
        assert token not in json.dumps(got)
    totals = stack.sim.totals()
    assert totals["violation_count"] == violations, totals["violations"][-3:]
    true, charged, ends = stack.books(key_id)
    assert true == charged and len(ends) == len(schemes(token))


def test_the_ids_in_answer_chain_and_ledger_are_one(stack):
    key_id, token = stack.new_key("1.00")
    _, headers, _ = ask(stack, OPENAI, token, headers={"x-keyward-request-id": "req_forged", "x-client-request-id": "mine"})
    entry = next(e for e in stack.audit(key_id) if e["event"] == "ADMITTED")
    assert headers["x-keyward-request-id"] == "req_" + entry["req"]
    assert [c["client_request_id"] for c in stack.calls_of(key_id)] == ["req_" + entry["req"]]


# --- what breaks (a system of its own) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_provider_credential_rejected(fresh, dialect):
    """A 401 of the provider is ours to answer for: 502, never a 401, and no piece of the secret in it."""
    credential = CREDENTIALS[DIALECTS.index(dialect)]
    key_id, token = fresh.new_key("1.00")
    fresh.sim.request("PATCH", f"/control/credentials/{credential['id']}", {"state": "invalid"})
    try:
        before = counted(fresh, "provider_credential_rejected")
        for stream in (False, True):
            answer = ask(fresh, dialect, token, body_of(dialect, stream=stream))
            check(answer, dialect, "provider_credential_rejected")
            said = json.dumps(answer[1]) + answer[2].decode()
            secret = credential["secret"]
            pieces = {secret[i:i + 5] for i in range(len(secret) - 4)}
            assert not [piece for piece in pieces if piece in said] and "***" not in said, said
        counts_up_to(fresh, "provider_credential_rejected", before + 2)
    finally:
        fresh.sim.request("PATCH", f"/control/credentials/{credential['id']}", {"state": "ok"})
    true, charged, ends = fresh.books(key_id)
    # The second one was not even sent: the credential is out until an operator acts. Who refused it, the gate or the service, depends on
    # whether the service had been told by then.
    assert true == charged == 0 and sorted(end["status"] for end in ends) in ([0, 401], [401])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_pool_exhausted_without_a_credential(fresh, dialect):
    key_id, token = fresh.new_key("1.00")
    stored = next(c for c in fresh.admin("GET", "/v1/credentials")["data"] if c["provider"] == dialect)
    fresh.admin("DELETE", f"/v1/credentials/{stored['id']}")
    try:
        with refusing(fresh, "pool_exhausted"):
            check(ask(fresh, dialect, token), dialect, "pool_exhausted")
        check_recorded(fresh, key_id, dialect, "pool_exhausted")
    finally:
        secret = CREDENTIALS[DIALECTS.index(dialect)]["secret"]
        fresh.admin("POST", "/v1/credentials", {"provider": dialect, "label": "again", "secret": secret})
    assert ask(fresh, dialect, token)[0] == 200


@pytest.mark.parametrize("dialect", DIALECTS)
def test_policy_service_killed(fresh, dialect):
    """Down means closed: 503 at once, nothing forwarded; the chain goes on after the restart and holds no ghost."""
    key_id, token = fresh.new_key("1.00")
    assert ask(fresh, dialect, token)[0] == 200
    fresh.settled(key_id)
    fresh.service.kill()
    try:
        with refusing(fresh, "policy_unavailable", 3):
            for _ in range(3):
                started = time.monotonic()
                check(ask(fresh, dialect, token), dialect, "policy_unavailable")
                assert time.monotonic() - started < 5
    finally:
        fresh.start_service()
    wait_for("serving again", lambda: ask(fresh, dialect, token)[0] == 200)
    true, charged, _ = fresh.books(key_id)
    assert true == charged > 0


@pytest.mark.parametrize("dialect", DIALECTS)
def test_policy_service_stopped(fresh, dialect):
    """A service that hangs is as good as none: 503 within about a second. What it admits too late is void and costs nothing."""
    key_id, token = fresh.new_key("1.00")
    fresh.service.process.send_signal(signal.SIGSTOP)
    try:
        with refusing(fresh, "policy_unavailable", 2):
            for _ in range(2):
                started = time.monotonic()
                check(ask(fresh, dialect, token), dialect, "policy_unavailable")
                assert time.monotonic() - started < 5
    finally:
        fresh.service.process.send_signal(signal.SIGCONT)
    wait_for("serving again", lambda: ask(fresh, dialect, token)[0] == 200)
    # The voids are on their way for a moment longer.
    wait_for("no ghost", lambda: {e["event"] for e in fresh.audit(key_id)[1:]} <= {"ADMITTED", "SETTLED", "VOIDED", "REFUSED"}
             and fresh.key(key_id)["in_flight"] == 0)
    true, charged, ends = fresh.books(key_id)
    assert true == charged > 0 and [end["event"] for end in ends].count("SETTLED") == 1


def test_offline_refusals_are_reported(fresh):
    """Section 4.3: what the gate refuses without asking is counted and reported by interval, also when nothing else happens."""
    def reported():
        return sum(value for name, value in fresh.metrics().items()
                   if name.startswith("keyward_edge_refusals_total") and "missing_key" in name)
    # A settled request first: what was waiting has been reported with it.
    key_id, token = fresh.new_key()
    assert ask(fresh, OPENAI, token)[0] == 200
    fresh.settled(key_id)
    before = reported()
    for _ in range(8):
        ask(fresh, OPENAI, None)
    wait_for("the report of offline refusals", lambda: reported() >= before + 8, 40)


def test_offline_refusals_survive_an_outage_of_the_service(fresh):
    """A report that failed is sent again: counts are not lost with it."""
    def reported():
        return sum(value for name, value in fresh.metrics().items()
                   if name.startswith("keyward_edge_refusals_total") and "unknown_provider" in name)
    key_id, token = fresh.new_key()
    seq = fresh.last_seq()
    thread = threading.Thread(target=lambda: ask(fresh, OPENAI, token, body_of(OPENAI, "[[sim first_ms=1500]]")))
    thread.start()
    wait_for("a request under way", lambda: fresh.sim.ledger(seq))
    fresh.service.kill()
    try:
        for _ in range(8):
            ask(fresh, OPENAI, token, path="/Nobody/v1/chat/completions")
        thread.join()
        time.sleep(1)
    finally:
        fresh.start_service()
    fresh.settled(key_id)
    # Both workers get something to report with.
    for _ in range(8):
        ask(fresh, OPENAI, token)
    wait_for("the report of offline refusals", lambda: reported() >= 8, 40)


def test_an_unreachable_provider_costs_nothing():
    """No connection, no charge: and an error object that SDKs understand."""
    with Stack(concurrency=1) as stack:
        key_id, token = stack.new_key("1.00")
        stack.sim.kill()
        for dialect in DIALECTS:
            status, headers, data = ask(stack, dialect, token)
            assert (status, headers["x-keyward-reason"]) == (503, "provider_unreachable")
            error = json.loads(data)["error"]
            assert error["message"] and (error["code"] == "provider_unreachable" if dialect == OPENAI else error["type"]), error
        stack.settled(key_id)
        key, ends = stack.key(key_id), [e for e in stack.audit(key_id) if e["event"] in ("SETTLED", "VOIDED")]
        assert (key["spent_nanodollars"], key["reserved_nanodollars"], len(ends)) == (0, 0, 2)
