"""Starts the real parts: provider simulator, policy service, Envoy with the filter. Everything listens on loopback."""

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import audit
import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVOY_BIN = os.environ.get("ENVOY_BIN", "envoy")
KEYWARD_BIN = os.environ.get("KEYWARD_BIN", str(ROOT / "target/release/keyward"))
SERVICE_BIN = os.environ.get("SERVICE_BIN", str(Path(KEYWARD_BIN).with_name("keyward-policy-service")))
SIM_BIN = os.environ.get("SIM_BIN", str(Path(KEYWARD_BIN).with_name("provider-sim")))
LOADGEN_BIN = os.environ.get("LOADGEN_BIN", str(Path(KEYWARD_BIN).with_name("loadgen")))
NODE_MODULES = Path(os.environ.get("NODE_MODULES", str(ROOT / "tests/e2e/node/node_modules")))

# Real-looking credentials that only this harness and the simulator know.
CREDENTIALS = [
    {"id": "openai-1", "provider": "openai", "secret": "sk-proj-Tq7ZkW3mXv9Bf2LsYc8RdHj5NaPe1GuKo4"},
    {"id": "anthropic-1", "provider": "anthropic", "secret": "sk-ant-api03-Hw6VbQ9xMz2JrTf7CkLp4SnYd8Eg"},
]


def pool(size, provider="openai", **limits):
    """`size` credentials of one provider, each of an account of its own. limits: what the simulator's accounts have (rpm, window_ms ...)."""
    start = {"openai": "sk-proj-", "anthropic": "sk-ant-api03-"}[provider]
    return [{"id": f"{provider}-{n}", "provider": provider, "secret": f"{start}Pool{n:03}Rv9Kq3Wz7Ty5Bx1Md8Hc6Nf", **limits} for n in range(1, size + 1)]


TAKEN = set()


def free_port():
    """A port below those that outgoing connections get: none of the tests' own clients can take it before its server does."""
    try:
        below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        below = 32768
    # Test processes that run side by side have their own ports.
    workers, worker = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = random.randrange(10240, max(below, 11000)) // workers * workers + worker
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in TAKEN:
            TAKEN.add(port)
            return port


def wait_for(what, check, timeout=20.0, every=0.02):
    """Polls until check() is truthy and gives its value."""
    end = time.monotonic() + timeout
    while True:
        try:
            value = check()
            if value:
                return value
        except (OSError, http.client.HTTPException, ValueError):
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come about within {timeout} s")
        time.sleep(every)


def call(base, method, path, body=None, headers=None, timeout=30):
    """One HTTP request to a loopback address: status, headers, body."""
    url = urlsplit(base)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)
    try:
        headers = dict(headers or {})
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
            headers.setdefault("content-type", "application/json")
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


# What the gate writes into every chat of a key that may not keep state at the provider, and that names no service tier.
NOT_STORED = b'"store":false,"service_tier":"default",'


def as_asked(body):
    """A chat's body as the provider got it, less what keeps the provider from storing it and from choosing its price."""
    assert body.startswith(b"{" + NOT_STORED) and body.count(b'"store"') == 1, body[:200]
    return body.replace(NOT_STORED, b"", 1)


class Part:
    """A process of the stack, with its log."""

    def __init__(self, name, directory):
        self.name, self.log, self.process = name, directory / f"{name}.log", None

    def spawn(self, command, env=None, stdout=None):
        self.command = command
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=stdout or log, stderr=log, env={**os.environ, **(env or {})}, start_new_session=True)
        return self.process

    def ready_line(self, timeout=20):
        """First line of standard output, as JSON."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended before it was ready: {self.command}\n{self.log.read_text(errors='replace')[-4000:]}")
        return json.loads(line)

    def running(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        if self.running():
            self.process.kill()
        if self.process:
            self.process.wait()

    def terminate(self, timeout=20):
        if self.running():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()


class Simulator(Part):
    """The provider, and the oracle."""

    credentials = CREDENTIALS

    def start(self, *options):
        self.spawn([SIM_BIN, "--listen", "127.0.0.1:0", "--control", "127.0.0.1:0", *options], stdout=subprocess.PIPE)
        ready = self.ready_line()
        self.api, self.control, self.ca = ready["api"], ready["control"], ready["ca"]
        self.put("/control/credentials", self.credentials)

    def request(self, method, path, body=None):
        status, _, data = call(self.control, method, path, body)
        assert status < 300, (method, path, status, data)
        return data

    def get(self, path):
        return json.loads(self.request("GET", path))

    def put(self, path, body):
        return self.request("PUT", path, body)

    def fault(self, sim, count=1, **where):
        self.request("POST", "/control/faults", {"sim": sim, "count": count, **where})

    def patch(self, credential, **changes):
        """Changes what a credential meets: `state`, `limited_for_ms`, limits of its account."""
        self.request("PATCH", f"/control/credentials/{credential}", changes)

    def totals(self):
        return self.get("/control/totals")

    def ledger(self, since=0):
        return self.get(f"/control/ledger?since={since}")["requests"]

    def quiet(self):
        wait_for("the simulator at rest", lambda: self.totals()["running"] == 0, 60)

    def reset(self):
        self.request("POST", "/control/reset")

    def body(self, seq):
        return self.request("GET", f"/control/bodies?seq={seq}")

    def headers(self, seq):
        return self.get(f"/control/headers?seq={seq}")


def alone(kind, credentials):
    """Fixtures of a module that talks to the simulator with nothing in between: one of this kind, and its books clean before each test."""
    @pytest.fixture(scope="module")
    def sim(tmp_path_factory):
        oracle = kind("oracle", tmp_path_factory.mktemp("oracle"))
        oracle.start()
        oracle.put("/control/credentials", credentials)
        yield oracle
        oracle.kill()

    @pytest.fixture(autouse=True)
    def clean(sim):
        sim.reset()
        yield
        assert sim.totals()["violations"] == []
    return sim, clean


# All that are built in: each of them is the simulator here.
PROVIDERS = ("openai", "anthropic", "gemini", "azure", "groq", "mistral", "deepseek", "together", "openrouter")


class Stack:
    """One Envoy, one policy service, one simulator."""

    def __init__(self, directory=None, concurrency=1, hold_ttl=3900, sim_options=(), render_options=(), envoy_bin=None, envoy_minor=40,
                 filter_module=None, service_env=None, credentials=None, rotation="router", admit_timeout_ms=900):
        """credentials: as the simulator takes them, all of them stored here as well, for the provider `at` where they are to be another's
        here; rotation: by whom a try is repeated; admit_timeout_ms: where a test must not depend on how fast this machine is, 8000 at most."""
        self.owned = directory is None
        self.directory = Path(directory or tempfile.mkdtemp(prefix="keyward-e2e-"))
        self.concurrency, self.hold_ttl = concurrency, hold_ttl
        self.sim_options, self.render_options = sim_options, render_options
        self.envoy_bin, self.envoy_minor = envoy_bin or ENVOY_BIN, envoy_minor
        self.filter_module, self.service_env = filter_module, service_env or {}
        self.credentials, self.rotation, self.admit_timeout_ms = credentials or CREDENTIALS, rotation, admit_timeout_ms
        # What the service calls each of them, by the simulator's name.
        self.credential_ids = {}
        self.sim = Simulator("sim", self.directory)
        self.sim.credentials = [{name: value for name, value in credential.items() if name != "at"} for credential in self.credentials]
        self.service = Part("service", self.directory)
        self.envoy = Part("envoy", self.directory)
        self.edge_port, self.admin_port = free_port(), free_port()
        self.listen_port, self.envoy_admin_port = free_port(), free_port()
        self.admin_token = None
        self.secrets = [c["secret"] for c in self.credentials]
        self.tokens = []

    # --- life ------------------------------------------------------------------------------------------------------

    def __enter__(self):
        try:
            self.sim.start(*self.sim_options)
            self.start_service()
            for credential in self.credentials:
                spec = {name: credential[name] for name in ("provider", "secret", "account") if name in credential}
                spec["provider"] = credential.get("at", spec["provider"])
                if spec["provider"] == "azure":
                    # Each account has a host of its own.
                    self.admin("PUT", "/v1/providers/azure", {"url": self.sim.api, "host": "acme.openai.azure.com"})
                self.credential_ids[credential["id"]] = self.admin("POST", "/v1/credentials", {**spec, "label": credential["id"]})["id"]
            self.start_envoy()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, *_):
        for part in (self.envoy, self.service, self.sim):
            part.kill()
        if kind is not None:
            self.describe()
        elif self.owned:
            shutil.rmtree(self.directory, ignore_errors=True)

    def describe(self):
        """What a person needs after a failure: commands, ports, the ends of the logs."""
        print(f"\nstack in {self.directory}: listen {self.listen_port}, admin {self.admin_port}, envoy admin {self.envoy_admin_port}", file=sys.stderr)
        for part in (self.sim, self.service, self.envoy):
            print(f"--- {part.name}: {' '.join(map(str, getattr(part, 'command', [])))}", file=sys.stderr)
            if part.log.exists():
                print(part.log.read_text(errors="replace")[-1500:], file=sys.stderr)

    def start_service(self):
        data = self.directory / "data"
        self.service.spawn([SERVICE_BIN, "--data", str(data), "--edge", f"127.0.0.1:{self.edge_port}", "--admin", f"127.0.0.1:{self.admin_port}",
                            "--origin", "e2e", "--hold-ttl", str(self.hold_ttl)], env=self.service_env, stdout=subprocess.PIPE)
        ready = self.service.ready_line()
        self.admin_token = ready["bootstrap_admin_token"] or self.admin_token

    def start_envoy(self):
        module = self.filter_module or self.directory / "filter.wasm"
        if not self.filter_module:
            subprocess.run([KEYWARD_BIN, "filter", "export", str(module)], check=True)
        config = self.directory / "envoy.yaml"
        providers = [option for name in PROVIDERS for option in ("--provider", f"{name}={self.sim.api}")]
        ca = ["--provider-ca", self.sim.ca] if self.sim.ca else []
        rendered = subprocess.run(
            [KEYWARD_BIN, "envoy", "render", "--envoy", str(self.envoy_minor), *providers, *ca, "--listen", f"127.0.0.1:{self.listen_port}",
             "--envoy-admin", f"127.0.0.1:{self.envoy_admin_port}", "--policy", f"127.0.0.1:{self.edge_port}",
             "--edge-token-file", str(self.directory / "data/edge-token"), "--filter", str(module),
             "--access-log", str(self.directory / "access.log"), "--rotation", self.rotation, *self.render_options], check=True, capture_output=True, text=True)
        limit = '"admit_timeout_ms": 900'
        assert rendered.stdout.count(limit) == 1
        config.write_text(rendered.stdout.replace(limit, f'"admit_timeout_ms": {self.admit_timeout_ms}'))
        self.spawn_envoy(config)

    def spawn_envoy(self, config=None):
        self.envoy.spawn([self.envoy_bin, "-c", str(config or self.directory / "envoy.yaml"), "--use-dynamic-base-id", "--log-level", "warning",
                          "--concurrency", str(self.concurrency), "--file-flush-interval-msec", "100"])
        wait_for("Envoy", lambda: call(f"http://127.0.0.1:{self.envoy_admin_port}", "GET", "/ready")[0] == 200 or not self.envoy.running())
        if not self.envoy.running():
            raise RuntimeError("Envoy ended at once\n" + self.envoy.log.read_text(errors="replace")[-4000:])
        # The filter names its counts at its first tick, 50 ms later.
        wait_for("the filter's counts", lambda: self.stats("keyward_vm_starts_total"))

    # --- asking ----------------------------------------------------------------------------------------------------

    @property
    def base(self):
        return f"http://127.0.0.1:{self.listen_port}"

    @property
    def admin_base(self):
        return f"http://127.0.0.1:{self.admin_port}"

    def admin(self, method, path, body=None, raw=False):
        status, _, data = call(self.admin_base, method, path, body, {"authorization": f"Bearer {self.admin_token}"})
        assert status < 300, (method, path, status, data)
        return data.decode() if raw else (json.loads(data) if data else None)

    def new_key(self, budget=None, **spec):
        """Makes a key: id, token. budget is dollars as text."""
        if budget is not None:
            spec["budgets"] = [{"usd": budget, "window": "total"}]
        key = self.admin("POST", "/v1/keys", spec)
        self.tokens.append(key["token"])
        return key["id"], key["token"]

    def key(self, key_id):
        return self.admin("GET", f"/v1/keys/{key_id}")

    def chat(self, token, content="Hello", timeout=30, path="/v1/chat/completions", headers=None, **more):
        """One chat completion: status, headers, body."""
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}], **more}
        return call(self.base, "POST", path, body, {"authorization": f"Bearer {token}", **(headers or {})}, timeout)

    def heard(self):
        """Waits until Envoy has no news to take in: it asks for more as soon as it has been told some, and counts that 50 ms later."""
        readings = []
        while len(readings) < 4 or len(set(readings[-4:])) > 1:
            time.sleep(0.1)
            readings.append(self.stats("keyward_watch_polls_total").get("wasmcustom.keyward_watch_polls_total"))

    def recover(self):
        """Every credential is usable again, as after an operator acted: what its provider said of it is forgotten, and Envoy has heard so.
        Only when all requests are settled: what a gate has yet to tell would stand after it."""
        stored = self.admin("GET", "/v1/credentials")["data"]
        # A state of one model says nothing of the others: each is asked.
        models = {(credential["provider"], state["model"]) for credential in stored for state in credential["states"]}
        for credential in stored:
            self.admin("POST", f"/v1/credentials/{credential['id']}/reset")
        self.heard()
        _, token = self.new_key("1.00")

        def works(provider, model):
            if provider == "openai":
                return self.chat(token, model=model or "gpt-4o-mini", max_tokens=5)[0] == 200
            body = {"model": model or "claude-haiku-4-5", "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}
            return call(self.base, "POST", "/v1/messages", body, {"x-api-key": token, "anthropic-version": "2023-06-01"})[0] == 200

        for provider in {credential["provider"] for credential in self.credentials} & {"openai", "anthropic"}:
            for model in {None} | {model for name, model in models if name == provider}:
                wait_for(f"{provider}'s credentials for {model or 'any model'}", lambda: works(provider, model), 5)

    def audit(self, key_id):
        """A key's chain, verified and decoded by the second reading."""
        return audit.verify(self.export(key_id))

    def export(self, key_id):
        return self.admin("GET", f"/v1/audit/{key_id}/bundle", raw=True)

    def settled(self, *key_ids, timeout=30):
        """Waits until nothing is in flight for these keys."""
        for key_id in key_ids:
            wait_for(f"{key_id} settled", lambda: self.key(key_id)["in_flight"] == 0, timeout)

    def last_seq(self):
        """The simulator's newest number: unchanged means that nothing reached it."""
        return self.sim.get(f"/control/ledger?since={1 << 60}")["last_seq"]

    def calls_of(self, key_id):
        """The simulator's entries of this key's requests, told apart by the request id of the chain."""
        admitted = {entry["req"] for entry in self.audit(key_id) if entry["event"] == "ADMITTED"}
        return [call for call in self.sim.ledger() if (call["client_request_id"] or "").removeprefix("req_") in admitted]

    def books(self, key_id):
        """Waits until a key is at rest on both sides and checks what holds however its requests ended: each admission has
        exactly one end, nothing stays reserved, the key paid what its chain says, and never less than the provider charged.
        Gives the true cost, the charge and the ends."""
        self.settled(key_id)
        wait_for("the provider's books", lambda: all(call["ended"] for call in self.calls_of(key_id)))
        chain, key, calls = self.audit(key_id), self.key(key_id), self.calls_of(key_id)
        admitted = [entry["req"] for entry in chain if entry["event"] == "ADMITTED"]
        ends = [entry for entry in chain if entry["event"] in ("SETTLED", "VOIDED", "EXPIRED")]
        assert sorted(admitted) == sorted(end["req"] for end in ends), chain
        assert len(set(admitted)) == len(admitted)
        voided = {end["req"] for end in ends if end["event"] == "VOIDED"}
        assert not voided & {call["client_request_id"].removeprefix("req_") for call in calls}, "voided, yet the provider saw it"
        charged, true = sum(end.get("charge", 0) for end in ends), sum(call["cost_nanodollars"] for call in calls)
        assert (key["reserved_nanodollars"], key["in_flight"], key["spent_nanodollars"]) == (0, 0, charged), key
        assert charged >= true, (charged, true, ends, calls)
        assert key["status"] != "frozen", chain
        return true, charged, ends

    def stats(self, pattern=""):
        data = call(f"http://127.0.0.1:{self.envoy_admin_port}", "GET", f"/stats?filter={pattern}")[2].decode()
        return {name: int(value) for name, _, value in (line.partition(": ") for line in data.splitlines()) if value.strip().isdigit()}

    def metrics(self):
        data = call(self.admin_base, "GET", "/metrics")[2].decode()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in data.splitlines() if line and not line.startswith("#")}

    def callouts(self):
        """Calls of the filter to the policy service so far, of any kind but its regular questions for news."""
        readings, pattern = [], "cluster.keyward_policy.upstream_rq_total|keyward_watch_polls_total"
        # The filter tells its own counts once a tick, 50 ms: only where both stand still do they belong together.
        while len(readings) < 4 or len(set(readings[-4:])) > 1:
            time.sleep(0.06)
            seen = self.stats(pattern)
            readings.append((seen["cluster.keyward_policy.upstream_rq_total"], seen.get("wasmcustom.keyward_watch_polls_total", 0)))
        return readings[-1][0] - readings[-1][1]

    def admissions_asked(self):
        """Admissions that the filter asked for so far: what Envoy counts as sent to the policy service, less the batches of
        settlements (with which counts of refusals go, every 15 s at most)."""
        while True:
            batches, callouts = self.metrics().get("keyward_edge_batches_total", 0), self.callouts()
            # None was on its way meanwhile.
            if batches == self.metrics().get("keyward_edge_batches_total", 0):
                return callouts - int(batches)

    def unadmitted(self, key_ids):
        """Requests that the simulator saw without an ADMITTED of before: must be empty."""
        admitted = {entry["req"]: entry["time_ms"] for key_id in key_ids for entry in self.audit(key_id) if entry["event"] == "ADMITTED"}
        wrong = []
        for request in self.sim.ledger():
            req = (request["client_request_id"] or "").removeprefix("req_")
            # Both clocks are this machine's; the chain's has milliseconds.
            if req not in admitted or admitted[req] * 1000 > request["started_unix_us"]:
                wrong.append(request)
        return wrong
