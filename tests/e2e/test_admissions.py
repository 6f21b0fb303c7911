"""Admissions go to the policy service together: what one request is told must never depend on the others in its callout."""

import json
import os
import signal
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from hashlib import sha256

import yaml
from edge import PRICED, BareGate
from harness import Stack, call, pool, wait_for
from load import Load, ask
from test_crash import SLACK, check_every_request, freeze, new_keys

STATE = {"models": ["*"], "endpoints": ["*"], "state": True}


def all_at_once(stack, keys):
    with ThreadPoolExecutor(len(keys)) as agents:
        return list(agents.map(lambda key: ask(stack, key, "tokens=3"), keys))


def held_up(stack, run, streams):
    """Lets the service stand still until Envoy has so many streams of `run`, so that questions gather."""
    open_now = lambda: stack.stats("http.keyward.downstream_rq_active")["http.keyward.downstream_rq_active"]  # noqa: E731
    freeze(stack.service.process)
    with ThreadPoolExecutor(1) as one:
        try:
            running = one.submit(run)
            wait_for("a crowd", lambda: open_now() >= streams or running.done(), 10, 0.01)
        finally:
            stack.service.process.send_signal(signal.SIGCONT)
        return running.result()


def test_requests_that_ask_together_get_each_its_own():
    """Two policies, two pools: no request may be sent with a credential, or charged to a key, that is another's."""
    credentials = pool(2)
    with Stack(concurrency=1, credentials=credentials, admit_timeout_ms=8000) as stack:
        for name in ("openai-1", "openai-2"):
            stack.admin("PUT", f"/v1/pools/of-{name}", {"provider": "openai", "credentials": [stack.credential_ids[name]]})
            stack.admin("PUT", f"/v1/policies/of-{name}", {"pools": {"openai": f"of-{name}"}})
        keys = [stack.new_key("1.00", policy=f"of-openai-{1 + n % 2}") for n in range(60)]
        poor = stack.new_key("0.00")
        assert ask(stack, keys[0], "tokens=3").status == 200
        before = stack.admissions_asked()
        results = held_up(stack, lambda: all_at_once(stack, [*keys, poor]), 61)
        assert [result.status for result in results] == [200] * 60 + [429]
        assert results[-1].reason == "cap_exhausted"
        # Two callouts were on their way; the rest went with one or two more.
        assert 1 < stack.admissions_asked() - before <= 6
        stack.settled(*(key_id for key_id, _ in keys))
        used = {(call["client_request_id"] or "").removeprefix("req_"): call["credential"] for call in stack.sim.ledger()}
        for n, (key_id, _) in enumerate(keys):
            _, _, ends = stack.books(key_id)
            assert {used[end["req"]] for end in ends} == {f"openai-{1 + n % 2}"}
        assert stack.unadmitted([key_id for key_id, _ in keys]) == [] and stack.sim.totals()["violations"] == []


def test_a_line_that_cannot_be_read_takes_nothing_from_the_others():
    with Stack() as stack:
        key_id, token = stack.new_key("1.00")
        gate = BareGate(stack)

        def line(req, **ask):
            return json.dumps({"req": req, "vm": gate.vm.hex(), "node": "bare", "token": sha256(token.encode()).hexdigest(), "ask": {**PRICED, **ask}})

        used, first, last, refused = (os.urandom(16).hex() for _ in range(4))
        gate.admit(token, used)
        lines = [line(first), "", "{", line(used, bytes=101), line(refused, model="no-such-model-0"), "[" * 1000, line(first, more=1), line(last)]
        status, headers, data = gate.post("/edge/v1/admit", "\n".join(lines).encode())
        assert status == 200 and headers["content-type"] == "application/x-ndjson"
        answers = [json.loads(answer) for answer in data.decode().splitlines()]
        assert [answer and answer["req"] for answer in answers] == [first, None, None, None, refused, None, None, last]
        assert answers[0]["plan"]["targets"] and answers[-1]["plan"]["targets"] and answers[4]["refusal"]["code"] == "unbounded_input"
        assert stack.key(key_id)["in_flight"] == 3
        # Where nothing could be decided the status says so, as for one question alone.
        for lines, status in (([""], 400), (["{", "x"], 400), ([line(used, bytes=101)], 409), (["{", line(used, bytes=101)], 400)):
            assert gate.post("/edge/v1/admit", "\n".join(lines).encode())[0] == status


def test_the_service_stands_still_before_a_crowd():
    """What never left is refused without a trace; what left and was not answered in time is voided; nothing is forwarded."""
    with Stack(concurrency=2) as stack:
        serving = stack.new_key("1.00")

        def chains():
            keys = [stack.new_key("1.00") for _ in range(40)]
            wait_for("an admission", lambda: ask(stack, serving, "tokens=1").status == 200)
            stack.settled(serving[0])
            seen = stack.last_seq()
            freeze(stack.service.process)
            try:
                results = all_at_once(stack, keys)
            finally:
                stack.service.process.send_signal(signal.SIGCONT)
            assert [(result.status, result.reason) for result in results] == [(503, "policy_unavailable")] * 40
            assert max(result.seconds for result in results) < 1 + SLACK
            assert stack.last_seq() == seen
            return chains_at_rest(stack, keys)

        found = until_some_never_left(chains)
        assert all(chain in ([], ["ADMITTED", "VOIDED"], ["REFUSED"]) for chain in found), found
        assert ask(stack, serving, "tokens=1").status == 200


def chains_at_rest(stack, keys):
    """What stands in the chain of each key but that it was made, once the gates have told everything."""
    wait_for("the service", lambda: call(stack.admin_base, "GET", "/readyz")[0] == 200)
    wait_for("no record on its way", lambda: set(stack.stats("keyward_settlements_pending").values()) == {0})
    chains = []
    for key_id, _ in keys:
        stack.books(key_id)
        chains.append([entry["event"] for entry in stack.audit(key_id)][1:])
    return chains


def until_some_never_left(chains):
    """A worker has two callouts at once: of many that ask one after the other some never leave, unless the worker read them all at a time."""
    for _ in range(5):
        found = chains()
        if [] in found:
            return found
    raise AssertionError(f"every question left, although two callouts were on their way: {found}")


def test_agents_that_leave_before_their_turn():
    with Stack(concurrency=1) as stack:
        serving = stack.new_key("1.00")

        def come_and_go(keys):
            connections = []
            for _, token in keys:
                connection = socket.create_connection(("127.0.0.1", stack.listen_port))
                body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Anybody?"}]})
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
                connections.append(connection)
                time.sleep(0.005)
            # The last ones wait for their turn: two callouts are on their way.
            time.sleep(0.1)
            for connection in connections:
                connection.close()
            wait_for("no stream", lambda: stack.stats("downstream_rq_active")["http.keyward.downstream_rq_active"] == 0)

        def chains():
            keys = [stack.new_key("1.00") for _ in range(20)]
            wait_for("an admission", lambda: ask(stack, serving, "tokens=1").status == 200)
            stack.settled(serving[0])
            seen = stack.last_seq()
            freeze(stack.service.process)
            try:
                come_and_go(keys)
            finally:
                stack.service.process.send_signal(signal.SIGCONT)
            wait_for("no stream left", lambda: stack.stats("keyward_streams_open")["wasmcustom.keyward_streams_open"] == 0)
            found = chains_at_rest(stack, keys)
            assert stack.last_seq() == seen
            return found

        until_some_never_left(chains)
        assert ask(stack, serving, "tokens=1").status == 200


def test_questions_that_take_their_time_hold_nobody_up():
    """A reference that is unknown while its key has requests in flight is looked up again and again: the others don't wait for it."""
    with Stack(concurrency=1, admit_timeout_ms=8000) as stack:
        _, token = stack.new_key("1.00", allow=STATE)
        other = stack.new_key("1.00")
        running = threading.Thread(target=lambda: stack.chat(token, "[[sim tokens=120 pace_ms=100]]", stream=True))
        running.start()
        wait_for("a request in flight", lambda: stack.sim.ledger())
        ends = []

        def ask_for(path, body, key):
            status, _, _ = call(stack.base, "POST", path, body, {"authorization": f"Bearer {key}"})
            ends.append((path, status))

        unknown = {"model": "gpt-4o-mini", "input": "x", "previous_response_id": "resp_00000000000000000000000000000000"}
        plain = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "[[sim tokens=1]]"}]}
        # Slow ones first, more than callouts may be on their way, and all of them when the service begins to decide.
        asks = [("/v1/responses", unknown, token)] * 4 + [("/v1/chat/completions", plain, other[1])] * 4

        def all_of_them():
            with ThreadPoolExecutor(len(asks)) as agents:
                for one in asks:
                    agents.submit(ask_for, *one)

        held_up(stack, all_of_them, len(asks) + 1)
        running.join()
        assert sorted(ends) == [("/v1/chat/completions", 200)] * 4 + [("/v1/responses", 403)] * 4
        came = [call["started_unix_us"] / 1e6 for call in stack.calls_of(other[0])]
        log = [line for line in stack.service.log.read_text().splitlines() if "state_not_owned" in line]
        refused = [datetime.fromisoformat(line.split()[0]).timestamp() for line in log]
        assert (len(came), len(refused)) == (4, 4) and max(came) < min(refused), (came, refused)


def test_a_new_configuration_under_load():
    """Envoy replaces the gate's root context, which had callouts on their way: nothing hangs, and every request is settled."""
    with Stack(concurrency=2) as stack:
        stack.envoy.kill()
        config = yaml.safe_load((stack.directory / "envoy.yaml").read_text())
        [listener] = config["static_resources"].pop("listeners")
        listener["@type"] = "type.googleapis.com/envoy.config.listener.v3.Listener"
        path = stack.directory / "listeners.json"
        config["dynamic_resources"] = {"lds_config": {"path_config_source": {"path": str(path)}}}
        [manager] = listener["filter_chains"][0]["filters"]
        gate = next(one for one in manager["typed_config"]["http_filters"] if one["name"] == "keyward.gate")
        plugin = gate["typed_config"]["config"]["configuration"]

        def configure(admit_timeout_ms):
            plugin["value"] = json.dumps({**json.loads(plugin["value"]), "admit_timeout_ms": admit_timeout_ms})
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps({"resources": [listener]}))
            os.replace(fresh, path)

        # Long enough that only a lost question is refused for it.
        configure(5000)
        (stack.directory / "dynamic.json").write_text(json.dumps(config))
        stack.envoy.spawn([stack.envoy_bin, "-c", str(stack.directory / "dynamic.json"), "--use-dynamic-base-id", "--log-level", "warning",
                           "--concurrency", "2", "--drain-time-s", "1", "--drain-strategy", "immediate"])
        keys = new_keys(stack)
        wait_for("an answer", lambda: ask(stack, keys[0], "tokens=1").status == 200)
        lds = "listener_manager.lds.update_success"
        with Load(stack, keys) as load:
            # The third goes back to the second before that one is gone: Envoy takes its root context up again.
            for number, (timeout_ms, drained) in enumerate([(5001, True), (5002, False), (5001, True), (5003, True), (5004, True)]):
                before, updates = load.count(), stack.stats("lds.update_success")[lds]
                configure(timeout_ms)
                wait_for("the change", lambda: stack.stats("lds.update_success")[lds] > updates)
                if drained and number % 2:
                    # Its listener, and with it its root context, goes while callouts are on their way.
                    time.sleep(0.8)
                    freeze(stack.service.process)
                    time.sleep(0.6)
                    stack.service.process.send_signal(signal.SIGCONT)
                elif drained:
                    time.sleep(1.5)
                wait_for("load", lambda: load.count() > before + 50)
        # A worker whose bell rings for nobody would let each wait for the tick, 50 ms.
        quick = [statistics.median(ask(stack, keys[0], "tokens=1").seconds for _ in range(20)) for _ in range(5)]
        assert min(quick) < 0.02, quick
        stack.settled(*(key_id for key_id, _ in keys))
        assert {result.status for result in load.results} <= {200, None}
        assert load.count() > 0.98 * len(load.results)
        check_every_request(stack, keys, load.results)
        # Somebody still asks for news.
        revoked = stack.new_key("1.00")
        started = threading.Event()
        with ThreadPoolExecutor(1) as one:
            cut = one.submit(ask, stack, revoked, "tokens=900 pace_ms=30", stream=True, started=started)
            assert started.wait(10)
            stack.admin("DELETE", f"/v1/keys/{revoked[0]}")
            assert b"revoked" in cut.result().body and not cut.result().whole
        stack.settled(revoked[0])
        wait_for("nothing left to tell", lambda: stack.stats("keyward_settlements_pending")["wasmcustom.keyward_settlements_pending"] == 0)
