"""The promise: who may no longer do it is refused at the next request, and what is running ends within a second, on every worker
of every Envoy: told why in the caller's own dialect, the provider disconnected, charged as cut, and written down so."""

import contextlib
import functools
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
import openai
import pytest
from fleet import Fleet, Reader, percentile, revocations
from harness import Stack, call, wait_for

DIALECTS = ["openai", "responses", "anthropic"]
LONG = "tokens=2900 pace_ms=40"


@pytest.fixture(scope="module")
def fleet():
    with Fleet(concurrency=4) as stack:
        yield stack


@pytest.fixture
def reader():
    with Reader() as reader:
        yield reader


def once_more_after_silence(test):
    """A stream is told why it ends where an event does; a provider that stands still for too long, as any process may on a busy machine,
    leaves no such place. Then the whole test is run again; a gate that tells nothing fails each time."""
    @functools.wraps(test)
    def run(*args, reader, **more):
        for _ in range(2):
            before = len(reader.streams)
            try:
                return test(*args, reader=reader, **more)
            except AssertionError:
                if not any(stream.met_silence() for stream in reader.streams[before:]):
                    raise
        return test(*args, reader=reader, **more)
    return run


@pytest.fixture(autouse=True)
def nothing_left_that_must_not(request):
    yield
    for name in ("fleet", "fresh"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name).sim.totals()["violations"] == []


def code_of(stream, dialect):
    """The reason that the stream's last event gives."""
    told = stream.ended_by()
    # Anthropic's error objects have no code: the text says it.
    return told if dialect != "anthropic" or told is None else {
        "this virtual key has been revoked": "revoked", "this virtual key has expired": "expired",
        "this virtual key may not use this model any more": "model_not_allowed", "this provider has been switched off": "unknown_provider",
        "this virtual key may not call this endpoint any more": "endpoint_not_allowed",
        "nothing is left of what this virtual key may spend": "cap_exhausted"}[told]


def ends_of(stack, key_id):
    """The key's books are right; how its requests ended, with their charges."""
    true, charged, ends = stack.books(key_id)
    return true, charged, [end["outcome"] for end in ends if end["event"] == "SETTLED"], ends


def disconnected(stack, key_id):
    return {call["ended"] for call in stack.calls_of(key_id)}


# --- what ends a stream ------------------------------------------------------------------------------------------------


def revoke(stack, key_id):
    stack.admin("DELETE", f"/v1/keys/{key_id}")


def forbid_the_model(stack, key_id):
    stack.admin("PATCH", f"/v1/keys/{key_id}", {"allow": {"models": ["o3"]}})


def forbid_the_endpoint(stack, key_id):
    stack.admin("PATCH", f"/v1/keys/{key_id}", {"allow": {"endpoints": ["POST /v1/embeddings"]}})


def lower_the_cap(stack, key_id):
    stack.admin("PATCH", f"/v1/keys/{key_id}", {"budgets": [{"usd": "0.000001", "window": "total"}]})


def rotate(stack, key_id):
    stack.admin("POST", f"/v1/keys/{key_id}/rotate", {"overlap": "0s"})


def shorten_its_life(stack, key_id):
    stack.admin("PATCH", f"/v1/keys/{key_id}", {"expires_in": "1s"})


CHANGES = [(revoke, "revoked"), (forbid_the_model, "model_not_allowed"), (forbid_the_endpoint, "endpoint_not_allowed"),
           (lower_the_cap, "cap_exhausted"), (rotate, "revoked"), (shorten_its_life, "expired")]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("change", "code"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
@once_more_after_silence
def test_a_change_ends_what_is_running(fleet, reader, dialect, change, code):
    """On both Envoys, with one well-formed error event; the bystander's streams go on to their own end."""
    key, bystander = fleet.new_key("50.00"), fleet.new_key("50.00")
    streams = [reader.open(port, key, LONG, dialect) for port in fleet.ports]
    others = [reader.open(port, bystander, "tokens=60 pace_ms=40", dialect) for port in fleet.ports]
    reader.wait_flowing(streams + others)
    change(fleet, key[0])
    reader.wait_closed(streams)
    assert [code_of(stream, dialect) for stream in streams] == [code, code]
    status, headers, _ = fleet.chat(key[1])
    assert (status, headers["x-keyward-reason"]) in [(401, code), (403, code), (429, code)], "denied at once"
    wait_for("the bystander's streams", lambda: all(b"\r\n0\r\n\r\n" in stream.data for stream in others))
    assert [stream.ended_by() for stream in others] == [None, None]
    true, charged, outcomes, ends = ends_of(fleet, key[0])
    assert outcomes == [f"ended:{code}"] * 2 and disconnected(fleet, key[0]) == {"client_gone"}
    assert 0 < true <= charged and all(end["estimated"] for end in ends)
    assert disconnected(fleet, bystander[0]) == {"complete"}


@once_more_after_silence
def test_a_policy_a_team_and_a_provider_end_what_they_no_longer_allow(fleet, reader):
    fleet.admin("PUT", "/v1/teams/push", {})
    fleet.admin("PUT", "/v1/policies/push", {})
    for path, now, before, code in (
        ("/v1/policies/push", {"allow": {"models": ["o3"]}}, {}, "model_not_allowed"),
        ("/v1/teams/push", {"allow": {"endpoints": ["POST /v1/embeddings"]}}, {}, "endpoint_not_allowed"),
        ("/v1/providers/openai", {"enabled": False}, {"enabled": True}, "unknown_provider"),
    ):
        key = fleet.new_key("50.00", team="push", policy="push")
        streams = [reader.open(port, key) for port in fleet.ports]
        reader.wait_flowing(streams)
        fleet.admin("PUT", path, now)
        reader.wait_closed(streams)
        fleet.admin("PUT", path, before)
        assert [stream.ended_by() for stream in streams] == [code, code]
        assert ends_of(fleet, key[0])[2] == [f"ended:{code}"] * 2


@once_more_after_silence
def test_a_key_that_is_frozen_ends_what_it_has_running(fleet, reader):
    """One request costs more than was held for it: the key is frozen when that is settled, and its other streams end."""
    from edge import BareGate

    key = fleet.new_key("50.00")
    streams = [reader.open(port, key) for port in fleet.ports]
    reader.wait_flowing(streams)
    gate = BareGate(fleet)
    req, answer = gate.admit(key[1])
    assert answer["plan"]["output_limit"] == 50
    gate.settle(gate.record(req, "complete", status=200, usage={"in": 100, "out": 900_000}))
    reader.wait_closed(streams)
    assert [stream.ended_by() for stream in streams] == ["cap_exhausted", "cap_exhausted"]
    assert fleet.key(key[0])["status"] == "frozen"


@pytest.mark.parametrize("dialect", DIALECTS)
@once_more_after_silence
def test_a_stream_ends_when_its_key_expires(fleet, reader, dialect):
    """The gate sees to it by itself: it was told at the admission."""
    key = fleet.new_key("50.00", expires_in="3s")
    streams = [reader.open(port, key, LONG, dialect) for port in fleet.ports]
    reader.wait_closed(streams)
    assert [code_of(stream, dialect) for stream in streams] == ["expired", "expired"]
    assert ends_of(fleet, key[0])[2] == ["ended:expired"] * 2


# --- however far it has come -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_request_without_an_answer_yet_is_refused(fleet, reader, dialect):
    key = fleet.new_key("50.00")
    seq = fleet.last_seq()
    asked = [reader.open(port, key, "first_ms=20000", dialect, stream) for port in fleet.ports for stream in (False, True)]
    wait_for("the provider at work", lambda: len(fleet.sim.ledger(seq)) == 4)
    revoke(fleet, key[0])
    wait_for("the answers", lambda: all(b"revoked" in stream.data and stream.body.endswith(b"}") for stream in asked))
    for stream in asked:
        assert stream.status == 401 and "x-keyward-reason: revoked" in stream.head
    # Sent is sent: whatever the provider had made is paid.
    assert ends_of(fleet, key[0])[2] == ["ended:revoked"] * 4
    assert disconnected(fleet, key[0]) == {"client_gone"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_that_is_no_stream_is_cut(fleet, reader, dialect):
    key = fleet.new_key("50.00")
    asked = [reader.open(port, key, "silent_ms=20000", dialect, stream=False) for port in fleet.ports]
    wait_for("the heads of the answers", lambda: all(b"\r\n\r\n" in stream.data for stream in asked))
    revoke(fleet, key[0])
    reader.wait_closed(asked)
    assert [(stream.status, stream.body) for stream in asked] == [(200, b"")] * 2
    assert ends_of(fleet, key[0])[2] == ["ended:revoked"] * 2


def test_a_silent_stream_is_cut(fleet, reader):
    key = fleet.new_key("50.00")
    streams = [reader.open(port, key, "tokens=300 pace_ms=20000", dialect) for port in fleet.ports for dialect in DIALECTS]
    reader.wait_flowing(streams, 1)
    revoke(fleet, key[0])
    reader.wait_closed(streams)
    assert [stream.ended_by() for stream in streams] == [None] * 6
    assert ends_of(fleet, key[0])[2] == ["ended:revoked"] * 6 and disconnected(fleet, key[0]) == {"client_gone"}


@pytest.mark.parametrize("split", [1, 7, 64, 250])
@pytest.mark.parametrize("dialect", DIALECTS)
@once_more_after_silence
def test_the_error_stands_between_two_events_however_the_stream_is_cut_up(fleet, reader, dialect, split):
    """Also with line ends of two bytes, which a piece may part."""
    key = fleet.new_key("50.00")
    words = [f"tokens=2900 pace_ms=30 split={split}{more}" for more in ("", " crlf=1")]
    streams = [reader.open(port, key, word, dialect) for port in fleet.ports for word in words]
    reader.wait_flowing(streams)
    revoke(fleet, key[0])
    reader.wait_closed(streams)
    assert [code_of(stream, dialect) for stream in streams] == ["revoked"] * 4


class Between(Stack):
    """The policy service behind a stretch of line on which the answers to admissions can be held up, and nothing else."""

    def start_envoy(self):
        self.free = threading.Event()
        self.free.set()
        outer, service = self, f"http://127.0.0.1:{self.edge_port}"

        class Line(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                status, _, answer = call(service, self.command, self.path, body, {"authorization": self.headers["authorization"]})
                if self.path.endswith("/admit"):
                    outer.free.wait(20)
                # Envoy may have given the request up.
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("content-length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.line = ThreadingHTTPServer(("127.0.0.1", 0), Line)
        threading.Thread(target=self.line.serve_forever, daemon=True).start()
        edge_port, self.edge_port = self.edge_port, self.line.server_port
        super().start_envoy()
        self.edge_port = edge_port

    def __exit__(self, *error):
        self.line.shutdown()
        super().__exit__(*error)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_permit_that_comes_after_the_revocation_is_void(reader, dialect):
    """Admitted and written down, but the answer is still on its way when the key is revoked: the caller is refused, nothing leaves,
    and when the answer comes it changes nothing."""
    with Between(concurrency=2, admit_timeout_ms=8000) as stack:
        key = stack.new_key("50.00")
        assert stack.chat(key[1])[0] == 200
        stack.settled(key[0])
        seq = stack.last_seq()
        stack.free.clear()
        asked = [reader.open(stack.listen_port, key, "tokens=5", dialect, stream) for stream in (False, True)]
        wait_for("the admissions", lambda: stack.key(key[0])["in_flight"] == 2)
        revoke(stack, key[0])
        wait_for("the refusals", lambda: all(stream.body.endswith(b"}") for stream in asked))
        for stream in asked:
            assert stream.status == 401 and "x-keyward-reason: revoked" in stream.head
        stack.free.set()
        assert [end["event"] for end in stack.books(key[0])[2]] == ["SETTLED", "VOIDED", "VOIDED"]
        assert stack.last_seq() == seq


def test_revoked_in_the_middle_of_a_run_of_short_requests(fresh):
    key = fresh.new_key("50.00")
    stopped = threading.Event()
    results = []

    def ask():
        while not stopped.is_set():
            results.append(fresh.chat(key[1], "[[sim tokens=2]]", timeout=10)[:2])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_for("requests", lambda: len(results) > 40)
    revoke(fresh, key[0])
    stopped.set()
    for thread in threads:
        thread.join()
    assert {status for status, _ in results} <= {200, 401}
    assert {headers["x-keyward-reason"] for status, headers in results if status == 401} <= {"revoked"}
    fresh.books(key[0])


# --- the SDKs ----------------------------------------------------------------------------------------------------------


def test_the_sdks_raise_it(fleet):
    """Each SDK raises its own error in mid-stream, with the reason."""
    def chat(client):
        return client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": f"[[sim {LONG}]]"}], stream=True)

    def response(client):
        return client.responses.create(model="gpt-4o-mini", input=f"[[sim {LONG}]]", stream=True)

    def message(client):
        return client.messages.create(model="claude-haiku-4-5", max_tokens=3000, messages=[{"role": "user", "content": f"[[sim {LONG}]]"}], stream=True)

    for make, raised in ((chat, openai.APIError), (response, openai.APIError), (message, anthropic.APIStatusError)):
        key_id, token = fleet.new_key("50.00")
        client = anthropic.Anthropic(base_url=fleet.base, api_key=token) if make is message else openai.OpenAI(base_url=fleet.base + "/v1", api_key=token)
        seen = 0
        with pytest.raises(raised) as error:
            for _ in make(client):
                seen += 1
                if seen == 5:
                    revoke(fleet, key_id)
        assert seen >= 5 and "revoked" in str(error.value), error.value
        assert ends_of(fleet, key_id)[2] == ["ended:revoked"]


# --- what can break meanwhile ------------------------------------------------------------------------------------------


@once_more_after_silence
def test_a_revocation_just_before_the_service_is_killed_is_not_forgotten(fresh, reader):
    """The service dies with the news still in its memory, and is back: its first answer tells everything."""
    for _ in range(3):
        key, bystander = fresh.new_key("50.00"), fresh.new_key("50.00")
        stream, other = reader.open(fresh.listen_port, key), reader.open(fresh.listen_port, bystander)
        reader.wait_flowing([stream, other])
        # The gate hears nothing until after the restart: its question is held by a service that stands still, and then dies.
        revoke(fresh, key[0])
        fresh.service.kill()
        fresh.start_service()
        reader.wait_closed([stream])
        assert stream.ended_by() == "revoked" and not other.closed
        revoke(fresh, bystander[0])
        reader.wait_closed([other])
        assert other.ended_by() == "revoked"
        assert ends_of(fresh, key[0])[2] == ["ended:revoked"]


@once_more_after_silence
def test_a_service_that_is_away_is_asked_again_and_not_in_a_spin(fresh, reader):
    key = fresh.new_key("50.00")
    stream = reader.open(fresh.listen_port, key)
    reader.wait_flowing([stream])
    fresh.service.kill()
    before = fresh.stats("keyward_watch_polls_total")["wasmcustom.keyward_watch_polls_total"]
    time.sleep(3)
    asked = fresh.stats("keyward_watch_polls_total")["wasmcustom.keyward_watch_polls_total"] - before
    # Every half second; a spin would be thousands.
    assert 2 <= asked <= 20
    assert not stream.closed, "by default streams finish"
    fresh.start_service()
    revoke(fresh, key[0])
    reader.wait_closed([stream])
    assert stream.ended_by() == "revoked"


def test_the_service_stops_at_once_although_questions_are_held(fresh):
    wait_for("a held question", lambda: fresh.stats("upstream_rq_active")["cluster.keyward_policy.upstream_rq_active"] == 1)
    fresh.service.terminate(timeout=4)
    assert fresh.service.process.returncode == 0, "it had to be killed"
    fresh.start_service()


def test_streams_end_when_the_service_is_lost_for_too_long(tmp_path):
    with Stack(concurrency=2) as stack:
        file = stack.directory / "envoy.yaml"
        stack.envoy.kill()
        text = file.read_text()
        assert text.count('"unmanaged": "deny"') == 1
        file.write_text(text.replace('"unmanaged": "deny"', '"unmanaged": "deny", "on_lost_watch": {"end_after": "8s"}'))
        stack.spawn_envoy()
        key = stack.new_key("50.00")
        with Reader() as reader:
            stream = reader.open(stack.listen_port, key)
            reader.wait_flowing([stream])
            # Longer than the span: the regular answers keep it alive.
            time.sleep(10)
            assert not stream.closed
            stack.service.kill()
            reader.wait_closed([stream])
            assert stream.ended_by() == "policy_unavailable"
        stack.start_service()
        assert ends_of(stack, key[0])[2] == ["ended:policy_unavailable"]


@pytest.mark.skipif("TRAP_FILTER" not in os.environ, reason="needs the filter that can be made to trap")
@pytest.mark.parametrize("trap", ["lease", "any"])
def test_a_trap_is_made_good(trap):
    """`lease`: the VM that asks for all traps, and another goes on. `any`: a worker traps. What the others have running still ends."""
    with Stack(concurrency=4, filter_module=os.environ["TRAP_FILTER"]) as stack, Reader() as reader:
        def counted(name):
            return stack.stats(name)[f"wasmcustom.{name}"]

        for _ in range(4):
            keys = [stack.new_key("50.00") for _ in range(12)]
            wait_for("a VM that serves", lambda: stack.chat(keys[0][1])[0] == 200)
            streams = [reader.open(stack.listen_port, key) for key in keys]
            reader.wait_flowing(streams)
            before = counted("keyward_watch_takeovers_total")
            with contextlib.suppress(OSError):
                stack.chat(keys[0][1], headers={"x-test-trap": trap})
            if trap == "lease":
                wait_for("another VM to ask", lambda: counted("keyward_watch_takeovers_total") > before)
            for key in keys:
                revoke(stack, key[0])
            reader.wait_closed(streams)
            # Those of the worker that trapped were cut with it.
            told = [stream.ended_by() for stream in streams]
            assert set(told) <= {"revoked", None} and told.count("revoked") >= 2, told
        wait_for("a VM that serves", lambda: stack.chat(stack.new_key()[1])[0] == 200)
        assert counted("keyward_vm_starts_total") > 5, "nothing trapped"


# --- the figure --------------------------------------------------------------------------------------------------------


def test_100_revocations_under_load(fleet):
    last, end, streams, others = revocations(fleet, count=100, wave=25)
    assert {stream.ended_by() or "revoked: " + str(stream.body[-200:]) for stream in streams} <= {"revoked", "this virtual key has been revoked"}
    assert {result.status for result in others} == {200} and all(result.whole for result in others)
    stats = fleet.both_stats("keyward_watch_takeovers|vm_starts")
    print(f"last byte: p50 {percentile(last, 0.5):.3f} s, p99 {percentile(last, 0.99):.3f} s, max {max(last):.3f} s; end: max {max(end):.3f} s; {stats}")
    # The promise is one second, and `make soak` holds it to that. Here other tests may have the machine to themselves for a while.
    assert max(last) < 5
