"""What the core writes as answers, read by the SDKs that are to read them.

The golden files say what comes out of translation; that it is right is for others to say: here the official SDKs get those bytes from
a transport of their own and parse, accumulate and raise as they do for their users.
"""

import json
import re
import struct
from base64 import b64decode
from pathlib import Path

import anthropic
import httpx
import httpx2
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

ANSWERS = Path(__file__).parents[2] / "core/tests/translate/answers"
EVENT = TypeAdapter(RawMessageStreamEvent)


class Case:
    """One case of a golden file; core/tests/translate_answers.rs knows the form."""

    def __init__(self, file: str, text: str):
        head, rest = text.split("\n--- in\n", 1)
        self.input, self.expected = rest.split("--- out\n", 1)
        title, _, words = head.partition("\nwith: ")
        self.kind, self.name = title.split(": ", 1)
        self.words = words.split()
        self.source, self.to = next((word for word in self.words if "-" in word), file).split("-")

    def answer(self) -> tuple[int, bytes, str]:
        """Status, body and content type with which it reaches the caller."""
        body = self.expected.rstrip("\n")
        if self.kind == "stream":
            return 200, (body + "\n\n").encode(), "text/event-stream"
        if self.kind.isdigit():
            status, _, body = body.partition(" ")
            return int(status), body.encode(), "application/json"
        return 200, body.encode(), "application/json"

    def events(self) -> list[dict]:
        data = re.findall(r"^data: (.*)$", self.expected, re.MULTILINE)
        return [json.loads(event) for event in data if event != "[DONE]"]


def cases() -> list[Case]:
    files = sorted(ANSWERS.glob("*.txt"))
    return [Case(file.stem, text) for file in files for text in file.read_text(encoding="utf-8").split("\n=== ")[1:]]


def parametrize(to: str, *kinds: str):
    def fits(case: Case) -> bool:
        kind = "error" if case.kind.isdigit() else case.kind
        return case.to == to and kind in kinds and not case.expected.startswith("Json(")

    found = [case for case in cases() if fits(case)]
    return pytest.mark.parametrize("case", found, ids=[f"{case.source}: {case.kind}: {case.name}" for case in found])


def transport(case: Case, module):
    """Serves the case's bytes. The SDKs are built on different HTTP libraries, and each takes only its own."""
    status, body, kind = case.answer()
    return module.MockTransport(lambda _: module.Response(status, content=body, headers={"content-type": kind}))


def openai_client(case: Case) -> openai.OpenAI:
    client = httpx.Client(transport=transport(case, httpx))
    return openai.OpenAI(api_key="vk", base_url="http://127.0.0.1:1/v1", http_client=client, max_retries=0)


def anthropic_client(case: Case) -> anthropic.Anthropic:
    client = httpx2.Client(transport=transport(case, httpx2))
    return anthropic.Anthropic(api_key="vk", base_url="http://127.0.0.1:1", http_client=client, max_retries=0)


ASK = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def parsed_arguments(call) -> dict:
    parsed = json.loads(call.function.arguments)
    assert isinstance(parsed, dict)
    return parsed


@parametrize("openai", "stream")
def test_openai_streams(case: Case):
    events = case.events()
    for event in events:
        if "error" not in event:
            ChatCompletionChunk.model_validate(event, strict=True)
    ends_badly = "error" in events[-1]
    assert ends_badly != case.expected.rstrip().endswith("[DONE]")
    assert ("include_usage" in case.words) or not any("usage" in event for event in events)

    # What `chat.completions.stream` does, but that it takes an answer cut short for an error.
    chunks, state = [], ChatCompletionStreamState()
    try:
        for chunk in openai_client(case).chat.completions.create(**ASK, stream=True):
            chunks.append(chunk)
            for _ in state.handle_chunk(chunk):
                pass
    except openai.APIError as error:
        assert ends_badly and error.message == events[-1]["error"]["message"]
        return
    assert not ends_badly and len(chunks) == len(events)
    final = state.current_completion_snapshot
    for choice in final.choices:
        message = choice.message
        pieces = [own.delta for chunk in chunks for own in chunk.choices if own.index == choice.index]
        assert message.role == "assistant" and message.content == "".join(piece.content or "" for piece in pieces)
        assert pieces[0].role == "assistant" and [piece.role for piece in pieces[1:]] == [None] * (len(pieces) - 1)
        assert bool(message.tool_calls) == (choice.finish_reason == "tool_calls")
        for number, call in enumerate(message.tool_calls or []):
            assert call.id and call.function.name and call.index == number
            parsed_arguments(call)
        for block in message.model_extra.get("thinking_blocks", []):
            assert block["type"] in ("thinking", "redacted_thinking")
    assert [choice.index for choice in final.choices] == list(range(len(final.choices)))


@parametrize("openai", "document")
def test_openai_documents(case: Case):
    body = json.loads(case.expected)
    if "error" in body:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return
    ChatCompletion.model_validate(body, strict=True)
    completion = openai_client(case).chat.completions.create(**ASK)
    for choice in completion.choices:
        assert bool(choice.message.tool_calls) == (choice.finish_reason == "tool_calls")
        assert choice.message.content is not None or choice.message.tool_calls or choice.message.refusal
        for call in choice.message.tool_calls or []:
            parsed_arguments(call)
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@parametrize("openai", "embeddings")
def test_openai_embeddings(case: Case):
    given = json.loads(case.input)
    given = given.get("embeddings") or [given["embedding"]]
    if "base64" not in case.words:
        CreateEmbeddingResponse.model_validate(json.loads(case.expected), strict=True)
    # The SDK asks for base64 where its user asks for nothing, and takes the numbers out.
    answer = openai_client(case).embeddings.create(model="m", input=["a", "b"])
    for item, own in zip(answer.data, given, strict=True):
        assert list(item.embedding) == pytest.approx(own["values"], rel=1e-6)
    if "base64" in case.words:
        raw = b64decode(json.loads(case.expected)["data"][0]["embedding"])
        assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(given[0]["values"], rel=1e-6)


@parametrize("openai", "error")
def test_openai_errors(case: Case):
    with pytest.raises(openai.APIStatusError) as raised:
        openai_client(case).chat.completions.create(**ASK)
    status, body, _ = case.answer()
    assert raised.value.status_code == status and raised.value.body == json.loads(body)["error"]
    assert raised.value.message and "secret" not in str(raised.value)
    assert raised.value.code == json.loads(body)["error"]["code"]


@parametrize("anthropic", "stream")
def test_anthropic_streams(case: Case):
    events = case.events()
    for event in events:
        if event["type"] not in ("error", "ping"):
            EVENT.validate_python(event, strict=True)
    ends_badly = events[-1]["type"] == "error"
    assert ends_badly or events[-1]["type"] == "message_stop"

    try:
        with anthropic_client(case).messages.stream(**ASK, max_tokens=9) as stream:
            for _ in stream:
                pass
            final = stream.get_final_message()
    except anthropic.APIStatusError as error:
        assert ends_badly and error.body == events[-1]
        return
    assert not ends_badly
    blocks = [event for event in events if event["type"] == "content_block_start"]
    assert len(final.content) == len(blocks) and final.stop_reason is not None
    texts = "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
    assert "".join(block.text for block in final.content if block.type == "text") == texts
    calls = [block for block in final.content if block.type == "tool_use"]
    assert bool(calls) == (final.stop_reason == "tool_use") and all(isinstance(call.input, dict) for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    told = next(event["usage"] for event in events if event["type"] == "message_delta")
    assert (final.usage.input_tokens, final.usage.output_tokens) == (told["input_tokens"], told["output_tokens"])


@parametrize("anthropic", "document")
def test_anthropic_documents(case: Case):
    Message.model_validate(json.loads(case.expected), strict=True)
    message = anthropic_client(case).messages.create(**ASK, max_tokens=9)
    assert message.stop_reason is not None
    calls = [block for block in message.content if block.type == "tool_use"]
    assert all(isinstance(call.input, dict) for call in calls)


@parametrize("anthropic", "error")
def test_anthropic_errors(case: Case):
    with pytest.raises(anthropic.APIStatusError) as raised:
        anthropic_client(case).messages.create(**ASK, max_tokens=9)
    status, body, _ = case.answer()
    assert raised.value.status_code == status and raised.value.body == json.loads(body)
    assert "secret" not in str(raised.value)


def test_that_the_files_were_read():
    assert len(cases()) >= 80
