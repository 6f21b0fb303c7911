"""Hundreds of requests that one worker must answer, let go on or end at one time. What Envoy does for each of them stands on the stack of the
one before, so a VM that did all at once would die, and with it every stream of its worker, whoever's it is."""

import collections
import signal
import threading
import time

import pytest
from harness import pool, wait_for
from load import ask
from test_crash import freeze
from test_no_way_round import Door, good, h2_headers
from wire import Http2

CONNECTIONS, STREAMS = 6, 100


class Crowd:
    """Connections with as many streams as Envoy lets each have, and a stream of somebody else on the same worker."""

    def __init__(self, door):
        self.door = door
        self.bystander = door.new_key("1.00")
        self.result = None
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        self.result = ask(self.door, self.bystander, "tokens=120 pace_ms=50", stream=True)

    def __enter__(self):
        assert ask(self.door, self.bystander, "tokens=1").status == 200
        self.thread.start()
        wait_for("the bystander's stream", lambda: any(not call["ended"] for call in self.door.sim.ledger()))
        self.connections = [Http2(self.door.listen_port, 30) for _ in range(CONNECTIONS)]
        return self

    def __exit__(self, kind, *_):
        for connection in self.connections:
            connection.close()
        self.thread.join()
        if kind is None:
            assert self.result.status == 200 and self.result.whole, "a stream of somebody else went down with them"
            assert self.door.traps() == ([], 0)

    def ask(self, token, body):
        """Asks on every stream there may be; returns when Envoy has read it all."""
        asked = []
        for connection in self.connections:
            for _ in range(STREAMS):
                stream = connection.headers(h2_headers(token), end=False)
                connection.data(stream, body, end=True)
                asked.append((connection, stream))
            connection.sync()
        return asked

    def statuses(self, asked):
        found = collections.Counter()
        for connection in self.connections:
            mine = [stream for other, stream in asked if other is connection]
            found.update((answer.status, dict(answer.headers or ()).get("x-keyward-reason")) for answer in connection.wait(*mine))
        return found


@pytest.fixture(scope="module")
def door():
    with Door(concurrency=1) as door:
        yield door


@pytest.fixture(scope="module")
def patient_door():
    """Where hundreds are to be admitted, and not to be refused for what else this machine has to do."""
    with Door(concurrency=1, admit_timeout_ms=8000) as door:
        yield door


def test_an_outage_before_hundreds_of_streams(door):
    _, token = door.new_key("1.00")
    with Crowd(door) as crowd:
        freeze(door.service.process)
        try:
            statuses = crowd.statuses(crowd.ask(token, good("[[sim tokens=1]]")))
        finally:
            door.service.process.send_signal(signal.SIGCONT)
        assert statuses == {(503, "policy_unavailable"): CONNECTIONS * STREAMS}
        wait_for("admissions again", lambda: ask(door, crowd.bystander, "tokens=1").status == 200)


def test_no_service_before_hundreds_of_streams(door):
    _, token = door.new_key("1.00")
    with Crowd(door) as crowd:
        door.service.kill()
        try:
            statuses = crowd.statuses(crowd.ask(token, good("[[sim tokens=1]]")))
        finally:
            door.start_service()
        assert statuses == {(503, "policy_unavailable"): CONNECTIONS * STREAMS}
        wait_for("admissions again", lambda: ask(door, crowd.bystander, "tokens=1").status == 200)


def test_hundreds_that_are_admitted_together(patient_door):
    door = patient_door
    key_id, token = door.new_key("10.00")
    with Crowd(door) as crowd:
        freeze(door.service.process)
        try:
            asked = crowd.ask(token, good("[[sim tokens=1]]"))
        finally:
            door.service.process.send_signal(signal.SIGCONT)
        assert crowd.statuses(asked) == {(200, None): CONNECTIONS * STREAMS}
        true, charged, _ = door.books(key_id)
        assert true == charged > 0


def test_hundreds_that_are_revoked_together(patient_door):
    door = patient_door
    key_id, token = door.new_key("10.00")
    with Crowd(door) as crowd:
        asked = crowd.ask(token, good("[[sim tokens=600 pace_ms=1000]]", stream=True))
        for connection, stream in asked:
            assert connection.until_headers(stream).status == 200
        began = time.monotonic()
        door.admin("DELETE", f"/v1/keys/{key_id}")
        crowd.statuses(asked)
        print(f"{len(asked)} streams of one worker were over {time.monotonic() - began:.2f} s after the revocation was asked for")
        # An event a second: most have to be cut where they are.
        assert all(connection.streams[stream].over and b"[DONE]" not in connection.streams[stream].body for connection, stream in asked)
        _, _, ends = door.books(key_id)
        assert [end["outcome"] for end in ends] == ["ended:revoked"] * len(asked)


def test_hundreds_that_wait_for_one_credential():
    """Its limit is met; all of them may wait, and go on when it is usable again."""
    with Door(concurrency=1, credentials=pool(1), admit_timeout_ms=8000) as door:
        door.admin("PUT", "/v1/policies/patient", {"wait_ms": 8000})
        _, token = door.new_key("10.00", policy="patient")
        with Crowd(door) as crowd:
            door.sim.fault("status=429 retry_after=1")
            asked = crowd.ask(token, good("[[sim tokens=1]]"))
            assert crowd.statuses(asked) == {(200, None): CONNECTIONS * STREAMS}
