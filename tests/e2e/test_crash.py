"""What is left after a crash: kill -9, stop, freeze and a full disk, all under load. KILLS says how often (default 5)."""

import collections
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from edge import BareGate
from harness import CREDENTIALS, ENVOY_BIN, KEYWARD_BIN, SERVICE_BIN, Part, Simulator, Stack, call, free_port, wait_for
from load import Load, accounts, ask, true_costs

KILLS = int(os.environ.get("KILLS", "5"))
# The next longer limit is the 5 s of a batch of settlements: whoever waited for that would be found out.
SLACK = 2


def freeze(process):
    """SIGSTOP, and the wait until every thread of it stands still."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    wait_for("standstill", lambda: all("\nState:\tT" in (task / "status").read_text() for task in tasks.iterdir()))


def new_keys(stack, n=4, budget="100.00"):
    return [stack.new_key(budget) for _ in range(n)]


def serves_again(stack, key, within=5.0):
    """Seconds until a request goes through."""
    began = time.monotonic()
    wait_for("an admission", lambda: ask(stack, key, "tokens=1", timeout=within).status == 200, within)
    return time.monotonic() - began


def verify_by_command(export):
    """`keyward audit verify`, on a chain that must verify."""
    done = subprocess.run([KEYWARD_BIN, "audit", "verify", "-"], input=export, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def say(books, results, costs):
    """What a run amounted to, for `pytest -s` and for failures."""
    ends = collections.Counter("+".join(end["event"] for end in account.ends) or "REFUSED" for account in books.values())
    answers = collections.Counter(str(result.status) + ("" if result.whole else " cut") for result in results)
    print(f"\n{len(results)} requests {dict(answers)}, {len(costs)} reached the provider, in the chains {dict(ends)}")
    return ends


def recover(stack, log):
    """`keyward settle import`: exit code, taken, rejected."""
    done = subprocess.run([KEYWARD_BIN, "settle", "import", "--admin", stack.admin_base, "--admin-token", stack.admin_token, str(log)],
                          capture_output=True, text=True)
    found = re.search(r"(\d+) records taken .*, (\d+) rejected", done.stdout)
    assert found, (done.stdout, done.stderr)
    return done.returncode, int(found[1]), int(found[2])


def complaints(stack):
    """Lines of the service's log that tell of records missing between Envoy and the service, or of unknown requests."""
    return [line for line in stack.service.log.read_text(errors="replace").splitlines() if "operator's eye" in line or "wrong MAC" in line]


def check_every_request(stack, keys, results, once=True):
    """The rules that hold whatever was killed. Gives the accounts and the true costs."""
    key_ids = [key_id for key_id, _ in keys]
    for key_id in key_ids:
        verify_by_command(stack.export(key_id))
    books, costs = accounts(stack, key_ids), true_costs(stack)
    for req, account in books.items():
        if account.refused:
            assert not account.admitted and not account.ends, (req, account)
        else:
            assert len(account.admitted) == 1, (req, account)
            assert account.ends, f"the hold of {req} never ended"
            if once:
                assert len(account.ends) == 1, (req, account)
    for result in results:
        if result.status == 200:
            assert result.req in books and books[result.req].admitted, f"a request went out and {result.req} is in no chain"
            assert books[result.req].key_id == result.key_id
        elif result.req and result.reason != "policy_unavailable":
            assert result.req in books, f"{result.reason}: the service answered {result.req} and did not write it down"
    say(books, results, costs)
    assert stack.unadmitted(key_ids) == []
    assert stack.sim.totals()["violations"] == []
    for req, cost in costs.items():
        assert books[req].charge >= cost, f"{req} cost {cost} and was charged {books[req]}"
    for key_id in key_ids:
        key = stack.key(key_id)
        charged = sum(account.charge for account in books.values() if account.key_id == key_id)
        assert key["spent_nanodollars"] == charged, f"the ledger and the chain of {key_id} differ"
        assert key["reserved_nanodollars"] == 0 and key["in_flight"] == 0, key
        assert key["status"] == "active"
    return books, costs


def check_exact(books, costs, results=None):
    """Every request was charged what it cost, to the nanodollar; with results: every one that an agent got the answer of."""
    exact = books if results is None else {result.req: books[result.req] for result in results if result.status == 200 and result.whole}
    wrong = {req: (account, costs[req]) for req, account in exact.items() if account.charge != costs[req]}
    assert not wrong, list(itertools.islice(wrong.items(), 5))
    assert sum(account.charge for account in exact.values()) == sum(costs[req] for req in exact) > 0
    if results is None:
        assert set(costs) <= set(exact)


# --- the policy service ------------------------------------------------------------------------------------------------


def test_the_service_is_killed_under_load():
    with Stack(concurrency=2) as stack:
        keys = new_keys(stack)
        with Load(stack, keys, vanishing=2) as load:
            for n in range(KILLS):
                before = load.count()
                wait_for("load", lambda: load.count() > before + 100)
                time.sleep(random.uniform(0.0, 0.5))
                stack.service.kill()
                unavailable = load.count(503)
                wait_for("refusals meanwhile", lambda: load.count(503) > unavailable + 3, 10)
                stack.start_service()
                assert serves_again(stack, keys[0]) < 5.0, f"kill {n}"
        stack.sim.quiet()
        stack.settled(*(key_id for key_id, _ in keys))
        books, costs = check_every_request(stack, keys, load.results)
        check_exact(books, costs, load.results)
        for result in load.results:
            if result.status == 503:
                assert result.reason == "policy_unavailable", (result.headers, result.body)
                assert result.seconds < 1.0 + SLACK, f"{result.req} waited {result.seconds:.2f} s to be refused"
            else:
                assert result.status == 200 and result.whole, result
        assert complaints(stack) == []


def test_the_service_is_told_to_stop_under_load():
    with Stack(concurrency=2) as stack:
        keys = new_keys(stack)
        with Load(stack, keys) as load:
            for _ in range(min(KILLS, 3)):
                before = load.count()
                wait_for("load", lambda: load.count() > before + 100)
                stack.service.process.send_signal(signal.SIGTERM)
                stopping = time.monotonic()
                assert stack.service.process.wait(15) == 0
                print(f"stopped in {time.monotonic() - stopping:.2f} s")
                time.sleep(0.3)
                stack.start_service()
                assert serves_again(stack, keys[0]) < 5.0
        stack.sim.quiet()
        stack.settled(*(key_id for key_id, _ in keys))
        books, costs = check_every_request(stack, keys, load.results)
        check_exact(books, costs)
        for result in load.results:
            assert result.status == 200 and result.whole or result.reason == "policy_unavailable", result
        assert complaints(stack) == []


def test_the_service_is_frozen_for_three_seconds():
    """Streams go on, admissions are given up, and nothing of either is left behind."""
    with Stack(concurrency=2) as stack, ThreadPoolExecutor(16) as agents:
        keys = new_keys(stack)
        started = [threading.Event() for _ in range(8)]
        streams = [agents.submit(ask, stack, keys[n % 4], "tokens=60 per_delta=3 pace_ms=80", True, started=event)
                   for n, event in enumerate(started)]
        assert all(event.wait(10) for event in started)
        freeze(stack.service.process)
        frozen = time.monotonic()
        try:
            pending = [agents.submit(ask, stack, key, "tokens=5") for key in keys]
            given_up = [future.result() for future in pending]
            streamed = [future.result() for future in streams]
            finished = time.monotonic()
            time.sleep(max(0.0, 3.0 - (finished - frozen)))
        finally:
            stack.service.process.send_signal(signal.SIGCONT)
        assert all(result.status == 200 and result.whole for result in streamed), streamed
        for result in given_up:
            assert (result.status, result.reason) == (503, "policy_unavailable"), result
            assert result.seconds < 1.0 + SLACK
        stack.settled(*(key_id for key_id, _ in keys), timeout=20)
        # The voids come with the settlements: wait until the filter has nothing more to say.
        wait_for("an empty outbox", lambda: set(stack.stats("keyward_settlements_pending").values()) == {0})
        assert serves_again(stack, keys[0]) < 5.0
        stack.settled(keys[0][0])
        stack.sim.quiet()
        books, costs = check_every_request(stack, keys, streamed + given_up)
        check_exact(books, costs)
        for result in given_up:
            # Voided, refused for its tombstone, or never read at all.
            account = books.get(result.req)
            assert account is None or account.refused or [end["event"] for end in account.ends] == ["VOIDED"], account
            assert costs[result.req] == 0
        assert complaints(stack) == []


def test_a_void_that_comes_first_refuses_its_admission():
    with Stack() as stack:
        key_id, token = stack.new_key("1.00")
        gate = BareGate(stack)
        req = os.urandom(16).hex()
        assert gate.settle(gate.record(req, "void"))["taken"] == 1
        _, answer = gate.admit(token, req)
        assert answer.get("plan") is None and answer["refusal"]["code"] == "policy_unavailable", "a credential went to a gate that had given up"
        # And the other way round: a hold, then its void, then the same admission once more.
        held, answer = gate.admit(token)
        assert answer["plan"] and stack.key(key_id)["in_flight"] == 1
        void = gate.record(held, "void")
        for _ in range(2):
            assert gate.settle(void)["rejected"] == 0
            assert stack.key(key_id)["in_flight"] == 0
        nobody = {"req": held, "vm": gate.vm.hex(), "node": "bare", "token": "00" * 32, "ask": {"provider": "openai", "endpoint": "x"}}
        assert b"secret" not in gate.post("/edge/v1/admit", nobody)[2]
        key = stack.key(key_id)
        assert key["spent_nanodollars"] == key["reserved_nanodollars"] == 0
        assert [entry["event"] for entry in stack.audit(key_id)] == ["KEY_CREATED", "REFUSED", "ADMITTED", "VOIDED"]


def test_a_replayed_admission_gets_no_credential_after_its_end():
    with Stack() as stack:
        key_id, token = stack.new_key("1.00")
        gate = BareGate(stack)
        held, answer = gate.admit(token)
        again, same = gate.admit(token, held)
        assert same["plan"]["targets"] == answer["plan"]["targets"] and stack.key(key_id)["in_flight"] == 1, "one request, one hold"
        body = {"req": held, "vm": gate.vm.hex(), "node": "bare", "token": hashlib.sha256(token.encode()).hexdigest(),
                "ask": {"provider": "openai", "endpoint": "POST /v1/chat/completions", "model": "gpt-4o-mini", "bytes": 101, "choices": 1}}
        status, _, data = gate.post("/edge/v1/admit", body)
        assert status == 409 and b"secret" not in data, (status, data)
        gate.settle(gate.record(held, "void"))
        status, _, data = gate.post("/edge/v1/admit", {**body, "ask": {**body["ask"], "bytes": 100, "max_tokens": 50}})
        assert status == 409 and b"secret" not in data, (status, data)


# --- Envoy -------------------------------------------------------------------------------------------------------------


def test_envoy_is_killed_under_load():
    with Stack(concurrency=2, hold_ttl=4) as stack:
        keys = new_keys(stack)
        with Load(stack, keys, vanishing=2) as load:
            for _ in range(KILLS):
                before = load.count()
                wait_for("load", lambda: load.count() > before + 100)
                time.sleep(random.uniform(0.0, 0.5))
                stack.envoy.kill()
                stack.spawn_envoy()
                serves_again(stack, keys[0])
        stack.sim.quiet()
        # Whatever died with an Envoy is charged when its time is over.
        stack.settled(*(key_id for key_id, _ in keys), timeout=4 + 10)
        books, costs = check_every_request(stack, keys, load.results, once=False)
        expired = {req for req, account in books.items() if account.ends and account.ends[-1]["event"] == "EXPIRED"}
        for req in expired:
            assert books[req].charge == books[req].admitted[0]["hold"]
        for req, account in books.items():
            if req not in expired and account.ends and account.ends[-1].get("outcome") == "complete":
                assert account.charge == costs[req], (account, costs[req])

        # The access log knows the end of some of them: importing it lowers their charges to the truth, once.
        code, taken, rejected = recover(stack, stack.directory / "access.log")
        assert (code, rejected) == (0, 0) and taken > 0
        books, costs = check_every_request(stack, keys, load.results, once=False)
        chains = [stack.export(key_id) for key_id, _ in keys]
        assert recover(stack, stack.directory / "access.log") == (0, taken, 0)
        assert chains == [stack.export(key_id) for key_id, _ in keys], "a second import changed something"
        for account in books.values():
            ends = [end["event"] for end in account.ends]
            assert account.refused or ends in (["SETTLED"], ["VOIDED"], ["EXPIRED"], ["EXPIRED", "SETTLED"], ["EXPIRED", "VOIDED"]), account


@pytest.mark.parametrize("service_is", ["gone", "frozen"])
def test_what_a_dead_envoy_never_sent_is_in_its_access_log(service_is):
    with Stack(concurrency=2, hold_ttl=10) as stack, ThreadPoolExecutor(8) as agents:
        keys = new_keys(stack, 2)
        # The VMs know their keys by now, and one record of each kind has gone the usual way.
        for _ in range(4):
            assert all(ask(stack, key).status == 200 for key in keys)
        stack.settled(*(key_id for key_id, _ in keys))
        started = [threading.Event() for _ in range(6)]
        running = [agents.submit(ask, stack, keys[n % 2], f"tokens={30 + 3 * n} per_delta=3 pace_ms=50", True, started=event)
                   for n, event in enumerate(started)]
        assert all(event.wait(10) for event in started)
        # From here on no settlement gets through; the answers come to their end all the same.
        if service_is == "gone":
            stack.service.kill()
        else:
            freeze(stack.service.process)
        try:
            results = [future.result() for future in running]
            assert all(result.status == 200 and result.whole for result in results), results
            log = stack.directory / "access.log"
            wait_for("the access log", lambda: sum(result.req in log.read_text() for result in results) == 6)
            stack.envoy.kill()
        finally:
            stack.start_service() if service_is == "gone" else stack.service.process.send_signal(signal.SIGCONT)
        stack.sim.quiet()
        # A log that somebody changed: the record is rejected, said to be so, and changes nothing.
        altered = stack.directory / "altered.log"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        victim = next(line for line in lines if line["request_id"] == f"req_{results[0].req}")
        assert '"out":' in victim["settle"]
        victim["settle"] = re.sub(r'"out":\d+', '"out":1', victim["settle"])
        altered.write_text(json.dumps(victim) + "\n")
        before = [stack.key(key_id)["spent_nanodollars"] for key_id, _ in keys] if service_is == "gone" else None
        assert recover(stack, altered) == (1, 0, 1)
        if service_is == "gone":
            assert [stack.key(key_id)["spent_nanodollars"] for key_id, _ in keys] == before
            assert sum(stack.key(key_id)["in_flight"] for key_id, _ in keys) == 6, "the holds outlive the Envoy"
            # The holds run out and are charged in full; the import then lowers them to what was used.
            stack.settled(*(key_id for key_id, _ in keys), timeout=30)
            books, costs = check_every_request(stack, keys, results, once=False)
            assert all(books[result.req].ends[-1]["event"] == "EXPIRED" for result in results)
            assert sum(account.charge for account in books.values()) > sum(costs.values())
        code, taken, rejected = recover(stack, log)
        assert (code, rejected) == (0, 0) and taken >= 14
        stack.settled(*(key_id for key_id, _ in keys), timeout=15)
        books, costs = check_every_request(stack, keys, results, once=False)
        check_exact(books, costs)
        chains = [stack.export(key_id) for key_id, _ in keys]
        assert recover(stack, log) == (0, taken, 0)
        assert chains == [stack.export(key_id) for key_id, _ in keys], "a second import changed something"


# --- all of it, in order -----------------------------------------------------------------------------------------------


class Up(Part):
    """`keyward up` as a person runs it."""

    def __init__(self, name, directory):
        super().__init__(name, directory)
        self.listen_port, self.admin_port, self.data = free_port(), free_port(), directory / "data"

    def command_line(self):
        return [KEYWARD_BIN, "up", "--data", str(self.data), "--listen", f"127.0.0.1:{self.listen_port}", "--admin", f"127.0.0.1:{self.admin_port}",
                "--provider", f"openai={self.sim.api}", "--provider", f"anthropic={self.sim.api}"]

    def spawn(self, command, env=None, stdout=None):
        env = {"OPENAI_API_KEY": CREDENTIALS[0]["secret"], "ANTHROPIC_API_KEY": CREDENTIALS[1]["secret"], "ENVOY_BIN": ENVOY_BIN}
        return super().spawn(command, env, stdout)

    def start(self):
        said = len(self.log.read_bytes()) if self.log.exists() else 0
        self.spawn(self.command_line())
        wait_for("keyward up", lambda: b"keyward is up" in self.log.read_bytes()[said:] or not self.running(), 30)
        assert self.running(), self.log.read_text()
        self.stack.listen_port, self.stack.admin_port = self.listen_port, self.admin_port
        if (self.data / "admin-token").exists():
            self.stack.admin_token = (self.data / "admin-token").read_text().strip()

    def envoys(self):
        """The Envoys that run on this data directory, whoever their parent is by now."""
        found, config = [], str(self.data / "envoy.yaml").encode()
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    if config in (process / "cmdline").read_bytes() and "\nState:\tZ" not in (process / "status").read_text():
                        found.append(int(process.name))
                except OSError:
                    pass
        return found


@pytest.fixture
def up(tmp_path):
    """`keyward up` in front of a simulator, with the stack's helpers speaking to it."""
    sim, up = Simulator("sim", tmp_path), Up("up", tmp_path)
    stack = up.stack = Stack(directory=tmp_path)
    try:
        sim.start()
        stack.sim = up.sim = sim
        yield up
    finally:
        # What a broken `up` left behind must not disturb the tests after this one.
        for pid in up.envoys():
            os.kill(pid, signal.SIGKILL)
        for part in (up, stack.service, sim):
            part.kill()


def test_up_stops_in_order_with_streams_in_flight(up):
    up.start()
    stack, sim, keys = up.stack, up.sim, new_keys(up.stack)
    [envoy] = up.envoys()
    started = [threading.Event() for _ in range(20)]
    with ThreadPoolExecutor(20) as agents:
        running = [agents.submit(ask, stack, keys[n % 4], f"tokens={90 + n} per_delta=3 pace_ms=100", True, n % 5 == 0, started=event)
                   for n, event in enumerate(started)]
        assert all(event.wait(10) for event in started)
        assert sim.totals()["running"] == 20
        up.process.send_signal(signal.SIGTERM)
        results = [future.result() for future in running]
    assert up.process.wait(30) == 0, up.log.read_text()
    cut = [result for result in results if result.status != 200 or not result.whole]
    assert not cut, f"{len(cut)} of 20 streams were cut: {cut[0]}"
    assert up.envoys() == [], f"Envoy {envoy} still runs"
    sim.quiet()
    # Nothing runs any more: what became of the money is read by opening the same data again.
    stack.start_service()
    books, costs = check_every_request(stack, keys, results)
    check_exact(books, costs)
    assert len(books) == 20 and all(account.ends[0]["event"] == "SETTLED" for account in books.values())
    assert all(account.ends[0]["estimated"] == 0 for account in books.values())


def test_up_stops_in_order_while_agents_go_on_asking(up):
    """No new requests, those in flight end: it must not wait for agents to lose interest, nor cut them off."""
    up.start()
    stack, keys = up.stack, new_keys(up.stack)
    with Load(stack, keys, hasty=2) as load:
        wait_for("load", lambda: load.count() > 50)
        up.process.send_signal(signal.SIGTERM)
        stopping = time.monotonic()
        try:
            code = up.process.wait(15)
        except subprocess.TimeoutExpired:
            code = "still running after 15 s"
    assert code == 0, f"{code}: {up.log.read_text()}"
    print(f"stopped in {time.monotonic() - stopping:.1f} s")
    assert up.envoys() == []
    up.sim.quiet()
    stack.start_service()
    cut = [result for result in load.results if result.status == 200 and not result.whole]
    assert not cut, f"{len(cut)} answers were cut: {cut[0]}"
    books, costs = check_every_request(stack, keys, load.results)
    check_exact(books, costs)


def test_up_that_was_killed_starts_again(up):
    """An Envoy that lost its `keyward up` must not share the port with the next one: it can only refuse."""
    up.start()
    stack, keys = up.stack, new_keys(up.stack)
    assert ask(stack, keys[0]).status == 200
    stack.settled(keys[0][0])
    up.kill()
    up.start()
    answers = collections.Counter(ask(stack, keys[n % 4]).status for n in range(60))
    assert answers == {200: 60}, f"{answers}; {len(up.envoys())} Envoys run"
    assert len(up.envoys()) == 1


def test_the_access_log_of_up_is_there_when_it_is_needed(up):
    """Answers that ended a second before everything was killed are in the access log: from there their holds are settled."""
    up.start()
    stack, keys = up.stack, new_keys(up.stack)
    [envoy] = up.envoys()
    assert ask(stack, keys[0]).status == 200
    stack.settled(keys[0][0])
    started = [threading.Event() for _ in range(4)]
    with ThreadPoolExecutor(4) as agents:
        running = [agents.submit(ask, stack, key, "tokens=30 per_delta=3 pace_ms=50", True, started=event)
                   for key, event in zip(keys, started, strict=True)]
        assert all(event.wait(10) for event in started)
        freeze(up.process)
        results = [future.result() for future in running]
    assert all(result.status == 200 and result.whole for result in results)
    time.sleep(1)
    os.kill(envoy, signal.SIGKILL)
    up.kill()
    up.sim.quiet()
    stack.start_service()
    log = (up.data / "access.log").read_text()
    missing = [result.req for result in results if result.req not in log]
    assert not missing, f"{len(missing)} of 4 answers that ended more than a second ago are not in the access log"
    assert recover(stack, up.data / "access.log")[0] == 0
    books, costs = check_every_request(stack, keys, results)
    check_exact(books, costs)


def test_a_first_start_that_fails_does_not_lose_the_admin_token(up):
    """Whoever repairs the cause and starts again must be able to get in."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        up.listen_port = taken.getsockname()[1]
        up.spawn(up.command_line())
        assert up.process.wait(30) != 0, "it can't have got the port"
        assert up.envoys() == []
    up.start()
    assert (up.data / "admin-token").exists(), "the only admin token was made by the start that failed, and shown to nobody"
    assert new_keys(up.stack, 1)


def test_a_first_start_of_the_service_that_fails_does_not_lose_the_admin_token(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        edge = free_port()
        command = [SERVICE_BIN, "--data", str(tmp_path / "data"), "--edge", f"127.0.0.1:{edge}", "--admin"]
        done = subprocess.run([*command, f"127.0.0.1:{taken.getsockname()[1]}"], capture_output=True, text=True, timeout=20)
        assert done.returncode != 0 and done.stdout == "" and "listen" in done.stderr
    service = Part("service", tmp_path)
    try:
        service.spawn([*command, f"127.0.0.1:{free_port()}"], stdout=subprocess.PIPE)
        assert service.ready_line()["bootstrap_admin_token"], "the only admin token was made by the start that failed, and shown to nobody"
    finally:
        service.kill()


# --- the disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "keyward-e2e", str(data)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(data)], check=True)
    shutil.rmtree(tmp_path, ignore_errors=True)


def fill(path):
    with open(path, "wb", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def test_a_full_disk_refuses_and_recovers(small_disk):
    with Stack(directory=small_disk) as stack, ThreadPoolExecutor(2) as agents:
        key = key_id, _ = stack.new_key("10.00")
        assert ask(stack, key).status == 200
        stack.settled(key_id)
        started = threading.Event()
        stream = agents.submit(ask, stack, key, "tokens=60 per_delta=3 pace_ms=50", True, started=started)
        assert started.wait(10)
        filler = small_disk / "data/filler"
        fill(filler)
        # What SQLite had set aside already may still take some.
        admitted_late = list(itertools.takewhile(lambda result: result.status == 200, (ask(stack, key) for _ in range(50))))
        assert len(admitted_late) < 50
        calls = len(stack.sim.ledger())
        refused = [ask(stack, key) for _ in range(5)]
        for result in refused:
            assert (result.status, result.reason) == (503, "audit_unavailable"), (result.headers, result.body)
            assert result.seconds < 1.0 + SLACK and result.headers.get("retry-after")
        assert call(stack.admin_base, "GET", "/readyz")[0] == 503, "it says it is ready"
        assert call(stack.admin_base, "GET", "/healthz")[0] == 200
        status, _, body = call(stack.admin_base, "POST", "/v1/keys", {"label": "no"}, {"authorization": f"Bearer {stack.admin_token}"})
        assert status == 503 and b"sqlite" not in body.lower(), body
        # The stream that was admitted before ends as it should; only its settlement waits.
        streamed = stream.result()
        assert streamed.status == 200 and streamed.whole
        assert len(stack.sim.ledger()) == calls, "something was forwarded"
        filler.unlink()
        assert serves_again(stack, key, 10) < 10
        assert call(stack.admin_base, "GET", "/readyz")[0] == 200
        stack.settled(key_id, timeout=20)
        stack.sim.quiet()
        books, costs = check_every_request(stack, [key], [*admitted_late, streamed])
        check_exact(books, costs)
