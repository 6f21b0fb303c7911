"""Demand for the money trials: thousands of requests at once from one thread, some of which their clients abandon.

Each request has a connection of its own and says in its body which key it is for (`user`), so that the simulator can sum what
each key has really cost. What came of each is an Answer; nothing here knows what Keyward should have said.
"""

import asyncio
import base64
import json
import random
import time
from dataclasses import dataclass, field

# Bytes of an answer that are kept to be looked at.
KEPT = 2048
WHOLE_ENDS = (b"data: [DONE]", b"message_stop", b"response.completed")


@dataclass(frozen=True)
class Ask:
    """One request as a client means it. key: its id and token. leave: seconds after which the client is gone, counted from the
    sending; leave_bytes: the same, by bytes of the answer's body. picture: bytes of one that the chat shows; headers: further ones, as
    (name, value)."""

    key: tuple
    directive: str = "tokens=20"
    model: str = "gpt-4o-mini"
    max_tokens: int | None = None
    stream: bool = False
    n: int | None = None
    pad: int = 0
    picture: int = 0
    leave: float | None = None
    leave_bytes: int | None = None
    more: dict = field(default_factory=dict)
    headers: tuple = ()

    def wire(self, port):
        """The request's bytes."""
        key_id, token = self.key
        content = f"{'word ' * (self.pad // 5)}Tell me more. [[sim {self.directive}]]"
        body = {"model": self.model, **self.more}
        headers = [f"authorization: Bearer {token}"]
        if self.model.startswith("text-embedding"):
            path, body["input"], body["user"] = "/v1/embeddings", content, key_id
        elif self.picture:
            url = f"data:image/png;base64,{base64.b64encode(random.Random(self.picture).randbytes(self.picture * 3 // 4)).decode()}"
            parts = [{"type": "text", "text": content}, {"type": "image_url", "image_url": {"url": url}}]
            path = "/v1/chat/completions"
            body |= {"messages": [{"role": "user", "content": parts}], "user": key_id}
        elif self.model.startswith("claude"):
            path, headers = "/v1/messages", [f"x-api-key: {token}", "anthropic-version: 2023-06-01"]
            body |= {"messages": [{"role": "user", "content": content}], "metadata": {"user_id": key_id}, "max_tokens": self.max_tokens or 400}
        else:
            path = "/v1/chat/completions"
            body |= {"messages": [{"role": "user", "content": content}], "user": key_id}
            if self.max_tokens is not None:
                body["max_completion_tokens" if self.model.startswith(("o", "gpt-5")) else "max_tokens"] = self.max_tokens
        if self.stream:
            body["stream"] = True
        if self.n is not None:
            body["n"] = self.n
        data = json.dumps(body).encode()
        headers += [f"{name}: {value}" for name, value in self.headers]
        head = [f"POST {path} HTTP/1.1", f"host: 127.0.0.1:{port}", *headers, "content-type: application/json", f"content-length: {len(data)}",
                "connection: close"]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + data


@dataclass(slots=True)
class Answer:
    """What a client got. Times are Unix seconds of this machine's clock, which no trial steps."""

    ask: Ask
    began: float
    ended: float = 0.0
    status: int | None = None
    headers: dict = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    left: bool = False
    error: str | None = None
    # When each piece of the body came, as the connection gave them.
    arrivals: list = field(default_factory=list)

    @property
    def key_id(self):
        return self.ask.key[0]

    @property
    def req(self):
        return self.headers.get("x-keyward-request-id", "").removeprefix("req_")

    @property
    def reason(self):
        return self.headers.get("x-keyward-reason")

    @property
    def retry_after(self):
        """Seconds that a refusal asks the client to wait; None if it doesn't say."""
        value = self.headers.get("retry-after")
        return int(value) if value is not None and value.isdigit() else None

    @property
    def output_limit(self):
        """Output tokens that the answer could have: as clamped, or as asked."""
        clamp = self.headers.get("x-keyward-max-tokens")
        return int(clamp) if clamp else self.ask.max_tokens


class Exchange(asyncio.Protocol):
    """One request on one connection, which the server closes at the end of its answer."""

    def __init__(self, answer, wire, over):
        self.answer, self.wire, self.over = answer, wire, over
        self.transport, self.head, self.seen, self.tail, self.expected = None, b"", 0, b"", None

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.wire)

    def data_received(self, data):
        if self.answer.status is None:
            self.head += data
            at = self.head.find(b"\r\n\r\n")
            if at < 0:
                return
            lines = self.head[:at].decode("latin-1").split("\r\n")
            self.answer.status = int(lines[0].split(" ", 2)[1])
            self.answer.headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            length = self.answer.headers.get("content-length")
            self.expected = int(length) if length else None
            data, self.head = self.head[at + 4:], b""
        if data:
            self.answer.arrivals.append(time.time())
        self.seen += len(data)
        if len(self.answer.body) < KEPT:
            self.answer.body += data[:KEPT - len(self.answer.body)]
        self.tail = (self.tail + data)[-256:]
        if self.answer.ask.leave_bytes is not None and self.answer.status == 200 and self.seen >= self.answer.ask.leave_bytes:
            self.leave()

    def leave(self):
        """The client has enough. Not counted as such if the answer was complete by then."""
        if not self.over.done() and not self.is_whole():
            self.answer.left = True
            self.transport.close()

    def is_whole(self):
        """The framing came to its end, and so did the stream in it."""
        if self.answer.status is None:
            return False
        if self.expected is not None:
            return self.seen == self.expected
        framed = self.answer.headers.get("transfer-encoding") != "chunked" or self.tail.endswith(b"0\r\n\r\n")
        is_stream = self.answer.headers.get("content-type", "").startswith("text/event-stream")
        return framed and (not is_stream or any(end in self.tail for end in WHOLE_ENDS))

    def connection_lost(self, why):
        self.answer.whole = not self.answer.left and self.is_whole()
        if why is not None and not self.answer.left:
            self.answer.error = repr(why)
        if not self.over.done():
            self.over.set_result(None)


async def ask(port, what, timeout=60.0):
    """Makes one request and gives its Answer; never raises for what goes wrong on the way."""
    loop = asyncio.get_running_loop()
    answer, over = Answer(what, time.time()), loop.create_future()
    exchange = Exchange(answer, what.wire(port), over)
    leaving = None
    try:
        async with asyncio.timeout(timeout):
            await loop.create_connection(lambda: exchange, "127.0.0.1", port)
            if what.leave is not None:
                leaving = loop.call_later(what.leave, exchange.leave)
            await over
    except (OSError, TimeoutError) as why:
        answer.error = repr(why)
        if exchange.transport is not None:
            exchange.transport.abort()
    finally:
        if leaving is not None:
            leaving.cancel()
        answer.ended = time.time()
    return answer


async def all_at_once(port, asks, at_once=200, timeout=60.0):
    """Every request of `asks` (an iterable) once, `at_once` of them in flight; gives the answers in no order."""
    asks, answers = iter(asks), []

    async def client():
        for what in asks:
            answers.append(await ask(port, what, timeout))

    await asyncio.gather(*(client() for _ in range(at_once)))
    return answers


async def patient(port, asks, until, took, pause=0.2, longest=2.0):
    """A client that goes on asking until the clock (monotonic) says `until()`, and gives each answer to `took`; refused, it waits as it is told, at most `longest`
    seconds, or `pause` if it is told nothing."""
    for what in asks:
        if time.monotonic() >= until():
            return
        answer = await ask(port, what)
        took(answer)
        if answer.status != 200:
            told = answer.retry_after
            await asyncio.sleep(min(longest, pause if told is None else max(told, 0.05)))
