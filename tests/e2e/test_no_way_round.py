"""No way round: whatever comes in, the provider sees only what was admitted before, with nothing in it that opens anything
but the one credential; and no input traps the VM, hangs a connection or moves its framing.

After every test `door` proves it with the provider's own books."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import struct
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import wire
from harness import CREDENTIALS, NOT_STORED, Stack, as_asked, call, free_port, wait_for
from wire import Closed, Http1, Http2, chunked, request

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TERMINAL = {"SETTLED", "VOIDED", "EXPIRED"}
CHAT = "/v1/chat/completions"
# A request that must never arrive has this model; all others have another.
SMUGGLED = "gpt-4o"


class Door(Stack):
    """A stack that remembers its keys and what was wrong already."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        # excused: a test has asserted the simulator's violations itself.
        self.keys, self.excused = [], False

    def new_key(self, *args, **spec):
        made = super().new_key(*args, **spec)
        self.keys.append(made[0])
        return made

    def violations(self):
        return self.sim.totals()["violations"]

    def traps(self):
        """Lines of Envoy's log that tell of a VM that died, and reloads."""
        lines = [line for line in self.envoy.log.read_text(errors="replace").splitlines()
                 if re.search(r"Function: proxy_|Uncaught|unreachable|memory allocation|Proxy-Wasm|wasm_fail|VM failed", line)]
        return lines, sum(self.stats("vm_reload").values())

    def no_settlements_pending(self):
        wait_for("an empty outbox", lambda: self.stats("keyward_settlements_pending").get("wasmcustom.keyward_settlements_pending", 0) == 0, 30)

    def works(self, token):
        status, _, body = self.chat(token)
        assert status == 200, body
        return True


@pytest.fixture(scope="module")
def shared_door():
    with Door(concurrency=2) as door:
        door.key_id, door.token = door.new_key(label="the good one")
        yield door


@pytest.fixture
def door(shared_door):
    before, trapped = len(shared_door.violations()), shared_door.traps()
    yield shared_door
    proven(shared_door, len(shared_door.violations()) if shared_door.excused else before)
    shared_door.excused = False
    assert shared_door.traps() == trapped, "a VM was trapped"
    assert shared_door.works(shared_door.token)


def proven(door, violations_before=0):
    """The promise itself."""
    door.sim.quiet()
    assert door.unadmitted(door.keys) == []
    assert door.violations()[violations_before:] == []


def good(content="Hello", **more):
    return json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}], **more}).encode()


def smuggled(token):
    """A whole, admissible request: to be placed where only a desynchronised reader would find it."""
    return request(headers=bearer(token), body=good("SMUGGLED", model=SMUGGLED))


def bearer(token):
    return [("authorization", f"Bearer {token}"), ("content-type", "application/json")]


def h2_headers(token, *extra, method="POST", path=CHAT, authority="keyward"):
    return [(":method", method), (":scheme", "http"), (":path", path), (":authority", authority), *bearer(token), *extra]


def key_like(rng):
    """A well-formed key that nobody issued: its CRC is right, and public."""
    secret = "".join(rng.choices(BASE62, k=43))
    crc, digits = zlib.crc32(secret.encode()), ""
    for _ in range(6):
        crc, digit = divmod(crc, 62)
        digits = BASE62[digit] + digits
    return f"vk_{secret}{digits}"


def one(door, raw, timeout=20):
    """Sends one request on a connection of its own."""
    with Http1(door.listen_port, timeout) as connection:
        connection.send(raw)
        return connection.answer()


def is_refusal(answer, *statuses):
    """A refusal by the gate: JSON with a reason."""
    assert answer.status in statuses, (answer.status, answer.body)
    assert "error" in json.loads(answer.body) and answer.header("x-keyward-reason"), answer
    return True


@contextlib.contextmanager
def news(door):
    """What the provider sees within the block, as ledger entries."""
    since, seen = door.sim.get("/control/ledger?since=0")["last_seq"], []
    yield seen
    door.sim.quiet()
    seen.extend(door.sim.ledger(since))


def left_unread(entry):
    """Its client left before the provider had read the body, so nobody knows what it asked for."""
    return entry["ended"] == "client_gone" and entry["model"] is None and entry["body_sha256"] is None


@contextlib.contextmanager
def held(part):
    """A process that stands still: admissions stay pending, or the provider reads late."""
    os.kill(part.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(part.process.pid, signal.SIGCONT)


def every_admission_ends_once(door, *key_ids):
    def ends(key_id):
        entries = door.audit(key_id)
        ended = {e["req"]: [] for e in entries if e["event"] == "ADMITTED"}
        for e in entries:
            if e["event"] in TERMINAL and e["req"] in ended:
                ended[e["req"]].append(e["event"])
        return list(ended.values())

    def at_rest(key_id):
        # A client that left during its admission: the admission may be recorded later than that.
        before = ends(key_id)
        time.sleep(0.25)
        return all(before) and ends(key_id) == before and door.key(key_id)["in_flight"] == 0

    for key_id in key_ids:
        wait_for(f"an end of every admission of {key_id}", lambda: at_rest(key_id), 40)
        # A settlement that comes after its hold expired lowers the charge (DESIGN.md, 6): that alone may follow an end.
        assert [end for end in ends(key_id) if len(end) != 1 and end != ["EXPIRED", "SETTLED"]] == []


def events_of(door, key_id):
    return Counter(entry["event"] for entry in door.audit(key_id))


# --- HTTP/1.1 ------------------------------------------------------------------------------------------------------------

def test_every_framing_of_a_good_body_arrives_byte_for_byte(door):
    body = good("ümläut \u2603 " * 40)
    te = [*bearer(door.token), ("transfer-encoding", "chunked")]
    raws = [
        request(headers=bearer(door.token), body=body),
        *[request(headers=te, length=False) + chunked(body, size) for size in (1, 7, 100_000)],
        request(headers=te, length=False) + chunked(body, 50, extension=b";name=value;q=\"x\""),
        request(headers=[*te, ("trailer", "x-a")], length=False) + chunked(body,
                        trailers=b"x-a: 1\r\nauthorization: Bearer vk_x\r\nx-keyward-target: anthropic\r\n"),
        request(headers=[("Authorization", f"bEARER  {door.token} "), ("Transfer-Encoding", "Chunked")], length=False) + chunked(body),
    ]
    with news(door) as seen, Http1(door.listen_port) as kept:
        for raw in raws:
            assert one(door, raw).status == 200, raw[:300]
            kept.send(raw)
            assert kept.answer().status == 200, raw[:300]
    assert len(seen) == 2 * len(raws) and {r["body_bytes"] for r in seen} == {len(NOT_STORED + body)}
    assert {as_asked(door.sim.body(r["seq"])) for r in seen} == {body}


def test_expect_100_continue(door):
    body = good()
    with Http1(door.listen_port) as connection:
        connection.send(request(headers=[*bearer(door.token), ("expect", "100-continue"), ("content-length", str(len(body)))], length=False))
        assert connection.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        connection.send(body)
        assert connection.answer().status == 200
    # Refused before the body: it is never asked for, or asked for and ignored; what follows is no request.
    with news(door) as seen, Http1(door.listen_port) as connection:
        connection.send(request(headers=[*bearer("vk_nothing"), ("expect", "100-continue"), ("content-length", "5000")], length=False))
        assert connection.answer().status == 401
        connection.send(smuggled(door.token))
        assert b" 200 " not in connection.drain()
    assert seen == []


@pytest.mark.parametrize("byte_by_byte", [False, True])
def test_pipelined_requests_are_answered_in_order(door, byte_by_byte):
    def echo(i):
        return good(f"[[sim echo=1]] number {i}")

    parts = [(200, request(headers=bearer(door.token), body=echo(0))), (401, request(headers=bearer("vk_x"), method="GET", path="/v1/models",
                        length=False)),
             (200, request(headers=[*bearer(door.token), ("transfer-encoding", "chunked")], length=False) + chunked(echo(2))),
             (403, request(headers=bearer(door.token), method="GET", path="/v1/files", length=False)),
             (200, request(headers=bearer(door.token), body=echo(4))),
             (400, request(headers=bearer(door.token), body=b"{nonsense")), (200, request(headers=bearer(door.token), body=echo(6)))]
    raw = b"".join(part for _, part in parts)
    with news(door) as seen, Http1(door.listen_port) as connection:
        for piece in ([raw[i:i + 1] for i in range(len(raw))] if byte_by_byte else [raw]):
            connection.send(piece)
        got = 0
        for i, (status, _) in enumerate(parts):
            try:
                answer = connection.answer()
            except Closed:
                # Envoy closes after an early refusal, and when more than two answers of its own queue up: nothing behind is served.
                break
            assert answer.status == status, (i, answer)
            assert status != 200 or f"number {i}" in answer.body.decode()
            got += 1
    assert got >= 2
    assert len(seen) <= sum(status == 200 for status, _ in parts) and len(seen) >= sum(status == 200 for status, _ in parts[:got])


@pytest.mark.parametrize("kind", ["bad-json", "bad-key", "too-large", "chunked-bad-json", "chunked-bad-key", "chunked-no-body-wanted"])
def test_what_follows_an_early_refusal_is_not_read_as_a_request(door, kind):
    """Refused in the middle of its body; the rest of that body holds a whole request."""
    token = "vk_nobody" if "key" in kind else door.token
    hidden = smuggled(door.token)
    start = b'{"model" nonsense'
    with news(door) as seen, Http1(door.listen_port) as connection:
        if kind.startswith("chunked"):
            method, path = ("GET", "/v1/models") if "wanted" in kind else ("POST", CHAT)
            connection.send(request(method, path, [*bearer(token), ("transfer-encoding", "chunked")], length=False) + b"%x\r\n%b\r\n" % (len(start),
                        start))
        else:
            length = 11 * 2**20 if kind == "too-large" else len(start) + len(hidden) + 1000
            connection.send(request(headers=[*bearer(token), ("content-length", str(length))], length=False) + start)
        assert connection.answer().status == {"bad-key": 401, "chunked-bad-key": 401, "too-large": 413}.get(kind, 400)
        connection.send(b"%x\r\n" % len(hidden) if kind.startswith("chunked") else b"")
        connection.send(hidden)
        assert b" 200 " not in connection.drain()
    assert seen == []


def probes(token):
    """Name, bytes. Each holds a hidden request that only a reader who frames it otherwise would find."""
    hidden = smuggled(token)
    auth = b"".join(b"%b: %b\r\n" % (n.encode(), v.encode()) for n, v in bearer(token))
    small = good()
    size = len(small)

    def raw(framing, body, line=b"POST /v1/chat/completions HTTP/1.1", host=b"host: keyward\r\n"):
        return line + b"\r\n" + host + auth + framing + b"\r\n" + body

    both = chunked(small) + hidden
    whole = small + hidden
    te = b"transfer-encoding: chunked\r\n"
    yield "cl-te", raw(b"content-length: %d\r\n" % len(both) + te, both)
    yield "te-cl", raw(te + b"content-length: 4\r\n", both)
    yield "cl-cl", raw(b"content-length: %d\r\ncontent-length: %d\r\n" % (size, len(whole)), whole)
    yield "cl-list", raw(b"content-length: %d, %d\r\n" % (size, len(whole)), whole)
    for name, value in [("plus", b"+%d"), ("hex", b"0x%x"), ("minus", b"-%d"), ("point", b"%d.0"), ("trail", b"%d x"), ("under", b"%d_0"),
                        ("huge", b"%d" + b"0" * 40)]:
        yield f"cl-{name}", raw(b"content-length: " + value % size + b"\r\n", whole)
    yield "cl-empty", raw(b"content-length:\r\n", whole)
    for name, value in [("identity", b"identity"), ("list", b"chunked, identity"), ("twice", b"chunked, chunked"), ("gzip", b"gzip, chunked"),
                        ("x", b"xchunked"),
                        ("quoted", b'"chunked"'), ("vt", b"\x0bchunked"), ("nul", b"chunked\0"), ("comma", b",chunked"), ("semi", b"chunked;q=1"),
                        ("high", b"chunked\xff"), ("empty", b"")]:
        yield f"te-{name}", raw(b"transfer-encoding: " + value + b"\r\ncontent-length: %d\r\n" % len(both), both)
        yield f"te-{name}-alone", raw(b"transfer-encoding: " + value + b"\r\n", both)
    yield "te-two", raw(te + b"transfer-encoding: identity\r\n", both)
    yield "te-space", raw(b"transfer-encoding : chunked\r\ncontent-length: %d\r\n" % len(both), both)
    yield "te-fold", raw(b"transfer-encoding:\r\n chunked\r\ncontent-length: %d\r\n" % len(both), both)
    yield "te-underscore", raw(b"transfer_encoding: chunked\r\ncontent-length: %d\r\n" % len(both), both)
    yield "te-lead", raw(b" transfer-encoding: chunked\r\ncontent-length: %d\r\n" % len(both), both)
    yield "te-cr", raw(b"x: y\rtransfer-encoding: chunked\r\ncontent-length: %d\r\n" % len(both), both)
    for name, line in [("hex", b"0x%x"), ("minus", b"-%x"), ("plus", b"+%x"), ("space", b" %x"), ("trail", b"%x \t"), ("huge", b"ffffffffffffffff%x"),
                       ("wrap", b"10000000000000000%02x"),
                       ("ext-cr", b"%x;a=\rb"), ("ext-nul", b"%x;a=\0"), ("ext-quote", b'%x;a="\r\nb"'), ("under", b"%x_")]:
        yield f"chunk-{name}", raw(te, line % size + b"\r\n" + small + b"\r\n0\r\n\r\n")
    yield "chunk-lf", raw(te, b"%x\n%b\n0\n\n" % (size, small))
    yield "chunk-short", raw(te, b"%x\r\n%b\r\n0\r\n\r\n" % (size - 5, small) + hidden)
    yield "chunk-long", raw(te, b"%x\r\n%b\r\n0\r\n\r\n" % (size + 5, small) + hidden)
    yield "chunk-nocrlf", raw(te, b"%x\r\n%bXX0\r\n\r\n" % (size, small) + hidden)
    yield "trailer-cl", raw(te, chunked(small, trailers=b"content-length: 4\r\ntransfer-encoding: chunked\r\n"))
    yield "trailer-bad", raw(te, chunked(small, trailers=b"no colon\r\n"))
    length = b"content-length: %d\r\n" % size
    yield "bare-lf", raw(length, small).replace(b"\r\n", b"\n")
    yield "bare-cr", raw(length, small).replace(b"\r\n", b"\r")
    yield "nul-value", raw(b"x: a\0b\r\n" + length, small)
    yield "nul-name", raw(b"x\0y: a\r\n" + length, small)
    yield "no-colon", raw(b"nonsense\r\n" + length, small)
    yield "no-name", raw(b": value\r\n" + length, small)
    yield "space-name", raw(b"x y: z\r\n" + length, small)
    yield "space-colon", raw(b"x : z\r\n" + length, small)
    yield "fold", raw(b"x: a\r\n\tb\r\n" + length, small)
    yield "fold-auth", raw(length, small).replace(b"Bearer ", b"Bearer\r\n ")
    yield "two-hosts", raw(b"host: api.openai.com\r\n" + length, small)
    yield "no-host", raw(length, small, host=b"")
    yield "odd-host", raw(length, small, host=b"host: a@b/c?d#e\r\n")
    for name, line in [("1.0-te", b"POST /v1/chat/completions HTTP/1.0"), ("0.9", b"POST /v1/chat/completions"),
                       ("2.0", b"POST /v1/chat/completions HTTP/2.0"), ("1.2", b"POST /v1/chat/completions HTTP/1.2"),
                       ("lower", b"POST /v1/chat/completions http/1.1"), ("tabs", b"POST\t/v1/chat/completions\tHTTP/1.1"),
                       ("two-spaces", b"POST  /v1/chat/completions  HTTP/1.1"),
                       ("lf-in-path", b"POST /v1/chat\n/completions HTTP/1.1"), ("nul-in-path", b"POST /v1/chat\0/completions HTTP/1.1"),
                       ("high-path", b"POST /v1/chat/completions\xff HTTP/1.1")]:
        yield f"line-{name}", raw(te if "te" in name else length, chunked(small) if "te" in name else small, line=line)
    yield "crlf-first", b"\r\n\r\n" + raw(length, small)
    yield "h2-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + raw(length, small)
    yield "h2c-upgrade", raw(b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n" + length, small)
    yield "websocket", raw(b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n" + length, small)
    yield "tls-hello", bytes.fromhex("16030100") + random.Random(1).randbytes(300)
    yield "proxy-protocol", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + raw(length, small)


def test_no_probe_smuggles_a_request(door):
    """Every answer of 200 stands for exactly one request at the provider, and none of them is the hidden one."""
    wrong = []

    def probe(case):
        name, raw = case
        with Http1(door.listen_port, 15) as connection:
            connection.send(raw)
            answers = []
            # The other side of the connection is closed for writing: whatever waits for more gets its end.
            with contextlib.suppress(Closed):
                connection.timeout = 1.0
                try:
                    answers.append(connection.answer())
                except TimeoutError:
                    pass
            connection.timeout = 15
            with contextlib.suppress(OSError):
                connection.socket.shutdown(1)
            rest = connection.buffer + connection.drain()
            for answer in answers:
                if not (200 <= answer.status < 300 or 400 <= answer.status < 600):
                    wrong.append((name, answer))
            return name, [a.status for a in answers], rest[:100]

    with news(door) as seen, ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(probe, probes(door.token)))
    assert wrong == []
    print(outcomes)
    assert [r for r in seen if r["model"] == SMUGGLED] == [], outcomes
    # One whose answer took longer than the probe waits was cut, which is no answer of 200.
    whole = [r for r in seen if r["ended"] != "client_gone"]
    assert len(whole) <= sum(200 in statuses for _, statuses, _ in outcomes) + sum(b"HTTP/1.1 200" in rest for *_, rest in outcomes), outcomes
    # Of two lengths, or a length and an encoding, none is ever believed.
    for name, statuses, _ in outcomes:
        if name in {"cl-te", "te-cl", "cl-cl", "cl-list", "te-two", "nul-value", "nul-name"}:
            assert 200 not in statuses, name


PATHS = ["/", "", "*", "/v1", "/v1/", "/v1/chat", "/v1/chat/completions/", "/v1/chat/completions/../files", "/v1/files", "/V1/chat/completions",
         "/v1/chat/completions;a=b", "/v1/chat/completions%00",
         "/v1%2fchat/completions", "/v1/chat%2Fcompletions", "/v1/chat%5ccompletions", "/v1/chat/completions%20", "/v1/chat/completions%3fkey=x",
         "/..", "/../../etc/passwd", "/v1/../edge/v1/admit", "/edge/v1/admit", "/edge/v1/settle", "/edge/v1/watch?since=0",
         "/keyward_policy/edge/v1/admit", "/openai", "/openai/", "/openai/edge/v1/admit",
         "/openai/openai/v1/chat/completions", "/anthropic/v1/responses", "/openai/v1/messages/count_tokens", "/nobody/v1/chat/completions",
         "/v1/models/gpt-4o/x", "/é", "/%", "/%zz", "/v1/chat/completions#f",
         "http://", "http:///", "http://api.openai.com", "http://127.0.0.1:1/edge/v1/admit", "ftp://x/v1/files", "//edge/v1/admit", "/healthz",
         "/metrics", "/v1/keys", "/ready", "/stats", "/" + "a" * 50_000]


def test_paths_lead_where_the_table_says_or_nowhere(door):
    with news(door) as seen:
        for path in PATHS:
            for method in ("POST", "GET"):
                answer = one(door, request(method, path, bearer(door.token), good() if method == "POST" else b""))
                assert answer.status in (400, 401, 403, 404), (method, path[:60], answer.status)
        assert seen == []
    # These are the same resource after normalisation (RFC 3986, 6.2.2): what reaches the provider is the table's path.
    same = [CHAT, "/openai" + CHAT, "//v1//chat///completions", "/x/../v1/./chat/completions", CHAT + "?", CHAT + "?a=b&c=%2f&d=%00",
            "http://other.example" + CHAT, "HTTP://Other:99" + CHAT + "?x=1", "/v1\\chat\\completions", "/v1/%63hat/completions"]
    with news(door) as seen:
        statuses = [one(door, request(path=path, headers=bearer(door.token), body=good())).status for path in same]
        assert statuses[:2] == [200, 200] and set(statuses) <= {200, 400, 403, 404}, statuses
        assert one(door, request(path=f"{CHAT}?key={door.token}&key={door.token}", headers=[("content-type", "application/json")],
                        body=good())).status == 200
        other = key_like(random.Random(5))
        is_refusal(one(door, request(path=f"{CHAT}?key={other}", headers=bearer(door.token), body=good())), 400)
        for query in ["?%6bey=" + door.token, "?KEY=" + door.token, "?key=" + door.token.replace("vk_", "vk%5f"), "?key=", "?x=key=" + door.token]:
            is_refusal(one(door, request(path=CHAT + query, headers=[], body=good())), 401)
    assert {r["path"] for r in seen} == {CHAT} and len(seen) == statuses.count(200) + 1
    for r in seen:
        assert dict(door.sim.headers(r["seq"]))["host"] == "api.openai.com"


def test_no_way_to_the_policy_service(door):
    """Its cluster carries the edge token: a request that arrives there is as good as the gate."""
    token_hash = "00" * 32
    body = json.dumps({"req": "00" * 16, "vm": "00" * 16, "node": "n", "token": token_hash,
                       "ask": {"provider": "openai", "endpoint": "POST " + CHAT, "bytes": 1}}).encode()
    door.no_settlements_pending()
    before = door.admissions_asked()
    hosts = ["keyward-policy", "keyward_policy", f"127.0.0.1:{door.edge_port}", "localhost"]
    steer = [("x-envoy-upstream-alt-stat-name", "a"), ("x-keyward-target", "keyward_policy"),
             ("x-envoy-original-dst-host", f"127.0.0.1:{door.edge_port}"), ("x-envoy-cluster", "keyward_policy")]
    for host in hosts:
        for path in ["/edge/v1/admit", "/edge/v1/settle", "/openai/edge/v1/admit", f"http://127.0.0.1:{door.edge_port}/edge/v1/admit",
                     "/v1/../edge/v1/admit", "/edge/v1/watch"]:
            for auth in ([], bearer(door.token), [("authorization", "Bearer " + token_hash)]):
                answer = one(door, request(path=path, headers=[*auth, *steer], body=body, host=host))
                assert answer.status in (400, 401, 403, 404), (host, path, answer)
    connection = Http2(door.listen_port)
    for host in hosts:
        stream = connection.headers(h2_headers(door.token, *steer, path="/edge/v1/admit", authority=host))
        connection.data(stream, body, True)
        assert connection.wait(stream).status in (403, 404)
    connection.close()
    assert door.admissions_asked() == before
    edge = f"http://127.0.0.1:{door.edge_port}"
    for auth in ({}, {"authorization": f"Bearer {door.token}"}, {"authorization": "Bearer "}, {"authorization": ""}):
        assert call(edge, "POST", "/edge/v1/admit", body, {**auth, "content-type": "application/json"})[0] == 401


def test_no_header_reaches_the_provider_as_two(door):
    """What Envoy lets pass as one line, a lenient provider must not read as another."""
    for raw in (b"x: y\rauthorization: Bearer sk-x", b"x: y\r authorization: z", b"x: y\r\n authorization: z", b"x: \ry: z", b"x: y\r\r"):
        with news(door) as seen:
            answer = one(door, request(headers=bearer(door.token), body=good()).replace(b"\r\nhost:", b"\r\n" + raw + b"\r\nhost:"))
            assert answer.status in (200, 400)
        for r in seen:
            assert not [pair for pair in door.sim.headers(r["seq"]) if set("\r\n\0") & set("".join(pair))], raw


def test_odd_methods(door):
    with news(door) as seen:
        for method in ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "post", "Post", "POST1", "P", "M-SEARCH",
                       "PRI", "PO\0ST", "PO ST", "{}", "é" * 10, "A" * 5_000]:
            for path in (CHAT, "/v1/models", "api.openai.com:443"):
                if (method, path) == ("GET", "/v1/models"):
                    continue
                with Http1(door.listen_port) as connection:
                    connection.send(request(method, path, bearer(door.token), good()))
                    status, _ = connection.head()
                    assert 400 <= status < 500 or status == 501, (method, path, status)
    assert seen == []


def test_header_storms(door):
    """Long, many, foreign: an answer each time, and nothing that Envoy and the gate read differently."""
    auth = bearer(door.token)
    passes = [[("x-a", b"\xff\xfe\x80")], [("x-a", b"\xc3\x28"), ("x-b", "é".encode())], [("x-%d" % i, "v") for i in range(80)],
              [("x-long", "a" * 40_000)], [("cookie", "a=b; " * 500)],
              [("accept-encoding", "gzip, br")], [("x-empty", "")], [("x-forwarded-for", "1.2.3.4, 5.6.7.8"), ("via", "1.1 x")], [("te", "trailers")],
              [("x-request-id", "../../x\"'")], [("user-agent", b"\xf0\x9f")]]
    refused = [([("x-%d" % i, "v") for i in range(500)], (400, 431)), ([("x-long", "a" * 70_000)], (400, 431)), ([("x_underscore", "v")], (400,)),
               ([("authorization", b"Bearer \xff\xfe")], (401,)),
               ([("authorization", "Bearer " + "vk_" * 10_000)], (401,)), ([("x-api-key", key_like(random.Random(1)))], (400,)),
               ([("content-encoding", "gzip")], (400,)), ([("content-encoding", "identity"), ("content-encoding", "br")], (400,)),
               ([("content-encoding", "identity, deflate")], (400,)), ([("connection", "close, authorization")], (200, 400, 401)),
               ([("connection", "content-length, transfer-encoding")], (200, 400))]
    with news(door) as seen:
        for extra in passes:
            assert one(door, request(headers=[*auth, *extra], body=good())).status == 200, extra[:1]
        count = len(passes)
        for extra, statuses in refused:
            base = auth if extra[0][0] != "authorization" else auth[1:]
            answer = one(door, request(headers=[*base, *extra], body=good()))
            assert answer.status in statuses, (extra[0][0], answer)
            count += answer.status == 200
    assert len(seen) == count


CARRIERS = ["authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key", "x-shopify-access-token", "x-postmark-server-token",
            "x-postmark-account-token", "cookie", "openai-organization",
            "x-keyward-key", "x-envoy-key", "sec-websocket-protocol", "referer", "user-agent", "x-auth-token", "x-access-token",
            "x-forwarded-authorization", "x-original-url", "x-custom", "forwarded", "x-forwarded-for", "baggage"]


@pytest.mark.parametrize("name", CARRIERS)
def test_a_virtual_key_in_any_header_never_arrives(door, name):
    """Beside the key that counts, the same key once more where some client or proxy may have copied it."""
    for value in (door.token, f"Bearer {door.token}", f"https://gateway/v1?key={door.token}", f"realtime, openai-insecure-api-key.{door.token}"):
        with news(door) as seen:
            headers = [*bearer(door.token), (name, value)]
            status = one(door, request(headers=headers, body=good())).status
            assert status in (200, 400, 401), status
        door.excused = True
        for r in seen:
            kept = door.sim.headers(r["seq"])
            assert not [pair for pair in kept if "vk_" in pair[1]], f"{name} took the virtual key to the provider"


def test_foreign_credentials_and_bills_never_arrive(door):
    anthropic = CREDENTIALS[1]["secret"]
    extra = [("x-api-key", anthropic), ("api-key", "sk-proj-somebodyelse0123456789"), ("x-goog-api-key", "AIzaSyA0123456789abcdefghijk"),
             ("proxy-authorization", "Basic c2stcHJvajp4"), ("cookie", "session=1"),
             ("openai-organization", "org-a"), ("openai-project", "proj-a"), ("x-goog-user-project", "p"), ("stripe-account", "acct_1"),
             ("stripe-context", "c"), ("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "9"),
             ("x-envoy-upstream-rq-timeout-ms", "1"), ("x-envoy-expected-rq-timeout-ms", "1"), ("x-envoy-hedge-on-per-try-timeout", "true"),
             ("x-envoy-original-path", "/edge"), ("x-envoy-internal", "true"),
             ("x-envoy-ip-tags", "a"), ("x-envoy-decorator-operation", "a"), ("x-envoy-attempt-count", "7"), ("x-keyward-flight", "00" * 16),
             ("x-keyward-target", "anthropic"), ("x-keyward-retry", "1"), ("X-KEYWARD-Anything", "1")]
    with news(door) as seen:
        assert one(door, request(headers=[*bearer(door.token), *extra], body=good())).status == 200
        basic = "Basic dXNlcjpwYXNz"
        is_refusal(one(door, request(headers=[("authorization", basic)], body=good())), 401)
        is_refusal(one(door, request(headers=[("authorization", f"Bearer {CREDENTIALS[0]['secret']}")], body=good())), 401)
    kept = dict(door.sim.headers(seen[0]["seq"]))
    assert len(seen) == 1 and not set(kept) & {n.lower() for n, _ in extra}, kept
    assert kept["authorization"] == "Bearer <credential:openai-1>"


# --- one reading of the body ---------------------------------------------------------------------------------------------

M = '"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}]'
AMBIGUOUS = {
    "twice": '{"model":"gpt-4o",%s}' % M, "escaped": r'{"mod\u0065l":"gpt-4o",%s}' % M, "case": '{"MODEL":"gpt-4o",%s}' % M,
    "fold": '{"\u017ftream":true,%s}' % M, "kelvin": '{"max_to\u212aens":1,%s}' % M,
    "stream": '{"stream":true,"stream":false,%s}' % M, "messages": '{"messages":[],%s}' % M,
    "nested": '{"stream_options":{"include_usage":true,"Include_Usage":false},"stream":true,%s}' % M,
    "nested-twice": '{"stream_options":{"include_usage":true,"include_usage":false},"stream":true,%s}' % M,
    "options": '{"stream_options":{},"stream_options":{},%s}' % M, "limit": '{"max_tokens":1,"Max_Tokens":9,%s}' % M,
    "bom": "\ufeff{%s}" % M, "after": "{%s}{}" % M, "nul-after": "{%s}\0" % M, "comment": "{/**/%s}" % M, "comma": "{%s,}" % M,
    "nan": '{"temperature":NaN,%s}' % M, "infinity": '{"temperature":-Infinity,%s}' % M,
    "plus": '{"max_tokens":+5,%s}' % M, "zero": '{"max_tokens":05,%s}' % M, "exponent": '{"max_tokens":1e1,%s}' % M,
    "fraction": '{"max_tokens":5.0,%s}' % M, "text": '{"max_tokens":"5",%s}' % M, "negative": '{"max_tokens":-5,%s}' % M,
    "single": "{'model':'gpt-4o-mini'}", "bare": '{model:"gpt-4o-mini"}', "surrogate": r'{"a":"\ud800",%s}' % M,
    "surrogate-key": r'{"\udfffmodel":1,%s}' % M, "control": '{"a":"\n",%s}' % M, "tab-key": '{"a\t":1,%s}' % M,
    "array": "[{%s}]" % M, "string": '"{}"', "deep": '{"a":%s%s,%s}' % ("[" * 200, "]" * 200, M), "deep-objects": '{"a":' * 300 + "1" + "}" * 300,
    "very-deep": "[" * 100_000, "model-number": '{"model":1,"messages":[]}',
    "model-null": '{"model":null,"messages":[]}', "no-model": '{"messages":[]}', "empty": "", "space": "  ", "lone": "{", "vertical": "\x0b{%s}" % M,
    "nbsp": "\u00a0{%s}" % M, "form": "model=gpt-4o-mini", "choices": '{"n":1.5,%s}' % M,
    "long-model": '{"model":"%s"}' % ("m" * 300), "bool": '{"stream":"true",%s}' % M, "bool-1": '{"stream":1,%s}' % M,
    "escape": r'{"a":"\x41",%s}' % M, "hex": r'{"a":"\u00g0",%s}' % M,
}
BYTES = {"utf-16": ("{%s}" % M).encode("utf-16"), "utf-16-le": ("{%s}" % M).encode("utf-16-le"), "utf-32": ("{%s}" % M).encode("utf-32"),
         "overlong": b'{"a":"\xc0\xaf",' + M.encode() + b"}", "high": b'{"a":"\xff",' + M.encode() + b"}",
         "cesu": b'{"a":"\xed\xa0\x80",' + M.encode() + b"}", "cut": b'{"a":"\xe2\x82",' + M.encode() + b"}",
         "latin": b'{"\xe9":1,' + M.encode() + b"}", "gzip": b"\x1f\x8b\x08" + bytes(20)}


def test_a_body_that_two_readers_read_differently_is_refused(door):
    with news(door) as seen, Http1(door.listen_port) as kept:
        for name, body in {**{n: b.encode("utf-8", "surrogatepass") for n, b in AMBIGUOUS.items()}, **BYTES}.items():
            for raw in (request(headers=bearer(door.token), body=body), request(headers=[*bearer(door.token), ("transfer-encoding", "chunked")],
                        length=False) + chunked(body, 1 if len(body) < 2_000 else 5_000)):
                assert is_refusal(one(door, raw), 400), name
        kept.send(request(headers=bearer(door.token), body=good()))
        assert kept.answer().status == 200
    assert len(seen) == 1


def test_the_provider_is_told_no_other_charset_than_the_gate_read(door):
    """In UTF-7 this ASCII body is another document, with another model: a server that honours `charset` would serve that."""
    body = b'{"model":"gpt-4o-mini","x":"+ACI-,+ACI-model+ACI-:+ACI-gpt-4o","messages":[{"role":"user","content":"x"}]}'
    assert json.loads(body)["model"] != json.loads(body.decode("utf-7"))["model"]
    for kind in ["application/json; charset=utf-7", "application/json;CHARSET=\"UTF-7\"", "application/x-www-form-urlencoded",
                 "multipart/form-data; boundary=x"]:
        with news(door) as seen:
            status = one(door, request(headers=[("authorization", f"Bearer {door.token}"), ("content-type", kind)], body=body)).status
        assert status in (200, 400, 415)
        told = [dict(door.sim.headers(r["seq"]))["content-type"].lower() for r in seen]
        assert all(re.fullmatch(r'application/json(; ?charset="?utf-8"?)?', t) for t in told), told


@pytest.mark.parametrize("numbers", [{"max_tokens": 2**64 - 1, "n": 2**64 - 1}, {"max_tokens": 2**63 - 1, "n": 2**63 - 1}, {"n": 2**64 - 1},
                        {"max_tokens": 2**64 - 1}, {"max_tokens": 2**63, "n": 2}, {"max_tokens": 10**400}, {"n": 10**30}])
def test_numbers_that_no_type_holds_are_the_callers_mistake(door, numbers):
    """And no alarm about the audit store, which is well."""
    for budget in (None, "1.00"):
        _, token = door.new_key(budget)
        for _ in range(2):
            answer = one(door, request(headers=bearer(token), body=good(**numbers)))
            assert 400 <= answer.status < 500, answer
        # What was held for it is no obstacle to the next.
        assert door.works(token)


def test_one_absurd_request_does_not_stop_the_books_of_all():
    """A hold too large to be charged, from a client that leaves: the records of other keys travel in the same batch."""
    with Door(concurrency=1) as door:
        (mine, token), (other, others_token) = door.new_key(), door.new_key("1.00")
        assert door.works(token) and door.works(others_token)
        every_admission_ends_once(door, mine, other)
        os.kill(door.sim.process.pid, signal.SIGSTOP)
        try:
            with Http1(door.listen_port) as connection:
                connection.send(request(headers=bearer(token), body=good(n=2**64 - 1)))
                time.sleep(0.3)
        finally:
            os.kill(door.sim.process.pid, signal.SIGCONT)
        assert door.works(others_token)
        door.settled(other, mine, timeout=15)
        every_admission_ends_once(door, other, mine)
        proven(door)


# --- HTTP/2 --------------------------------------------------------------------------------------------------------------

def test_h2_bodies_in_every_framing(door):
    body = good("[[sim echo=1]] ☃ " + "x" * 20_000)

    def send(connection, frames, end="data", trailers=()):
        stream = connection.headers(h2_headers(door.token))
        for i, frame in enumerate(frames):
            data, pad = frame if isinstance(frame, tuple) else (frame, None)
            connection.data(stream, data, end == "data" and i == len(frames) - 1, pad)
        if end == "trailers":
            connection.headers(list(trailers), True, stream)
        return stream

    half = len(body) // 2
    shapes = [dict(frames=[body[:16000], body[16000:]]), dict(frames=[body[:half], b"", body[half:]]),
              dict(frames=[b"", body[:16000], body[16000:], b""]), dict(frames=[(body[:half], 255), (body[half:], 0)]),
              dict(frames=[body[:16000], body[16000:]], end="trailers", trailers=[("x-checksum", "1")]),
              dict(frames=[body[:16000], body[16000:], b""], end="trailers", trailers=[]),
              dict(frames=[(body[:half], 9), (body[half:], 9), (b"", 9)], end="trailers", trailers=[("x-%d" % i, "v") for i in range(50)]),
              dict(frames=[body[i:i + 97] for i in range(0, len(body), 97)], end="trailers", trailers=[("x", "y")])]
    with news(door) as seen:
        connection = Http2(door.listen_port)
        for shape in shapes:
            answer = connection.wait(send(connection, **shape))
            assert answer.status == 200, (shape.get("end"), answer)
        connection.close()
    assert len(seen) == len(shapes) and {as_asked(door.sim.body(r["seq"])) for r in seen} == {body}


def test_h2_without_a_body_or_with_a_bad_one_ends_with_its_trailers(door):
    """Trailers end the body, also of a request that must be refused."""
    with news(door) as seen:
        connection = Http2(door.listen_port)
        cases = [(b"", True, 400), (b"{", False, 400), (b'{"model":', True, 400), (good()[:-1], True, 400), (good() + b"x", True, 400)]
        for body, trailers, status in cases:
            stream = connection.headers(h2_headers(door.token))
            if body:
                connection.data(stream, body, not trailers)
            if trailers:
                connection.headers([("x", "y")], True, stream)
            assert connection.wait(stream).status == status, body
        assert connection.wait(connection.headers(h2_headers(door.token), end=True)).status == 400
        stream = connection.headers(h2_headers("vk_x"))
        connection.headers([("authorization", f"Bearer {door.token}")], True, stream)
        answer = connection.wait(stream)
        assert answer.status == 401 or answer.reset is not None
        stream = connection.headers([h for h in h2_headers("") if h[0] != "authorization"])
        connection.data(stream, good())
        connection.headers([("authorization", f"Bearer {door.token}"), ("x-api-key", door.token)], True, stream)
        answer = connection.wait(stream)
        assert answer.status == 401 or answer.reset is not None
        # A key in trailers is no key; a GET may end by trailers as well.
        stream = connection.headers(h2_headers(door.token, method="GET", path="/v1/models"))
        connection.headers([("x", "y")], True, stream)
        assert connection.wait(stream).status in (200, 400)
        connection.close()
    assert len(seen) <= 1


def test_h2_trailers_carry_nothing_to_a_provider(tmp_path):
    """Real providers speak HTTP/2, and Envoy hands trailers on to those."""
    provider = wire.Http2Provider(tmp_path, "api.openai.com")
    options = ("--provider", f"openai=https://127.0.0.1:{provider.port}", "--provider-ca", str(provider.certificate))
    with Door(concurrency=1, render_options=options) as door:
        _, token = door.new_key()
        connection = Http2(door.listen_port)
        for trailers in ([("x-checksum", "1")], [("authorization", f"Bearer {token}")], [("x-api-key", "sk-ant-somebody0123456789"),
                        ("x-keyward-flight", "00"), ("x-envoy-max-retries", "3"), ("x-note", token)]):
            stream = connection.headers(h2_headers(token))
            connection.data(stream, good())
            connection.headers(trailers, True, stream)
            answer = connection.wait(stream)
            assert answer.status in (200, 400), answer
        connection.close()
    assert provider.requests
    provider.close()
    carried = [field for r in provider.requests for field in r["trailers"] if field[0] != "x-checksum"]
    assert carried == [], [name for name, _ in carried]
    for r in provider.requests:
        names = Counter(name for name, _ in r["headers"])
        assert names["authorization"] == 1 and not [v for _, v in r["headers"] if "vk_" in v]


def test_h2_many_streams_at_once(door):
    with news(door) as seen:
        connections = [Http2(door.listen_port, 60) for _ in range(3)]
        streams = []
        for i in range(100):
            for connection in connections:
                token = door.token if i % 2 else key_like(random.Random(i))
                stream = connection.headers(h2_headers(token))
                connection.data(stream, good("[[sim echo=1]] stream-%d." % stream), i % 3 == 0)
                if i % 3:
                    connection.headers([("x", "y")], True, stream)
                streams.append((connection, stream, 200 if i % 2 else 401))
        for connection, stream, status in streams:
            answer = connection.wait(stream)
            assert answer.status == status, answer
            assert status != 200 or f"stream-{stream}." in answer.body.decode(), "the answer of another stream"
        for connection in connections:
            connection.close()
        # More than the listener allows at once: refused or reset, never lost.
        connection = Http2(door.listen_port, 60)
        streams = [connection.headers(h2_headers(door.token)) for _ in range(150)]
        for stream in streams:
            connection.data(stream, good(), True)
        answers = connection.wait(*streams)
        assert connection.closed or all(a.status == 200 or a.reset is not None for a in answers)
        connection.close()
    assert len(seen) >= 150


def test_h2_goaway_and_connection_errors(door):
    connection = Http2(door.listen_port)
    streams = [connection.headers(h2_headers(door.token)) for _ in range(4)]
    for stream in streams:
        connection.data(stream, good("[[sim first_ms=150]]"), True)
    connection.frame(wire.GOAWAY, 0, 0, struct.pack(">II", 0, 0))
    answers = connection.wait(*streams)
    assert connection.closed or all(a.over for a in answers)
    connection.close()
    for breaker in (b"\xff" * 64, struct.pack(">BHBBI", 0, 5, 0xEE, 0, 1) + b"hello", struct.pack(">BHBBI", 0, 1, wire.PING, 0, 0) + b"x",
                    struct.pack(">BHBBI", 255, 65535, wire.DATA, 0, 1)):
        connection = Http2(door.listen_port)
        stream = connection.headers(h2_headers(door.token))
        connection.data(stream, good("[[sim first_ms=100]]"), True)
        connection.send(breaker)
        with contextlib.suppress(OSError):
            connection.socket.shutdown(1)
        with contextlib.suppress(Closed):
            connection.wait(stream)
        connection.close()


def h2_tricks(token):
    """Name, a function that sends something on a connection and gives its stream."""
    body = good()

    def sends(fields, end=False, data=body, finish=True):
        def go(c):
            stream = c.headers(fields, end)
            if not end:
                c.data(stream, data, finish)
            return stream
        return go

    base = h2_headers(token)

    def replaced(name, *values):
        return [pair for pair in base if pair[0] < ":~" and pair[0][0] == ":" and pair[0] != name] + [(name, v) for v in values] + base[4:]

    for name, values in {":path": ["", "v1", "*", "http://a/v1/chat/completions", "/v1/chat/completions\0", "/v1/chat/completions HTTP/1.1\r\nx: y",
                        "/v1/chat/../../edge", "/v1/chat/completions#x", "/v1/%2e%2e/v1/files"],
                         ":authority": ["a@b", "127.0.0.1:1", "a b", "a/b", "", "keyward-policy"],
                        ":method": ["", "post", "CONNECT", "POST\r\nx: y", "P OST"], ":scheme": ["", "https", "ftp", "h t"]}.items():
        for value in values:
            yield f"{name} {value!r}", sends(replaced(name, value))
        yield f"{name} missing", sends(replaced(name))
        yield f"{name} twice", sends(replaced(name, dict(base)[name], "/v1/files" if name == ":path" else "x"))
    yield "pseudo last", sends(base[4:] + base[:4])
    yield "status", sends([*base[:4], (":status", "200"), *base[4:]])
    yield "unknown pseudo", sends([*base[:4], (":x", "200"), *base[4:]])
    yield "protocol", sends([*base[:4], (":protocol", "websocket"), *base[4:]])
    for name, value in [("Authorization", f"Bearer {token}"), ("connection", "close"), ("transfer-encoding", "chunked"), ("upgrade", "h2c"),
                        ("te", "gzip"), ("keep-alive", "1"), ("proxy-connection", "x"), ("x", "a\r\nb: c"), ("x", "a\nb"), ("x", "a\0"),
                        ("", "x"), ("a b", "x"), ("a:b", "x"), ("a\r\nb", "c"), ("x_y", "z"), ("host", "other"), ("content-length", "5"),
                        ("content-length", "99999"), ("content-length", "x"), ("content-length", "-1"), ("content-length", "99999999999999999999"),
                        ("expect", "100-continue"), ("x", " lead"), ("\x80", "x")]:
        yield f"header {name!r}: {value[:20]!r}", sends([*base, (name, value)])
    yield "two lengths", sends([*base, ("content-length", str(len(body))), ("content-length", "4")])
    yield "many headers", sends([*base, *[("x-%d" % i, "v") for i in range(400)]])
    yield "long header", sends([*base, ("x", "a" * 100_000)])

    def empty_flood(c):
        stream = c.headers(base)
        for _ in range(1_000):
            c.data(stream, b"")
        c.data(stream, body, True)
        return stream

    def trailers_without_end(c):
        stream = c.headers(base)
        c.data(stream, body)
        c.headers([("x", "y")], False, stream)
        return stream

    def data_after_end(c):
        stream = c.headers(base)
        c.data(stream, body, True)
        c.data(stream, body, True)
        return stream

    def headers_after_end(c):
        stream = c.headers(base)
        c.data(stream, body, True)
        c.headers(base, True, stream)
        return stream

    def trailers_with_pseudo(c):
        stream = c.headers(base)
        c.data(stream, body)
        c.headers([(":path", "/v1/files"), ("x", "y")], True, stream)
        return stream

    def data_without_headers(c):
        c.streams[1], c.next = wire.Stream(), 3
        c.data(1, body, True)
        return 1

    def even_stream(c):
        c.streams[2] = wire.Stream()
        return c.headers(base, True, 2)

    def old_stream(c):
        c.next = 9
        c.wait(sends(base)(c))
        c.streams[3] = wire.Stream()
        c.headers(base, True, 3)
        # Closed streams are ignored: a connection that still answers a PING is as good as an error.
        c.sync()
        c.streams[3].reset = 5
        return 3

    def continuation_flood(c):
        stream = c.headers(base, flags=0)
        for _ in range(300):
            c.frame(wire.CONTINUATION, 0, stream, b"\x00\x01a\x01b")
        return stream

    def hpack_bomb(c):
        c.headers([*base, ("x-big", "b" * 3_900)], True)
        block = c.encoder.encode(base) + c.encoder.encode([("x-big", "b" * 3_900)]) * 4_000
        stream, c.next = c.next, c.next + 2
        c.streams[stream] = wire.Stream()
        c.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, stream, block[:16384])
        return stream

    def hpack_garbage(c):
        c.streams[1], c.next = wire.Stream(), 3
        c.frame(wire.HEADERS, wire.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\x0f")
        return 1

    def bad_padding(c):
        stream = c.headers(base)
        c.frame(wire.DATA, wire.PADDED | wire.END_STREAM, stream, b"\xff" + body)
        return stream

    def rapid_reset(c):
        for _ in range(200):
            stream = c.headers(base)
            c.data(stream, body, True)
            c.cancel(stream)
        c.streams[stream].reset = 8
        return stream

    def self_dependent(c):
        c.streams[1], c.next = wire.Stream(), 3
        block = c.encoder.encode(base)
        c.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM | 0x20, 1, struct.pack(">IB", 1, 1) + block)
        return 1

    for trick in (empty_flood, trailers_without_end, data_after_end, headers_after_end, trailers_with_pseudo, data_without_headers, even_stream,
                  old_stream, continuation_flood, hpack_bomb, hpack_garbage, bad_padding, rapid_reset, self_dependent):
        yield trick.__name__, trick


def test_h2_tricks_are_answered_or_cut(door):
    """Each on a connection of its own: an answer, a reset or the end, within the timeout."""
    def play(case):
        name, trick = case
        with Http2(door.listen_port, 20) as connection:
            try:
                answer = connection.wait(trick(connection))
                return name, answer.status if answer.headers else (answer.reset if answer.reset is not None else f"goaway {connection.goaway}")
            except Closed:
                return name, "closed"
            except TimeoutError:
                return name, "hang"

    # Envoy takes a second to close a connection that it gave up.
    with news(door) as seen, ThreadPoolExecutor(12) as pool:
        outcomes = dict(pool.map(play, h2_tricks(door.token)))
    assert "hang" not in outcomes.values(), outcomes
    assert outcomes[":scheme 'https'"] == 200
    for r in seen:
        assert r["path"] == CHAT and r["method"] == "POST" and (r["model"] == "gpt-4o-mini" or left_unread(r)), r
    for name in (":path twice", ":authority twice", "header 'x': 'a\\r\\nb: c'", "two lengths", "header 'content-length': '5'",
                 "header 'transfer-encoding': 'chunked'"):
        assert outcomes[name] != 200, name


# --- clients that leave --------------------------------------------------------------------------------------------------

PHASES = ["headers", "mid-body", "pending", "unread", "waiting", "streaming"]


@pytest.mark.parametrize("protocol", ["http1-fin", "http1-rst", "h2-reset", "h2-close"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves(door, phase, protocol):
    key_id, token = door.new_key(label=f"{phase} {protocol}")
    body = {"waiting": good("[[sim first_ms=400]]"), "streaming": good("[[sim tokens=300 pace_ms=20]]", stream=True)}.get(phase, good())
    with news(door) as seen, contextlib.ExitStack() as stack:
        hold = stack.enter_context(contextlib.ExitStack())
        if phase == "pending":
            hold.enter_context(held(door.service))
        if phase == "unread":
            hold.enter_context(held(door.sim))
        for _ in range(5):
            if protocol.startswith("http1"):
                connection = Http1(door.listen_port)
                raw = request(headers=bearer(token), body=body)
                connection.send(raw[:-len(body)] if phase == "headers" else raw[:-20] if phase == "mid-body" else raw)
                if phase == "streaming":
                    connection.head()
                    connection.more()
                else:
                    time.sleep(0.03)
                connection.reset() if protocol == "http1-rst" else connection.close()
            else:
                connection = Http2(door.listen_port)
                stream = connection.headers(h2_headers(token))
                if phase != "headers":
                    connection.data(stream, body[:-20] if phase == "mid-body" else body, phase != "mid-body")
                connection.sync() if phase != "streaming" else connection.until_headers(stream)
                if phase == "unread":
                    time.sleep(0.03)
                if protocol == "h2-reset":
                    connection.cancel(stream)
                    connection.sync()
                connection.close()
        hold.close()
        wait_for("a policy service that answers", lambda: door.chat(token)[0] == 200)
        every_admission_ends_once(door, key_id)
    every_admission_ends_once(door, key_id)
    if phase in ("headers", "mid-body", "pending"):
        assert len(seen) == 1, "something was forwarded for a client that had left"
    if phase == "unread":
        assert all(r["model"] == "gpt-4o-mini" or left_unread(r) for r in seen), seen
    wait_for("all streams gone", lambda: door.stats("http.keyward.downstream_rq_active")["http.keyward.downstream_rq_active"] == 0, 20)


def test_a_policy_service_that_stands_still_admits_nobody(door):
    _, token = door.new_key()
    with news(door) as seen:
        with held(door.service):
            connection = Http2(door.listen_port, 30)
            streams = [connection.headers(h2_headers(token)) for _ in range(40)]
            for i, stream in enumerate(streams):
                connection.data(stream, good(), i % 2 == 0)
                if i % 2:
                    connection.headers([("x", "y")], True, stream)
            for answer in connection.wait(*streams):
                assert answer.status == 503 and b"policy_unavailable" in answer.body
            connection.close()
    assert seen == []
    every_admission_ends_once(door, *door.keys[-1:])


# --- ten thousand ---------------------------------------------------------------------------------------------------------

def mutate(rng, data, times):
    data = bytearray(data)
    for _ in range(times):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.choice([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\xff", b"\\u", b"\r\n", b"null", b"-1", b"1e999",
                        b'"model":"x",', b"\xed\xa0\x80", b"\\ud800", b" "])
            case 2 if at < len(data):
                del data[at:at + rng.randrange(1, 9)]
            case 3:
                data[at:at] = data[at:at + rng.randrange(1, 30)]
            case 4:
                del data[max(1, at):]
            case 5:
                data[at:at] = rng.randbytes(rng.randrange(1, 5))
            case 6 if at < len(data):
                data[at] = rng.randrange(256)
        if not data:
            data = bytearray(b"x")
    return bytes(data)


def bad_key(rng):
    key = list(key_like(rng))
    match rng.randrange(6):
        case 0:
            key[rng.randrange(3, 52)] = rng.choice("!-_./+é")
        case 1:
            del key[rng.randrange(52)]
        case 2:
            key.insert(rng.randrange(52), rng.choice(BASE62))
        case 3:
            at = rng.randrange(3, 52)
            key[at] = BASE62[(BASE62.index(key[at]) + 1) % 62]
        case 4:
            key = key[:rng.randrange(4, 50)]
        case 5:
            key[0:3] = rng.choice(["VK_", "vk-", "sk-", "", "vk_vk_"])
    return "".join(key) or "vk_"


def in_some_scheme(rng, key):
    name = rng.choice(["authorization", "authorization", "x-api-key", "api-key", "x-goog-api-key", "x-shopify-access-token", "proxy-authorization"])
    value = rng.choice(["Bearer {}", "bearer  {}", "{}", "Basic {}", "Token {}"]).format(key) if "authorization" in name else key
    return name, value.encode("utf-8", "replace")


def malformed(rng, tokens):
    """Kind, bytes of one malformed request."""
    kind = rng.choices(["json", "key", "header", "framing"], [40, 25, 15, 20])[0]
    body = good(rng.choice(["Hello", "☃ é", "x" * 300]), max_tokens=16, stream=rng.random() < 0.3,
                tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], n=1)
    token = rng.choice(tokens)
    match kind:
        case "json":
            bad = mutate(rng, body, rng.choice([1, 1, 2, 5, 20]))
            if rng.random() < 0.5:
                return kind, request(headers=bearer(token), body=bad)
            return kind, request(headers=[*bearer(token), ("transfer-encoding", "chunked")], length=False) + chunked(bad,
                        rng.choice([1, 3, 50, 1000]))
        case "key":
            return kind, request(headers=[in_some_scheme(rng, bad_key(rng)), ("content-type", "application/json")], body=body)
        case "header":
            name = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789-!#$%&'*+.^|~`", k=rng.randrange(1, 40)))
            value = bytes(rng.choice([b for b in range(0x20, 0x100) if b != 0x7f]) for _ in range(rng.choice([0, 1, 20, 2000])))
            extra = [(name, value.strip()), rng.choice([("content-encoding", "gzip"), ("authorization",
                        "Bearer " + bad_key(rng).encode("ascii", "replace").decode()), ("x-api-key", "vk_"), ("x_y", "z"),
                        ("anthropic-version", "1")])]
            return kind, request(headers=[*extra, ("x-goog-api-key", token)], body=b"{" + body)
        case _:
            raw = request(headers=bearer(token), body=body) if rng.random() < 0.5 else request(headers=[*bearer(token),
                        ("transfer-encoding", "chunked")], length=False) + chunked(body, 40)
            head = raw.index(b"\r\n\r\n") + 4
            return kind, mutate(rng, raw[:head], rng.choice([1, 2, 4])) + (raw[head:] if rng.random() < 0.5 else mutate(rng, raw[head:], 2))


async def read_answer(reader):
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        status = int(head[0].split()[1])
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in head[1:])}
        if status != 100:
            break
    body = b""
    if headers.get(b"transfer-encoding") == b"chunked":
        while size := int((await reader.readuntil(b"\r\n")), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    else:
        body = await reader.readexactly(int(headers.get(b"content-length", b"0")))
    return status, headers, body


async def throw(port, cases, workers):
    """Sends every case; gives kind, status, whether the body was what it should be. Framing cases may end without an answer."""
    results, queue = [], list(reversed(cases))

    async def framing(raw):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(raw)
            first = b""
            with contextlib.suppress(TimeoutError):
                first = await asyncio.wait_for(reader.read(65536), 0.2)
            with contextlib.suppress(OSError):
                writer.write_eof()
            rest = await asyncio.wait_for(reader.read(-1), 30)
            data = first + rest
            return int(data.split()[1]) if data.startswith(b"HTTP/1.1 ") else None
        except (ConnectionError, BrokenPipeError):
            return None
        finally:
            writer.close()

    async def worker():
        connection = None
        while queue:
            kind, raw = queue.pop()
            if kind == "framing":
                results.append((kind, await framing(raw), True, raw))
                continue
            for last in (False, True):
                if connection is None:
                    connection = await asyncio.open_connection("127.0.0.1", port)
                reader, writer = connection
                try:
                    writer.write(raw)
                    status, headers, body = await asyncio.wait_for(read_answer(reader), 30)
                except (asyncio.IncompleteReadError, ConnectionError):
                    # Closed after the answer before this one: once more on a new connection.
                    writer.close()
                    connection = None
                    if last:
                        results.append((kind, None, False, raw))
                    continue
                if headers.get(b"connection") == b"close":
                    writer.close()
                    connection = None
                is_json = body.lstrip()[:1] == b"{" or status == 200
                results.append((kind, status, is_json and (status == 200 or b"x-keyward-reason" in headers or b"openai-version" in headers or b"x-request-id" in headers), raw))
                break
        if connection:
            connection[1].close()

    await asyncio.gather(*(worker() for _ in range(workers)))
    return results


def test_ten_thousand_malformed_requests(door):
    rng = random.Random(20_260_101)
    _, known = door.new_key(label="fuzz")
    cases = [malformed(rng, [known, known, key_like(rng)]) for _ in range(10_000)]
    results = asyncio.run(throw(door.listen_port, cases, 24))
    assert len(results) == 10_000
    unanswered = [(kind, raw[:200]) for kind, status, _, raw in results if status is None and kind != "framing"]
    assert unanswered == []
    odd = [(kind, status, raw[-300:]) for kind, status, _, raw in results if status is not None and not (status == 200 or 400 <= status < 500 or (kind == "framing" and status in (501, 505)))]
    assert odd == [], odd[:3]
    # The gate reads keys and bodies itself: its refusals are the caller's dialect. (Envoy's own, of an x_y header, are not.)
    plain = [(kind, status, raw[:400]) for kind, status, fine, raw in results if kind in ("json", "key") and not fine]
    assert plain == [], plain[:3]
    assert {status for kind, status, *_ in results if kind == "key"} <= {400, 401}
    print(Counter((kind, status) for kind, status, *_ in results))


def test_ten_thousand_malformed_keys_ask_nobody(door):
    rng = random.Random(7)
    door.settled(*door.keys)
    door.no_settlements_pending()
    before = door.admissions_asked()
    keys = [in_some_scheme(rng, bad_key(rng)) for _ in range(10_000)]
    statuses = Counter()

    def shower(part):
        with Http1(door.listen_port, 60) as connection:
            for pair in part:
                connection.send(request("GET", "/v1/models", [pair], length=False))
                yield connection.answer().status

    for i in range(0, 9_000, 1_000):
        statuses.update(shower(keys[i:i + 1_000]))
    for pair in keys[9_000:]:
        statuses[one(door, request(headers=[pair], body=good())).status] += 1
    assert statuses == {401: 10_000}
    assert door.admissions_asked() == before


# --- memory ---------------------------------------------------------------------------------------------------------------

def test_bodies_of_nine_mebibytes_at_once(door):
    """The VM has 64 MiB; 24 such bodies are 216. None of them may stay in it, and a CRC is all it takes to send one."""
    filler = b'"audio":1,' * (9 * 2**20 // 10)
    bodies = {"text": good("x" * (9 * 2**20)), "escapes": good("x")[:-1] + b',"y":"' + b"\\u00e9" * (9 * 2**20 // 6) + b'"}',
              "governed": b"{" + filler + good()[1:]}
    rng = random.Random(3)

    def send(case):
        token, body = case
        return one(door, request(headers=bearer(token), body=body), 120).status

    with ThreadPoolExecutor(24) as pool:
        for body in bodies.values():
            assert set(pool.map(send, [(key_like(rng), body)] * 24)) <= {400, 401, 503}
        with news(door) as seen:
            statuses = Counter(pool.map(send, [(door.token, bodies["text"])] * 24))
        # Far beyond the model's context: the provider says so. A worker that is at its limit says 503.
        assert set(statuses) <= {400, 503} and statuses[400] == len(seen), statuses
        assert {r["body_bytes"] for r in seen} == {len(NOT_STORED + bodies["text"])}
    wait_for("all streams gone", lambda: door.stats("http.keyward.downstream_rq_active")["http.keyward.downstream_rq_active"] == 0, 20)


def test_eleven_mebibytes_are_too_large(door):
    body = good("x" * (11 * 2**20))
    with news(door) as seen:
        is_refusal(one(door, request(headers=bearer(door.token), body=body)), 413)
        is_refusal(one(door, request(headers=[*bearer(door.token), ("transfer-encoding", "chunked")], length=False) + chunked(body, 100_000)), 413)
    assert seen == []


def test_thousands_of_waiting_streams_stay_in_the_vm(door):
    """Headers and the first bytes of a body, with a key that only looks like one: what a stranger can leave lying."""
    connections = []
    token = key_like(random.Random(9))
    for _ in range(60):
        connection = Http2(door.listen_port, 60)
        for _ in range(100):
            connection.data(connection.headers(h2_headers(token)), b'{"model":"gpt-4o-mini","messages":[')
        connections.append(connection)
    for connection in connections:
        connection.sync()
    assert door.works(door.token)
    for connection in connections:
        connection.close()
    wait_for("all streams gone", lambda: door.stats("http.keyward.downstream_rq_active")["http.keyward.downstream_rq_active"] == 0, 30)


def test_an_outage_of_the_policy_service_fills_no_memory():
    """Every refused request of a stranger must not leave a record that waits for the service: 220,000 of them are 40 seconds of one client."""
    with Door(concurrency=1) as door:
        _, token = door.new_key()
        assert door.works(token)
        door.service.kill()
        fields = h2_headers(key_like(random.Random(11)), method="GET", path="/v1/models")
        for _ in range(22):
            with Http2(door.listen_port, 8) as connection:
                for _ in range(100):
                    streams = [connection.headers(fields, end=True) for _ in range(100)]
                    assert {answer.status for answer in connection.wait(*streams)} == {503}
                    connection.streams.clear()
        assert door.traps() == ([], 0)
        door.start_service()
        wait_for("admissions again", lambda: door.chat(token)[0] == 200)
        proven(door)


# --- a VM that dies --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trap_door():
    with Door(concurrency=1, hold_ttl=5, filter_module=os.environ["TRAP_FILTER"]) as door:
        yield door


@pytest.mark.parametrize("phase", ["reading", "pending", "waiting", "streaming", "settling"])
def test_a_trap_ends_what_its_worker_had_in_flight(trap_door, phase):
    door, before = trap_door, len(trap_door.violations())
    key_id, token = door.new_key(label=f"trap while {phase}")
    wait_for("a VM that serves", lambda: door.chat(token, timeout=5)[0] == 200, 20)
    every_admission_ends_once(door, key_id)
    seen_before = len(door.sim.ledger())
    body = {"waiting": good("[[sim first_ms=1500]]"), "streaming": good("[[sim tokens=400 pace_ms=20]]", stream=True)}.get(phase, good())
    with contextlib.ExitStack() as stack:
        hold = stack.enter_context(contextlib.ExitStack())
        if phase in ("pending", "settling"):
            if phase == "settling":
                for _ in range(3):
                    assert door.chat(token)[0] == 200
            hold.enter_context(held(door.service))
        connections = [stack.enter_context(Http1(door.listen_port, 25)) for _ in range(4)]
        for connection in connections:
            raw = request(headers=bearer(token), body=body)
            connection.send(raw[:-10] if phase == "reading" else raw if phase != "settling" else b"")
            if phase == "streaming":
                assert connection.head()[0] == 200
        time.sleep(0.2)
        assert one(door, request(headers=[*bearer(token), ("x-test-trap", "1")], body=good())).status == 503
        hold.close()
        for connection in connections:
            if phase == "reading":
                connection.send(body[-10:])
            if phase == "streaming":
                assert b"[DONE]" not in connection.drain()
            elif phase != "settling":
                with contextlib.suppress(Closed):
                    assert connection.answer().status == 503
    wait_for("the next request to work", lambda: door.chat(token, timeout=5)[0] == 200, 20)
    every_admission_ends_once(door, key_id)
    events = events_of(door, key_id)
    if phase == "settling":
        wait_for("the settlements that outlived the trap", lambda: events_of(door, key_id)["SETTLED"] == events["ADMITTED"], 30)
    if phase in ("reading", "pending"):
        assert len(door.sim.ledger()) == seen_before + 1
    proven(door, before)


def test_traps_under_load(trap_door):
    """Every twentieth request kills the VM: the others are answered or fail, and the books are right in the end."""
    door, before = trap_door, len(trap_door.violations())
    cost = door.sim.totals()["overall"]["cost_nanodollars"]
    key_id, token = door.new_key(label="traps under load")

    def ask(i):
        extra = [("x-test-trap", "1")] if i % 20 == 19 else []
        try:
            return one(door, request(headers=[*bearer(token), *extra], body=good("[[sim tokens=5 pace_ms=5]]", stream=i % 2 == 0)), 10).status
        except TimeoutError:
            return "hang"
        except (Closed, OSError):
            return None

    with ThreadPoolExecutor(4) as pool:
        statuses = Counter(pool.map(ask, range(120)))
    assert set(statuses) <= {200, 503, None}, statuses
    wait_for("the next request to work", lambda: door.chat(token, timeout=5)[0] == 200, 20)
    every_admission_ends_once(door, key_id)
    proven(door, before)
    assert door.key(key_id)["spent_nanodollars"] >= door.sim.totals()["overall"]["cost_nanodollars"] - cost


# --- without the gate -------------------------------------------------------------------------------------------------------

class Sideways(Door):
    """The same Envoy with a second listener that leads straight to the provider's cluster, past the gate."""

    def spawn_envoy(self, config=None):
        config = config or self.directory / "envoy.yaml"
        text = config.read_text()
        self.side_port = free_port()
        side = f"""
  - name: side
    address: {{socket_address: {{address: 127.0.0.1, port_value: {self.side_port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: side
          route_config:
            name: side
            virtual_hosts:
            - name: side
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: openai, retry_policy: {{retry_on: "5xx,reset", num_retries: 3}}}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"""
        config.write_text(text.replace("\n  clusters:\n", side + "  clusters:\n", 1))
        super().spawn_envoy(config)


def test_the_attempt_lets_nothing_through_without_a_permit():
    with Sideways(concurrency=2) as door:
        _, token = door.new_key()
        assert door.works(token)
        door.sim.quiet()
        known = door.sim.ledger()
        ids = [r["client_request_id"].removeprefix("req_") for r in known]
        for auth in (token, CREDENTIALS[0]["secret"], "x"):
            for extra in ([], [("x-keyward-flight", ids[0])], [("keyward.flight", ids[0])],
                        [("x-request-id", ids[0]), ("x-client-request-id", "req_" + ids[0])], [("x-envoy-retry-on", "5xx")]):
                with Http1(door.side_port) as connection:
                    connection.send(request(headers=[*bearer(auth), *extra], body=good()))
                    answer = connection.answer()
                assert answer.status == 503 and answer.header("x-keyward-reason") == "policy_unavailable", answer
        connection = Http2(door.side_port)
        stream = connection.headers(h2_headers(CREDENTIALS[0]["secret"]))
        connection.data(stream, good())
        connection.headers([("x", "y")], True, stream)
        assert connection.wait(stream).status == 503
        connection.close()
        # While a permit is out, on the same worker or another: it is that stream's alone.
        waiting = Http1(door.listen_port)
        waiting.send(request(headers=bearer(token), body=good("[[sim first_ms=500]]")))
        time.sleep(0.1)
        for _ in range(10):
            with Http1(door.side_port) as side:
                side.send(request(headers=bearer(token), body=good()))
                assert side.answer().status == 503
        assert waiting.answer().status == 200
        waiting.close()
        assert len(door.sim.ledger()) == len(known) + 1
        proven(door)
