"""make bench: Keyward beside plain Envoy, same machine, same run, same provider simulator.

CPU per request (user + system, from /proc) is the figure that holds on a noisy machine; latency stands beside it.
Everything is on: admission with a durable commit, hard cap, usage metering, settlement, audit chain.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import CREDENTIALS, LOADGEN_BIN, Part, Simulator, Stack, call, free_port, wait_for

BUSY = int(os.environ.get("BENCH_CONNECTIONS", "64"))
REQUESTS = int(os.environ.get("BENCH_REQUESTS", "6000"))
TICKS = os.sysconf("SC_CLK_TCK")

PLAIN = """
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {listen}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: plain
          route_config: {{virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: sim, timeout: 0s}}}}]}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: sim
    type: STATIC
    load_assignment:
      cluster_name: sim
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {sim}}}}}}}}}]}}]
    circuit_breakers: {{thresholds: [{{max_connections: 4096, max_pending_requests: 65536, max_requests: 65536}}]}}
"""


def cpu_us(part):
    """User and system time of a process so far, in microseconds."""
    fields = Path(f"/proc/{part.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * 1_000_000 // TICKS


def resident_kib(part):
    status = Path(f"/proc/{part.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def body(stream, directory):
    """A 2 KB chat request."""
    filler = "The quick brown fox jumps over the lazy dog. " * 41
    path = directory / f"body-{stream}.json"
    request = {"model": "gpt-4o-mini", "max_tokens": 64, "messages": [{"role": "user", "content": filler}]}
    if stream:
        request["stream"] = True
    path.write_text(json.dumps(request))
    return path


# Chunks of the streams by which translation is measured, and how often each dialect has its turn.
CHUNKS = 200
TURNS = 7


def conversation(dialect, stream, directory):
    """A 4 KB request to Claude of several turns and three tools, or a short one whose answer has many chunks, in either dialect."""
    path = directory / f"conversation-{dialect}-{stream}.json"
    request = {"model": "claude-haiku-4-5", "max_tokens": 300 if stream else 64}
    if stream:
        request |= {"stream": True, "messages": [{"role": "user", "content": f"[[sim tokens={CHUNKS} per_delta=1]] Go on."}]}
    else:
        turn = "The quick brown fox jumps over the lazy dog, \"twice\".\n" * 8
        turns = [{"role": "assistant" if n % 2 else "user", "content": turn} for n in range(7)]
        schema = {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}, "required": ["city"]}
        names = [(f"tool_{n}", turn[:100]) for n in range(3)]
        if dialect == "openai":
            tools = [{"type": "function", "function": {"name": name, "description": words, "parameters": schema}} for name, words in names]
            request |= {"messages": [{"role": "system", "content": "Be brief."}, *turns], "tools": tools}
        else:
            tools = [{"name": name, "description": words, "input_schema": schema} for name, words in names]
            request |= {"system": "Be brief.", "messages": turns, "tools": tools}
    path.write_text(json.dumps(request))
    return path


def load(port, token, stream, connections, requests, directory, file=None, path="/v1/chat/completions"):
    command = [LOADGEN_BIN, "--url", f"http://127.0.0.1:{port}{path}", "--connections", str(connections), "--requests", str(requests),
               "--warmup", str(min(500, requests // 4)), "--header", f"authorization: Bearer {token}", "--header", "content-type: application/json",
               "--header", "anthropic-version: 2023-06-01",
               "--body-file", str(file or body(stream, directory)), "--json", *(["--stream"] if stream else [])]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if result["errors"] or set(result["by_status"]) != {"200"}:
        raise SystemExit(f"the run is worth nothing: {result}")
    return result


def measure(parts, *args):
    """A run (as `load` takes it) with the CPU that each part spent per request; the warm-up's requests count as well."""
    requests = args[4]
    before = {part.name: cpu_us(part) for part in parts}
    result = load(*args)
    total = requests + min(500, requests // 4)
    result["cpu_us"] = {part.name: (cpu_us(part) - before[part.name]) / total for part in parts}
    return result


def row(name, result):
    latency = result["ttfb_us"] or result["latency_us"]
    cpu = "  ".join(f"{who} {us:6.1f}" for who, us in result["cpu_us"].items() if who != "sim")
    print(f"  {name:<34} {result['rps']:>6} rps   p50 {latency['p50']:>6} us  p99 {latency['p99']:>6} us   CPU us/request: {cpu}")


def main():
    directory = Path(tempfile.mkdtemp(prefix="keyward-bench-"))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {REQUESTS} requests of 2 KB a run; latency of a stream is the time to its first byte")
    with Stack(concurrency=1, sim_options=("--bench",)) as stack:
        _, token = stack.new_key("1000000.00")
        plain = Part("plain-envoy", directory)
        ports = {"listen": free_port(), "admin": free_port(), "sim": int(stack.sim.api.rsplit(":", 1)[1])}
        (directory / "plain.yaml").write_text(PLAIN.format(**ports))
        plain.spawn([stack.envoy_bin, "-c", str(directory / "plain.yaml"), "--use-dynamic-base-id", "--log-level", "error", "--concurrency", "1"])
        wait_for("plain Envoy", lambda: call(f"http://127.0.0.1:{ports['admin']}", "GET", "/ready")[0] == 200)
        secret = CREDENTIALS[0]["secret"]
        figures = {}
        try:
            for stream in (False, True):
                for connections in (1, BUSY):
                    print(f"{'streamed' if stream else 'buffered'}, {connections} connection{'s' if connections > 1 else ''}")
                    requests = REQUESTS // 3 if connections == 1 else REQUESTS
                    for name, port, key, parts in (("plain Envoy", ports["listen"], secret, [plain]),
                                                   ("Keyward", stack.listen_port, token, [stack.envoy, stack.service])):
                        result = measure(parts, port, key, stream, connections, requests, directory)
                        figures[name, stream, connections] = result
                        row(name, result)
        finally:
            plain.kill()
        stack.settled(stack.admin("GET", "/v1/keys")["data"][0]["id"])
        summary(figures, stack)
        translation(stack, token, directory)


def translation(stack, token, directory):
    """What a request to Claude costs more in OpenAI's dialect than in Claude's own: the request and its whole answer, then each chunk of a
    stream. The simulator is asked the same either way."""
    paths = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}
    for stream in (False, True):
        results = {}
        for _ in range(TURNS):
            for dialect, path in paths.items():
                file = conversation(dialect, stream, directory)
                for connections, requests in ((1, REQUESTS // 6), (BUSY, REQUESTS // (20 if stream else 2))):
                    result = measure([stack.envoy], stack.listen_port, token, stream, connections, requests, directory, file, path)
                    results.setdefault((dialect, connections), []).append(result)
        cpu = {dialect: statistics.median(result["cpu_us"]["envoy"] for result in results[dialect, BUSY]) for dialect in paths}
        if stream:
            each = (cpu["openai"] - cpu["anthropic"]) / CHUNKS
            print(f"  translation, streamed: Envoy {cpu['openai']:.0f} us for {CHUNKS} chunks, {cpu['anthropic']:.0f} us untranslated: {each:.1f} us each [10]")
        else:
            # Turn by turn, so that what else the machine does touches both.
            p50 = [[result["latency_us"]["p50"] for result in results[dialect, 1]] for dialect in ("openai", "anthropic")]
            added = statistics.median(one - other for one, other in zip(*p50, strict=True))
            size = conversation("openai", False, directory).stat().st_size
            print(f"  translation, {size / 1024:.1f} KB request with its answer: added p50 {added:.0f} us [60]; "
                  f"Envoy {cpu['openai']:.0f} us, {cpu['anthropic']:.0f} us untranslated: {cpu['openai'] - cpu['anthropic']:.0f} us")


def summary(figures, stack):
    print("\nfigures (aims of DESIGN section 11 in brackets)")
    for stream in (False, True):
        kind = "streamed" if stream else "buffered"
        busy, base = figures["Keyward", stream, BUSY], figures["plain Envoy", stream, BUSY]
        envoy, service, plain = busy["cpu_us"]["envoy"], busy["cpu_us"]["service"], base["cpu_us"]["plain-envoy"]
        which = "ttfb_us" if stream else "latency_us"
        added = figures["Keyward", stream, 1][which]["p50"] - figures["plain Envoy", stream, 1][which]["p50"]
        print(f"  {kind}: Envoy {envoy:.0f} us [160] = {envoy / plain:.2f} x plain ({plain:.0f} us); service {service:.0f} us [100]; "
              f"added p50 {added} us [800]; throughput {busy['rps'] / base['rps']:.2f} x plain")
    module = (stack.directory / "filter.wasm").stat().st_size
    print(f"  filter module {module / 1024:.0f} KiB [2048]; Envoy resident {resident_kib(stack.envoy) / 1024:.0f} MiB, service {resident_kib(stack.service) / 1024:.0f} MiB")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
