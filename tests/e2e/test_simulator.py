"""The oracle against the official SDKs, with nothing in between: what it says must be what they understand, what it charges
what the list prices give, and what one credential keeps every credential of its account must see."""

import base64
import io
import math
import wave

import anthropic
import openai
import pytest
from harness import Simulator, alone, call, wait_for

# Three credentials: two of one account, one of another. Real-looking, known to this file and its simulator alone.
CREDENTIALS = [
    {"id": "ours", "provider": "openai", "secret": "sk-proj-Zr4VnT8kQw2LsXy6HcBf9MdJ1Gp", "account": "shared"},
    {"id": "theirs", "provider": "openai", "secret": "sk-proj-Bm7RkW1vYt5NzQa3PdLx8HgC6Je", "account": "shared"},
    {"id": "strangers", "provider": "openai", "secret": "sk-proj-Xc9LwD2fUs4KbVh7TjMn5RqY8Ga"},
    {"id": "claude", "provider": "anthropic", "secret": "sk-ant-api03-Lp3XvN7qKd5RzWt9BhMy2JcS"},
]
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


class Oracle(Simulator):
    """The simulator with clients, and its books since the last look."""

    def client(self, credential="ours", **options):
        secret = next(given["secret"] for given in CREDENTIALS if given["id"] == credential)
        if credential == "claude":
            return anthropic.Anthropic(base_url=self.api, api_key=secret, max_retries=0, **options)
        return openai.OpenAI(base_url=self.api + "/v1", api_key=secret, max_retries=0, **options)

    def last(self):
        """The entry of the newest request, ended."""
        wait_for("the end of the last request", lambda: self.ledger()[-1]["ended"])
        return self.ledger()[-1]

    def cost(self):
        return self.last()["cost_nanodollars"]


sim, clean = alone(Oracle, CREDENTIALS)


@pytest.fixture
def client(sim):
    return sim.client()


def refused(kind, ask, *args, **more):
    """The error of a request that must be refused."""
    with pytest.raises(kind) as caught:
        ask(*args, **more)
    return caught.value


def typed(made):
    """The same object, if it has all that its type demands: the SDKs themselves let everything pass."""
    type(made).model_validate(made.to_dict(mode="json"))
    return made


def spoken(seconds, rate=16_000):
    """A WAV file of silence, with a name."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(b"\0\0" * round(seconds * rate))
    return ("said.wav", file.getvalue())


# --- responses ---------------------------------------------------------------------------------------------------------


def test_a_response_is_typed_charged_and_kept(sim, client):
    made = typed(client.responses.create(model="gpt-4o-mini", input="[[sim tokens=12]] Hello", instructions="Be brief", metadata={"k": "v"}))
    assert (made.status, made.object, made.model) == ("completed", "response", "gpt-4o-mini-2024-07-18")
    assert made.usage.output_tokens == 12 and made.usage.input_tokens_details.cached_tokens == 0
    assert made.usage.total_tokens == made.usage.input_tokens + 12 and len(made.output_text.split()) == 12
    entry = sim.last()
    assert entry["cost_nanodollars"] == made.usage.input_tokens * 150 + 12 * 600
    assert (entry["endpoint"], entry["store"], entry["response_id"]) == ("POST /v1/responses", "absent", made.id)
    assert {"kind": "response", "id": made.id} in entry["created"]
    again = typed(client.responses.retrieve(made.id))
    assert again.output_text == made.output_text and again.metadata == {"k": "v"} and again.usage == made.usage
    items = [typed(item) for item in client.responses.input_items.list(made.id).data]
    assert [item.content[0].text for item in items] == ["[[sim tokens=12]] Hello"]
    client.responses.delete(made.id)
    gone = refused(openai.NotFoundError, client.responses.retrieve, made.id)
    assert gone.body["message"] == f"Response with id '{made.id}' not found."


@pytest.mark.parametrize("model", ["gpt-4o", "o4-mini"])
def test_every_event_has_what_its_type_demands(client, model):
    for words in ("tokens=5", 'tokens=3 tool=weather args={"city":"Paris"}'):
        for event in client.responses.create(model=model, input=f"[[sim {words}]]", tools=[WEATHER], stream=True):
            typed(event)


def test_a_streamed_response_adds_up(sim, client):
    with client.responses.stream(model="gpt-4o", input="[[sim tokens=10 per_delta=1]] Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds.count("response.output_text.delta") == 10 and kinds[-1] == "response.completed"
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text == client.responses.retrieve(final.id).output_text
    assert sim.ledger()[0]["cost_nanodollars"] == final.usage.input_tokens * 2500 + final.usage.output_tokens * 10_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_answered(client, stream):
    ask = {"model": "gpt-4o", "tools": [WEATHER], "input": '[[sim tool=weather args={"city":"Zürich"}]]'}
    if stream:
        with client.responses.stream(**ask) as events:
            deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
            first = events.get_final_response()
        assert "".join(deltas) == '{"city":"Zürich"}'
    else:
        first = typed(client.responses.create(**ask))
    asked = first.output[0]
    assert (asked.type, asked.name, asked.arguments) == ("function_call", "weather", '{"city":"Zürich"}')
    output = {"type": "function_call_output", "call_id": asked.call_id, "output": "fog"}
    second = typed(client.responses.create(model="gpt-4o", tools=[WEATHER], previous_response_id=first.id, input=[output]))
    assert second.output_text and second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens, "what went before is paid again"
    stray = refused(openai.BadRequestError, client.responses.create, model="gpt-4o", input=[{**output, "call_id": "call_none"}])
    assert stray.body["message"] == "No tool call found for function call output with call_id call_none."


def test_reasoning_is_an_item_and_is_paid(sim, client):
    made = typed(client.responses.create(model="gpt-5-mini", input="[[sim tokens=5 reasoning=40]]", include=["reasoning.encrypted_content"]))
    thought, said = made.output
    assert (thought.type, said.type) == ("reasoning", "message") and thought.encrypted_content
    assert made.usage.output_tokens_details.reasoning_tokens == 40 and made.usage.output_tokens == 45
    assert sim.cost() == made.usage.input_tokens * 250 + 45 * 2000
    used_up = typed(client.responses.create(model="o4-mini", input="[[sim tokens=5 reasoning=40]]", max_output_tokens=20))
    assert (used_up.status, used_up.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.type for item in used_up.output] == ["reasoning"] and used_up.usage.output_tokens == 20


def test_a_limit_ends_a_stream_as_incomplete(sim, client):
    events = [typed(event) for event in client.responses.create(model="gpt-4o", input="[[sim tokens=100]]", max_output_tokens=30, stream=True)]
    assert events[-1].type == "response.incomplete" and events[-1].response.usage.output_tokens == 30
    assert events[-2].item.status == "incomplete"
    assert sim.last()["completion_tokens"] == 30


def test_a_response_can_fail(sim, client):
    failed = typed(client.responses.create(model="gpt-4o", input="[[sim failed=1 tokens=20]]"))
    assert (failed.status, failed.error.code, failed.output) == ("failed", "server_error", [])
    events = [typed(event) for event in client.responses.create(model="gpt-4o", input="[[sim failed=1 tokens=20]]", stream=True)]
    assert events[-1].type == "response.failed" and events[-1].response.error.code == "server_error"
    assert events[-1].response.usage.output_tokens == sim.last()["completion_tokens"] == 10
    events = [typed(event) for event in client.responses.create(model="gpt-4o", input="[[sim error_midstream=1 tokens=20]]", stream=True)]
    assert (events[-1].type, events[-1].code) == ("error", "server_error")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert sim.last()["ended"] == "fault"


def test_what_is_not_stored_can_not_be_named(sim, client):
    made = client.responses.create(model="o4-mini", input="Hi", store=False)
    assert sim.last()["store"] == "false" and sim.last()["created"] == []
    refused(openai.NotFoundError, client.responses.retrieve, made.id)
    error = refused(openai.BadRequestError, client.responses.create, model="o4-mini", input="More", previous_response_id=made.id)
    assert (error.code, error.param) == ("previous_response_not_found", "previous_response_id")
    assert error.body["message"] == f"Previous response with id '{made.id}' not found."
    named = [{"type": "item_reference", "id": made.output[1].id}, {"role": "user", "content": "More"}]
    error = refused(openai.NotFoundError, client.responses.create, model="o4-mini", input=named)
    assert error.body["message"].startswith(f"Item with id '{made.output[1].id}' not found. Items are not persisted")
    kept = [reference for entry in sim.ledger() for reference in entry["referenced"]]
    assert len(kept) == 3 and all(reference["created_seq"] is None for reference in kept)


def test_an_account_is_one_whoever_asks(sim):
    ours, theirs, strangers = sim.client("ours"), sim.client("theirs"), sim.client("strangers")
    made = ours.responses.create(model="gpt-4o", input="[[sim tokens=3]] secret")
    made_by = sim.last()["seq"]
    # The other credential of the account reads, lists, continues and names what isn't its own.
    assert theirs.responses.retrieve(made.id).output_text == made.output_text
    assert theirs.responses.input_items.list(made.id).data[0].content[0].text.endswith("secret")
    theirs.responses.create(model="gpt-4o", input="Go on", previous_response_id=made.id)
    used = sim.last()["referenced"]
    assert used == [{"kind": "response", "id": made.id, "how": "used", "created_seq": made_by, "created_by": "ours"}]
    item = {"type": "item_reference", "id": made.output[0].id}
    theirs.responses.create(model="gpt-4o", input=[item, {"role": "user", "content": "Go on"}])
    assert sim.last()["referenced"][0]["kind"] == "item" and sim.last()["account"] == "shared"
    # Another account gets to see nothing, and the same answer as for what never was.
    refused(openai.NotFoundError, strangers.responses.retrieve, made.id)
    refused(openai.NotFoundError, strangers.responses.delete, made.id)
    refused(openai.BadRequestError, strangers.responses.create, model="gpt-4o", input="a", previous_response_id=made.id)
    kinds = [(shown["kind"], shown["credential"]) for shown in sim.get("/control/objects")["accounts"]["shared"]]
    assert kinds.count(("response", "ours")) == 1 and kinds.count(("response", "theirs")) == 2


def test_a_chain_pays_for_all_that_went_before(sim, client):
    first = client.responses.create(model="gpt-4o", input="[[sim tokens=50]] " + "word " * 100)
    second = client.responses.create(model="gpt-4o", input="[[sim tokens=5]] more", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens + 50
    told = client.responses.create(model="gpt-4o", input="[[sim tokens=5]] more", instructions="be brief " * 200)
    after = client.responses.create(model="gpt-4o", input="more", previous_response_id=told.id)
    assert after.usage.input_tokens < 100 < told.usage.input_tokens, "instructions are not handed on"
    history = client.responses.input_items.list(second.id, order="asc").data
    assert [item.role for item in history] == ["user", "assistant", "user"]
    page = client.responses.input_items.list(second.id, limit=2)
    assert page.has_more and len(list(page)) == 3, "the SDK follows the pages"


def test_work_in_the_background_is_waited_for_or_cancelled(client):
    queued = typed(client.responses.create(model="gpt-4o", input="[[sim tokens=4]]", background=True))
    assert queued.status == "queued" and queued.usage is None
    done = wait_for("the background response", lambda: (got := client.responses.retrieve(queued.id)).status == "completed" and got)
    assert done.usage.output_tokens == 4
    long = client.responses.create(model="gpt-4o", input="[[sim tokens=4 first_ms=600000]]", background=True)
    assert client.responses.retrieve(long.id).status == "queued"
    assert client.responses.cancel(long.id).status == "cancelled" == client.responses.retrieve(long.id).status
    plain = client.responses.create(model="gpt-4o", input="Hi")
    error = refused(openai.BadRequestError, client.responses.cancel, plain.id)
    assert error.body["message"] == "Cannot cancel a synchronous response."


@pytest.mark.parametrize("more, kind", [
    ({"conversation": "conv_0123"}, "conversation"),
    ({"prompt": {"id": "pmpt_0123"}}, "prompt"),
    ({"tools": [{"type": "file_search", "vector_store_ids": ["vs_0123"]}]}, "vector_store"),
    ({"tools": [{"type": "code_interpreter", "container": "cntr_0123"}]}, "container"),
])
def test_objects_of_other_kinds_are_written_down_and_unknown(sim, client, more, kind):
    refused(openai.NotFoundError, client.responses.create, model="gpt-4o", input="Hi", **more)
    [named] = sim.last()["referenced"]
    assert named["kind"] == kind and named["created_seq"] is None


# --- files and stored chats --------------------------------------------------------------------------------------------


def test_a_file_is_kept_for_the_account_and_read_in_prompts(sim, client):
    text = b"one two three four " * 50
    file = typed(client.files.create(file=("notes.txt", text), purpose="user_data"))
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(text), "notes.txt", "user_data", "processed")
    entry = sim.last()
    assert entry["created"] == [{"kind": "file", "id": file.id}] and entry["cost_nanodollars"] == 0
    theirs = sim.client("theirs")
    assert [typed(row).id for row in theirs.files.list()] == [file.id]
    assert sim.last()["referenced"][0]["how"] == "listed"
    content = [{"type": "input_file", "file_id": file.id}, {"type": "input_text", "text": "Sum up"}]
    answer = theirs.responses.create(model="gpt-4o", input=[{"role": "user", "content": content}])
    assert answer.usage.input_tokens > 200
    assert sim.last()["referenced"] == [{"kind": "file", "id": file.id, "how": "used", "created_seq": entry["seq"], "created_by": "ours"}]
    part = {"type": "file", "file": {"file_id": file.id}}
    chat = theirs.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": [part]}])
    assert chat.usage.prompt_tokens > 200 and sim.last()["referenced"][0]["id"] == file.id
    kept = refused(openai.BadRequestError, client.files.content, file.id)
    assert kept.body["message"] == "Not allowed to download files of purpose: user_data"
    strangers = sim.client("strangers")
    missing = refused(openai.NotFoundError, strangers.files.retrieve, file.id)
    assert (missing.body["message"], missing.param) == (f"No such File object: {file.id}", "id")
    refused(openai.NotFoundError, strangers.responses.create, model="gpt-4o", input=[{"role": "user", "content": content}])
    assert list(strangers.files.list()) == []
    assert typed(theirs.files.delete(file.id)).deleted
    refused(openai.NotFoundError, client.files.retrieve, file.id)


def test_a_file_comes_back_byte_for_byte(client):
    data = bytes(range(256)) * 700 + b"\r\n--not the end\r\n"
    file = client.files.create(file=("data.jsonl", data), purpose="batch")
    assert client.files.content(file.id).read() == data
    assert client.files.retrieve(file.id).bytes == len(data)
    error = refused(openai.BadRequestError, client.files.create, file=("a", b"a"), purpose="fun")
    assert error.param == "purpose"


def test_chats_are_stored_only_when_told(sim, client):
    def chat(**more):
        return client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "[[sim tokens=3]] Hi"}], **more)

    plain, never = chat(), chat(store=False)
    assert [entry["store"] for entry in sim.ledger()] == ["absent", "false"]
    for made in (plain, never):
        refused(openai.NotFoundError, client.chat.completions.retrieve, made.id)
    kept = chat(store=True, metadata={"k": "v"})
    assert sim.last()["store"] == "true" and sim.last()["created"] == [{"kind": "chat_completion", "id": kept.id}]
    theirs = sim.client("theirs")
    again = typed(theirs.chat.completions.retrieve(kept.id))
    assert again.choices == kept.choices and again.usage == kept.usage and again.metadata == {"k": "v"}
    assert [row.id for row in theirs.chat.completions.list()] == [kept.id]
    assert theirs.chat.completions.messages.list(kept.id).data[0].content == "[[sim tokens=3]] Hi"
    assert theirs.chat.completions.update(kept.id, metadata={"k": "w"}).metadata == {"k": "w"}
    assert client.chat.completions.retrieve(kept.id).metadata == {"k": "w"}
    refused(openai.NotFoundError, sim.client("strangers").chat.completions.retrieve, kept.id)
    assert typed(client.chat.completions.delete(kept.id)).deleted
    assert list(client.chat.completions.list()) == []


def test_a_streamed_chat_is_stored_as_it_was_streamed(client):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    ask = {"model": "gpt-4o", "messages": [{"role": "user", "content": "[[sim tool=weather args={} ]]"}], "tools": [tool], "store": True}
    with client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion()
    stored = client.chat.completions.retrieve(final.id)
    assert stored.choices[0].message.tool_calls[0].id == final.choices[0].message.tool_calls[0].id


# --- the others --------------------------------------------------------------------------------------------------------


def test_embeddings_in_every_form(sim, client):
    one = typed(client.embeddings.create(model="text-embedding-3-small", input="Hello there"))
    vector = one.data[0].embedding
    assert len(vector) == 1536 and math.isclose(sum(x * x for x in vector), 1, abs_tol=1e-4)
    assert one.usage.prompt_tokens == one.usage.total_tokens and sim.cost() == one.usage.prompt_tokens * 20
    plain = client.embeddings.create(model="text-embedding-3-small", input="Hello there", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(vector, abs=1e-6)
    batch = client.embeddings.create(model="text-embedding-3-large", input=["a", "b c"], dimensions=256)
    assert [len(row.embedding) for row in batch.data] == [256, 256] and [row.index for row in batch.data] == [0, 1]
    assert batch.usage.prompt_tokens == 3 and sim.cost() == 3 * 130
    tokens = client.embeddings.create(model="text-embedding-3-small", input=[[1, 2, 3], [4]])
    assert tokens.usage.prompt_tokens == 4 and len(tokens.data) == 2
    empty = refused(openai.BadRequestError, client.embeddings.create, model="text-embedding-3-small", input="")
    assert "'$.input' is invalid" in empty.body["message"]
    refused(openai.PermissionDeniedError, client.embeddings.create, model="gpt-4o", input="a")


def test_completions_of_before_chat(sim, client):
    made = typed(client.completions.create(model="gpt-3.5-turbo-instruct", prompt="[[sim tokens=5]] Say", n=2, best_of=3, echo=True, max_tokens=9))
    assert len(made.choices) == 2 and all(choice.text.startswith("[[sim tokens=5]] Say") for choice in made.choices)
    assert made.usage.completion_tokens == 15 and made.choices[0].finish_reason == "stop"
    assert sim.cost() == made.usage.prompt_tokens * 1500 + 15 * 2000
    short = client.completions.create(model="gpt-3.5-turbo-instruct", prompt=["[[sim tokens=50]]", "[[sim tokens=50]]"])
    assert [choice.finish_reason for choice in short.choices] == ["length"] * 2 and short.usage.completion_tokens == 32
    ask = {"model": "gpt-3.5-turbo-instruct", "prompt": "[[sim tokens=7]]", "stream": True}
    chunks = list(client.completions.create(**ask, stream_options={"include_usage": True}))
    assert len("".join(chunk.choices[0].text for chunk in chunks[:-1]).split()) == 7
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 7
    error = refused(openai.NotFoundError, client.completions.create, model="gpt-4o", prompt="a")
    assert error.body["message"].startswith("This is a chat model and not supported in the v1/completions endpoint.")
    error = refused(openai.NotFoundError, client.chat.completions.create, model="gpt-3.5-turbo-instruct",
                    messages=[{"role": "user", "content": "a"}])
    assert error.body["message"].startswith("This is not a chat model")


def test_moderations_cost_nothing(sim, client):
    made = typed(client.moderations.create(input=["fine", "I could kill for a pizza"]))
    assert [result.flagged for result in made.results] == [False, True] and made.results[1].categories.violence
    picture = {"type": "image_url", "image_url": {"url": "https://images.invalid/a.png"}}
    both = typed(client.moderations.create(model="omni-moderation-latest", input=[{"type": "text", "text": "fine"}, picture]))
    assert both.results[0].category_applied_input_types.violence == ["text", "image"]
    assert sim.totals()["overall"]["cost_nanodollars"] == 0 and sim.last()["prompt_tokens"] == 1


def test_pictures_by_the_piece_and_by_the_token(sim, client):
    made = typed(client.images.generate(model="dall-e-3", prompt="A lake", size="1792x1024", quality="hd", response_format="b64_json"))
    assert base64.b64decode(made.data[0].b64_json).startswith(b"\x89PNG") and made.data[0].revised_prompt == "A lake"
    assert sim.cost() == 120_000_000 and sim.last()["images"] == 1
    cheap = client.images.generate(prompt="A lake", n=3, size="512x512")
    assert len(cheap.data) == 3 and cheap.data[0].url and sim.cost() == 54_000_000
    painted = typed(client.images.generate(model="gpt-image-1", prompt="A lake", size="1024x1024", quality="medium"))
    assert (painted.usage.output_tokens, painted.quality, painted.size) == (1056, "medium", "1024x1024")
    assert sim.cost() == painted.usage.input_tokens * 5_000 + 1056 * 40_000
    assert sim.last()["image_tokens"] == 1056
    ask = {"model": "gpt-image-1", "prompt": "A lake", "size": "1024x1024", "quality": "low", "stream": True, "partial_images": 1}
    events = [typed(event) for event in client.images.generate(**ask)]
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert events[-1].usage.output_tokens == 372 == sim.last()["completion_tokens"]
    many = refused(openai.BadRequestError, client.images.generate, model="dall-e-3", prompt="a", n=2)
    assert (many.param, many.code) == ("n", "integer_above_max_value")


@pytest.mark.parametrize("kind, content_type, begins", [
    ("mp3", "audio/mpeg", b"\xff\xf3"), ("wav", "audio/wav", b"RIFF"), ("opus", "audio/opus", b"OggS"), ("pcm", "audio/pcm", b"\0\0")])
def test_speech_is_bytes_and_paid_by_the_character(sim, client, kind, content_type, begins):
    text = "Grüezi mitenand, 日本"
    said = client.audio.speech.create(model="tts-1", voice="alloy", input=text, response_format=kind)
    assert said.response.headers["content-type"] == content_type and said.read().startswith(begins)
    assert sim.last()["characters"] == len(text) and sim.cost() == len(text) * 15_000
    client.audio.speech.create(model="tts-1-hd", voice="alloy", input=text)
    assert sim.cost() == len(text) * 30_000
    long = refused(openai.BadRequestError, client.audio.speech.create, model="tts-1", voice="alloy", input="a" * 4097)
    assert long.code == "string_above_max_length"


def test_transcriptions_by_time_and_by_token(sim, client):
    made = typed(client.audio.transcriptions.create(model="whisper-1", file=spoken(8.47), prompt="[[sim tokens=6]]"))
    assert len(made.text.split()) == 6 and (made.usage.type, made.usage.seconds) == ("duration", 9)
    assert sim.cost() == 9 * 100_000 and sim.last()["seconds"] == 9
    text = client.audio.transcriptions.create(model="whisper-1", file=spoken(1), response_format="text")
    assert isinstance(text, str) and text.endswith("\n") and sim.cost() == 100_000
    verbose = client.audio.transcriptions.create(model="whisper-1", file=spoken(61.5), response_format="verbose_json",
                                                 timestamp_granularities=["word", "segment"])
    assert (typed(verbose).duration, verbose.language, verbose.usage.seconds) == (61.5, "english", 62)
    assert verbose.segments[0].end == 61.5 and len(verbose.words) == 20
    tokens = typed(client.audio.transcriptions.create(model="gpt-4o-transcribe", file=spoken(60), prompt="[[sim tokens=20]]"))
    assert (tokens.usage.type, tokens.usage.input_token_details.audio_tokens, tokens.usage.output_tokens) == ("tokens", 600, 20)
    words = tokens.usage.input_token_details.text_tokens
    assert sim.cost() == 600 * 6_000 + words * 2_500 + 20 * 10_000 and sim.last()["audio_tokens"] == 600
    events = [typed(event) for event in client.audio.transcriptions.create(model="gpt-4o-transcribe", file=spoken(2), stream=True)]
    assert events[-1].type == "transcript.text.done" and events[-1].usage.output_tokens == 20
    assert "".join(event.delta for event in events[:-1]) == events[-1].text
    wrong = refused(openai.BadRequestError, client.audio.transcriptions.create, model="whisper-1", file=("a.wav", b"not sound"))
    assert wrong.body["message"].startswith("Invalid file format. Supported formats:")
    refused(openai.BadRequestError, client.audio.transcriptions.create, model="gpt-4o-transcribe", file=spoken(1), response_format="srt")


def test_what_is_said_can_be_heard(sim, client):
    for kind in ("wav", "mp3"):
        said = client.audio.speech.create(model="tts-1", voice="alloy", input="a" * 100, response_format=kind).read()
        client.audio.transcriptions.create(model="whisper-1", file=(f"a.{kind}", said))
        assert sim.last()["seconds"] == 6


def test_claude_counts_and_lists_for_nothing(sim):
    claude = sim.client("claude")
    messages = [{"role": "user", "content": "How many tokens is this?"}]
    counted = claude.messages.count_tokens(model="claude-haiku-4-5", messages=messages, system="Be brief")
    made = claude.messages.create(model="claude-haiku-4-5", messages=messages, system="Be brief", max_tokens=50)
    assert counted.input_tokens == made.usage.input_tokens
    names = [typed(model).id for model in claude.models.list()]
    assert "claude-haiku-4-5-20251001" in names
    assert claude.models.retrieve("claude-haiku-4-5").display_name == "Claude Haiku 4.5"
    refused(anthropic.NotFoundError, claude.models.retrieve, "claude-none")
    refused(anthropic.NotFoundError, claude.messages.count_tokens, model="claude-none", messages=messages)
    assert [entry["cost_nanodollars"] > 0 for entry in sim.ledger()] == [False, True, False, False, False, False]


def test_openai_lists_its_models(client):
    names = {typed(model).id for model in client.models.list()}
    assert {"gpt-4o-mini", "text-embedding-3-small", "whisper-1", "gpt-image-1", "gpt-3.5-turbo-instruct"} <= names
    assert client.models.retrieve("tts-1-hd").object == "model"
    refused(openai.NotFoundError, client.models.retrieve, "gpt-none")


# --- faults and books --------------------------------------------------------------------------------------------------

WORK = {
    "responses": lambda client: client.responses.create(model="gpt-4o", input="Hi"),
    "embeddings": lambda client: client.embeddings.create(model="text-embedding-3-small", input="Hi"),
    "completions": lambda client: client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Hi"),
    "moderations": lambda client: client.moderations.create(input="Hi"),
    "images": lambda client: client.images.generate(prompt="Hi"),
    "speech": lambda client: client.audio.speech.create(model="tts-1", voice="alloy", input="Hi").read(),
    "transcriptions": lambda client: client.audio.transcriptions.create(model="whisper-1", file=spoken(1)),
}


@pytest.mark.parametrize("work", WORK)
def test_faults_meet_every_kind_of_work(sim, client, work):
    sim.fault("status=429 retry_after=3")
    limited = refused(openai.RateLimitError, WORK[work], client)
    assert limited.response.headers["retry-after"] == "3" and limited.code == "rate_limit_exceeded"
    sim.fault("status=500")
    refused(openai.InternalServerError, WORK[work], client)
    sim.fault("error=insufficient_quota")
    assert refused(openai.RateLimitError, WORK[work], client).code == "insufficient_quota"
    assert sim.totals()["overall"]["cost_nanodollars"] == 0, "what is refused is free"
    sim.fault("cut_after_bytes=20")
    refused(openai.APIConnectionError, WORK[work], client)
    assert sim.last()["ended"] == "fault"
    sim.fault("first_ms=600000")
    # Where the first was gone before it was read, nothing is written down of it.
    for patience in (0.3, 5):
        refused(openai.APITimeoutError, WORK[work], client.with_options(timeout=patience))
        if not sim.get("/control/faults")["faults"]:
            break
    assert sim.last()["ended"] == "client_gone"
    before = sim.totals()["overall"]["cost_nanodollars"]
    WORK[work](client)
    assert work == "moderations" or sim.last()["cost_nanodollars"] > 0 and sim.totals()["overall"]["cost_nanodollars"] > before


def test_faults_for_what_names_no_model_name_the_endpoint(sim, client):
    made = client.responses.create(model="gpt-4o", input="Hi")
    sim.fault("status=500", endpoint="/v1/files")
    sim.fault("status=503", endpoint="GET /v1/responses/{id}")
    refused(openai.InternalServerError, client.files.create, file=("a", b"a"), purpose="batch")
    assert refused(openai.InternalServerError, client.responses.retrieve, made.id).status_code == 503
    assert client.responses.retrieve(made.id).id == made.id
    assert sim.get("/control/faults")["faults"] == []


def test_streams_break_in_the_middle(sim, client):
    ask = {"model": "gpt-3.5-turbo-instruct", "prompt": "[[sim tokens=16 error_midstream=1]]", "stream": True}
    broken = refused(openai.APIError, lambda: list(client.completions.create(**ask)))
    assert broken.body["type"] == "server_error"
    cut = {"model": "gpt-4o", "input": "[[sim tokens=200 cut_after_bytes=4000]]", "stream": True}
    with pytest.raises(Exception) as caught:
        list(client.responses.create(**cut))
    assert "incomplete chunked read" in str(caught.value)
    assert sim.last()["ended"] == "fault"


def test_the_books_tell_credentials_and_endpoints_apart(sim):
    ours, theirs = sim.client("ours"), sim.client("theirs")
    ours.embeddings.create(model="text-embedding-3-small", input="Hi")
    ours.audio.speech.create(model="tts-1", voice="alloy", input="Hello").read()
    theirs.audio.transcriptions.create(model="whisper-1", file=spoken(3))
    theirs.images.generate(prompt="Hi", n=2)
    totals = wait_for("all to have ended", lambda: (t := sim.totals())["overall"]["calls"] == 4 and t)
    mine, other = totals["credentials"]["ours"], totals["credentials"]["theirs"]
    assert mine["by_endpoint"]["POST /v1/audio/speech"] == {"calls": 1, "cost_nanodollars": 75_000}
    assert mine["characters"] == 5 and mine["cost_nanodollars"] == 75_000 + 20
    assert (other["seconds"], other["images"], other["cost_nanodollars"]) == (3, 2, 300_000 + 40_000_000)
    assert set(other["by_endpoint"]) == {"POST /v1/audio/transcriptions", "POST /v1/images/generations"}
    entries = sim.ledger()
    assert [entry["credential"] for entry in entries] == ["ours", "ours", "theirs", "theirs"]
    assert {entry["account"] for entry in entries} == {"shared"}
    assert sum(entry["cost_nanodollars"] for entry in entries) == totals["overall"]["cost_nanodollars"]


def test_wrong_keys_and_unknown_things_are_the_sdks_own_errors(sim, client):
    error = refused(openai.NotFoundError, client.responses.retrieve, "resp_none")
    assert error.body == {"message": "Response with id 'resp_none' not found.", "type": "invalid_request_error", "param": None, "code": None}
    error = refused(openai.BadRequestError, client.responses.create, model="gpt-4o", input="a", extra_body={"max_tokens": 5})
    assert (error.code, error.param) == ("unknown_parameter", "max_tokens")
    refused(openai.NotFoundError, client.responses.create, model="gpt-none", input="a")
    status, _, body = call(sim.api, "POST", "/v1/files", {"purpose": "batch"}, {"authorization": f"Bearer {CREDENTIALS[0]['secret']}"})
    assert status == 400 and b"expected multipart/form-data" in body
    sim.request("PATCH", "/control/credentials/ours", {"state": "invalid"})
    try:
        refused(openai.AuthenticationError, client.embeddings.create, model="text-embedding-3-small", input="a")
    finally:
        sim.request("PATCH", "/control/credentials/ours", {"state": "ok"})
