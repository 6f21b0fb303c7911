"""A second reading of the audit format, written from docs/audit-format.md: it shares no code with the product."""

import base64
import hashlib
import hmac
import json
import struct

KINDS = {1: "ADMITTED", 2: "REFUSED", 3: "SETTLED_1", 4: "VOIDED", 5: "EXPIRED", 6: "KEY_CREATED", 7: "KEY_CHANGED", 8: "KEY_FROZEN", 9: "KEY_REVOKED",
         10: "ADMIN_CHANGED", 11: "WOULD_REFUSE", 12: "ALARM", 13: "SETTLED"}
U64, I64, BYTES, TEXT = "u64", "i64", "bytes", "text"
FIELDS = {
    "ADMITTED": [("req", BYTES), ("vm", BYTES), ("node", TEXT), ("provider", TEXT), ("endpoint", TEXT), ("model", TEXT), ("stream", U64), ("bytes", U64),
                 ("clamp", U64), ("choices", U64), ("hold", I64), ("rev", U64), ("credentials", [("id", TEXT)])],
    "REFUSED": [("req", BYTES), ("code", TEXT), ("provider", TEXT), ("endpoint", TEXT), ("model", TEXT)],
    "SETTLED_1": [("req", BYTES), ("outcome", TEXT), ("status", U64), ("input", U64), ("cache_read", U64), ("cache_write", U64), ("cache_write_1h", U64),
                ("output", U64), ("reasoning", U64), ("charge", I64), ("estimated", U64), ("ms", U64),
                ("tries", [("credential", TEXT), ("status", U64), ("ms", U64)])],
    "VOIDED": [("req", BYTES)],
    "EXPIRED": [("req", BYTES), ("charge", I64)],
    "KEY_CREATED": [("actor", TEXT), ("detail", TEXT)],
    "KEY_CHANGED": [("actor", TEXT), ("detail", TEXT)],
    "KEY_FROZEN": [("reason", TEXT)],
    "KEY_REVOKED": [("actor", TEXT)],
    "ADMIN_CHANGED": [("actor", TEXT), ("action", TEXT), ("target", TEXT), ("detail", TEXT)],
    "WOULD_REFUSE": [("req", BYTES), ("code", TEXT), ("provider", TEXT), ("endpoint", TEXT), ("model", TEXT)],
    "ALARM": [("what", TEXT), ("detail", TEXT)],
}

FIELDS["SETTLED"] = [*FIELDS["SETTLED_1"], ("provider", TEXT), ("model", TEXT)]


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        if self.at + n > len(self.data):
            raise ValueError("the entry stops half way")
        piece = self.data[self.at:self.at + n]
        self.at += n
        return piece

    def value(self, kind):
        if kind == U64:
            return struct.unpack(">Q", self.take(8))[0]
        if kind == I64:
            return struct.unpack(">q", self.take(8))[0]
        if isinstance(kind, list):
            return [{name: self.value(k) for name, k in kind} for _ in range(self.value(U64))]
        data = self.take(struct.unpack(">I", self.take(4))[0])
        return data.decode() if kind == TEXT else data.hex()


def decode(entry):
    """One entry as a dict."""
    reader = Reader(entry)
    if reader.take(4) != b"KWE1":
        raise ValueError("no KWE1 entry")
    kind = KINDS[reader.take(1)[0]]
    out = {"event": kind.removesuffix("_1")}
    for name, form in [("epoch", U64), ("seq", U64), ("time_ms", U64), ("organisation", TEXT), ("key", TEXT), *FIELDS[kind]]:
        out[name] = reader.value(form)
    if reader.at != len(entry):
        raise ValueError("bytes after the entry")
    return out


def verify(export):
    """Checks an export (JSON lines) and gives its decoded entries; raises ValueError on the first thing wrong."""
    lines = [json.loads(line) for line in export.splitlines()]
    head, rows, tail = lines[0], lines[1:-1], lines[-1]
    last = hashlib.sha256(b"keyward/genesis/v1\0" + head["origin"].encode() + head["key"].encode()).digest()
    entries, key = [], bytes.fromhex(head["chain_keys"].get("0", ""))
    for number, row in enumerate(rows, 1):
        raw = base64.b64decode(row["entry"])
        entry = decode(raw)
        if entry["seq"] != number or entry["key"] != head["key"]:
            raise ValueError(f"entry {number} is out of place")
        key = bytes.fromhex(head["chain_keys"][str(entry["epoch"])])
        last = hmac.digest(key, last + raw, "sha256")
        if last.hex() != row["mac"]:
            raise ValueError(f"entry {number} does not match its MAC")
        entries.append(entry)
    expected = hmac.digest(key, b"keyward/head/v1" + struct.pack(">Q", len(rows)) + last, "sha256").hex()
    if tail != {"count": len(rows), "head": expected}:
        raise ValueError("the head does not match")
    return entries
