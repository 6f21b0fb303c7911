"""The oracle's other dialects against the official SDKs, with nothing in between: what Gemini, Azure, servers like OpenAI's and
Claude's stricter rules say must be what their own clients understand, and the same script must mean the same to all of them."""

import base64
import json

import anthropic
import openai
import pytest
from google import genai
from google.genai import errors, types
from harness import Simulator, alone, call, wait_for
from pydantic import BaseModel

# Real-looking, known to this file and its simulator alone.
CREDENTIALS = [
    {"id": "google", "provider": "gemini", "secret": "AIzaSyD4kVnT8rQw2LsXy6HcBf9MdJ1GpZr5Yt"},
    {"id": "azure", "provider": "azure", "secret": "7c1f0e9b2d3a48c5a6e4b8d7f9012c3e"},
    {"id": "groq", "provider": "compatible", "secret": "gsk_Hw6VbQ9xMz2JrTf7CkLp4SnYd8EgKa3V"},
    {"id": "openai", "provider": "openai", "secret": "sk-proj-Gp5RkW1vYt7NzQa3PdLx8HgC6JeBm2Fu"},
    {"id": "claude", "provider": "anthropic", "secret": "sk-ant-api03-Rd5WzLp3XvN7qKt9BhMy2JcSaE"},
]
SECRET = {given["id"]: given["secret"] for given in CREDENTIALS}
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"],
          "additionalProperties": False}
BASES = {"/openai/v1": "llama-3.3-70b-versatile", "/v1": "deepseek-chat", "/api/v1": "meta-llama/llama-3.3-70b-instruct"}


class Person(BaseModel):
    name: str
    age: int


class Oracle(Simulator):
    """The simulator with a client of every kind, and its books since the last look."""

    def gemini(self, secret=SECRET["google"], **options):
        return genai.Client(api_key=secret, http_options=types.HttpOptions(base_url=self.api, **options))

    def azure(self, **options):
        return openai.AzureOpenAI(azure_endpoint=self.api, api_key=SECRET["azure"], api_version="2024-10-21", max_retries=0, **options)

    def openai(self, base="/v1", credential="openai"):
        return openai.OpenAI(base_url=self.api + base, api_key=SECRET[credential], max_retries=0)

    def claude(self, **options):
        return anthropic.Anthropic(base_url=self.api, api_key=SECRET["claude"], max_retries=0, **options)

    def old_claude(self):
        """As SDKs of before 2026-10-21 ask: another version, the key in its own header."""
        return anthropic.Anthropic(base_url=self.api, api_key=SECRET["claude"], max_retries=0,
                                   default_headers={"anthropic-version": "2023-06-01"})

    def last(self):
        wait_for("the end of the last request", lambda: self.ledger()[-1]["ended"])
        return self.ledger()[-1]

    def asked(self):
        """The body of the newest request."""
        return json.loads(self.body(self.ledger()[-1]["seq"]))


sim, clean = alone(Oracle, CREDENTIALS)


def refused(kind, ask, *args, **more):
    with pytest.raises(kind) as caught:
        ask(*args, **more)
    return caught.value


# --- Gemini ------------------------------------------------------------------------------------------------------------


def config(**more):
    return types.GenerateContentConfig(**more)


def tools(*names):
    return [types.Tool(function_declarations=[types.FunctionDeclaration(name=name, parameters_json_schema=CITY) for name in names])]


@pytest.mark.parametrize("version", ["v1", "v1beta"])
def test_gemini_answers_and_is_charged(sim, version):
    client = sim.gemini(api_version=version)
    made = client.models.generate_content(model="gemini-2.5-flash", contents="[[sim tokens=12 cache_read=4]] Hello",
                                          config=config(system_instruction="Be brief", max_output_tokens=100, temperature=2))
    assert len(made.text.split()) == 12 and made.candidates[0].finish_reason == types.FinishReason.STOP
    usage = made.usage_metadata
    assert (usage.candidates_token_count, usage.cached_content_token_count, usage.thoughts_token_count) == (12, 4, None)
    assert usage.total_token_count == usage.prompt_token_count + 12
    entry = sim.last()
    assert entry["path"] == f"/{version}/models/gemini-2.5-flash:generateContent"
    assert (entry["provider"], entry["endpoint"], entry["credential"]) == ("gemini", "POST /v1beta/models/{id}:generateContent", "google")
    assert entry["cost_nanodollars"] == (usage.prompt_token_count - 4) * 300 + 4 * 30 + 12 * 2500
    assert (entry["model"], entry["response_id"]) == ("gemini-2.5-flash", made.response_id) and made.model_version == "gemini-2.5-flash"


def test_gemini_streams_whole_calls_and_its_usage_with_every_piece(sim):
    client = sim.gemini()
    ask = {"model": "gemini-2.5-flash", "contents": '[[sim tokens=7 per_delta=2 unicode=1 tool=weather args={"city":"Zürich"} tool=time args={"city":"Rom"}]]'}
    pieces = list(client.models.generate_content_stream(**ask, config=config(tools=tools("weather", "time"))))
    calls = [part.function_call for piece in pieces for part in piece.candidates[0].content.parts if part.function_call]
    assert [(one.name, one.args) for one in calls] == [("weather", {"city": "Zürich"}), ("time", {"city": "Rom"})]
    assert all(piece.usage_metadata.prompt_token_count for piece in pieces)
    assert [piece.candidates[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].candidates[0].finish_reason == "STOP"
    assert pieces[-1].usage_metadata.candidates_token_count == sim.last()["completion_tokens"]
    headers = {"x-goog-api-key": SECRET["google"]}
    body = {"contents": [{"parts": [{"text": "[[sim tokens=3 per_delta=1]]"}]}]}
    status, head, data = call(sim.api, "POST", "/v1beta/models/gemini-2.5-flash:streamGenerateContent", body, headers)
    assert status == 200 and head["content-type"] == "application/json" and len(json.loads(data)) == 4, "a list without alt=sse"


def test_gemini_thinks_signs_and_wants_its_signature_back(sim):
    client = sim.gemini()
    ask = '[[sim reasoning=30 tool=weather args={"city":"Paris"} tool=time]]'
    setup = config(tools=tools("weather", "time"), thinking_config=types.ThinkingConfig(include_thoughts=True, thinking_level="LOW"))
    first = client.models.generate_content(model="gemini-3-pro-preview", contents=ask, config=setup)
    thought, one, two = first.candidates[0].content.parts
    assert thought.thought and len(thought.text.split()) == 30 and one.thought_signature and not two.thought_signature
    assert first.usage_metadata.thoughts_token_count == 30
    visible = first.usage_metadata.candidates_token_count
    assert sim.last()["completion_tokens"] == 30 + visible
    assert sim.last()["cost_nanodollars"] == first.usage_metadata.prompt_token_count * 2000 + (30 + visible) * 12_000
    answers = [types.Part.from_function_response(name=name, response={"result": "fog"}) for name in ("weather", "time")]
    history = [types.Content(role="user", parts=[types.Part(text=ask)]), first.candidates[0].content, types.Content(role="user", parts=answers)]
    second = client.models.generate_content(model="gemini-3-pro-preview", contents=history, config=setup)
    assert second.text and not second.function_calls
    history[1] = types.Content(role="model", parts=[types.Part(function_call=one.function_call), types.Part(function_call=two.function_call)])
    error = refused(errors.ClientError, client.models.generate_content, model="gemini-3-pro-preview", contents=history, config=setup)
    assert error.code == 400 and error.message.startswith("Function call is missing a thought_signature in functionCall parts.")
    older = client.models.generate_content(model="gemini-2.5-flash", contents=history, config=config(tools=tools("weather", "time")))
    assert older.text, "models of before take it without"
    one_answer = [*history[:2], types.Content(role="user", parts=answers[:1])]
    error = refused(errors.ClientError, client.models.generate_content, model="gemini-2.5-flash", contents=one_answer)
    assert "number of function response parts is equal to the number of function call parts" in error.message


def test_gemini_calls_what_it_must_and_nothing_else(sim):
    client = sim.gemini()

    def names(**calling):
        setup = config(tools=tools("weather", "time"), tool_config=types.ToolConfig(function_calling_config=types.FunctionCallingConfig(**calling)))
        made = client.models.generate_content(model="gemini-2.5-flash", contents="[[sim tool=weather]]", config=setup)
        return [one.name for one in made.function_calls or []]

    assert names(mode="AUTO") == ["weather"] and names(mode="NONE") == []
    assert names(mode="ANY", allowed_function_names=["time"]) == ["time"]
    error = refused(errors.ClientError, names, mode="AUTO", allowed_function_names=["time"])
    assert "only when function calling mode is ANY" in error.message


def test_gemini_writes_json_stops_and_sees(sim):
    client = sim.gemini()
    for schema in ({"response_schema": Person}, {"response_json_schema": PERSON}):
        made = client.models.generate_content(model="gemini-2.5-flash", contents="Who?", config=config(response_mime_type="application/json", **schema))
        assert Person.model_validate_json(made.text)
    image = types.Part.from_bytes(data=PNG, mime_type="image/png")
    made = client.models.generate_content(model="gemini-2.5-flash", contents=["[[sim echo=1]] one two three", image], config=config(stop_sequences=[" three"]))
    assert (made.text, made.candidates[0].finish_reason) == ("one two", "STOP")
    assert base64.urlsafe_b64decode(sim.asked()["contents"][0]["parts"][1]["inlineData"]["data"]) == PNG
    cut = client.models.generate_content(model="gemini-2.5-flash", contents="[[sim tokens=50]]", config=config(max_output_tokens=5, candidate_count=2))
    assert [one.finish_reason for one in cut.candidates] == ["MAX_TOKENS"] * 2 and cut.usage_metadata.candidates_token_count == 10


def test_gemini_blocks(sim):
    client = sim.gemini()
    made = client.models.generate_content(model="gemini-2.5-flash", contents="[[sim block=PROHIBITED_CONTENT]]")
    assert made.prompt_feedback.block_reason == types.BlockedReason.PROHIBITED_CONTENT and not made.candidates
    made = client.models.generate_content(model="gemini-2.5-flash", contents="[[sim finish=RECITATION tokens=3]]")
    assert made.candidates[0].finish_reason == types.FinishReason.RECITATION
    pieces = list(client.models.generate_content_stream(model="gemini-2.5-flash", contents="[[sim finish=SAFETY tokens=0]]"))
    assert pieces[-1].candidates[0].finish_reason == types.FinishReason.SAFETY and not pieces[-1].candidates[0].content


def test_gemini_counts_embeds_and_lists(sim):
    client = sim.gemini()
    counted = client.models.count_tokens(model="gemini-2.5-flash", contents="How many tokens is this?").total_tokens
    made = client.models.generate_content(model="gemini-2.5-flash", contents="How many tokens is this?")
    assert made.usage_metadata.prompt_token_count == counted
    both = client.models.embed_content(model="gemini-embedding-001", contents=["a", "b c"], config=types.EmbedContentConfig(output_dimensionality=8))
    assert [len(one.values) for one in both.embeddings] == [8, 8] and sim.last()["cost_nanodollars"] == 3 * 150
    assert sim.last()["endpoint"] == "POST /v1beta/models/{id}:batchEmbedContents"
    body = {"content": {"parts": [{"text": "a"}]}}
    status, _, data = call(sim.api, "POST", f"/v1beta/models/gemini-embedding-001:embedContent?key={SECRET['google']}", body)
    assert status == 200 and len(json.loads(data)["embedding"]["values"]) == 3072
    assert SECRET["google"] not in json.dumps(sim.ledger())
    listed = {model.name: model for model in client.models.list()}
    assert listed["models/gemini-2.5-pro"].input_token_limit == 1_048_576 and "models/gemini-embedding-001" in listed
    assert client.models.get(model="gemini-2.5-pro").output_token_limit == 65_536


@pytest.mark.parametrize("words, kind, code, status", [
    ("status=429", errors.ClientError, 429, "RESOURCE_EXHAUSTED"), ("error=per_day", errors.ClientError, 429, "RESOURCE_EXHAUSTED"),
    ("status=403 wrapped=1", errors.ClientError, 403, "PERMISSION_DENIED"), ("error=API_KEY_INVALID", errors.ClientError, 400, "INVALID_ARGUMENT"),
    ("status=500", errors.ServerError, 500, "INTERNAL"), ("status=503 wrapped=1", errors.ServerError, 503, "UNAVAILABLE"),
    ("status=404", errors.ClientError, 404, "NOT_FOUND"), ("status=400", errors.ClientError, 400, "INVALID_ARGUMENT"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_gemini_errors_are_the_sdks_own(sim, words, kind, code, status, stream):
    client = sim.gemini()
    sim.fault(words)
    ask = client.models.generate_content_stream if stream else client.models.generate_content
    error = refused(kind, lambda: list(ask(model="gemini-2.5-flash", contents="Hi")))
    assert (error.code, error.status) == (code, status)
    assert not any("ratelimit" in name or name == "retry-after" for name in error.response.headers)
    if code == 429:
        quota, _, retry = error.details["error"]["details"]
        assert ("PerDay" in quota["violations"][0]["quotaId"]) == ("per_day" in words) and retry["retryDelay"] == "22s"


def test_gemini_refuses_what_it_does_not_know(sim):
    headers = {"x-goog-api-key": SECRET["google"]}

    def ask(body, path="gemini-2.5-flash:generateContent", head=headers):
        status, _, data = call(sim.api, "POST", f"/v1beta/models/{path}", {"contents": [{"parts": [{"text": "a"}]}], **body}, head)
        return status, json.loads(data)["error"]

    status, error = ask({"contents": [{"foo": 1, "parts": [{"text": "a"}]}], "max_tokens": 5})
    assert (status, error["status"]) == (400, "INVALID_ARGUMENT")
    fields = error["details"][0]["fieldViolations"]
    assert fields[0] == {"field": "contents[0]", "description": "Invalid JSON payload received. Unknown name \"foo\" at 'contents[0]': Cannot find field."}
    assert "Unknown name \"max_tokens\": Cannot find field." in error["message"]
    assert ask({"contents": [{"role": "assistant", "parts": [{"text": "a"}]}]})[1]["message"] == "Please use a valid role: user, model."
    assert ask({}, "gemini-none:generateContent")[0] == 404 == ask({}, "gemini-embedding-001:generateContent")[0]
    assert ask({"cachedContent": "cachedContents/a"})[0] == 403 and sim.last()["referenced"][0]["kind"] == "cached_content"
    assert ask({}, head={}) [0] == 403
    sim.request("PATCH", "/control/credentials/google", {"state": "invalid"})
    try:
        status, error = ask({})
        assert status == 400 and error["details"][0]["reason"] == "API_KEY_INVALID"
    finally:
        sim.request("PATCH", "/control/credentials/google", {"state": "ok"})


def test_gemini_streams_break_in_the_middle(sim):
    client = sim.gemini()
    error = refused(errors.APIError, lambda: list(client.models.generate_content_stream(model="gemini-2.5-flash", contents="[[sim error_midstream=1]]")))
    assert error.code == 503 and sim.last()["ended"] == "fault"


# --- Azure -------------------------------------------------------------------------------------------------------------


def user(text):
    return [{"role": "user", "content": text}]


def functions(*names):
    return [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in names]


def test_azure_serves_deployments_and_its_newer_paths(sim):
    for client, path in ((sim.azure(), "/openai/deployments/gpt-4o/chat/completions"), (sim.openai("/openai/v1", "azure"), "/openai/v1/chat/completions")):
        made = client.chat.completions.create(model="gpt-4o", messages=user("[[sim tokens=6]] Hi"))
        assert (made.usage.completion_tokens, made.model, made.choices[0].finish_reason) == (6, "gpt-4o-2024-08-06", "stop")
        assert made.prompt_filter_results[0]["prompt_index"] == 0 and not made.choices[0].content_filter_results["hate"]["filtered"]
        entry = sim.last()
        assert (entry["path"], entry["provider"], entry["credential"], entry["model"]) == (path, "azure", "azure", "gpt-4o")
        assert entry["cost_nanodollars"] == made.usage.prompt_tokens * 2500 + 6 * 10_000
    made = sim.azure(azure_deployment="gpt-4o-mini").chat.completions.create(model="whatever", messages=user("Hi"))
    assert made.model == "gpt-4o-mini-2024-07-18", "the path decides"
    made = sim.azure().embeddings.create(model="text-embedding-3-small", input="Hi")
    assert len(made.data[0].embedding) == 1536 and sim.last()["endpoint"] == "POST /v1/embeddings"
    raw = sim.azure().chat.completions.with_raw_response.create(model="gpt-4o", messages=user("Hi"))
    told = {name for name in raw.headers if name.startswith("x-ratelimit")}
    assert told == {f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining") for of in ("requests", "tokens")}


def test_azure_streams_begin_without_choices(sim):
    chunks = list(sim.azure().chat.completions.create(model="gpt-4o", messages=user("[[sim tokens=5]]"), stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices == [] and chunks[0].prompt_filter_results and chunks[0].model == ""
    assert all(chunk.choices[0].content_filter_results for chunk in chunks[1:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5


def test_azure_errors_are_its_own(sim):
    client = sim.azure()
    error = refused(openai.NotFoundError, client.chat.completions.create, model="gpt-none", messages=user("Hi"))
    assert error.code == "DeploymentNotFound"
    error = refused(openai.BadRequestError, client.chat.completions.create, model="gpt-4o", messages=user("[[sim block=SAFETY]]"))
    assert (error.code, error.body["innererror"]["code"]) == ("content_filter", "ResponsibleAIPolicyViolation")
    error = refused(openai.RateLimitError, client.chat.completions.create, model="gpt-4o", messages=user("[[sim status=429 retry_after=3]]"))
    assert error.code == "429" and error.response.headers["retry-after"] == "3"
    path = "/openai/deployments/gpt-4o/chat/completions"
    status, _, data = call(sim.api, "POST", path, {"messages": user("Hi")}, {"api-key": SECRET["azure"]})
    assert (status, json.loads(data)) == (404, {"error": {"code": "404", "message": "Resource not found"}})
    sim.request("PATCH", "/control/credentials/azure", {"state": "invalid"})
    try:
        assert refused(openai.AuthenticationError, client.chat.completions.create, model="gpt-4o", messages=user("Hi")).code == "401"
    finally:
        sim.request("PATCH", "/control/credentials/azure", {"state": "ok"})


# --- servers that speak OpenAI's chat ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_compatible_servers_answer_under_their_own_paths(sim, base):
    client = sim.openai(base, "groq")
    made = client.chat.completions.create(model=BASES[base], messages=user("[[sim tokens=6]] Hi"))
    assert made.usage.completion_tokens == 6 and made.choices[0].finish_reason == "stop"
    entry = sim.last()
    assert (entry["provider"], entry["path"], entry["credential"]) == ("compatible", f"{base}/chat/completions", "groq")
    assert entry["cost_nanodollars"] > 0
    bare = list(client.chat.completions.create(model=BASES[base], messages=user("Hi"), stream=True))
    assert not any(chunk.usage for chunk in bare)
    chunks = list(client.chat.completions.create(model=BASES[base], messages=user("[[sim tokens=6]]"), stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [6]
    assert bool(chunks[-1].choices) == (base == "/v1"), "some send usage with the last choice"
    for name, value in {"store": False, "service_tier": "auto", "metadata": {}, "prediction": {}, "modalities": ["text"]}.items():
        error = refused(openai.APIStatusError, client.chat.completions.create, model=BASES[base], messages=user("Hi"), extra_body={name: value})
        assert error.status_code == (422 if base == "/v1" else 400) and name in json.dumps(error.body)
    assert BASES[base] in [model.id for model in client.models.list()]
    assert client.models.retrieve(BASES[base]).id == BASES[base]
    refused(openai.NotFoundError, client.chat.completions.create, model="none", messages=user("Hi"))
    assert len(client.embeddings.create(model="nomic-embed-text", input="Hi").data[0].embedding) == 768


def test_compatible_servers_show_what_they_think(sim):
    client = sim.openai("/v1", "groq")
    made = client.chat.completions.create(model="deepseek-chat", messages=user("[[sim tokens=3 reasoning=9]]"))
    assert len(made.choices[0].message.reasoning_content.split()) == 9 and made.usage.completion_tokens == 12 == sim.last()["completion_tokens"]
    chunks = list(client.chat.completions.create(model="deepseek-chat", messages=user("[[sim tokens=3 reasoning=9]]"), stream=True))
    thought = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert thought == made.choices[0].message.reasoning_content
    sim.fault("error=insufficient_quota")
    refused(openai.RateLimitError, client.chat.completions.create, model="deepseek-chat", messages=user("Hi"))
    sim.request("PATCH", "/control/credentials/groq", {"state": "insufficient_quota"})
    try:
        assert refused(openai.APIStatusError, client.chat.completions.create, model="deepseek-chat", messages=user("Hi")).status_code == 402
    finally:
        sim.request("PATCH", "/control/credentials/groq", {"state": "ok"})


# --- Claude's stricter rules -------------------------------------------------------------------------------------------


def typed(made):
    """The same object, if it has all that its type demands: the SDKs themselves let everything pass."""
    type(made).model_validate(made.to_dict(mode="json"))
    return made


def test_claude_writes_json_that_fits(sim):
    form = {"format": {"type": "json_schema", "schema": PERSON}}
    made = typed(sim.claude().messages.create(model="claude-haiku-4-5", max_tokens=100, messages=user("Who?"), output_config=form))
    assert Person.model_validate_json(made.content[0].text) and made.stop_reason == "end_turn"
    open_ended = {"format": {"type": "json_schema", "schema": {"type": "object", "properties": {}}}}
    error = refused(anthropic.BadRequestError, sim.claude().messages.create, model="claude-haiku-4-5", max_tokens=100, messages=user("Who?"),
                    output_config=open_ended)
    assert "'additionalProperties' must be explicitly set to false" in str(error)


@pytest.mark.parametrize("model, thinking", [("claude-haiku-4-5", {"type": "enabled", "budget_tokens": 1024}), ("claude-opus-4-7", {"type": "adaptive"})])
@pytest.mark.parametrize("stream", [False, True])
def test_claude_thinks_and_wants_its_thoughts_back(sim, model, thinking, stream):
    client = sim.claude()
    offered = [{"name": "weather", "input_schema": CITY}]
    ask = {"model": model, "max_tokens": 2000, "thinking": thinking, "tools": offered}
    messages = user('[[sim reasoning=30 tokens=4 tool=weather args={"city":"Paris"}]] Hi')
    if stream:
        with client.messages.stream(**ask, messages=messages) as events:
            kinds = [event.delta.type for event in events if event.type == "content_block_delta"]
            first = typed(events.get_final_message())
        assert {"thinking_delta", "signature_delta", "text_delta", "input_json_delta"} == set(kinds)
    else:
        first = typed(client.messages.create(**ask, messages=messages))
    thought, text, used = first.content
    assert len(thought.thinking.split()) == 30 and thought.signature and len(text.text.split()) == 4 and used.input == {"city": "Paris"}
    assert first.usage.output_tokens == sim.last()["completion_tokens"] and sim.last()["reasoning_tokens"] == 30
    answer = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used.id, "content": "fog"}]}
    back = [block.to_dict(mode="json") for block in first.content]
    if stream:
        used_back = back[2]
        back[2] = {name: used_back[name] for name in ("type", "id", "name", "input")}
        back[1] = {"type": "text", "text": text.text}
    second = client.messages.create(**ask, messages=[*messages, {"role": "assistant", "content": back}, answer])
    assert second.stop_reason == "end_turn"
    forged = [{**back[0], "thinking": "something else"}, *back[1:]]
    error = refused(anthropic.BadRequestError, client.messages.create, **ask, messages=[*messages, {"role": "assistant", "content": forged}, answer])
    assert "Invalid `signature` in `thinking` block" in str(error)


def test_claude_refuses_what_its_versions_and_models_do_not_take(sim):
    def ask(client, model="claude-haiku-4-5", **more):
        return client.messages.create(model=model, max_tokens=2000, messages=more.pop("messages", user("Hi")), **more)

    def said(client, **more):
        return refused(anthropic.BadRequestError, ask, client, **more).body["error"]["message"]

    new, old = sim.claude(), sim.old_claude()
    assert said(new, extra_body={"temperature": 1}) == "temperature: Extra inputs are not permitted"
    assert ask(old, extra_body={"temperature": 0.5}).stop_reason == "end_turn"
    assert said(old, model="claude-opus-4-7", extra_body={"temperature": 0.5}) == "`temperature` is deprecated for this model."
    assert ask(old, model="claude-opus-4-7", extra_body={"temperature": 1}).stop_reason == "end_turn"
    assert said(new, extra_body={"foo": 1}) == "foo: Extra inputs are not permitted"
    assert said(new, extra_body={"metadata": {"foo": 1}}) == "metadata.foo: Extra inputs are not permitted"
    assert "greater than or equal to 1024" in said(new, thinking={"type": "enabled", "budget_tokens": 10})
    assert "does not support the effort parameter" in said(new, output_config={"effort": "low"})
    assert ask(new, model="claude-opus-4-6", output_config={"effort": "max"}).stop_reason == "end_turn"
    assert said(new, tools=[{"name": "a b", "input_schema": CITY}]).endswith("String should match pattern '^[a-zA-Z0-9_-]{1,128}$'")
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PNG).decode()}}
    assert ask(new, messages=[{"role": "user", "content": [picture, {"type": "text", "text": "?"}]}]).stop_reason == "end_turn"
    blocked = ask(new, messages=user("[[sim block=SAFETY]]"))
    assert (blocked.stop_reason, blocked.content) == ("refusal", [])


# --- the same script in every dialect ----------------------------------------------------------------------------------


def spoken(sim, text, offered=(), stop=(), schema=None, one=False):
    """What each dialect answers to one script: text, calls with their arguments, output tokens."""
    said = {}
    strict = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    chat = {name: value for name, value in {
        "tools": functions(*offered) or None, "stop": list(stop) or None, "response_format": schema and strict,
        "parallel_tool_calls": False if one else None}.items() if value is not None}
    clients = {"openai": (sim.openai(), "gpt-4o"), "azure": (sim.azure(), "gpt-4o"),
               **{base: (sim.openai(base, "groq"), model) for base, model in BASES.items()}}
    for name, (client, model) in clients.items():
        made = client.chat.completions.create(model=model, messages=user(text), **chat)
        message = made.choices[0].message
        calls = [(one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls or []]
        said[name] = (message.content or "", calls, made.usage.completion_tokens, made.choices[0].finish_reason)
    claude = {name: value for name, value in {
        "tools": [{"name": name, "input_schema": CITY} for name in offered], "stop_sequences": list(stop),
        "output_config": schema and {"format": {"type": "json_schema", "schema": schema}},
        "tool_choice": one and {"type": "auto", "disable_parallel_tool_use": True}}.items() if value}
    made = sim.claude().messages.create(model="claude-haiku-4-5", max_tokens=1000, messages=user(text), **claude)
    words = "".join(block.text for block in made.content if block.type == "text")
    calls = [(block.name, block.input) for block in made.content if block.type == "tool_use"]
    reason = {"end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length"}[made.stop_reason]
    said["claude"] = (words, calls, made.usage.output_tokens, reason)
    setup = config(tools=tools(*offered) if offered else None, stop_sequences=list(stop) or None,
                   **({"response_mime_type": "application/json", "response_json_schema": schema} if schema else {}))
    google = sim.gemini()  # A client that nobody holds closes itself.
    made = google.models.generate_content(model="gemini-2.5-flash", contents=text, config=setup)
    parts = made.candidates[0].content.parts
    calls = [(part.function_call.name, part.function_call.args) for part in parts if part.function_call]
    calls = calls[:1] if one else calls
    reason = "tool_calls" if calls else {"STOP": "stop", "MAX_TOKENS": "length"}[made.candidates[0].finish_reason]
    said["gemini"] = ("".join(part.text or "" for part in parts), calls, made.usage_metadata.candidates_token_count, reason)
    return said


@pytest.mark.parametrize("text, more, expected", [
    ("[[sim tokens=9]]", {}, None),
    ("[[sim tokens=9 unicode=1]]", {}, None),
    ("[[sim echo=1]] Grüezi, 日本 😀", {}, "Grüezi, 日本 😀"),
    ("[[sim echo=1]] one two END three", {"stop": ["END", "three"]}, "one two "),
    ('[[sim tokens=2 tool=weather args={"city":"Zürich"} tool=time args={"city":"Rom"}]]', {"offered": ["time", "weather"]}, None),
    ("[[sim]] Who? JSON", {"schema": PERSON}, '{"age":7,"name":"the calm hill"}'),
])
def test_a_script_means_the_same_in_every_dialect(sim, text, more, expected):
    said = spoken(sim, text, **more)
    assert len(said) == 7 and len({json.dumps(one, sort_keys=True) for one in said.values()}) == 1, said
    if expected is not None:
        assert said["claude"][0] == expected
    assert bool(said["claude"][1]) == ("offered" in more)
    tokens = {entry["completion_tokens"] for entry in sim.ledger()}
    assert tokens == {said["claude"][2]}, "the books say the same"


def test_calls_come_one_at_a_time_where_that_can_be_asked(sim):
    said = spoken(sim, "[[sim tool=weather tool=time]]", offered=["weather", "time"], one=True)
    assert all([name for name, _ in calls] == ["weather"] for _, calls, _, _ in said.values()), said


def test_other_credentials_and_virtual_keys_are_violations_wherever_they_stand(sim):
    virtual, other = "vk_0123456789abcdef", SECRET["openai"]
    body = {"contents": [{"parts": [{"text": "a"}]}]}
    path = "/v1beta/models/gemini-2.5-flash:generateContent"
    deployment = "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"
    for target, headers in ((path, {"x-goog-api-key": "K"}), (f"{path}?key=K", {}), (deployment, {"api-key": "K"}), (deployment, {"authorization": "Bearer K"}),
                            ("/openai/v1/chat/completions", {"authorization": "Bearer K"})):
        for secret, kinds in ((virtual, {"virtual_key", "unknown_secret"}), (other, {"foreign_secret"})):
            sim.reset()
            filled = {name: value.replace("K", secret) for name, value in headers.items()}
            status, _, _ = call(sim.api, "POST", target.replace("key=K", f"key={secret}"), body, filled)
            assert status in (400, 401), (target, headers)
            assert {what["what"].split(":")[0] for what in sim.totals()["violations"]} == kinds, (target, headers)
    sim.reset()
