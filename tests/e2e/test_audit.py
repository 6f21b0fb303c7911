"""The audit chain, checked offline by the command and by a second reading: any change to an export shows, and where."""

import base64
import hmac
import json
import random
import re
import struct
import subprocess
import time

import audit
import pytest
from edge import BareGate
from harness import KEYWARD_BIN, Stack, wait_for
from load import ask

# What a key can live through. KEY_CHANGED has no way to come about in this version: keys can't be changed yet.
KINDS = {"KEY_CREATED", "ADMITTED", "SETTLED", "REFUSED", "VOIDED", "EXPIRED", "KEY_FROZEN", "KEY_REVOKED", "ALARM"}


@pytest.fixture(scope="module")
def eventful():
    """A stack, and a key with every kind of entry in its chain."""
    with Stack(concurrency=2, hold_ttl=2) as stack:
        key_id, token = key = stack.new_key("5.00", label="évén\u00adtful \U0001f511", allow={"models": ["gpt-4o*", "claude-*"]})
        other = stack.new_key("1.00")
        for directive in ("", "status=500", "tokens=40"):
            ask(stack, key, directive)
        ask(stack, key, "tokens=12 pace_ms=5", stream=True)
        ask(stack, key, "tokens=12 pace_ms=5", stream=True, anthropic=True)
        ask(stack, key, "tokens=60 cut_after_bytes=900", stream=True)
        assert stack.chat(token, model="o3-mini")[0] == 403
        ask(stack, other)
        gate = BareGate(stack)
        voided, _ = gate.admit(token)
        expiring, _ = gate.admit(token)
        gate.settle(gate.record(voided, "void"))
        wait_for("the hold's end", lambda: stack.key(key_id)["in_flight"] == 0, 10)
        late = gate.record(expiring, "complete", status=200, usage={"in": 3, "out": 5})
        gate.settle(late)
        dear, _ = gate.admit(token)
        # More than was held: charged in full, and the key stops.
        gate.settle(gate.record(dear, "complete", status=200, usage={"in": 1000, "out": 100_000}))
        assert stack.chat(token)[0] == 429
        stack.settled(key_id, other[0])
        stack.admin("DELETE", f"/v1/keys/{key_id}")
        assert stack.chat(token)[0] == 401
        stack.sim.quiet()
        stack.eventful = key_id, gate, other[0]
        yield stack


def by_command(export):
    """`keyward audit verify`: exit code, and the entry its message names."""
    done = subprocess.run([KEYWARD_BIN, "audit", "verify", "-"], input=export, capture_output=True, text=True)
    named = re.search(r"\bentry (\d+)\b", done.stderr)
    return done.returncode, int(named[1]) if named else None, done.stdout + done.stderr


def by_second_reading(export):
    """0 when the second reading accepts the export, 1 when it does not."""
    try:
        audit.verify(export)
    except (ValueError, KeyError):
        return 1
    # The number that stands beside an entry repeats the one inside it (docs/audit-format.md).
    rows = [json.loads(line) for line in export.splitlines()][1:-1]
    return 0 if [row["seq"] for row in rows] == list(range(1, len(rows) + 1)) else 1


def must_fail(export, entries, what):
    """Both readings reject an export, and the command names one of these entries (from 1)."""
    code, named, message = by_command(export)
    assert code == 3, f"{what}: accepted, {message}"
    assert named in entries, f"{what}: expected entry {entries}, got: {message}"
    assert by_second_reading(export) == 1, f"{what}: the second reading accepts it"


class Export:
    """An export, to be taken apart and put together again."""

    def __init__(self, text):
        self.head, *self.rows, self.tail = [json.loads(line) for line in text.splitlines()]

    def text(self, rows=None, renumber=False, **tail):
        rows = [dict(row) for row in (self.rows if rows is None else rows)]
        if renumber:
            for number, row in enumerate(rows, 1):
                row["seq"] = number
        return "".join(json.dumps(line) + "\n" for line in [self.head, *rows, {**self.tail, **tail}])

    def flipped(self, at, byte, bit, part="entry"):
        """With one bit of one decoded byte changed."""
        rows = [dict(row) for row in self.rows]
        if part == "entry":
            data = bytearray(base64.b64decode(rows[at]["entry"]))
            data[byte] ^= 1 << bit
            rows[at]["entry"] = base64.b64encode(data).decode()
        else:
            data = bytearray(bytes.fromhex(rows[at]["mac"]))
            data[byte] ^= 1 << bit
            rows[at]["mac"] = data.hex()
        return self.text(rows)


@pytest.fixture(scope="module")
def export(eventful):
    return Export(eventful.export(eventful.eventful[0]))


def test_an_untouched_chain_verifies(eventful, export, tmp_path):
    key_id = eventful.eventful[0]
    entries = audit.verify(export.text())
    assert {entry["event"] for entry in entries} == KINDS
    code, _, message = by_command(export.text())
    assert code == 0 and f"{len(entries)} entries of {key_id}" in message
    # As a file, and as the command itself exports it.
    access = ["--admin", eventful.admin_base, "--admin-token", eventful.admin_token]
    done = subprocess.run([KEYWARD_BIN, "audit", "export", *access, key_id], capture_output=True, text=True, check=True)
    assert done.stdout == eventful.export(key_id)
    (tmp_path / "chain.jsonl").write_text(done.stdout)
    assert subprocess.run([KEYWARD_BIN, "audit", "verify", str(tmp_path / "chain.jsonl")], capture_output=True).returncode == 0
    assert subprocess.run([KEYWARD_BIN, "audit", "verify", str(tmp_path / "nothing.jsonl")], capture_output=True).returncode == 1


def test_every_changed_bit_shows(export):
    rng = random.Random(7)
    for at, row in enumerate(export.rows):
        length = len(base64.b64decode(row["entry"]))
        # Magic, kind, epoch, number, time, the last byte, and some in between.
        for byte in {0, 4, 5, 12, 13, 20, 28, length - 1, *(rng.randrange(length) for _ in range(8))}:
            bit = rng.randrange(8)
            must_fail(export.flipped(at, byte, bit), {at + 1}, f"entry {at + 1}, byte {byte}, bit {bit}")
        for byte in (0, 31, rng.randrange(32)):
            must_fail(export.flipped(at, byte, rng.randrange(8), "mac"), {at + 1}, f"entry {at + 1}, MAC byte {byte}")


@pytest.mark.parametrize("renumber", [False, True], ids=["as-it-was", "renumbered"])
def test_every_moved_entry_shows(export, renumber):
    rows, n = export.rows, len(export.rows)
    for at in range(n):
        must_fail(export.text(rows[:at] + rows[at + 1:], renumber), {at + 1}, f"entry {at + 1} removed")
        must_fail(export.text(rows[:at] + rows[at + 1:], renumber, count=n - 1), {at + 1} | ({n - 1} if at == n - 1 else set()),
                  f"entry {at + 1} removed, count adapted")
        must_fail(export.text(rows[:at + 1] + rows[at:], renumber), {at + 2}, f"entry {at + 1} twice")
        if at + 1 < n:
            must_fail(export.text([*rows[:at], rows[at + 1], rows[at], *rows[at + 2:]], renumber), {at + 1}, f"entries {at + 1} and {at + 2} swapped")


def test_every_cut_shows(export):
    n = len(export.rows)
    for kept in range(n):
        must_fail(export.text(export.rows[:kept]), {kept + 1}, f"cut after {kept}")
        # The count fits again, but the head's MAC is over another one.
        must_fail(export.text(export.rows[:kept], count=kept), {kept, kept + 1}, f"cut after {kept}, count adapted")
    lines = export.text().splitlines(keepends=True)
    for kept in range(1, n + 1):
        code, _, message = by_command("".join(lines[:kept + 1]))
        assert code == 3, f"the last line is gone after {kept} entries: {message}"
    for broken in ("", lines[0], lines[0] + lines[-1][:-20], "".join(lines[1:]), "".join(lines) + lines[-1], "".join(lines) + "{}\n"):
        assert by_command(broken)[0] == 3
    for head in (export.tail["head"][:-1] + ("0" if export.tail["head"][-1] != "0" else "1"), "00" * 32, ""):
        assert by_command(export.text(head=head))[0] == 3


def test_another_chain_does_not_pass_for_this_one(eventful, export):
    key_id, _, other_id = eventful.eventful
    other = Export(eventful.export(other_id))
    n = len(export.rows)
    # An entry of another key, in place of one and at the end.
    must_fail(export.text([other.rows[0], *export.rows[1:]]), {1}, "another key's first entry")
    must_fail(export.text([*export.rows, {**other.rows[0], "seq": n + 1}], count=n + 1), {n + 1}, "another key's entry at the end")
    for field, value in (("origin", "elsewhere"), ("key", other_id), ("chain_keys", other.head["chain_keys"])):
        changed = Export(export.text())
        changed.head[field] = value
        must_fail(changed.text(), {1}, f"another {field}")
    changed = Export(export.text())
    changed.head["format"] = "keyward-audit-export/v9"
    assert by_command(changed.text())[0] == 3


def test_the_chain_lists_exactly_what_reached_the_provider(eventful):
    key_id, gate, other_id = eventful.eventful
    admitted = [entry for chain in (key_id, other_id) for entry in eventful.audit(chain)
                if entry["event"] == "ADMITTED" and entry["vm"] != gate.vm.hex()]
    admitted.sort(key=lambda entry: entry["time_ms"])
    seen = [request["client_request_id"] for request in eventful.sim.ledger()]
    assert [f"req_{entry['req']}" for entry in admitted] == seen
    for entry, request in zip(admitted, eventful.sim.ledger(), strict=True):
        assert (entry["model"], entry["provider"], bool(entry["stream"])) == (request["model"], request["provider"], request["stream"])
        assert entry["time_ms"] * 1000 <= request["started_unix_us"]
        assert entry["endpoint"] == f"{request['method']} {request['path']}"


def test_entries_say_what_happened(eventful):
    key_id, gate, _ = eventful.eventful
    chain = eventful.audit(key_id)
    by_req = {}
    for entry in chain:
        if "req" in entry:
            by_req.setdefault(entry["req"], []).append(entry)
    costs = {request["client_request_id"].removeprefix("req_"): request for request in eventful.sim.ledger()}
    for req, entries in by_req.items():
        names = [entry["event"] for entry in entries]
        assert names in (["REFUSED"], ["ADMITTED", "SETTLED"], ["ADMITTED", "VOIDED"], ["ADMITTED", "EXPIRED", "SETTLED"]), names
        if names == ["ADMITTED", "SETTLED"] and req in costs and costs[req]["ended"] == "complete":
            end, truth = entries[1], costs[req]
            assert (end["charge"], end["output"]) == (truth["cost_nanodollars"], truth["completion_tokens"])
            assert (end["status"], end["outcome"]) == (200, "complete")
            assert [t["credential"] for t in end["tries"]] == [c["id"] for c in entries[0]["credentials"]][:1]
    assert sorted(entry["code"] for entry in chain if entry["event"] == "REFUSED") == ["cap_exhausted", "model_not_allowed", "revoked"]
    times = [entry["time_ms"] for entry in chain]
    assert times == sorted(times) and abs(times[-1] / 1000 - time.time()) < 3600
    created = json.loads(chain[0]["detail"])
    assert created["label"] == "évén\u00adtful \U0001f511" and created["limits"]["budgets"] == [{"window": "total", "cap": 5_000_000_000}]
    # The spent that the admin API tells is the sum of the chain: the last word on each request counts.
    assert sum(entries[-1].get("charge", 0) for entries in by_req.values()) == eventful.key(key_id)["spent_nanodollars"]


def test_tail_prints_the_entries(eventful):
    key_id = eventful.eventful[0]
    access = ["--admin", eventful.admin_base, "--admin-token", eventful.admin_token]
    done = subprocess.run([KEYWARD_BIN, "audit", "tail", *access, key_id], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [line.split()[:3] for line in done.stdout.splitlines()]
    chain = eventful.audit(key_id)
    assert printed == [[str(entry["seq"]), str(entry["time_ms"]), entry["event"]] for entry in chain[-20:]]
    for secret in (*eventful.secrets, *eventful.tokens):
        assert secret not in done.stdout
    missing = subprocess.run([KEYWARD_BIN, "audit", "tail", *access, "key_0000"], capture_output=True, text=True)
    assert missing.returncode != 0 and "no key" in missing.stderr


@pytest.fixture(scope="module")
def long_chain(eventful):
    """A chain longer than one page of the service's own reading."""
    key_id, token = eventful.new_key()
    gate = BareGate(eventful)
    for _ in range(1005):
        gate.admit(token)
    wait_for("the holds' end", lambda: eventful.key(key_id)["in_flight"] == 0, 20)
    return key_id


def test_a_long_chain_exports_whole(eventful, long_chain):
    text = eventful.export(long_chain)
    assert len(audit.verify(text)) == 1 + 2 * 1005
    assert by_command(text)[0] == 0


def test_tail_of_a_long_chain_is_its_end(eventful, long_chain):
    access = ["--admin", eventful.admin_base, "--admin-token", eventful.admin_token]
    done = subprocess.run([KEYWARD_BIN, "audit", "tail", *access, long_chain], capture_output=True, text=True, check=True)
    numbers = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert numbers == list(range(1992, 2012)), f"the newest 20, in order; {len(numbers)} were printed"


def test_the_access_log_holds_each_vm_s_chain_of_records(eventful):
    """KS1 lines, read by docs/audit-format.md alone: MACs, numbers, links."""
    wait_for("the access log", lambda: "KS1" in (eventful.directory / "access.log").read_text())
    gate, vms, ended = BareGate(eventful), {}, set()
    for line in (eventful.directory / "access.log").read_text().splitlines():
        settle = json.loads(line)["settle"]
        if settle is None:
            continue
        magic, vm, seq, prev, mac, payload = settle.split(" ", 5)
        if vm not in vms:
            gate.vm = bytes.fromhex(vm)
            answer = json.loads(gate.post("/edge/v1/settle", f"KB1 {vm} 1 {{}}\n".encode())[2])
            vms[vm] = [bytes.fromhex(answer["edge_key"]), {}]
        sealed = struct.pack(">Q", int(seq)) + bytes.fromhex(prev) + payload.encode()
        assert magic == "KS1" and hmac.digest(vms[vm][0], sealed, "sha256").hex() == mac
        vms[vm][1][int(seq)] = (prev, mac)
        ended.add(json.loads(payload)["req"])
    for _, records in vms.values():
        previous = bytes(32).hex()
        for seq in sorted(records):
            prev, mac = records[seq]
            if seq - 1 in records or seq == 1:
                assert prev == previous
            previous = mac
    key_id, bare, _ = eventful.eventful
    admitted = {entry["req"]: entry["vm"] for entry in eventful.audit(key_id) if entry["event"] == "ADMITTED"}
    assert {req for req, vm in admitted.items() if vm != bare.vm.hex()} <= ended
