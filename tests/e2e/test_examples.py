"""examples/: each runs as it stands, told nothing but base URL and key, and what it prints, what the provider counted and
what the key paid agree."""

import json
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from documents import Reader
from harness import NODE_MODULES, ROOT, wait_for

EXAMPLES = ROOT / "examples"
# What the simulator says to each request of an example, in order: the examples themselves know nothing of it.
SAYS = ["echo=1", "tokens=12 per_delta=3", 'tool=get_weather args={"city": "Paris"}', "tokens=5"]
CALL = "-> 21 degrees and sunny in Paris"


def example_env(stack, token):
    """Base URL and key, and what a process needs to run at all: nothing of this machine's own settings."""
    import llama_index.core

    return {
        "PATH": os.environ["PATH"], "HOME": str(stack.directory), "LANG": "C.UTF-8",
        "OPENAI_BASE_URL": f"{stack.base}/v1", "OPENAI_API_KEY": token, "ANTHROPIC_BASE_URL": stack.base, "ANTHROPIC_API_KEY": token,
        # LangChain counts tokens by tables that it would fetch from the internet; LlamaIndex brings the same file along.
        "TIKTOKEN_CACHE_DIR": str(Path(llama_index.core.__file__).parent / "_static/tiktoken_cache"),
    }


def command(name, directory):
    """How a developer runs an example, in a copy of its folder with what its README line installs."""
    folder = directory / name
    shutil.copytree(EXAMPLES / name, folder)
    if (folder / "package.json").exists():
        (folder / "node_modules").symlink_to(NODE_MODULES)
        return folder, ["node", "main.js"]
    if (folder / "main.py").exists():
        return folder, [sys.executable, "main.py"]
    return folder, ["./run.sh"]


def counts(stack):
    """Requests that each of the provider's credentials has seen."""
    return {name: sum(seen["by_status"].values()) for name, seen in stack.sim.totals()["credentials"].items()}


def run(stack, name, directory, says):
    """Runs an example to its end: its output, the key it ran with, the requests by credential and endpoint."""
    key_id, token = stack.new_key("1.00")
    before, violations = counts(stack), stack.sim.totals()["violation_count"]
    stack.sim.request("POST", "/control/faults", [{"sim": words} for words in says])
    folder, line = command(name, directory)
    try:
        done = subprocess.run(line, cwd=folder, env=example_env(stack, token), capture_output=True, text=True, timeout=120)
    finally:
        left = stack.sim.get("/control/faults")["faults"]
        stack.sim.request("DELETE", "/control/faults")
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    assert left == [], "the example asked less than it should"
    true, charged, ends = stack.books(key_id)
    assert charged == true > 0 and all(end["outcome"] == "complete" and end["status"] == 200 for end in ends), ends
    totals = stack.sim.totals()
    assert totals["violation_count"] == violations, totals["violations"][-5:]
    rise = {name: count - before.get(name, 0) for name, count in counts(stack).items() if count != before.get(name, 0)}
    return done.stdout, rise, [call["endpoint"] for call in stack.calls_of(key_id)]


def check_lines(output):
    """The lines that every example prints: what the simulator was told to say has come through."""
    lines = dict(line.split(": ", 1) for line in output.splitlines())
    assert lines["plain"] == "Name a river in Paris."
    assert len(lines["stream"].split()) == 12
    name, _, result = lines["tool"].partition(" ")
    assert name == "get_weather" and '"Paris"' in result and result.endswith(CALL), result
    assert len(lines["tools"].split()) == 5
    return lines


CHAT = ["POST /v1/chat/completions"] * 4


@pytest.mark.parametrize("name", ["openai-python", "openai-node"])
def test_openai(stack, tmp_path, name):
    output, rise, endpoints = run(stack, name, tmp_path, [*SAYS, "echo=1", "tokens=3 per_delta=1"])
    lines = check_lines(output)
    assert lines["responses"] == "Name a bridge in Paris." and len(lines["responses stream"].split()) == 3
    assert lines["embeddings"] == "2 vectors of 1536"
    assert rise == {"openai-1": 7} and endpoints == [*CHAT, *["POST /v1/responses"] * 2, "POST /v1/embeddings"]


@pytest.mark.parametrize("name", ["anthropic-python", "anthropic-node"])
def test_anthropic(stack, tmp_path, name):
    output, rise, endpoints = run(stack, name, tmp_path, SAYS)
    check_lines(output)
    assert rise == {"anthropic-1": 4} and endpoints == ["POST /v1/messages"] * 4


@pytest.mark.parametrize("name", ["langchain", "llama-index"])
def test_frameworks_on_the_openai_sdk(stack, tmp_path, name):
    output, rise, endpoints = run(stack, name, tmp_path, SAYS)
    assert check_lines(output)["embeddings"] == "2 vectors of 1536"
    assert rise == {"openai-1": 5} and endpoints == [*CHAT, "POST /v1/embeddings"]


def test_curl(stack, tmp_path):
    output, rise, endpoints = run(stack, "curl", tmp_path, [*SAYS, "echo=1"])
    parts = dict(part.split("\n", 1) for part in output.split("--- ")[1:])
    assert "Name a river in Paris." in parts["plain"] and parts["stream"].rstrip().endswith("data: [DONE]")
    assert '"get_weather"' in parts["tools: the model asks for a call"] and '"stop"' in parts["tools: it gets the result"]
    assert "Name a bridge in Paris." in parts["responses"] and '"embedding"' in parts["embeddings"]
    assert rise == {"openai-1": 6} and endpoints == [*CHAT, "POST /v1/responses", "POST /v1/embeddings"]


def test_every_example_is_run_by_a_test():
    """A folder that somebody adds is not forgotten here."""
    assert {folder.name for folder in EXAMPLES.iterdir() if folder.is_dir()} == {
        "openai-python", "openai-node", "anthropic-python", "anthropic-node", "langchain", "llama-index", "curl", "beside-an-api-gateway",
        # The README runs it: test_docs.py.
        "quickstart"}


# --- beside an API gateway: the README's own commands, then what it says must hold ---------------------------------------


@pytest.fixture(scope="module")
def edge():
    """What somebody has who typed the README: a gateway, Keyward behind it, a key."""
    with Reader() as reader:
        reader.printed = reader.read(EXAMPLES / "beside-an-api-gateway/README.md")
        reader.folder = reader.directory / "examples/beside-an-api-gateway"
        reader.base = f"https://localhost:{reader.ports['8443']}"
        yield reader


def through(edge, source="127.0.0.1"):
    """An HTTP client of a caller whose address is `source`."""
    context = ssl.create_default_context(cafile=edge.folder / "tls/ca.pem")
    return httpx.Client(transport=httpx.HTTPTransport(verify=context, local_address=source), timeout=60)


def last_entry(file, **where):
    """The newest line of an access log that has these fields; Envoy writes them a little later."""
    def find():
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        return [entry for entry in entries if all(entry.get(name) == value for name, value in where.items())][-1:]
    return wait_for(f"an entry with {where}", find)[0]


def test_the_gateways_readme_works_as_it_stands(edge):
    assert "Not a model" in edge.printed and edge.printed.count('"object":"list"') == 2 and edge.printed.count("tools: ") == 2
    assert edge.sim.totals()["violations"] == []


def test_a_chunk_passes_both_envoys_before_the_next_is_sent(edge):
    client = openai.OpenAI(base_url=f"{edge.base}/llm/v1", api_key=edge.first_key(), http_client=through(edge))
    early, texts, seq = 0, [], edge.sim.get(f"/control/ledger?since={1 << 60}")["last_seq"]
    ask = [{"role": "user", "content": "[[sim tokens=18 per_delta=3 pace_ms=300]]"}]
    for chunk in client.chat.completions.create(model="gpt-4o-mini", messages=ask, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            texts.append(chunk.choices[0].delta.content)
            calls = edge.sim.ledger(seq)
            early += len(texts) <= 2 and bool(calls) and calls[-1]["ended_unix_us"] is None
    assert len(texts) == 6 and early == 2


@pytest.mark.parametrize("stream", [False, True], ids=["buffered", "stream"])
def test_a_model_may_think_for_longer_than_envoys_default_timeout(edge, stream):
    client = openai.OpenAI(base_url=f"{edge.base}/llm/v1", api_key=edge.first_key(), http_client=through(edge), max_retries=0)
    ask = [{"role": "user", "content": "[[sim tokens=5 silent_ms=9000 first_ms=8000]]"}]
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=ask, stream=stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in answer) if stream else answer.choices[0].message.content
    assert len(text.split()) == 5


def test_the_callers_address_and_one_request_id_stand_in_both_logs_and_stay_inside(edge):
    """Also when the caller names an address and an id of its own choice."""
    seq = edge.sim.get(f"/control/ledger?since={1 << 60}")["last_seq"]
    with through(edge, "127.0.0.7") as client:
        answer = client.post(f"{edge.base}/llm/v1/chat/completions", headers={
            "authorization": f"Bearer {edge.first_key()}", "x-forwarded-for": "203.0.113.9", "cookie": "session=of-the-edge",
        }, json={"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]})
    assert answer.status_code == 200
    request_id, edge_id = answer.headers["x-keyward-request-id"], answer.headers["x-request-id"]
    outer = last_entry(edge.folder / "gateway.log", keyward_request_id=request_id)
    inner = last_entry(edge.directory / ".keyward/access.log", edge_request_id=edge_id)
    assert outer["client"] == inner["client"] == "127.0.0.7" and outer["x_request_id"] == edge_id
    assert inner["request_id"] == request_id
    sent = edge.sim.headers(edge.sim.ledger(seq)[-1]["seq"])
    seen = json.dumps(sent)
    assert "127.0.0.7" not in seen and "203.0.113.9" not in seen and "of-the-edge" not in seen and "llm" not in seen, sent
    assert edge.sim.totals()["violations"] == []


def test_a_refusal_comes_back_whole(edge):
    with through(edge) as client:
        answer = client.get(f"{edge.base}/llm/v1/models", headers={"authorization": "Bearer vk_nonsense"})
        assert (answer.status_code, answer.headers["x-keyward-reason"], answer.headers["x-should-retry"]) == (401, "unknown_key", "false")
        assert client.get(f"{edge.base}/v1/models").text.startswith("Not a model")
    last_entry(edge.folder / "gateway.log", keyward_reason="unknown_key")
    assert edge.first_key() not in (edge.folder / "gateway.log").read_text(), "a virtual key stands in the gateway's log"
