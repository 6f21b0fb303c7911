"""Load from several agents at once, and the books of what they got: for tests that break things meanwhile."""

import collections
import http.client
import json
import random
import threading
import time
from dataclasses import dataclass, field

import audit

ENDS = ("SETTLED", "VOIDED", "EXPIRED")


@dataclass
class Result:
    """What one request came to, from the agent's side."""

    key_id: str
    stream: bool
    began: float
    status: int | None = None
    headers: dict = field(default_factory=dict)
    body: bytes = b""
    ended: float = 0.0
    error: Exception | None = None

    @property
    def req(self):
        return self.headers.get("x-keyward-request-id", "").removeprefix("req_")

    @property
    def reason(self):
        return self.headers.get("x-keyward-reason")

    @property
    def seconds(self):
        return self.ended - self.began

    @property
    def whole(self):
        """The answer came to its own end, not only to the end of the connection."""
        if self.error is not None or self.status is None:
            return False
        return not (self.stream and self.status == 200) or b"data: [DONE]" in self.body or b"message_stop" in self.body


def ask(stack, key, directive="", stream=False, anthropic=False, timeout=30, started=None, connection=None):
    """One request of one agent; never raises. started: an event to set when the answer's headers are there; connection: one to
    keep, instead of one for this request alone."""
    key_id, token = key
    content = f"Tell me more. [[sim {directive}]]" if directive else "Tell me more."
    body = {"model": "claude-haiku-4-5" if anthropic else "gpt-4o-mini", "messages": [{"role": "user", "content": content}], "stream": stream}
    headers = {"content-type": "application/json"}
    if anthropic:
        headers |= {"x-api-key": token, "anthropic-version": "2023-06-01"}
        body["max_tokens"] = 500
    else:
        headers["authorization"] = f"Bearer {token}"
    result = Result(key_id, stream, time.monotonic())
    kept, connection = connection, connection or http.client.HTTPConnection("127.0.0.1", stack.listen_port, timeout=timeout)
    try:
        connection.request("POST", "/v1/messages" if anthropic else "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        result.status, result.headers = response.status, {name.lower(): value for name, value in response.getheaders()}
        if started is not None and result.status == 200:
            started.set()
        while piece := response.read1(65536):
            result.body += piece
        # Tells http.client that the connection is free for the next request.
        response.close()
    except (OSError, http.client.HTTPException) as error:
        result.error = error
    finally:
        if kept is None or result.error is not None:
            connection.close()
        result.ended = time.monotonic()
    return result


# Buffered and streamed, fast and slow, both dialects.
MIX = [
    {"directive": "tokens=20"},
    {"directive": "tokens=30 per_delta=3 pace_ms=30", "stream": True},
    {"directive": "first_ms=150"},
    {"directive": "tokens=60 per_delta=3 pace_ms=50", "stream": True},
    {"directive": "tokens=24 per_delta=3 pace_ms=30", "stream": True, "anthropic": True},
    {"directive": "tokens=10", "anthropic": True},
]


class Load:
    """Agents that go on asking until they are told to stop, whatever they are answered."""

    def __init__(self, stack, keys, agents=6, hasty=4, vanishing=0):
        """hasty: further agents that ask for short answers without a pause, so that a kill finds admissions half done; every other
        one keeps its connection. vanishing: agents that are gone before they can be answered; what they asked is in no result."""
        self.stack, self.keys, self.over = stack, keys, threading.Event()
        self.results, self.lock = [], threading.Lock()
        self.threads = [threading.Thread(target=self.agent, args=(n,), daemon=True) for n in range(agents)]
        self.threads += [threading.Thread(target=self.hasty, args=(n,), daemon=True) for n in range(hasty)]
        self.threads += [threading.Thread(target=self.vanishing, args=(n,), daemon=True) for n in range(vanishing)]

    def hasty(self, n):
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.listen_port, timeout=30) if n % 2 else None
        while not self.over.is_set():
            result = ask(self.stack, self.keys[n % len(self.keys)], "tokens=3", connection=connection)
            with self.lock:
                self.results.append(result)
            if result.status != 200:
                self.over.wait(0.05)

    def agent(self, n):
        turn = n
        while not self.over.is_set():
            result = ask(self.stack, self.keys[turn % len(self.keys)], **MIX[turn % len(MIX)])
            # Steps of one more than the number of keys: every kind of request comes to every key.
            turn += 1 if turn % len(self.keys) else 2
            with self.lock:
                self.results.append(result)
            self.over.wait(0.02 if result.status == 200 else 0.1)

    def vanishing(self, n):
        while not self.over.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.stack.listen_port, timeout=30)
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Anybody there? [[sim tokens=3]]"}]}
            headers = {"authorization": f"Bearer {self.keys[n % len(self.keys)][1]}", "content-type": "application/json"}
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
                # From at once to after the admission.
                time.sleep(random.choice((0.0, 0.0005, 0.001, 0.002)))
            except OSError:
                pass
            finally:
                connection.close()
            self.over.wait(0.01)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads), "an agent hangs"

    def count(self, status=200):
        with self.lock:
            return sum(result.status == status for result in self.results)


@dataclass
class Account:
    """One request in the chains."""

    key_id: str
    admitted: list = field(default_factory=list)
    ends: list = field(default_factory=list)
    refused: list = field(default_factory=list)

    @property
    def charge(self):
        return self.ends[-1].get("charge", 0) if self.ends else 0


def accounts(stack, key_ids):
    """Every request of these keys, from their verified chains."""
    found = {}
    for key_id in key_ids:
        for entry in audit.verify(stack.export(key_id)):
            if "req" not in entry:
                continue
            account = found.setdefault(entry["req"], Account(key_id))
            assert account.key_id == key_id, f"{entry['req']} stands in two chains"
            {"ADMITTED": account.admitted, "REFUSED": account.refused}.get(entry["event"], account.ends).append(entry)
    return found


def true_costs(stack):
    """What the provider really charged, by request, as the simulator has it; and the sum."""
    costs = collections.Counter()
    for request in stack.sim.ledger():
        assert request["ended"] is not None, "call sim.quiet() first"
        costs[(request["client_request_id"] or "none").removeprefix("req_")] += request["cost_nanodollars"]
    return costs
