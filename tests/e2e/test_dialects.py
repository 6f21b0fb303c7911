"""The promise: whatever SDK an application uses, it reaches every provider, and what is answered means the same. One table (dialects.py)
is run by each SDK against each provider through the whole system, and straight to the simulator where that speaks the SDK's dialect."""

import asyncio
import base64
import json
import time

import anthropic
import openai
import pydantic
import pytest
from anthropic.types import message_create_params
from dialects import (
    FOREIGN_CALL,
    PNG,
    SCENARIOS,
    TOOLS,
    At,
    Meaning,
    Node,
    Person,
    Scenario,
    anthropic_client,
    anthropic_python,
    functions,
    google,
    headers,
    kind,
    langchain,
    llama_index,
    openai_client,
    openai_python,
)
from harness import Stack, call, wait_for
from vendor_types import GenerateContent, unknown

# Real-looking, known to this file and its simulator alone.
CREDENTIALS = [
    {"id": "google", "provider": "gemini", "secret": "AIzaSyB7mXkQ2vTn9LrWc5JdHs8PfZy3GuEa1Ko"},
    {"id": "azure", "provider": "azure", "secret": "5e8a1c7d2f904b36a9c8e1d7f0b24a63"},
    {"id": "groq", "provider": "compatible", "secret": "gsk_Vt8KpN3xWq6LzRc1HmJd5YfB9SgTa2Eu", "at": "groq"},
    {"id": "openai", "provider": "openai", "secret": "sk-proj-Zx4NvK8mQt1WpLs7RdHc3YgJ9BfTe5Au"},
    {"id": "claude", "provider": "anthropic", "secret": "sk-ant-api03-Lm9QwXt4VzKp2NrHc7JdYs5BgE"},
]
SECRET = {given["id"]: given["secret"] for given in CREDENTIALS}
DEPLOYMENTS = "2024-10-21"
# What is asked for through Keyward, the name at the provider, and whose credential that takes.
TARGETS = {
    "openai": ("gpt-4o-mini", "gpt-4o-mini", "openai"),
    "claude": ("claude-haiku-4-5", "claude-haiku-4-5", "claude"),
    "gemini-2.5": ("gemini-2.5-flash", "gemini-2.5-flash", "google"),
    "gemini-3": ("gemini-3.1-pro-preview", "gemini-3.1-pro-preview", "google"),
    "azure": ("azure/gpt-4o-mini", "gpt-4o-mini", "azure"),
    "azure-deployments": ("azure-deployments/gpt-4o-mini", "gpt-4o-mini", "azure"),
    "groq": ("groq/llama-3.3-70b-versatile", "llama-3.3-70b-versatile", "groq"),
}
DRIVERS = {"openai": openai_python, "openai-node": None, "anthropic": anthropic_python, "langchain": langchain, "llama-index": llama_index}
# Where the simulator speaks an SDK's own dialect.
OWN = {
    "openai": ("openai", "azure", "azure-deployments", "groq"),
    "openai-node": ("openai", "azure", "azure-deployments", "groq"),
    "anthropic": ("claude",),
    "langchain": ("openai", "azure", "groq"),
    "llama-index": ("openai", "azure", "groq"),
    "google": ("gemini-2.5", "gemini-3"),
}
PEOPLE = Person(name="the calm hill", age=7)


def user(text):
    return [{"role": "user", "content": text}]


class Everybody(Stack):
    """Every provider, and Azure twice: as it is now, and with deployments in its paths."""

    def start_envoy(self):
        # The price table has Azure's prices of a region, the simulator the global ones.
        price = {"input": "0.15", "cache_read": "0.075", "output": "0.60", "context": 128_000, "max_output": 16_384, "reasoning": False}
        settings = {"url": self.sim.api, "host": "acme.openai.azure.com", "prices": {"gpt-4o-mini": price}}
        self.admin("PUT", "/v1/providers/azure", settings)
        self.admin("PUT", "/v1/providers/azure-deployments", settings | {"dialect": "azure", "api_version": DEPLOYMENTS})
        made = self.admin("POST", "/v1/credentials", {"provider": "azure-deployments", "secret": SECRET["azure"], "label": "azure-deployments"})
        self.credential_ids["azure-deployments"] = made["id"]
        self.render_options = ("--provider", f"azure-deployments={self.sim.api}")
        super().start_envoy()

    def at(self, token):
        return At(f"{self.base}/v1", self.base, token)

    def direct(self, target):
        """The simulator itself."""
        path = "/openai/v1" if target in ("azure", "groq") else "/v1"
        return At(self.sim.api + path, self.sim.api, SECRET[TARGETS[target][2]], DEPLOYMENTS if target == "azure-deployments" else None)

    def usable_again(self, target):
        """What a provider's errors made of its credential is forgotten, and Envoy has heard so."""
        name = target if target.startswith("azure") else TARGETS[target][2]
        self.admin("POST", f"/v1/credentials/{self.credential_ids[name]}/reset")
        wait_for(f"{target}'s credential", lambda: self.chat(self.spare, model=TARGETS[target][0], max_tokens=5)[0] == 200, 5)


@pytest.fixture(scope="module")
def stack():
    with Everybody(credentials=CREDENTIALS, concurrency=2) as everybody:
        _, everybody.spare = everybody.new_key()
        yield everybody


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    node = Node(tmp_path_factory.mktemp("node"))
    yield DRIVERS | {"openai-node": node, "google": google}
    node.close()


@pytest.fixture(scope="module")
def keys(stack):
    """The key of each driver and target: its id and token. `ends` is how what it asks for ends: whole, refused or broken."""
    made = {}

    def key(driver, target, ends="whole"):
        if (driver, target, ends) not in made:
            made[driver, target, ends] = stack.new_key("10.00")
        return made[driver, target, ends]

    key.made = made
    return key


MESSAGES = pydantic.TypeAdapter(message_create_params.MessageCreateParams)
# The types are of Anthropic's version 2026-10-21, which takes no temperature; requests go under 2023-06-01, which does.
OLDER = {".temperature", ".top_p"}


@pytest.fixture(autouse=True)
def clean(stack, request):
    """Nothing that must not leave has left, and what reached a provider is what its own client could have sent."""
    seq, violations = stack.last_seq(), stack.sim.totals()["violation_count"]
    yield
    totals = stack.sim.totals()
    assert totals["violation_count"] == violations, totals["violations"][-5:]
    for sent in stack.sim.ledger(seq):
        if sent["provider"] in ("anthropic", "gemini"):
            status, _, body = call(stack.sim.control, "GET", f"/control/bodies?seq={sent['seq']}")
            # The simulator keeps none of more than 64 KiB.
            if status == 200:
                validate(sent, json.loads(body))
            else:
                assert request.function in (test_a_prompt_that_is_too_long, test_a_body_of_five_mebibytes_with_images_is_translated)


def validate(sent, body):
    """Parses a body with the types of the provider's own SDK, where nothing may be that they don't have."""
    if sent["provider"] == "anthropic":
        assert set(unknown(body, MESSAGES.validate_json(json.dumps(body), strict=True))) <= OLDER, body
    else:
        GenerateContent.model_validate_json(json.dumps(body), strict=True)


def check(answers, scenario):
    assert [answer.meaning for answer in answers] == list(scenario.expected)
    for answer in answers:
        assert answer.usage and min(answer.usage) > 0
        assert not scenario.form or answer.parsed == PEOPLE
        if scenario.stream and answer.meaning.text:
            assert answer.pieces > 1, "in pieces, as it was made"


# --- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_sdk_gets_the_same_meaning_from_every_provider(stack, drivers, keys, driver, target, scenario):
    _, token = keys(driver, target)
    check(drivers[driver](stack.at(token), TARGETS[target][0], scenario), scenario)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
@pytest.mark.parametrize(("driver", "target"), [(driver, target) for driver, targets in OWN.items() for target in targets])
def test_the_provider_itself_means_the_same(stack, drivers, driver, target, scenario):
    check(drivers[driver](stack.direct(target), TARGETS[target][1], scenario), scenario)


@pytest.mark.parametrize("target", TARGETS)
def test_usage_is_in_a_stream_only_where_it_was_asked_for(stack, keys, target):
    _, token = keys("openai", target)
    client = openai_client(stack.at(token))
    chunks = list(client.chat.completions.create(model=TARGETS[target][0], messages=user("[[sim tokens=9 per_delta=1]]"), stream=True))
    assert not any(chunk.usage for chunk in chunks)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    # Azure tells of its filters in a chunk without choices, which comes first and bears no id.
    said = [chunk for at, chunk in enumerate(chunks) if at or chunk.choices]
    assert all(chunk.object == "chat.completion.chunk" and chunk.choices for chunk in said)
    assert len({chunk.id for chunk in said}) == 1



# --- what a provider puts beside its answer, and wants back ------------------------------------------------------------

TWO_CALLS = next(scenario for scenario in SCENARIOS if scenario.name == "two calls and their results")
TWO_CALLS_STREAMED = next(scenario for scenario in SCENARIOS if scenario.name == "two calls of a stream and their results")


@pytest.mark.parametrize("scenario", [TWO_CALLS, TWO_CALLS_STREAMED], ids=str)
@pytest.mark.parametrize(("driver", "keeps"), [("openai", True), ("openai-node", True), ("anthropic", True), ("langchain", False), ("llama-index", None)])
def test_geminis_signature_makes_the_round_trip(stack, drivers, keys, driver, keeps, scenario):
    """The first call of a turn bears the signature of the thought that led to it, and Gemini 3 wants it back. Clients that echo the
    message bring it; what LangChain makes of a message does not have it, and then Google's word for that stands in."""
    _, token = keys(driver, "gemini-3")
    seq = stack.last_seq()
    check(drivers[driver](stack.at(token), TARGETS["gemini-3"][0], scenario), scenario)
    first, second = [json.loads(stack.sim.body(request["seq"])) for request in stack.sim.ledger(seq)]
    assert "thoughtSignature" not in json.dumps(first)
    signed = [part.get("thoughtSignature") for content in second["contents"] for part in content["parts"] if "functionCall" in part]
    assert len(signed) == 2 and signed[0] and signed[1] is None
    if keeps is not None:
        assert (signed[0] != FOREIGN_CALL) == keeps


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_claudes_thoughts_make_the_round_trip_through_the_openai_sdk(stack, keys, stream):
    """Claude signs what it thought before a call, and refuses the results of the call without it."""
    _, token = keys("openai", "claude")
    tools, said = functions(["weather"]), user('[[sim reasoning=30 tool=weather args={"city":"Rom"}]] Hi')
    ask = {"model": "claude-sonnet-4-5", "tools": tools, "max_tokens": 4000, "reasoning_effort": "low"}
    seq = stack.last_seq()
    client = openai_client(stack.at(token))
    if stream:
        with client.chat.completions.stream(**ask, messages=said) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**ask, messages=said).choices[0].message
    assert len(message.reasoning_content.split()) == 30
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "fog"}
    last = client.chat.completions.create(**ask, messages=[*said, message, result])
    assert last.choices[0].finish_reason == "stop" and last.choices[0].message.content
    thought = json.loads(stack.sim.body(stack.sim.ledger(seq)[-1]["seq"]))["messages"][1]["content"][0]
    assert thought["type"] == "thinking" and thought["thinking"] == message.reasoning_content and thought["signature"]


# --- errors ------------------------------------------------------------------------------------------------------------


def fails(drivers, driver, at, model, scenario):
    """What the SDK raises."""
    with pytest.raises(Exception) as raised:
        drivers[driver](at, model, scenario)
    assert not isinstance(raised.value, (AssertionError, KeyError, AttributeError, TypeError)), raised.value
    return raised.value


# The script, the exception through Keyward, and straight from the provider. Of what Keyward's own key is, the caller hears nothing.
ERRORS = {
    "rate limit": ("status=429 retry_after=1", "RateLimitError", "RateLimitError"),
    "server error": ("status=500", "InternalServerError", "InternalServerError"),
    "bad request": ("status=400", "BadRequestError", "BadRequestError"),
    "rejected credential": ("status=401", "InternalServerError", "AuthenticationError"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("target", ["openai", "claude", "gemini-2.5", "azure", "groq"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_sdk_raises_its_own_exception(stack, drivers, keys, driver, target, error):
    script, ours, theirs = ERRORS[error]
    scenario = Scenario("error", f"[[sim {script}]] Hi", ())
    key_id, token = keys(driver, target, "refused")
    try:
        raised = fails(drivers, driver, stack.at(token), TARGETS[target][0], scenario)
        assert kind(raised) == ours
        seen = headers(raised)
        assert seen["x-keyward-request-id"].startswith("req_")
        if error == "rejected credential":
            assert raised.status_code == 502 and seen["x-keyward-reason"] == "provider_credential_rejected"
        if error == "rate limit":
            assert int(seen["retry-after"]) >= 1
        if target in OWN[driver]:
            assert kind(fails(drivers, driver, stack.direct(target), TARGETS[target][1], scenario)) == theirs
    finally:
        if error in ("rate limit", "rejected credential"):
            stack.settled(key_id)
            stack.usable_again(target)


@pytest.mark.parametrize(("driver", "target", "expected"), [
    ("openai", "openai", "BadRequestError"), ("openai", "azure", "BadRequestError"), ("openai", "groq", "BadRequestError"),
    ("openai", "claude", "filter"), ("openai", "gemini-2.5", "filter"), ("anthropic", "openai", "BadRequestError"),
    ("anthropic", "claude", "filter"), ("anthropic", "gemini-2.5", "filter")])
def test_a_prompt_that_a_provider_will_not_answer(stack, drivers, keys, driver, target, expected):
    """Some say so by an error, some by an answer without content: both are what the SDK has for it."""
    _, token = keys(driver, target)
    scenario = Scenario("blocked", "[[sim block=SAFETY]] Hi", ())
    if expected == "filter":
        answers = drivers[driver](stack.at(token), TARGETS[target][0], scenario)
        assert [answer.meaning for answer in answers] == [Meaning("", finish="filter")]
    else:
        raised = fails(drivers, driver, stack.at(token), TARGETS[target][0], scenario)
        assert kind(raised) == expected and ("filter" in str(raised) or "flagged" in str(raised))


@pytest.mark.parametrize(("target", "reason"), [("openai", "content_filter"), ("azure", "content_filter"), ("groq", "content_filter"),
                                                ("claude", "refusal"), ("gemini-2.5", "SAFETY"), ("gemini-3", "PROHIBITED_CONTENT")])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("driver", ["openai-node", "anthropic"])
def test_an_answer_that_a_filter_ends(stack, drivers, keys, driver, stream, target, reason):
    scenario = Scenario("filtered", f"[[sim tokens=3 finish={reason}]]", (Meaning("the calm hill", finish="filter"),), stream=stream)
    _, token = keys(driver, target)
    answers = drivers[driver](stack.at(token), TARGETS[target][0], scenario)
    assert [answer.meaning for answer in answers] == list(scenario.expected)


@pytest.mark.parametrize(("driver", "target", "words"), [("openai", "openai", 130_000), ("openai", "claude", 210_000), ("anthropic", "claude", 210_000),
                                                         ("anthropic", "openai", 130_000), ("openai", "gemini-2.5", 1_100_000)])
def test_a_prompt_that_is_too_long(stack, drivers, driver, target, words):
    key_id, token = stack.new_key()
    raised = fails(drivers, driver, stack.at(token), TARGETS[target][0], Scenario("long", "a " * words, ()))
    assert kind(raised) == "BadRequestError" and "token" in str(raised)
    assert stack.books(key_id)[:2] == (0, 0)


@pytest.mark.parametrize("target", ["openai", "claude", "gemini-2.5", "azure", "groq"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_an_error_in_the_middle_of_a_stream_is_raised(stack, drivers, keys, driver, target):
    _, token = keys(driver, target, "broken")
    scenario = Scenario("midstream", "[[sim tokens=30 error_midstream=1]] Hi", (), stream=True)
    raised = fails(drivers, driver, stack.at(token), TARGETS[target][0], scenario)
    assert kind(raised) in ("APIError", "APIStatusError", "InternalServerError"), repr(raised)


@pytest.mark.parametrize("target", ["openai", "claude", "gemini-2.5", "azure", "groq"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_stream_that_is_cut_is_no_answer(stack, drivers, keys, driver, target):
    _, token = keys(driver, target, "broken")
    scenario = Scenario("cut", "[[sim tokens=90 per_delta=1 cut_after_bytes=900]] Hi", (), stream=True)
    fails(drivers, driver, stack.at(token), TARGETS[target][0], scenario)


# --- what can't be asked of a provider ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "field", "more"), [
    ("claude", "n", {"n": 2}),
    ("claude", "logprobs", {"logprobs": True}),
    ("claude", "seed", {"seed": 7}),
    ("claude", "presence_penalty", {"presence_penalty": 0.5}),
    ("claude", "temperature", {"temperature": 1.5}),
    ("claude", "logit_bias", {"logit_bias": {"1": 1}}),
    ("gemini-2.5", "parallel_tool_calls", {"parallel_tool_calls": False, "tools": functions(["time"])}),
    ("gemini-3", "reasoning_effort", {"reasoning_effort": "none"}),
])
def test_what_a_provider_can_not_do_is_refused_by_name(stack, target, field, more):
    key_id, token = stack.new_key("1.00")
    seq = stack.last_seq()
    client = openai_client(stack.at(token))
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=TARGETS[target][0], messages=user("Hi"), **more)
    assert raised.value.code == "bad_request" and f'"{field}"' in raised.value.message
    assert raised.value.response.headers["x-keyward-reason"] == "bad_request"
    assert stack.last_seq() == seq and stack.books(key_id)[:2] == (0, 0)


@pytest.mark.parametrize(("target", "field", "more"), [
    ("openai", "top_k", {"top_k": 5}),
    ("gemini-2.5", "tool_choice.disable_parallel_tool_use",
     {"tools": [{"name": "time", "input_schema": TOOLS["time"]}], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}})])
def test_what_only_claude_can_do_is_refused_by_name(stack, target, field, more):
    key_id, token = stack.new_key("1.00")
    seq = stack.last_seq()
    client = anthropic_client(stack.at(token))
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(model=TARGETS[target][0], max_tokens=9, messages=user("Hi"), extra_body=more)
    assert f'"{field}"' in str(raised.value) and raised.value.response.headers["x-keyward-reason"] == "bad_request"
    assert stack.last_seq() == seq and stack.books(key_id)[:2] == (0, 0)


@pytest.mark.parametrize("target", ["claude", "gemini-2.5"])
def test_a_body_of_five_mebibytes_with_images_is_translated(stack, target):
    key_id, token = stack.new_key("10.00")
    picture = base64.b64encode(base64.b64decode(PNG) + bytes(2_000_000)).decode()
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}] * 2
    body = {"model": TARGETS[target][0], "max_tokens": 50,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "[[sim echo=1]] Which?"}]}]}
    assert len(json.dumps(body)) > 5 << 20
    status, _, data = call(stack.base, "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {token}"})
    assert status == 200, data
    assert json.loads(data)["choices"][0]["message"]["content"] == "Which?"
    true, charged, _ = stack.books(key_id)
    assert charged == true > 0


@pytest.mark.parametrize("target", ["claude", "gemini-2.5"])
def test_a_body_of_too_many_values_is_refused(stack, target):
    """Each value of a body that is translated is kept track of: their number is bounded, whatever the bytes are."""
    key_id, token = stack.new_key("10.00")
    seq = stack.last_seq()
    body = {"model": TARGETS[target][0], "max_tokens": 50, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 70_000}]}
    status, seen, data = call(stack.base, "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {token}"})
    assert (status, seen["x-keyward-reason"]) == (400, "bad_request"), data
    assert json.loads(data)["error"]["code"] == "bad_request" and "too many parts" in json.loads(data)["error"]["message"]
    assert stack.last_seq() == seq and stack.books(key_id)[:2] == (0, 0)


# --- many at once ------------------------------------------------------------------------------------------------------


def test_fifty_translated_streams_side_by_side_pass_as_they_are_made(stack):
    """No part of any of them is kept back: its first words are here before the provider has sent its last."""
    key_id, token = stack.new_key("10.00")
    words = 12

    async def one(client, number):
        model = TARGETS["claude" if number % 2 else "gemini-2.5"][0]
        raw = await client.chat.completions.with_raw_response.create(
            model=model, messages=user(f"[[sim tokens={words} per_delta=1 pace_ms=200]] {number}"), stream=True, stream_options={"include_usage": True})
        seen, text, finish, usage = [], "", None, None
        async for chunk in raw.parse():
            usage = chunk.usage or usage
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if choice.delta.content:
                    seen.append(time.time_ns() // 1000)
                    text += choice.delta.content
        assert (len(text.split()), finish, usage.completion_tokens) == (words, "stop", words)
        return raw.headers["x-keyward-request-id"], seen

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{stack.base}/v1", api_key=token, max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(50)))

    streams = asyncio.run(all_of_them())
    true, charged, ends = stack.books(key_id)
    assert charged == true > 0 and len(ends) == 50
    ended = {request["client_request_id"]: request["ended_unix_us"] for request in stack.calls_of(key_id)}
    for request_id, seen in streams:
        assert len(seen) == words, "each as it was sent, none put together"
        assert seen[0] < ended[request_id], "before the provider had sent its last"


# --- last: what all of this cost ---------------------------------------------------------------------------------------


def test_every_key_paid_exactly_what_the_providers_charged(stack, keys):
    """Whoever was asked, and however it was translated: of what was turned away nothing, and of what broke off, where nobody told how
    much it was, no less."""
    assert keys.made
    for (driver, target, ends), (key_id, _) in keys.made.items():
        true, charged, _ = stack.books(key_id)
        if ends == "whole":
            assert charged == true > 0, (driver, target)
        elif ends == "refused":
            assert charged == true == 0, (driver, target)
        else:
            assert charged >= true > 0, (driver, target)
