"""A gate without an Envoy: speaks the edge API and seals records as docs/audit-format.md says, sharing no code with the
product. With it a test can leave a hold open, void out of turn, or report any usage."""

import hmac
import json
import os
import struct
import time
from hashlib import sha256

from harness import call

PRICED = {"provider": "openai", "endpoint": "POST /v1/chat/completions", "model": "gpt-4o-mini", "bytes": 100, "max_tokens": 50, "choices": 1}


class BareGate:
    def __init__(self, stack):
        self.base = f"http://127.0.0.1:{stack.edge_port}"
        self.authorization = (stack.directory / "data/edge-token").read_text().strip()
        self.vm, self.seq, self.mac, self.key = os.urandom(16), 0, bytes(32), None

    def post(self, path, body):
        return call(self.base, "POST", path, body, {"authorization": self.authorization})

    def admit(self, token, req=None, **ask):
        """Asks for an admission: request id, answer."""
        req = req or os.urandom(16).hex()
        body = {"req": req, "vm": self.vm.hex(), "node": "bare", "token": sha256(token.encode()).hexdigest(), "need_key": self.key is None,
                "ask": {**PRICED, **ask}}
        status, _, data = self.post("/edge/v1/admit", body)
        assert status == 200, (status, data)
        answer = json.loads(data)
        self.key = bytes.fromhex(answer["edge_key"]) if "edge_key" in answer else self.key
        return req, answer

    def record(self, req, outcome, **more):
        """The next sealed record: one line."""
        if self.key is None:
            status, _, data = self.post("/edge/v1/settle", f"KB1 {self.vm.hex()} 1 {{}}\n".encode())
            assert status == 200, (status, data)
            self.key = bytes.fromhex(json.loads(data)["edge_key"])
        payload = json.dumps({"req": req, "outcome": outcome, "sent": outcome != "void", "ms": 1, "at": int(time.time() * 1000), **more})
        self.seq, previous = self.seq + 1, self.mac
        self.mac = hmac.digest(self.key, struct.pack(">Q", self.seq) + previous + payload.encode(), "sha256")
        return f"KS1 {self.vm.hex()} {self.seq} {previous.hex()} {self.mac.hex()} {payload}"

    def settle(self, *lines):
        """Sends a batch: taken, rejected."""
        status, _, data = self.post("/edge/v1/settle", "\n".join([f"KB1 {self.vm.hex()} 0 {{}}", *lines]).encode())
        assert status == 200, (status, data)
        return json.loads(data)
