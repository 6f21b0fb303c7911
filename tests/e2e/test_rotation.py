"""The promise: a pool of keys is a pool of budgets. What one key refuses the next one serves, unseen by the caller and paid once,
and a key that said that it is out is left alone. The trials of soak_rotation.py at a size for every day."""

import contextlib
import copy
import json
import os
import time
from types import SimpleNamespace

import pytest
import rotation
from demand import Answer, Ask
from fleet import Fleet
from harness import Stack, pool
from money import Books
from rotation import CLAUDE, DEATHS, GPT, answers_findings, one_by_one_findings, too_late, tries_findings

# Who repeats a try: Envoy's router, or the gate by callouts of its own.
ROTATIONS = ["router", "callout"]


def passes(trial):
    """A trial without findings; what it saw stands in the output of `pytest -s`."""
    print("\n" + trial.row())
    assert not trial.findings, "\n".join([trial.row(), *trial.findings[:40]])


@pytest.fixture(params=ROTATIONS)
def rotating(request):
    """A system of one's own with a pool of so many keys: what happens to them stays with them."""
    with contextlib.ExitStack() as stacks:
        def start(size, model=GPT, kind=Stack, concurrency=2, **options):
            credentials = pool(size, rotation.provider_of(model))
            return stacks.enter_context(kind(concurrency=concurrency, credentials=credentials, rotation=request.param, **options))
        yield start


MODELS = pytest.mark.parametrize("model", [GPT, CLAUDE])


@MODELS
def test_one_key_of_five_serves_all(rotating, model):
    passes(rotation.four_of_five(rotating(5, model), requests=200, at_once=40, model=model))


def test_a_rotated_stream_begins_hardly_later(rotating):
    passes(rotation.first_token(rotating(5), pairs=8))


@MODELS
def test_as_many_tries_as_there_are_keys(rotating, model):
    passes(rotation.no_hidden_cap(rotating(12, model), model=model))


@pytest.mark.parametrize(("model", "kind"), [(model, kind) for model in (GPT, CLAUDE) for kind in DEATHS[rotation.provider_of(model)]])
def test_a_key_that_is_out_is_not_asked_again(rotating, model, kind):
    passes(rotation.dies(rotating(3, model), kind, model=model))


@MODELS
def test_keys_that_are_all_rejected_are_no_fault_of_the_caller(rotating, model):
    passes(rotation.all_rejected(rotating(3, model), model=model))


@MODELS
def test_an_overloaded_provider_is_passed_on(rotating, model):
    passes(rotation.overloaded(rotating(3, model), model=model))


def test_large_bodies_rotate_up_to_the_limit(rotating):
    passes(rotation.large_bodies(rotating(3)))


def test_a_body_that_may_pass_but_not_twice_has_one_try(rotating):
    """Where larger bodies are let in than are kept for another try, the caller is told so honestly."""
    stack = rotating(2, render_options=("--max-body-bytes", str(20 << 20)))
    key_id, token = stack.new_key("5.00")
    served = rotation.run(stack, [Ask((key_id, token), picture=11 << 20)], timeout=60)[0]
    assert served.status == 200 and len(stack.sim.ledger()) == 1
    for name in stack.credential_ids:
        stack.sim.patch(name, limited_for_ms=60_000)
    answer = rotation.run(stack, [Ask((key_id, token), picture=11 << 20)], timeout=60)[0]
    assert (answer.status, answer.reason, len(stack.sim.ledger())) == (429, "pool_exhausted", 2), "one try"
    assert b"too large to be sent again" in answer.body
    true, charged, _ = stack.books(key_id)
    assert true == charged > 0


def test_the_largest_body_that_may_pass_rotates(rotating):
    passes(rotation.large_bodies(rotating(3), mib=9))


class Impatient(Stack):
    """Its callouts take half a second at most."""

    def spawn_envoy(self, config=None):
        file = self.directory / "envoy.yaml"
        text = file.read_text()
        assert '"rotation": "callout"' in text
        file.write_text(text.replace('"rotation": "callout"', '"rotation": "callout", "callout_timeout_ms": 500'))
        super().spawn_envoy(config)


def test_a_callout_whose_end_nobody_knows_keeps_its_charge():
    """The provider works on it, and the gate gives up waiting: it may have been paid."""
    keys = pool(2)
    with Impatient(concurrency=1, credentials=keys, rotation="callout") as stack:
        key_id, token = stack.new_key("1.00")
        stack.sim.patch(keys[0]["id"], limited_for_ms=60_000)
        for _ in range(2):
            stack.sim.fault("first_ms=1500", count=1, credential=keys[1]["id"])
            status, headers, body = stack.chat(token)
            if int(headers.get("x-keyward-attempts", 0)) == 1:
                # The good key was asked first, by the router, which waits.
                assert status == 200
                continue
            assert (status, headers["x-keyward-reason"]) == (503, "provider_unreachable"), body
            assert b"reset" not in body and b"timeout" not in body, "Envoy's own words"
            stack.settled(key_id)
            end = [entry for entry in stack.audit(key_id) if entry["event"] == "SETTLED"][-1]
            assert end["charge"] > 0 and end["estimated"] and [one["status"] for one in end["tries"]] == [429, 0]
            break
        else:
            raise AssertionError("no request was tried twice")


def test_a_pool_rotates_over_tls_and_http2(tmp_path):
    certificates = tmp_path / "tls"
    certificates.mkdir()
    options = ("--tls-dir", str(certificates), "--host", "api.openai.com", "--host", "api.anthropic.com")
    keys = pool(3)
    with Stack(sim_options=options, credentials=keys) as stack:
        key_id, token = stack.new_key("1.00")
        for key in keys[:2]:
            stack.sim.fault("status=429 retry_after=30", count=100, credential=key["id"])
        for stream in (False, True) * 4:
            assert stack.chat(token, stream=stream)[0] == 200
        calls = stack.sim.ledger()
        assert [call["status"] for call in calls].count(429) <= 2 and calls[-1]["credential"] == keys[2]["id"]
        true, charged, _ = stack.books(key_id)
        assert true == charged > 0


@pytest.mark.skipif("TRAP_FILTER" not in os.environ, reason="needs the filter that can be made to trap")
def test_a_cooled_key_stays_cooled_when_the_vm_is_lost():
    """The state is the process's: a VM that starts anew finds it."""
    keys = pool(2)
    with Stack(concurrency=1, filter_module=os.environ["TRAP_FILTER"], credentials=keys) as stack:
        key_id, token = stack.new_key("1.00")
        stack.sim.patch(keys[0]["id"], limited_for_ms=60_000)
        while not [call for call in stack.sim.ledger() if call["status"] == 429]:
            assert stack.chat(token)[0] == 200
        for _ in range(3):
            with contextlib.suppress(OSError):
                stack.chat(token, headers={"x-test-trap": "1"})
            time.sleep(0.2)
            for _ in range(4):
                assert stack.chat(token)[0] == 200
        calls = stack.sim.ledger()
        assert [call["credential"] for call in calls if call["status"] == 429] == [keys[0]["id"]], "asked once, in all VMs"
        assert len([call for call in calls if call["status"] == 200]) >= 12


def test_most_limits_are_never_met():
    """Keys of unequal limits are used as they have room: by what their provider tells with each answer, not by turns until one refuses."""
    limits = (20, 60, 100)
    keys = [{**key, "rpm": rpm} for key, rpm in zip(pool(3), limits)]
    with Stack(concurrency=2, credentials=keys) as stack:
        key_id, token = stack.new_key("5.00")
        # By turns, the smallest would have been asked fifty times, and refused thirty.
        answers = rotation.run(stack, [Ask((key_id, token), stream=n % 2 == 1) for n in range(150)], at_once=6)
        assert [answer.status for answer in answers] == [200] * 150
        refused = [call["credential"] for call in stack.sim.ledger() if call["status"] == 429]
        assert len(refused) <= 6, f"{len(refused)} tries were refused"
        served = {key["id"]: [call["credential"] for call in stack.sim.ledger() if call["status"] == 200].count(key["id"]) for key in keys}
        assert all(served[key["id"]] > key["rpm"] * 0.5 for key in keys), served


def test_what_the_provider_says_of_the_router_is_not_heard():
    """A provider that answers in Keyward's own headers moves nobody to try again."""
    keys = pool(3)
    with Stack(concurrency=1, credentials=keys) as stack:
        key_id, token = stack.new_key("1.00")
        stack.sim.fault("status=500 header=x-keyward-retry:1 header=x-envoy-ratelimited:true", count=1, provider="openai")
        status, headers, _ = stack.chat(token)
        assert (status, headers["x-keyward-attempts"], len(stack.sim.ledger())) == (500, "1", 1)
        status, headers, body = stack.chat(token, "[[sim header=x-keyward-attempts:9 header=x-keyward-reason:revoked]]")
        assert (status, headers["x-keyward-attempts"], headers.get("x-keyward-reason")) == (200, "1", None) and json.loads(body)
        # Envoy's own rate limiter marks its refusals so, and routers that see it don't try again.
        stack.sim.fault("status=429 retry_after=9 header=x-envoy-ratelimited:true", count=1, provider="openai")
        status, headers, _ = stack.chat(token)
        assert (status, headers["x-keyward-attempts"]) == (200, "2")


@MODELS
def test_when_all_are_limited_the_soonest_is_told(rotating, model):
    passes(rotation.all_limited(rotating(4, model), model=model))


def test_a_storm_of_retries_does_not_reach_the_provider(rotating):
    passes(rotation.storm(rotating(5), clients=60, cores=None))


def test_a_key_is_out_on_every_worker_of_every_envoy(rotating):
    passes(rotation.everywhere(rotating(5, kind=Fleet, concurrency=4)))


def test_envoy_is_killed_in_the_middle_of_a_rotation(rotating):
    passes(rotation.killed(rotating(5, hold_ttl=4)))


# --- the oracle itself -------------------------------------------------------------------------------------------------------


def call(seq, credential, status, at_ms, **more):
    """A call of the request `1`, answered 5 ms after it began."""
    return {"seq": seq, "client_request_id": "req_1", "credential": credential, "status": status, "started_unix_us": at_ms * 1000,
            "answered_unix_us": (at_ms + 5) * 1000, "model": GPT, "body_sha256": "a", "path": "/v1/chat/completions", "query": None, "stream": True,
            "idempotency_key": "once", "body_bytes": 100, **more}


def honest():
    """A stream that the first key refused and the second served."""
    tries = [{"credential": "cred_1", "status": 429, "ms": 6}, {"credential": "cred_2", "status": 200, "ms": 7}]
    chain = [{"event": "ADMITTED", "req": "1", "time_ms": 0}, {"event": "SETTLED", "req": "1", "ms": 40, "tries": tries}]
    answer = Answer(Ask(("a", "vk_"), stream=True, headers=(("idempotency-key", "once"),)), 0.0, 0.5, 200,
                    {"x-keyward-request-id": "req_1", "x-keyward-attempts": "2"}, whole=True, arrivals=[n / 20 for n in range(10)])
    return Books([], {"a": chain}, [call(1, "openai-1", 429, 0), call(2, "openai-2", 200, 10)], {}, [answer])


STACK = SimpleNamespace(credential_ids={"openai-1": "cred_1", "openai-2": "cred_2"})


def findings(books):
    late = [f"{one['credential']} came late" for one in too_late(books.calls, books.admitted_ms())]
    return [*tries_findings(STACK, books), *answers_findings(books), *one_by_one_findings(books.answers, 10, 50), *late]


def test_honest_tries_have_no_findings():
    assert findings(honest()) == []


def settled(books):
    return books.chains["a"][1]


FORGED = [
    ("a try is not in the record", lambda books: settled(books)["tries"].pop(0), "the provider saw"),
    ("a try has another status", lambda books: settled(books)["tries"][0].update(status=500), "the provider saw"),
    ("the tries are in another order", lambda books: settled(books)["tries"].reverse(), "the provider saw"),
    ("a try is the wrong key's", lambda books: settled(books)["tries"][0].update(credential="cred_2"), "the provider saw"),
    ("a try took longer than all of it", lambda books: settled(books)["tries"][0].update(ms=90), "its tries took [90, 7] ms, all of it 40 ms"),
    ("a key was asked twice", lambda books: books.calls[1].update(credential="openai-1"), "one of them twice"),
    ("a try had another body", lambda books: books.calls[1].update(body_sha256="b"), "its tries differ in body_sha256"),
    ("a try had another model", lambda books: books.calls[1].update(model="gpt-4o"), "its tries differ in model"),
    ("all tries had another model", lambda books: [one.update(model="gpt-4o") for one in books.calls], "answered 200, and the provider saw"),
    ("a try lost its idempotency key", lambda books: books.calls[1].update(idempotency_key=None), "its tries differ in idempotency_key"),
    ("all tries lost it", lambda books: [one.update(idempotency_key=None) for one in books.calls], "sent the idempotency key once"),
    ("nobody told the attempts", lambda books: books.answers[0].headers.pop("x-keyward-attempts"), "told None attempts, the provider saw 2"),
    ("a header of the first try came through", lambda books: books.answers[0].headers.update({"retry-after-ms": "1"}), "with ['retry-after-ms']"),
    ("the client got the 429", lambda books: setattr(books.answers[0], "status", 429), "got 429"),
    ("the stream was cut", lambda books: setattr(books.answers[0], "whole", False), "whole=False"),
    ("the stream came at once", lambda books: setattr(books.answers[0], "arrivals", [0.49] * 10), "came in 1 pieces"),
    ("a key was asked after its 429", lambda books: books.calls.append(call(3, "openai-1", 429, 60)), "openai-1 came late"),
]


@pytest.mark.parametrize(("forge", "told"), [pytest.param(forge, told, id=what.replace(" ", "-")) for what, forge, told in FORGED])
def test_forged_tries_are_found_out(forge, told):
    books = copy.deepcopy(honest())
    forge(books)
    found = findings(books)
    assert any(told in finding for finding in found), found


def test_what_was_on_its_way_is_not_late():
    """Nor is what comes when the limit is over."""
    first = [call(1, "openai-1", 429, 0), call(2, "openai-2", 200, 8)]
    others = [call(3, "openai-1", 429, 54, client_request_id="req_2"), call(4, "openai-1", 200, 2000, client_request_id="req_3")]
    asked_ms = {"1": 0, "2": 7, "3": 9}
    assert [one["seq"] for one in too_late(first + others, asked_ms, 1_999_000)] == []
    assert [one["seq"] for one in too_late(first + others, asked_ms)] == [4]
