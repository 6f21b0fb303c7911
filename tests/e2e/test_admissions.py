"""Admissions go to the policy service together: what one request is told must never depend on the others in its callout."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import yaml
from edge import PRICED, BareGate
from harness import Stack, call, pool, wait_for
from load import Load, ask
from test_crash import check_every_request, freeze, new_keys

STATE = {"models": ["*"], "endpoints": ["*"], "state": True}


def all_at_once(stack, keys):
    with ThreadPoolExecutor(len(keys)) as agents:
        return list(agents.map(lambda key: ask(stack, key, "tokens=3"), keys))


def held_up(stack, run):
    """Lets the service stand still until `run` has been under way for a moment, so that questions gather."""
    freeze(stack.service.process)
    with ThreadPoolExecutor(1) as one:
        try:
            running = one.submit(run)
            time.sleep(0.4)
        finally:
            stack.service.process.send_signal(signal.SIGCONT)
        return running.result()


def test_requests_that_ask_together_get_each_its_own():
    """Two policies, two pools: no request may be sent with a credential, or charged to a key, that is another's."""
    credentials = pool(2)
    with Stack(concurrency=1, credentials=credentials) as stack:
        for name in ("openai-1", "openai-2"):
            stack.admin("PUT", f"/v1/pools/of-{name}", {"provider": "openai", "credentials": [stack.credential_ids[name]]})
            stack.admin("PUT", f"/v1/policies/of-{name}", {"pools": {"openai": f"of-{name}"}})
        keys = [stack.new_key("1.00", policy=f"of-openai-{1 + n % 2}") for n in range(60)]
        poor = stack.new_key("0.00")
        assert ask(stack, keys[0], "tokens=3").status == 200
        before = stack.admissions_asked()
        results = held_up(stack, lambda: all_at_once(stack, [*keys, poor]))
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
        keys = [stack.new_key("1.00") for _ in range(40)]
        assert ask(stack, keys[0], "tokens=1").status == 200
        stack.settled(keys[0][0])
        seen = stack.last_seq()
        freeze(stack.service.process)
        try:
            results = all_at_once(stack, keys)
        finally:
            stack.service.process.send_signal(signal.SIGCONT)
        assert [(result.status, result.reason) for result in results] == [(503, "policy_unavailable")] * 40
        assert stack.last_seq() == seen
        wait_for("another admission", lambda: ask(stack, keys[1], "tokens=1").status == 200)
        events = []
        for key_id, _ in keys[2:]:
            stack.books(key_id)
            events.append([entry["event"] for entry in stack.audit(key_id)][1:])
        # A worker has two callouts at once, of which each had what came at one time.
        assert [] in events
        assert all(chain in ([], ["ADMITTED", "VOIDED"], ["REFUSED"]) for chain in events), events


def test_agents_that_leave_before_their_turn():
    with Stack(concurrency=1) as stack:
        keys = [stack.new_key("1.00") for _ in range(20)]
        assert ask(stack, keys[0], "tokens=1").status == 200
        stack.settled(keys[0][0])
        seen = stack.last_seq()

        def come_and_go():
            connections = []
            for _, token in keys:
                connection = socket.create_connection(("127.0.0.1", stack.listen_port))
                body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Anybody?"}]})
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
                connections.append(connection)
                time.sleep(0.005)
            for connection in connections:
                connection.close()

        held_up(stack, come_and_go)
        wait_for("no stream left", lambda: stack.stats("keyward_streams_open")["wasmcustom.keyward_streams_open"] == 0)
        for key_id, _ in keys[1:]:
            stack.books(key_id)
        assert stack.last_seq() == seen
        assert [] in [[entry["event"] for entry in stack.audit(key_id)][1:] for key_id, _ in keys]
        assert ask(stack, keys[0], "tokens=1").status == 200


def test_a_question_that_takes_its_time_holds_nobody_up():
    """A reference that is unknown while its key has requests in flight is looked up again and again: the others don't wait for it."""
    with Stack(concurrency=1) as stack:
        _, token = stack.new_key("1.00", allow=STATE)
        other = stack.new_key("1.00")
        ended = {}

        def unknown():
            body = {"model": "gpt-4o-mini", "input": "x", "previous_response_id": "resp_00000000000000000000000000000000"}
            answer = call(stack.base, "POST", "/v1/responses", body, {"authorization": f"Bearer {token}"})
            ended["slow"] = time.monotonic()
            return answer

        running = threading.Thread(target=lambda: stack.chat(token, "[[sim tokens=20 pace_ms=100]]", stream=True))
        running.start()
        wait_for("a request in flight", lambda: stack.sim.ledger())
        with ThreadPoolExecutor(1) as one:
            slow = one.submit(unknown)
            time.sleep(0.05)
            for _ in range(3):
                assert ask(stack, other, "tokens=1").status == 200
            ended["others"] = time.monotonic()
            assert slow.result()[0] == 403
        running.join()
        assert ended["others"] < ended["slow"]


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

        configure(900)
        (stack.directory / "dynamic.json").write_text(json.dumps(config))
        stack.envoy.spawn([stack.envoy_bin, "-c", str(stack.directory / "dynamic.json"), "--use-dynamic-base-id", "--log-level", "warning",
                           "--concurrency", "2", "--drain-time-s", "1", "--drain-strategy", "immediate"])
        keys = new_keys(stack)
        wait_for("an answer", lambda: ask(stack, keys[0], "tokens=1").status == 200)
        with Load(stack, keys) as load:
            for change in range(5):
                before, updates = load.count(), stack.stats("lds.update_success")["listener_manager.lds.update_success"]
                configure(901 + change)
                wait_for("the change", lambda: stack.stats("lds.update_success")["listener_manager.lds.update_success"] > updates)
                # The listener of before, and with it its root context, is gone after its drain time.
                time.sleep(1.5)
                wait_for("load", lambda: load.count() > before + 50)
        stack.settled(*(key_id for key_id, _ in keys))
        assert {result.status for result in load.results} <= {200, None, 503}
        assert load.count() > 0.9 * len(load.results)
        check_every_request(stack, keys, load.results)
        assert stack.stats("keyward_settlements_pending")["wasmcustom.keyward_settlements_pending"] == 0
