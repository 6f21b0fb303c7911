"""The promise: an SDK needs another base_url and another api_key, and nothing else. What it sends arrives byte for byte,
what the provider answers comes back as it came, and every error is the SDK's own typed exception."""

import asyncio
import json

import anthropic
import openai
import pytest
from harness import as_asked, wait_for

USAGE_MEMBER = b'"stream_options":{"include_usage":true}'
WEATHER = {"city": "Zürich – 日本 🦀", "days": [1, 2], "note": 'a "quoted" \\ back\nslash'}
TIME = {"zone": "Europe/Paris"}


@pytest.fixture(autouse=True)
def clean(any_stack):
    """Nothing that must not leave has left: no virtual key, no foreign secret, no broken framing."""
    before = any_stack.sim.totals()["violation_count"]
    yield
    totals = any_stack.sim.totals()
    assert totals["violation_count"] == before, totals["violations"][-5:]


def sync_openai(stack, token, prefix="/v1", **options):
    """The SDK, and the bodies it sends (seen by a hook of its HTTP client: the SDK itself is as installed)."""
    client, sent = openai.OpenAI(base_url=stack.base + prefix, api_key=token, **options), []
    client._client.event_hooks = {"request": [lambda request: sent.append(request.read())]}
    return client, sent


def sync_anthropic(stack, token=None, prefix="", **options):
    client, sent = anthropic.Anthropic(base_url=stack.base + prefix, **({"api_key": token} if token else {}), **options), []
    client._client.event_hooks = {"request": [lambda request: sent.append(request.read())]}
    return client, sent


def user(text):
    return [{"role": "user", "content": text}]


def forwarded(stack, key_id):
    """The bodies of this key's requests as the provider got them, less what the gate writes into every chat: that it is not to be
    stored, and, for a key with a budget when the caller set no limit, the model's own maximum, because the hold rests on it."""
    calls = stack.calls_of(key_id)
    bodies = [as_asked(stack.sim.body(call["seq"])) if call["provider"] == "openai" else stack.sim.body(call["seq"]) for call in calls]
    return [body.replace(b'{"max_completion_tokens":16384,', b"{", 1) for body in bodies]


def without(body, member):
    """`body` with one JSON member taken out, comma included."""
    assert body.count(member) == 1, body
    return body.replace(member + b",", b"").replace(b"," + member, b"")


def running(stack, seq):
    """Whether the simulator is still at work on the request after `seq`."""
    calls = stack.sim.ledger(seq)
    return bool(calls) and calls[-1]["ended_unix_us"] is None


# --- OpenAI ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_openai_chat_is_carried_unchanged_and_paid_exactly(any_stack, prefix):
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_openai(any_stack, token, prefix)
    messages = [{"role": "system", "content": "Sei kurz – 簡潔に 🦀"}, *user("Grüße, 世界! \u2028 \x7f [[sim echo=1]]")]
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=messages, temperature=0.5, seed=7, stop=["\n\n"])
    answer = raw.parse()
    assert answer.choices[0].message.content == "Grüße, 世界! \u2028 \x7f"
    assert answer.choices[0].finish_reason == "stop" and answer.usage.total_tokens > 0
    assert forwarded(any_stack, key_id) == sent and len(sent) == 1
    assert raw.headers["x-keyward-request-id"] == any_stack.calls_of(key_id)[0]["client_request_id"]
    assert not {"set-cookie", "openai-organization"} & set(raw.headers), "tells which account paid"
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0


def test_openai_unicode_answers_arrive_whole(any_stack):
    _, token = any_stack.new_key()
    client, _ = sync_openai(any_stack, token)
    whole = client.chat.completions.create(model="gpt-4o", messages=user("[[sim unicode=1 tokens=50]]")).choices[0].message.content
    stream = client.chat.completions.create(model="gpt-4o", messages=user("[[sim unicode=1 tokens=50 split=1]]"), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole and "🦀" in whole


def test_openai_stream_without_usage_shows_none_though_the_gate_asked(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_openai(any_stack, token)
    chunks = list(client.chat.completions.create(model="gpt-4o-mini", messages=user("[[sim tokens=30]]"), stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len("".join(c.choices[0].delta.content or "" for c in chunks).split()) == 30
    assert [without(body, USAGE_MEMBER) for body in forwarded(any_stack, key_id)] == sent
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0


def test_openai_stream_that_said_no_to_usage_shows_none(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_openai(any_stack, token)
    chunks = list(client.chat.completions.create(
        model="gpt-4o-mini", messages=user("Hi"), stream=True, stream_options={"include_usage": False}))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert forwarded(any_stack, key_id) == [sent[0].replace(b'"include_usage":false', b'"include_usage":true')]
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0


def test_openai_stream_with_usage_shows_it_once(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_openai(any_stack, token)
    chunks = list(client.chat.completions.create(
        model="gpt-4o-mini", messages=user("[[sim tokens=30]]"), stream=True, stream_options={"include_usage": True}))
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert len(usages) == 1 and usages[0].completion_tokens == 30
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert forwarded(any_stack, key_id) == sent
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0


@pytest.mark.parametrize("ask", [None, {"include_usage": True}], ids=["usage-hidden", "usage-shown"])
def test_openai_chunks_arrive_one_by_one(any_stack, ask):
    """A stream is passed on as it is made: the first chunks are here while the provider still writes."""
    _, token = any_stack.new_key("1.00")
    client, _ = sync_openai(any_stack, token)
    seq, early, texts = any_stack.last_seq(), 0, []
    options = {"stream_options": ask} if ask else {}
    for chunk in client.chat.completions.create(
            model="gpt-4o-mini", messages=user("[[sim tokens=18 per_delta=3 pace_ms=200]]"), stream=True, **options):
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            texts.append(text)
            early += len(texts) <= 2 and running(any_stack, seq)
    assert len(texts) == 6 and early == 2


def test_openai_async_streams_side_by_side(any_stack):
    key_id, token = any_stack.new_key("1.00")

    async def one(client, number):
        stream = await client.chat.completions.create(
            model="gpt-4o-mini", messages=user(f"Nr {number} [[sim echo=1 per_delta=1 pace_ms=5]]"), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=any_stack.base + "/v1", api_key=token) as client:
            plain = await client.chat.completions.create(model="gpt-4o", messages=user("Hello"))
            assert plain.choices[0].message.content
            return await asyncio.gather(*(one(client, number) for number in range(16)))

    assert asyncio.run(all_of_them()) == [f"Nr {number}" for number in range(16)]
    true, charged, ends = any_stack.books(key_id)
    assert charged == true > 0 and len(ends) == 17


def tool(name):
    return {"type": "function", "function": {"name": name, "description": f"Über {name}", "parameters": {
        "type": "object", "properties": {"model": {"type": "string"}, "max_tokens": {"type": "web_search"}}, "additionalProperties": True}}}


def test_openai_tools_parallel_calls_and_their_results(any_stack):
    """Tool definitions go through untouched, even where their parameters have governed names; arguments come back whole."""
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_openai(any_stack, token)
    tools = [tool("get_weather"), tool("get_time")]
    script = f"[[sim tool=get_weather args={json.dumps(WEATHER)} tool=get_time args={json.dumps(TIME)}]]"
    messages = user(script)
    message = client.chat.completions.create(model="gpt-4o", messages=messages, tools=tools, parallel_tool_calls=True).choices[0].message
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        ("get_weather", WEATHER), ("get_time", TIME)]

    calls = {}
    for chunk in client.chat.completions.create(model="gpt-4o", messages=messages, tools=tools, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            name, arguments = calls.get(part.index, ("", ""))
            calls[part.index] = (name + (part.function.name or ""), arguments + (part.function.arguments or ""))
    assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == [("get_weather", WEATHER), ("get_time", TIME)]

    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 °C"} for call in message.tool_calls]
    last = client.chat.completions.create(model="gpt-4o", messages=[*messages, message, *results], tools=tools).choices[0]
    assert last.finish_reason == "stop" and last.message.content and not last.message.tool_calls
    got = forwarded(any_stack, key_id)
    assert [got[0], without(got[1], USAGE_MEMBER), got[2]] == sent
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0


@pytest.mark.parametrize("form", [
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "size", "description": "Größe", "strict": True, "schema": {
        "type": "object", "properties": {"stream": {"enum": [1.0, 1e300, -0.0, "🦀 \u2028"]}}, "required": ["stream"], "additionalProperties": False}}},
], ids=["json_object", "json_schema"])
def test_openai_response_format_passes_byte_for_byte(any_stack, form):
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_openai(any_stack, token)
    assert client.chat.completions.create(model="gpt-4o", messages=user("JSON please"), response_format=form).choices
    assert forwarded(any_stack, key_id) == sent


def test_openai_several_choices_are_all_paid(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_openai(any_stack, token)
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=user("Hi"), n=2, max_completion_tokens=50)
    assert [choice.index for choice in answer.choices] == [0, 1]
    seen = {chunk.choices[0].index for chunk in client.chat.completions.create(
        model="gpt-4o-mini", messages=user("Hi"), n=2, max_completion_tokens=50, stream=True)}
    assert seen == {0, 1}
    got = forwarded(any_stack, key_id)
    assert [got[0], without(got[1], USAGE_MEMBER)] == sent
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0
    assert [entry["choices"] for entry in any_stack.audit(key_id) if entry["event"] == "ADMITTED"] == [2, 2]


def test_openai_reasoning_model_and_cached_prompt_are_paid_exactly(any_stack):
    key_id, token = any_stack.new_key("5.00")
    client, _ = sync_openai(any_stack, token)
    usage = client.chat.completions.create(
        model="o4-mini", messages=user("think " * 40 + "[[sim reasoning=300 cache_read=30]]"), reasoning_effort="low").usage
    assert (usage.completion_tokens_details.reasoning_tokens, usage.prompt_tokens_details.cached_tokens) == (300, 30)
    true, charged, ends = any_stack.books(key_id)
    assert charged == true > 0 and (ends[0]["reasoning"], ends[0]["cache_read"]) == (300, 30)


def test_openai_clamp_is_all_the_gate_writes(any_stack):
    """With little money left the body that goes on differs by the limit alone."""
    key_id, token = any_stack.new_key("0.0001")
    client, sent = sync_openai(any_stack, token)
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=user("[[sim tokens=5000]]"))
    limit = raw.headers["x-keyward-max-tokens"]
    assert raw.parse().choices[0].finish_reason == "length"
    assert [without(body, f'"max_completion_tokens":{limit}'.encode()) for body in forwarded(any_stack, key_id)] == sent


def test_openai_models_are_listed(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client, _ = sync_openai(any_stack, token)
    assert "gpt-4o-mini" in {model.id for model in client.models.list()}
    true, charged, _ = any_stack.books(key_id)
    assert true == charged == 0


# --- Anthropic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "scheme"), [("", "api_key"), ("/anthropic", "auth_token")])
def test_anthropic_messages_are_carried_unchanged_and_paid_exactly(any_stack, prefix, scheme):
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_anthropic(any_stack, prefix=prefix, **{scheme: token})
    answer = client.messages.create(
        model="claude-haiku-4-5", max_tokens=200, system=[{"type": "text", "text": "Sei kurz – 簡潔に", "cache_control": {"type": "ephemeral"}}],
        messages=user("Grüße, 世界! [[sim echo=1 cache_write=5]]"), metadata={"user_id": "u-1"}, stop_sequences=["\n\nHuman"])
    assert answer.content[0].text == "Grüße, 世界!" and answer.stop_reason == "end_turn"
    assert answer.usage.cache_creation_input_tokens == 5
    assert forwarded(any_stack, key_id) == sent and len(sent) == 1
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0


def test_anthropic_streaming_helper(any_stack):
    """`client.messages.stream`: text as it comes, and the whole message at the end."""
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_anthropic(any_stack, token)
    seq, early, texts = any_stack.last_seq(), 0, []
    with client.messages.stream(
            model="claude-opus-4-6", max_tokens=100, messages=user("[[sim tokens=18 per_delta=3 pace_ms=200]]")) as stream:
        for text in stream.text_stream:
            texts.append(text)
            early += len(texts) <= 2 and running(any_stack, seq)
        message = stream.get_final_message()
    assert len(texts) == 6 and early == 2
    assert message.content[0].text == "".join(texts) and message.usage.output_tokens == 18
    assert forwarded(any_stack, key_id) == sent
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0


def test_anthropic_raw_stream_keeps_every_event(any_stack):
    _, token = any_stack.new_key("1.00")
    client, _ = sync_anthropic(any_stack, token)
    kinds = [event.type for event in client.messages.create(
        model="claude-haiku-4-5", max_tokens=100, messages=user("[[sim tokens=6]]"), stream=True)]
    assert kinds == ["message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
                     "message_delta", "message_stop"]


def test_anthropic_async_streams_side_by_side(any_stack):
    key_id, token = any_stack.new_key("1.00")

    async def one(client, number):
        async with client.messages.stream(
                model="claude-haiku-4-5", max_tokens=100, messages=user(f"Nr {number} [[sim echo=1 per_delta=1 pace_ms=5]]")) as stream:
            return "".join([text async for text in stream.text_stream])

    async def all_of_them():
        async with anthropic.AsyncAnthropic(base_url=any_stack.base, api_key=token) as client:
            plain = await client.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=user("Hello"))
            assert plain.content[0].text
            return await asyncio.gather(*(one(client, number) for number in range(8)))

    assert asyncio.run(all_of_them()) == [f"Nr {number}" for number in range(8)]
    true, charged, ends = any_stack.books(key_id)
    assert charged == true > 0 and len(ends) == 9


def test_anthropic_tools_parallel_calls_and_their_results(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client, sent = sync_anthropic(any_stack, token)
    tools = [{"name": name, "description": "…", "input_schema": {"type": "object", "properties": {"type": {"type": "string"}}}}
             for name in ("get_weather", "get_time")]
    messages = user(f"[[sim tool=get_weather args={json.dumps(WEATHER)} tool=get_time args={json.dumps(TIME)}]]")
    ask = {"model": "claude-opus-4-6", "max_tokens": 500, "tools": tools}
    answer = client.messages.create(messages=messages, **ask)
    assert answer.stop_reason == "tool_use"
    uses = [block for block in answer.content if block.type == "tool_use"]
    assert [(use.name, use.input) for use in uses] == [("get_weather", WEATHER), ("get_time", TIME)]

    with client.messages.stream(messages=messages, **ask) as stream:
        streamed = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert [(use.name, use.input) for use in streamed] == [("get_weather", WEATHER), ("get_time", TIME)]

    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "21 °C"} for use in uses]
    last = client.messages.create(
        messages=[*messages, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}], **ask)
    assert last.stop_reason == "end_turn" and last.content[0].text
    assert forwarded(any_stack, key_id) == sent and len(sent) == 3
    true, charged, _ = any_stack.books(key_id)
    assert charged == true > 0


def test_anthropic_models_are_listed(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client, _ = sync_anthropic(any_stack, token)
    assert any(model.id.startswith("claude-haiku-4-5") for model in client.models.list())
    assert any_stack.books(key_id)[:2] == (0, 0)


# --- errors ------------------------------------------------------------------------------------------------------------


def raised(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def test_openai_refusals_are_the_sdks_own_exceptions(any_stack):
    """Also with the SDK's own retries on: a refusal that a retry can't help is asked once."""
    _, good = any_stack.new_key("1.00", allow={"models": ["gpt-4o-mini"]})
    poor_id, poor = any_stack.new_key("0.000001")
    gone_id, gone = any_stack.new_key()
    any_stack.admin("DELETE", f"/v1/keys/{gone_id}")

    def call(token, prefix="/v1", model="gpt-4o-mini", **more):
        client, sent = sync_openai(any_stack, token, prefix)
        with_error = {}
        try:
            client.chat.completions.create(model=model, messages=user("Hi"), **more)
        except openai.APIStatusError as error:
            with_error["error"] = error
        assert len(sent) == 1, "retried in vain"
        return with_error["error"]

    seq = any_stack.last_seq()
    for error, kind, code in [
        (call("vk_nonsense"), openai.AuthenticationError, "unknown_key"),
        (call(gone), openai.AuthenticationError, "revoked"),
        (call(good, model="gpt-4o"), openai.PermissionDeniedError, "model_not_allowed"),
        (call(good, prefix="/nowhere/v1"), openai.NotFoundError, "unknown_provider"),
        (call(good, extra_body={"web_search_options": {}}), openai.BadRequestError, "unbounded_input"),
        (call(poor), openai.RateLimitError, "cap_exhausted"),
    ]:
        assert type(error) is kind and error.code == code, (error, code)
        assert set(error.body) == {"message", "type", "param", "code"} and error.body["message"] and error.body["param"] is None
        assert error.response.headers["x-keyward-reason"] == code
    assert any_stack.last_seq() == seq
    assert [e["code"] for e in any_stack.audit(poor_id) if e["event"] == "REFUSED"] == ["cap_exhausted"]


def test_anthropic_refusals_are_the_sdks_own_exceptions(any_stack):
    _, good = any_stack.new_key("1.00", allow={"models": ["claude-haiku-*"]})
    _, poor = any_stack.new_key("0.000001")

    def call(token, prefix="", model="claude-haiku-4-5", **more):
        client, sent = sync_anthropic(any_stack, token, prefix)
        error = raised(anthropic.APIStatusError, lambda: client.messages.create(model=model, max_tokens=50, messages=user("Hi"), **more))
        assert len(sent) == 1, "retried in vain"
        return error

    seq = any_stack.last_seq()
    for error, kind, code, kind_text in [
        (call("vk_nonsense"), anthropic.AuthenticationError, "unknown_key", "authentication_error"),
        (call(good, model="claude-opus-4-6"), anthropic.PermissionDeniedError, "model_not_allowed", "permission_error"),
        (call(good, prefix="/nowhere"), anthropic.NotFoundError, "unknown_provider", "not_found_error"),
        (call(good, extra_body={"mcp_servers": [{}]}), anthropic.BadRequestError, "unbounded_input", "invalid_request_error"),
        (call(poor), anthropic.RateLimitError, "cap_exhausted", "rate_limit_error"),
    ]:
        assert type(error) is kind and error.response.headers["x-keyward-reason"] == code, (error, code)
        assert error.body["type"] == "error" and error.body["error"]["type"] == kind_text and error.body["error"]["message"]
    assert any_stack.last_seq() == seq


def rest(stack, error):
    """A provider that asks for time gets it from everybody: not in the tests that follow."""
    if "retry-after" in error.response.headers:
        stack.recover()


@pytest.mark.parametrize(("words", "kind", "code"), [
    ("status=400", openai.BadRequestError, None),
    ("status=400 error=context_length_exceeded", openai.BadRequestError, "context_length_exceeded"),
    ("status=404", openai.NotFoundError, "model_not_found"),
    ("status=500", openai.InternalServerError, None),
    ("status=503", openai.InternalServerError, None),
    ("status=529", openai.InternalServerError, None),
])
@pytest.mark.parametrize("stream", [False, True], ids=["buffered", "stream"])
def test_openai_errors_of_the_provider_pass_through(any_stack, words, kind, code, stream):
    """The provider's own error object reaches the caller, and costs nothing."""
    key_id, token = any_stack.new_key("1.00")
    client, _ = sync_openai(any_stack, token, max_retries=0)
    error = raised(kind, lambda: client.chat.completions.create(model="gpt-4o", messages=user(f"[[sim {words}]]"), stream=stream))
    assert type(error) is kind and error.code == code and error.body["message"] and error.body["type"]
    assert "x-keyward-reason" not in error.response.headers and error.response.headers["x-keyward-request-id"]
    assert any_stack.books(key_id)[:2] == (0, 0)
    rest(any_stack, error)


@pytest.mark.parametrize(("words", "retry_after", "retries"), [("status=429 retry_after=3", 3, True), ("error=insufficient_quota", 600, False)])
def test_a_limit_of_the_provider_is_told_as_the_pools(any_stack, words, retry_after, retries):
    """With no key left that could serve, SDKs get the 429 that they know, with the time that counts, and a hint where no retry helps."""
    key_id, token = any_stack.new_key("1.00")
    try:
        client, _ = sync_openai(any_stack, token, max_retries=0)
        error = raised(openai.RateLimitError, lambda: client.chat.completions.create(model="gpt-4o", messages=user(f"[[sim {words}]]")))
        assert error.code == "pool_exhausted" and error.body["message"] and error.body["type"]
        assert 0 < int(error.response.headers["retry-after"]) <= retry_after
        assert (error.response.headers.get("x-should-retry") != "false") == retries
        if retries:
            claude, _ = sync_anthropic(any_stack, token, max_retries=0)
            error = raised(anthropic.RateLimitError,
                           lambda: claude.messages.create(model="claude-haiku-4-5", max_tokens=9, messages=user(f"[[sim {words}]]")))
            assert error.body["error"]["type"] == "rate_limit_error" and error.response.headers["x-keyward-reason"] == "pool_exhausted"
        assert any_stack.books(key_id)[:2] == (0, 0)
    finally:
        any_stack.settled(key_id)
        any_stack.recover()


@pytest.mark.parametrize(("words", "kind", "kind_text"), [
    ("status=400", anthropic.BadRequestError, "invalid_request_error"),
    ("status=404", anthropic.NotFoundError, "not_found_error"),
    ("status=500", anthropic.InternalServerError, "api_error"),
    ("status=529", anthropic.InternalServerError, "overloaded_error"),
])
def test_anthropic_errors_of_the_provider_pass_through(any_stack, words, kind, kind_text):
    key_id, token = any_stack.new_key("1.00")
    client, _ = sync_anthropic(any_stack, token, max_retries=0)
    error = raised(kind, lambda: client.messages.create(model="claude-haiku-4-5", max_tokens=9, messages=user(f"[[sim {words}]]")))
    assert error.body["error"]["type"] == kind_text and error.body["request_id"] == error.response.headers["request-id"]
    assert "x-keyward-reason" not in error.response.headers
    assert any_stack.books(key_id)[:2] == (0, 0)
    rest(any_stack, error)


def test_a_rejected_stored_credential_is_no_authentication_error(any_stack):
    """The caller's key is fine: a 401 would make SDKs and people look in the wrong place."""
    key_id, token = any_stack.new_key("1.00")
    for name, client, kind, call in [
        ("openai-1", sync_openai(any_stack, token, max_retries=0)[0], openai.InternalServerError,
         lambda c: c.chat.completions.create(model="gpt-4o", messages=user("Hi"))),
        ("anthropic-1", sync_anthropic(any_stack, token, max_retries=0)[0], anthropic.InternalServerError,
         lambda c: c.messages.create(model="claude-haiku-4-5", max_tokens=9, messages=user("Hi"))),
    ]:
        any_stack.sim.request("PATCH", f"/control/credentials/{name}", {"state": "invalid"})
        try:
            error = raised(kind, lambda: call(client))  # noqa: B023
        finally:
            any_stack.sim.request("PATCH", f"/control/credentials/{name}", {"state": "ok"})
        assert error.status_code == 502 and error.response.headers["x-keyward-reason"] == "provider_credential_rejected"
    any_stack.settled(key_id)
    any_stack.recover()


def test_the_sdks_retry_of_a_provider_error_succeeds_and_is_paid_once(any_stack):
    """Left to its defaults the SDK retries a 500 with a new request; both stand in the chain, one of them costs."""
    key_id, token = any_stack.new_key("1.00")
    any_stack.sim.fault("status=500", provider="openai")
    client, sent = sync_openai(any_stack, token)
    assert client.chat.completions.create(model="gpt-4o", messages=user("Hi")).choices and len(sent) == 2
    true, charged, ends = any_stack.books(key_id)
    assert charged == true > 0 and sorted(end["status"] for end in ends) == [200, 500]


def test_a_stream_left_early_by_the_sdk_settles(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client, _ = sync_openai(any_stack, token)
    with client.chat.completions.create(model="gpt-4o-mini", messages=user("[[sim tokens=900 pace_ms=20]]"), stream=True) as stream:
        for _, _ in zip(range(3), stream):
            pass
    wait_for("the provider saw it", lambda: any_stack.calls_of(key_id)[0]["ended"] == "client_gone")
    _, charged, ends = any_stack.books(key_id)
    assert charged > 0 and [end["outcome"] for end in ends] == ["cut"]
