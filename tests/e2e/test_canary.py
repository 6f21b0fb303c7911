"""No secret stands where it should not: real credentials, virtual keys, their hashes, the edge token, in any encoding."""

import base64
import hashlib
import http.server
import itertools
import json
import os
import subprocess
import threading
import time
import zlib
from pathlib import Path

import pytest
from harness import CREDENTIALS, SERVICE_BIN, Part, Stack, call, free_port, wait_for

# A well-formed key that nobody issued (its CRC fits), and a provider's key of somebody else that an agent sends by mistake.
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
STRAY = "sk-proj-Zz8VnQ2wYp4KfR7tLm3XcJ6bHs9Gd1EaUoS5"


def unissued():
    digits = "4kT9" * 10 + "abc"
    crc, tail = zlib.crc32(digits.encode()), ""
    for _ in range(6):
        crc, digit = divmod(crc, 62)
        tail = BASE62[digit] + tail
    return f"vk_{digits}{tail}"


# --- searching ---------------------------------------------------------------------------------------------------------


def base64_forms(secret):
    """What of a secret's base64 does not depend on its neighbours, at each of the three alignments, in both alphabets."""
    for lead in range(3):
        encoded = base64.b64encode(bytes(lead) + secret)
        first = -(-lead * 8 // 6)
        last = (lead + len(secret)) * 8 // 6
        yield encoded[first:last]
        yield encoded[first:last].replace(b"+", b"-").replace(b"/", b"_")


def encodings(secret):
    """Every form in which a secret is looked for."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield from base64_forms(secret)


class Search:
    def __init__(self):
        self.needles = {}

    def secret(self, name, text):
        """A secret of printable characters: whole, and its first and last 20 characters, as a log that cuts would show it."""
        data = text.encode()
        for part, piece in (("", data), (" (beginning)", data[:20]), (" (end)", data[-20:])):
            self.hash(f"{name}{part}", piece)

    def hash(self, name, data):
        for form in encodings(data):
            self.needles[form] = name

    def hits(self, places):
        """(place, what) of everything found."""
        return [(place, name) for place, data in places.items() for needle, name in self.needles.items() if needle in data]


def everything(stack):
    """What must hold no credential, no virtual key and no hash of one."""
    search = Search()
    for credential in CREDENTIALS:
        search.secret(f"credential {credential['id']}", credential["secret"])
    search.secret("a stray provider key", STRAY)
    for n, token in enumerate([*stack.tokens, unissued()]):
        search.secret(f"virtual key {n}", token)
        search.hash(f"hash of virtual key {n}", hashlib.sha256(token.encode()).digest())
    return search


def installation(stack):
    """The secrets of the installation itself."""
    search = Search()
    edge = (stack.directory / "data/edge-token").read_text().strip().removeprefix("Bearer ")
    search.secret("edge token", edge)
    search.secret("admin token", stack.admin_token)
    search.hash("hash of the admin token", hashlib.sha256(stack.admin_token.encode()).digest())
    kek = (stack.directory / "data/kek").read_text().strip()
    search.secret("key-encryption key, as text", kek)
    search.hash("key-encryption key", bytes.fromhex(kek))
    return search


def envoy_pages(stack):
    """What Envoy's own admin port shows."""
    paths = ["/config_dump", "/config_dump?include_eds", "/stats", "/stats?format=json", "/stats/prometheus", "/certs", "/clusters", "/clusters?format=json",
             "/listeners", "/server_info", "/runtime", "/memory", "/contention", "/init_dump", "/hot_restart_version", "/stats/recentlookups"]
    places = {}
    for path in paths:
        status, headers, data = call(f"http://127.0.0.1:{stack.envoy_admin_port}", "GET", path)
        assert status == 200 or path in ("/contention", "/stats/recentlookups"), (path, status)
        places[f"envoy {path}"] = data
    assert len(places["envoy /config_dump?include_eds"]) > 5000 and b"keyward-gate" in places["envoy /config_dump"]
    return places


def logs(stack):
    places = {name: (stack.directory / name).read_bytes() for name in ("envoy.log", "service.log", "access.log", "envoy.yaml")}
    assert len(places["access.log"]) > 1000
    for part in (stack.envoy, stack.service):
        if part.running():
            places[f"{part.name} command line"] = Path(f"/proc/{part.process.pid}/cmdline").read_bytes()
    return places


def database(stack, moment):
    found = {f"{path.name} {moment}": path.read_bytes() for path in (stack.directory / "data").iterdir() if path.name.startswith("keyward.db")}
    assert f"keyward.db {moment}" in found
    return found


def service_pages(stack, key_ids):
    """What the admin API shows to who may ask. The answer that makes a key is the one place where its token stands."""
    bearer = {"authorization": f"Bearer {stack.admin_token}"}
    paths = ["/metrics", "/healthz", "/readyz", "/v1/keys", "/v1/credentials", "/v1/nothing",
             *(f"/v1/keys/{key_id}" for key_id in key_ids), *(f"/v1/audit/{key_id}" for key_id in key_ids), *(f"/v1/audit/{key_id}/bundle" for key_id in key_ids)]
    places = {f"admin {path}": heads_and_body(call(stack.admin_base, "GET", path, headers=bearer)) for path in paths}
    assert b"keyward_admissions_total" in places["admin /metrics"]
    return places


def heads_and_body(answer):
    status, headers, body = answer
    return f"{status}\n{json.dumps(headers)}\n".encode() + body


# --- a busy run --------------------------------------------------------------------------------------------------------


def basic(user, password):
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def schemes(token):
    """Every way in which an SDK sends a key."""
    yield "/v1/chat/completions", {"authorization": f"Bearer {token}"}
    yield "/v1/chat/completions", {"authorization": f"bearer {token}"}
    yield "/v1/chat/completions", basic(token, "")
    yield "/v1/chat/completions", basic("agent", token)
    for name in ("x-api-key", "api-key", "x-goog-api-key", "x-shopify-access-token", "x-postmark-server-token"):
        yield "/v1/chat/completions", {name: token}
    yield f"/v1/chat/completions?key={token}", {}
    yield f"/openai/v1/chat/completions?a=b&key={token}", {}
    yield "/v1/chat/completions", {"authorization": f"Bearer {token}", "x-api-key": token}


class Agents:
    """Keeps everything that an agent received."""

    def __init__(self, stack):
        self.stack, self.received, self.statuses = stack, {}, {}

    def send(self, what, method, path, headers, body=None):
        answer = call(self.stack.base, method, path, body, headers)
        place = f"answer {len(self.received)}: {what}"
        self.received[place] = heads_and_body(answer)
        self.statuses.setdefault(answer[0], []).append(what)
        return answer[0]

    def chat(self, what, token, content="Hello", **more):
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}], **more}
        return self.send(what, "POST", "/v1/chat/completions", {"authorization": f"Bearer {token}"}, body)


def busy_run(stack):
    """Successes, streams, refusals, failures of the provider, of the policy service, of admin calls."""
    agents = Agents(stack)
    key_id, token = stack.new_key("10.00")
    open_id, open_token = stack.new_key()
    narrow_id, narrow = stack.new_key("0.0001", allow={"models": ["gpt-4o-mini"], "endpoints": ["POST /v1/chat/completions"]})
    gone_id, gone = stack.new_key("1.00")
    brief_id, brief = stack.new_key("1.00", expires_in="1s")
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
    for path, headers in schemes(token):
        used = [*headers, "query"][0]
        # Other schemes than the query's are found; whether this endpoint takes them or not, nothing may show.
        assert agents.send(f"scheme {used}", "POST", path, headers, body) == 200, used
    claude = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
    for stream in (False, True):
        assert agents.send("anthropic", "POST", "/v1/messages", {"x-api-key": token, "anthropic-version": "2023-06-01"}, {**claude, "stream": stream}) == 200
        assert agents.chat("stream", token, "Hello [[sim tokens=30 pace_ms=3]]", stream=stream) == 200
    agents.send("models", "GET", "/v1/models", {"authorization": f"Bearer {open_token}"})
    # Refusals.
    stack.admin("DELETE", f"/v1/keys/{gone_id}")
    refused = [agents.chat("revoked", gone), agents.chat("unissued", unissued()), agents.chat("garbage", token[:-1] + "!"), agents.chat("cut", token[:30]),
               agents.chat("a provider's key", STRAY), agents.chat("another model", narrow, model="gpt-4o"),
               agents.chat("cap", narrow, "x" * 4000, max_tokens=16000), agents.chat("no model", token, model=""), agents.chat("unknown model", token, model="gpt-99"),
               agents.send("no key", "POST", "/v1/chat/completions", {}, body),
               agents.send("two keys", "POST", "/v1/chat/completions", {"authorization": f"Bearer {token}", "x-api-key": open_token}, body),
               agents.send("no JSON", "POST", "/v1/chat/completions", {"authorization": f"Bearer {token}"}, token.encode()),
               agents.send("key in the path", "POST", f"/v1/{token}", {"authorization": f"Bearer {token}"}, body),
               agents.send("key in a strange path", "GET", f"/{token}/../%2f?key={token}", {"authorization": f"Bearer {token}"}),
               agents.send("unknown provider", "POST", f"/stripe/v1/x?key={token}", {}, body),
               agents.send("steering", "POST", "/v1/chat/completions", {"x-keyward-plan": token, "x-envoy-original-path": token}, body)]
    assert all(400 <= status < 500 for status in refused), refused
    assert agents.send("steering with a key", "POST", "/v1/chat/completions", {"authorization": f"Bearer {token}", "x-keyward-key": token, "cookie": f"k={token}"}, body) == 200
    # A provider that fails.
    for directive in ("status=401", "status=403", "status=429 retry_after=3", "status=500", "status=503", "error=insufficient_quota", "no_usage=1", "gzip=1",
                      "cut_after_bytes=40", "reset_after_bytes=60"):
        for stream in (False, True):
            try:
                agents.chat(directive, token, f"Hello [[sim {directive}]]", stream=stream)
            except OSError:
                pass
            except Exception as error:
                assert "IncompleteRead" in type(error).__name__ or "Disconnected" in type(error).__name__, error
        if directive.startswith(("status=4", "error")):
            # Or the next one would not reach the provider.
            stack.settled(key_id)
            stack.recover()
    # Admin calls, also wrong ones with a secret in them.
    wrong = [("GET", "/v1/keys", None, "Bearer " + token), ("GET", f"/v1/keys/{token}", None, None), ("POST", "/v1/keys", {"label": 5, "allow": token}, None),
             ("POST", "/v1/credentials", {"provider": "openai", "secret": CREDENTIALS[0]["secret"], "more": 1}, None),
             ("POST", "/v1/credentials", {"provider": "nobody", "secret": CREDENTIALS[0]["secret"]}, None),
             ("POST", "/v1/credentials", {"provider": "openai", "secret": CREDENTIALS[0]["secret"] + "\n"}, None),
             ("POST", "/v1/credentials", {"provider": "openai", "secret": token}, None),
             ("POST", "/v1/credentials", {"provider": "openai", "secret": [CREDENTIALS[0]["secret"]]}, None),
             ("GET", f"/v1/audit/{token}/bundle", None, None), ("POST", "/v1/settlements/import", None, None), ("GET", f"/v1/keys?limit={token}", None, None),
             ("GET", f"/v1/{token}", None, None)]
    for n, (method, path, data, authorization) in enumerate(wrong):
        answer = call(stack.admin_base, method, path, data, {"authorization": authorization or f"Bearer {stack.admin_token}"})
        agents.received[f"admin answer {n}: {method} {path.replace(token, 'TOKEN')}"] = heads_and_body(answer)
        assert answer[0] >= 400 or path.endswith("import"), (path, answer)
    edge = f"http://127.0.0.1:{stack.edge_port}"
    for authorization in ("", "Bearer kwe_00", f"Bearer {token}"):
        answer = call(edge, "POST", "/edge/v1/admit", {"token": token}, {"authorization": authorization})
        agents.received[f"edge answer to {len(authorization)}"] = heads_and_body(answer)
        assert answer[0] == 401
    # The policy service goes and comes again; a credential is replaced meanwhile.
    stack.service.kill()
    assert agents.chat("service gone", token) == 503
    stack.start_service()
    wait_for("the service again", lambda: agents.chat("service again", token) == 200)
    time.sleep(1.1)
    assert agents.chat("expired", brief) == 401
    stack.settled(key_id, open_id, narrow_id)
    assert {200, 400, 401, 403, 429, 502, 503} <= set(agents.statuses), sorted(agents.statuses)
    return agents, [key_id, open_id, narrow_id, gone_id, brief_id]


@pytest.mark.parametrize("log_level", ["warning", "info"])
def test_no_secret_shows_anywhere(log_level):
    with Stack(concurrency=2) as stack:
        if log_level != "warning":
            # Louder logs, turned on while it runs. (At debug level Envoy itself prints all headers: docs say never to.)
            assert call(f"http://127.0.0.1:{stack.envoy_admin_port}", "POST", f"/logging?level={log_level}")[0] == 200
            stack.service.terminate()
            stack.service_env = {"RUST_LOG": "trace"}
            stack.start_service()
        agents, key_ids = busy_run(stack)
        stack.sim.quiet()
        time.sleep(0.3)
        agents_see = everything(stack)
        places = {**logs(stack), **envoy_pages(stack), **service_pages(stack, key_ids), **database(stack, "while it runs"), **agents.received}
        assert agents_see.hits(places) == []
        assert log_level == "warning" or len(places["service.log"]) > 1000, "the louder log is not on"
        # The service's own pages are for the administrator, but hold none of these either.
        assert installation(stack).hits(places) == []

        # What the provider received: its own credential, and never a virtual key.
        assert stack.sim.totals()["violations"] == []
        ledger = stack.sim.ledger()
        assert len(ledger) > 20
        for request in ledger:
            seen = json.dumps(stack.sim.headers(request["seq"])).encode() + stack.sim.body(request["seq"]) + json.dumps(request).encode()
            assert b"vk_" not in seen and b"kwe_" not in seen and b"kwa_" not in seen and STRAY.encode() not in seen, request
            assert installation(stack).hits({"provider": seen}) == []

        # The disk after kill -9: what was in memory a moment ago may not have been written either.
        stack.service.kill()
        stack.envoy.kill()
        places = {**logs(stack), **database(stack, "after kill -9")}
        assert everything(stack).hits(places) == [] and installation(stack).hits(places) == []
        left = {str(path): path.read_bytes() for path in stack.directory.rglob("*") if path.is_file() and path.name not in ("kek", "edge-token")}
        assert everything(stack).hits(left) == [] and installation(stack).hits(left) == []
        assert any(path.endswith("/root") for path in left) and any(path.endswith("filter.wasm") for path in left)


def test_the_search_finds_what_is_there():
    """A canary planted in a copy of each place, in each encoding, at each alignment, is found; the unplanted copy is clean."""
    with Stack() as stack:
        key_id, _ = stack.new_key("1.00")
        assert stack.chat(stack.tokens[0])[0] == 200
        stack.settled(key_id)
        wait_for("the access log", lambda: "KS1" in (stack.directory / "access.log").read_text())
        search, inner = everything(stack), installation(stack)
        clean = {**{name: (stack.directory / name).read_bytes() for name in ("access.log", "service.log", "envoy.log")}, **database(stack, "copy")}
        assert search.hits(clean) == [] and inner.hits(clean) == []
        token = stack.tokens[0].encode()
        edge = (stack.directory / "data/edge-token").read_text().strip().removeprefix("Bearer ").encode()
        canaries = [("credential", CREDENTIALS[0]["secret"].encode(), search), ("virtual key", token, search), ("hash", hashlib.sha256(token).digest(), search),
                    ("edge token", edge, inner), ("admin token", stack.admin_token.encode(), inner), ("stray", STRAY.encode(), search)]
        for (place, data), (name, secret, finder) in itertools.product(clean.items(), canaries):
            planted = [secret, secret.hex().encode(), secret.hex().upper().encode()]
            for lead, trail in itertools.product(range(3), range(3)):
                surrounded = os.urandom(lead) + secret + os.urandom(trail)
                planted += [base64.b64encode(surrounded), base64.urlsafe_b64encode(surrounded), base64.b64encode(surrounded).rstrip(b"=")]
            for form in planted:
                at = len(data) // 2
                assert finder.hits({place: data[:at] + form + data[at:]}), f"{name} as {form!r} in {place} is not found"
        # And half of one, as a log that cuts its lines would leave it.
        assert search.hits({"cut": b"... " + token[:25] + b"..."}) and search.hits({"cut": b"..." + CREDENTIALS[1]["secret"][-21:].encode()})


# --- a provider that repeats what it was sent --------------------------------------------------------------------------


class Parrot(http.server.BaseHTTPRequestHandler):
    """Answers with the credential it was sent: in headers always, in the body when asked. The simulator never does that."""

    protocol_version = "HTTP/1.1"
    in_body = False

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        sent = self.headers.get("authorization", "")
        said = f"You sent {sent}" if self.in_body else "Hello"
        body = json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-4o-mini",
                           "choices": [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}],
                           "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if not self.in_body:
            self.send_header("authorization", sent)
            self.send_header("x-echo", f"you sent: {sent}; thank you")
            self.send_header("set-cookie", f"key={sent.removeprefix('Bearer ')}")
            self.send_header("www-authenticate", f'Bearer realm="{sent}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def parrot_run(in_body):
    handler = type("Handler", (Parrot,), {"in_body": in_body})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        # The later --provider wins: openai is the parrot.
        with Stack(render_options=["--provider", f"openai=http://127.0.0.1:{server.server_port}"]) as stack:
            key_id, token = stack.new_key("1.00")
            answers = {f"answer {n}": heads_and_body(stack.chat(token)) for n in range(5)}
            assert all(answer.startswith(b"200") and b"chat.completion" in answer for answer in answers.values()), answers
            stack.settled(key_id)
            time.sleep(0.3)
            files = {name: (stack.directory / name).read_bytes() for name in ("envoy.log", "service.log", "access.log")}
            return everything(stack).hits({**answers, **files, **envoy_pages(stack), **database(stack, "now")})
    finally:
        server.shutdown()


def test_a_provider_that_repeats_the_credential_in_headers_does_not_tell_it_to_the_agent():
    assert parrot_run(in_body=False) == []


def test_of_a_credential_that_a_provider_repeats_in_a_body_nothing_is_kept():
    """Bodies pass as they are, so the agent sees it (docs/threat-model.md says so); no log and no database does."""
    hits = parrot_run(in_body=True)
    assert [hit for hit in hits if not hit[0].startswith("answer")] == []


# --- files -------------------------------------------------------------------------------------------------------------


def test_secret_files_are_their_owner_s_alone():
    with Stack() as stack:
        data = stack.directory / "data"
        for name in ("kek", "root", "edge-token"):
            assert oct((data / name).stat().st_mode & 0o777) == "0o600", name
        # What is sealed or hashed may be read, but nobody else may write it.
        for path in data.iterdir():
            assert path.stat().st_mode & 0o022 == 0, f"others can write {path.name}"


@pytest.mark.parametrize("name", ["kek", "root", "edge-token"])
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_secret_file_that_others_can_read_is_refused(tmp_path, name, mode):
    service = Part("service", tmp_path)
    command = [SERVICE_BIN, "--data", str(tmp_path / "data"), "--edge", f"127.0.0.1:{free_port()}", "--admin", f"127.0.0.1:{free_port()}"]
    service.spawn(command, stdout=subprocess.PIPE)
    try:
        service.ready_line()
        service.terminate()
        os.chmod(tmp_path / "data" / name, mode)
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode != 0 and done.stdout == ""
        assert name in done.stderr and "chmod 600" in done.stderr
        os.chmod(tmp_path / "data" / name, 0o600)
        service.spawn(command, stdout=subprocess.PIPE)
        assert service.ready_line()["bootstrap_admin_token"] is None
    finally:
        service.kill()


def test_another_kek_is_refused(tmp_path):
    service = Part("service", tmp_path)
    command = [SERVICE_BIN, "--data", str(tmp_path / "data"), "--edge", f"127.0.0.1:{free_port()}", "--admin", f"127.0.0.1:{free_port()}"]
    service.spawn(command, stdout=subprocess.PIPE)
    service.ready_line()
    service.terminate()
    kek = tmp_path / "data/kek"
    right = kek.read_text()
    for wrong in ("00" * 32, "short", "zz" * 32):
        kek.write_text(wrong)
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode != 0 and wrong not in done.stderr and right.strip() not in done.stderr, done.stderr
