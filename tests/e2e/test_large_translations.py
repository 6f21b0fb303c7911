"""Bodies of nearly the largest size that are translated, of the kinds that grow most or have most parts: none of them ends a worker's VM,
whose memory is 64 MiB, and each is told what its provider thinks of it, or why it can't be translated."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import Stack, call

CREDENTIALS = [
    {"id": "google", "provider": "gemini", "secret": "AIzaSyD4kVnT8rQw2LsXy6HcBf9MdJ1GpZr5Yt"},
    {"id": "openai", "provider": "openai", "secret": "sk-proj-Gp5RkW1vYt7NzQa3PdLx8HgC6JeBm2Fu"},
    {"id": "claude", "provider": "anthropic", "secret": "sk-ant-api03-Rd5WzLp3XvN7qKt9BhMy2JcSaE"},
]
SIZE = 9_500_000
CHAT, MESSAGES, EMBEDDINGS = "/v1/chat/completions", "/v1/messages", "/v1/embeddings"


def asked(model, messages, **more):
    return json.dumps({"model": model, "max_tokens": 20, "messages": messages, **more})


def quotes(model):
    return asked(model, [{"role": "user", "content": "\"" * (SIZE // 2)}])


def used_tool(model):
    """Arguments that become a string, in which every quote is escaped once more."""
    call_, result = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": "\"" * (SIZE // 2)}}, {"type": "tool_result", "tool_use_id": "toolu_1"}
    return asked(model, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [call_]}, {"role": "user", "content": [{**result, "content": "ok"}]}])


def called_tool(model):
    """Arguments that are a string, and become an object."""
    made = {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": json.dumps({"x": "q" * (SIZE - 500)})}}
    return asked(model, [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": "call_1", "content": "ok"}])


BODIES = [
    ("quotes for Claude", CHAT, quotes("claude-haiku-4-5"), 400, "too long"),
    ("quotes for Gemini", CHAT, quotes("gemini-2.5-flash"), 400, "exceeds the maximum"),
    ("arguments for OpenAI", MESSAGES, used_tool("gpt-4o-mini"), 400, "maximum context length"),
    ("arguments for Gemini", MESSAGES, used_tool("gemini-2.5-flash"), 400, "exceeds the maximum"),
    ("arguments for Claude", CHAT, called_tool("claude-haiku-4-5"), 400, "too long"),
    ("millions of values", CHAT, asked("claude-haiku-4-5", [{"role": "user", "content": "Hi"}], metadata={"a": [1] * 2_000_000}), 400, "too many parts"),
    ("45,000 messages", CHAT, asked("claude-haiku-4-5", [{"role": "user", "content": "a"}] * 45_000), 200, "choices"),
    ("150,000 texts", EMBEDDINGS, json.dumps({"model": "gemini-embedding-001", "input": ["a"] * 150_000}), 400, "at most 2048 texts"),
]


@pytest.mark.parametrize("rotation", ["router", "callout"])
def test_no_body_ends_a_vm(rotation):
    with Stack(credentials=CREDENTIALS, rotation=rotation) as stack:
        key_id, token = stack.new_key()

        def send(path, body):
            return call(stack.base, "POST", path, body.encode(), {"authorization": f"Bearer {token}", "content-type": "application/json"}, 120)

        for name, path, body, status, words in BODIES:
            answer = send(path, body)
            assert (answer[0], words in answer[2].decode()) == (status, True), (name, answer[0], answer[2][:300])
        with ThreadPoolExecutor(6) as pool:
            for name, path, body, status, _ in BODIES[2:5]:
                assert {answer[0] for answer in pool.map(lambda _: send(path, body), range(6))} <= {status, 503}, name
        reloads = {name: value for name, value in stack.stats("wasm.*vm_reload").items() if value}
        assert reloads == {}, "a VM trapped"
        stack.books(key_id)
