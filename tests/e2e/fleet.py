"""Two Envoys at one policy service, and many streams at once with the time of each one's last byte."""

import json
import random
import selectors
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from harness import Part, Stack, call, free_port, wait_for

PATHS = {"openai": "/v1/chat/completions", "responses": "/v1/responses", "anthropic": "/v1/messages"}


class Fleet(Stack):
    """A stack with a second Envoy beside the first, each with a process, an identity and a configuration of its own."""

    def start_envoy(self):
        super().start_envoy()
        self.second = Part("envoy-2", self.directory)
        self.second_port, self.second_admin_port = free_port(), free_port()
        text = (self.directory / "envoy.yaml").read_text()
        for old, new in ((f"port_value: {self.listen_port}}}", f"port_value: {self.second_port}}}"),
                         (f"port_value: {self.envoy_admin_port}}}", f"port_value: {self.second_admin_port}}}"),
                         ("id: keyward-envoy,", "id: keyward-envoy-2,"), ("access.log", "access-2.log")):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.directory / "envoy-2.yaml").write_text(text)
        self.second.spawn([self.envoy_bin, "-c", str(self.directory / "envoy-2.yaml"), "--use-dynamic-base-id", "--log-level", "warning",
                           "--concurrency", str(self.concurrency), "--file-flush-interval-msec", "100"])
        wait_for("the second Envoy", lambda: call(f"http://127.0.0.1:{self.second_admin_port}", "GET", "/ready")[0] == 200)

    def __exit__(self, kind, *rest):
        if hasattr(self, "second"):
            self.second.kill()
            if kind is not None and self.second.log.exists():
                print(self.second.log.read_text(errors="replace")[-1500:])
        super().__exit__(kind, *rest)

    @property
    def ports(self):
        return self.listen_port, self.second_port

    def both_stats(self, pattern):
        """Sums over both Envoys."""
        sums = {}
        for port in (self.envoy_admin_port, self.second_admin_port):
            text = call(f"http://127.0.0.1:{port}", "GET", f"/stats?filter={pattern}")[2].decode()
            for name, _, value in (line.partition(": ") for line in text.splitlines()):
                if value.strip().isdigit():
                    sums[name] = sums.get(name, 0) + int(value)
        return sums


def body_of(dialect, words, stream=True, **more):
    content = f"Hello [[sim {words}]]"
    if dialect == "anthropic":
        body = {"model": "claude-haiku-4-5", "max_tokens": 3000, "messages": [{"role": "user", "content": content}]}
    elif dialect == "responses":
        body = {"model": "gpt-4o-mini", "input": content}
    else:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}]}
    return {**body, "stream": stream, **more}


@dataclass
class Stream:
    """One answer as it came."""

    key_id: str
    port: int
    socket: socket.socket
    data: bytearray = field(default_factory=bytearray)
    last_byte: float | None = None
    last_event: float | None = None
    closed: float | None = None

    @property
    def head(self):
        return bytes(self.data).partition(b"\r\n\r\n")[0].decode()

    @property
    def status(self):
        return int(self.head.split(" ", 2)[1])

    @property
    def body(self):
        """What came, without the framing of chunks."""
        rest, body = bytes(self.data).partition(b"\r\n\r\n")[2], b""
        if "transfer-encoding: chunked" not in self.head.lower():
            return rest
        while rest:
            length, found, rest = rest.partition(b"\r\n")
            if not found or not length:
                break
            n = int(length, 16)
            body, rest = body + rest[:n], rest[n + 2:]
        return body

    def events(self):
        """(event, document) of each, by the standard's reading; one that has not ended is none."""
        *blocks, _ = self.body.decode().replace("\r\n", "\n").split("\n\n")
        events = []
        for block in blocks:
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            name = next((line[7:] for line in lines if line.startswith("event: ")), None)
            text = "\n".join(line[5:].strip() for line in lines if line.startswith("data:"))
            if text and text != "[DONE]":
                events.append((name, json.loads(text)))
        return events

    def ended_by(self):
        """The code of the one error event, which is the last; None without any."""
        errors = [(name, document) for name, document in self.events() if document.get("error")]
        if not errors:
            return None
        assert len(errors) == 1 and errors[0] == self.events()[-1], self.body[-2000:]
        assert b"[DONE]" not in self.body and b"message_stop" not in self.body and b"response.completed" not in self.body
        return errors[0][1]["error"].get("code") or errors[0][1]["error"]["message"]

    def met_silence(self):
        """It was closed without a reason told, after the 0.2 s and more in which no event of the provider's came to its end: a gate gives
        it 0.25 s for that."""
        return bool(self.closed and self.last_event) and self.closed - self.last_event > 0.2 and self.ended_by() is None


class Reader:
    """Reads any number of streams in one thread, and notes when each one's last byte came and when it was closed."""

    def __init__(self):
        self.selector, self.lock, self.over = selectors.DefaultSelector(), threading.Lock(), threading.Event()
        self.streams = []
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        for stream in self.streams:
            stream.socket.close()

    def open(self, port, key, words="tokens=2900 pace_ms=40", dialect="openai", stream=True, **more):
        key_id, token = key
        body = json.dumps(body_of(dialect, words, stream, **more)).encode()
        auth = f"x-api-key: {token}\r\nanthropic-version: 2023-06-01" if dialect == "anthropic" else f"authorization: Bearer {token}"
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        connection.sendall(f"POST {PATHS[dialect]} HTTP/1.1\r\nhost: keyward\r\n{auth}\r\ncontent-type: application/json\r\n"
                           f"content-length: {len(body)}\r\n\r\n".encode() + body)
        connection.setblocking(False)
        found = Stream(key_id, port, connection)
        with self.lock:
            self.streams.append(found)
            self.selector.register(connection, selectors.EVENT_READ, found)
        return found

    def read(self):
        while not self.over.is_set():
            with self.lock:
                ready = self.selector.select(0)
            if not ready:
                time.sleep(0.001)
            for key, _ in ready:
                stream = key.data
                try:
                    piece = stream.socket.recv(65536)
                except BlockingIOError:
                    continue
                except OSError:
                    piece = b""
                now = time.monotonic()
                if piece:
                    stream.data += piece
                    stream.last_byte = now
                    # The end of an event may stand in two pieces.
                    if b"\n\n" in stream.data[-len(piece) - 3:] or b"\n\r\n" in stream.data[-len(piece) - 3:]:
                        stream.last_event = now
                else:
                    stream.closed = now
                    with self.lock:
                        self.selector.unregister(stream.socket)

    @staticmethod
    def wait_flowing(streams, events=2):
        wait_for("all streams to flow", lambda: all(stream.data.count(b"data:") >= events for stream in streams), 60)

    @staticmethod
    def wait_closed(streams, timeout=60):
        wait_for("all streams to be closed", lambda: all(stream.closed for stream in streams), timeout)


def revoke_all(stack, keys, deleters=4):
    """Revokes the keys, several at a time: when each one's 204 was there."""
    done = {}

    def revoke(key):
        stack.admin("DELETE", f"/v1/keys/{key[0]}")
        done[key[0]] = time.monotonic()

    with ThreadPoolExecutor(deleters) as pool:
        list(pool.map(revoke, keys))
    return done


def revocations(stack, count, wave, deleters=4):
    """Revokes `count` keys, `wave` at a time, each with a stream on both Envoys, while other keys are at work. Gives, for each
    stream, the seconds from its key's 204 to its last byte and to its end; and what the others' requests came to."""
    from load import Load

    last, end, seen = [], [], []
    others = [stack.new_key(label="bystander") for _ in range(3)]
    load = Load(stack, others, agents=3, hasty=1)
    for thread in load.threads:
        thread.start()
    try:
        with Reader() as reader:
            bystanders = [reader.open(port, others[0], "tokens=100000 per_delta=1 pace_ms=200", max_tokens=16000) for port in stack.ports]
            while len(last) < count * len(stack.ports):
                keys = [stack.new_key(label="to be revoked") for _ in range(min(wave, count - len(last) // len(stack.ports)))]
                streams = [reader.open(port, key, dialect=random.choice(["openai", "anthropic"])) for key in keys for port in stack.ports]
                reader.wait_flowing(streams)
                done = revoke_all(stack, keys, deleters)
                reader.wait_closed(streams)
                last += [stream.last_byte - done[stream.key_id] for stream in streams]
                end += [stream.closed - done[stream.key_id] for stream in streams]
                seen += streams
                assert not any(stream.closed for stream in bystanders), "another key's stream was ended"
    finally:
        load.over.set()
        for thread in load.threads:
            thread.join()
    return last, end, seen, load.results


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
