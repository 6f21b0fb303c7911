"""The promise: every operation that developers call every day works through the SDKs as they are, is paid exactly, and what a
provider keeps belongs to the key that made it, whoever else shares the account."""

import io
import struct

import anthropic
import openai
import pytest
from harness import CREDENTIALS, Stack, call, wait_for

STATE = {"state": True}
FILES = {"endpoints": ["*", "POST /v1/files", "GET /v1/files/*", "DELETE /v1/files/*"]}


@pytest.fixture(autouse=True)
def clean(any_stack):
    before = any_stack.sim.totals()["violation_count"]
    yield
    totals = any_stack.sim.totals()
    assert totals["violation_count"] == before, totals["violations"][-5:]


def sdk(stack, token, **options):
    return openai.OpenAI(base_url=stack.base + "/v1", api_key=token, max_retries=0, **options)


def wav(seconds, rate=8_000):
    """Silence in 16 bit PCM."""
    data = b"\0\0" * rate * seconds
    head = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVEfmt ", 16, 1, 1, rate, rate * 2, 2, 16, b"data", len(data))
    return ("sound.wav", io.BytesIO(head + data), "audio/wav")


def refused(what, code, status):
    """Runs a call that must be refused, and gives the error."""
    with pytest.raises(openai.APIStatusError) as caught:
        what()
    assert caught.value.response.headers["x-keyward-reason"] == code, caught.value.response.text
    assert caught.value.status_code == status
    return caught.value


def exactly_paid(stack, key_id):
    true, charged, ends = stack.books(key_id)
    assert charged == true > 0, ends
    return ends


# --- every operation ---------------------------------------------------------------------------------------------------

def test_responses_buffered_and_streamed(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client = sdk(any_stack, token)
    answer = client.responses.create(model="gpt-4o-mini", input="[[sim echo=1]]Hello", max_output_tokens=100)
    assert answer.output_text and answer.usage.output_tokens > 0 and answer.status == "completed"
    events = list(client.responses.create(model="gpt-5-mini", input="[[sim tokens=30 reasoning=40]]", stream=True))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens == 40
    with client.responses.stream(model="gpt-4o", input="[[sim tokens=5 cache_read=3]] as little as that") as stream:
        assert stream.get_final_response().usage.input_tokens_details.cached_tokens == 3
    incomplete = client.responses.create(model="gpt-4o-mini", input="[[sim tokens=500]]", max_output_tokens=20)
    assert incomplete.status == "incomplete" and incomplete.usage.output_tokens == 20
    failed = client.responses.create(model="gpt-4o-mini", input="[[sim failed=1]]")
    assert failed.status == "failed"
    assert len(exactly_paid(any_stack, key_id)) == 5


def test_embeddings_completions_and_moderations(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client = sdk(any_stack, token)
    vectors = client.embeddings.create(model="text-embedding-3-small", input=["one", "two"])
    assert len(vectors.data) == 2 and len(vectors.data[0].embedding) == 1536 and vectors.usage.prompt_tokens > 0
    client.embeddings.create(model="text-embedding-3-large", input=[[1, 2, 3], [4]])
    done = client.completions.create(model="gpt-3.5-turbo-instruct", prompt=["one", "two"], n=2, max_tokens=10)
    assert len(done.choices) == 4
    # No limit of its own: the provider's default of 16 is what is held and what stands in the body.
    chunks = list(client.completions.create(model="gpt-3.5-turbo-instruct", prompt="[[sim tokens=50]]", stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    judged = client.moderations.create(input="is this fine?")
    assert judged.results[0].flagged is False
    ends = exactly_paid(any_stack, key_id)
    assert [end["charge"] for end in ends if end["charge"] == 0] == [0], "moderations are free, and settled"


def test_images(any_stack):
    key_id, token = any_stack.new_key("5.00")
    client = sdk(any_stack, token)
    assert client.images.generate(model="dall-e-3", prompt="a cat").data[0].url
    client.images.generate(model="dall-e-3", prompt="a cat", size="1024x1792", quality="hd")
    assert len(client.images.generate(model="dall-e-2", prompt="a cat", n=3, size="256x256").data) == 3
    drawn = client.images.generate(model="gpt-image-1", prompt="a cat", quality="low", size="1024x1024", n=2)
    assert drawn.usage.output_tokens == 2 * 272
    events = list(client.images.generate(model="gpt-image-1", prompt="a cat", quality="medium", size="1024x1024", stream=True, partial_images=2))
    assert events[-1].usage.output_tokens == 1056 + 200
    exactly_paid(any_stack, key_id)


def test_a_budget_holds_for_the_dearest_picture(any_stack):
    key_id, token = any_stack.new_key("0.20")
    error = refused(lambda: sdk(any_stack, token).images.generate(model="gpt-image-1", prompt="a cat"), "cap_exhausted", 429)
    assert "budget" in str(error)
    sdk(any_stack, token).images.generate(model="dall-e-2", prompt="a cat", n=10, size="256x256")
    exactly_paid(any_stack, key_id)


def test_speech_and_transcription(any_stack):
    key_id, token = any_stack.new_key("1.00")
    client = sdk(any_stack, token)
    spoken = client.audio.speech.create(model="tts-1", voice="alloy", input="Grüezi mitenand – 日本 🦀")
    assert spoken.read()
    with client.audio.speech.with_streaming_response.create(model="tts-1-hd", voice="alloy", input="word " * 300) as response:
        assert sum(len(piece) for piece in response.iter_bytes()) > 10_000
    heard = client.audio.transcriptions.create(model="whisper-1", file=wav(7))
    assert heard.text and heard.usage.seconds == 7
    mp3 = spoken.read()
    client.audio.transcriptions.create(model="whisper-1", file=("speech.mp3", io.BytesIO(mp3), "audio/mpeg"))
    told = client.audio.transcriptions.create(model="gpt-4o-transcribe", file=wav(3))
    assert told.usage.type == "tokens"
    events = list(client.audio.transcriptions.create(model="gpt-4o-transcribe", file=wav(2), stream=True))
    assert events[-1].type == "transcript.text.done"
    exactly_paid(any_stack, key_id)
    # In plain text nothing tells the length: what was held is charged.
    client.audio.transcriptions.create(model="whisper-1", file=wav(2), response_format="text")
    true, charged, ends = any_stack.books(key_id)
    assert charged >= true and ends[-1]["estimated"]


def test_a_recording_whose_length_nobody_can_bound_needs_a_key_without_a_budget(any_stack):
    ogg = ("sound.ogg", io.BytesIO(b"OggS" + bytes(500)), "audio/ogg")
    _, token = any_stack.new_key("1.00")
    refused(lambda: sdk(any_stack, token).audio.transcriptions.create(model="whisper-1", file=ogg), "unbounded_input", 400)


def test_anthropic_counts_tokens_for_free(any_stack):
    key_id, token = any_stack.new_key("0.000001")
    client = anthropic.Anthropic(base_url=any_stack.base, api_key=token, max_retries=0)
    counted = client.messages.count_tokens(model="claude-haiku-4-5", messages=[{"role": "user", "content": "How many?"}])
    assert counted.input_tokens > 0
    true, charged, ends = any_stack.books(key_id)
    assert (true, charged, len(ends)) == (0, 0, 1)


@pytest.mark.parametrize("budget", ["0.0005", "0.002"])
def test_a_cap_holds_over_all_operations_at_once(any_stack, budget):
    """Whatever is asked, and however it ends: the true cost never exceeds the cap, and the key pays at least that."""
    from concurrent.futures import ThreadPoolExecutor
    key_id, token = any_stack.new_key(budget, allow=STATE)
    client = sdk(any_stack, token)

    def drain(stream):
        for _ in stream:
            pass

    asks = [
        lambda: client.responses.create(model="gpt-4o-mini", input="[[sim tokens=200]]"),
        lambda: drain(client.responses.create(model="gpt-4o-mini", input="[[sim tokens=100 cut_after_bytes=2500]]", stream=True)),
        lambda: drain(client.responses.create(model="gpt-4o-mini", input="[[sim tokens=60 no_usage=1]]", stream=True)),
        lambda: client.embeddings.create(model="text-embedding-3-small", input=["a"] * 20),
        lambda: client.completions.create(model="gpt-3.5-turbo-instruct", prompt=["x", "y"], n=2),
        lambda: client.audio.speech.create(model="tts-1", voice="alloy", input="hello"),
        lambda: client.moderations.create(input="x"),
    ]

    def run(n):
        try:
            asks[n % len(asks)]()
        except openai.OpenAIError:
            pass
        except Exception as error:  # noqa: BLE001 - a stream cut on purpose
            assert type(error).__module__.startswith("httpx"), error

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, range(70)))
    true, charged, _ = any_stack.books(key_id)
    assert 0 < true <= charged <= round(float(budget) * 1e9)


# --- models ------------------------------------------------------------------------------------------------------------

def test_models_are_what_the_key_may_use_and_nobody_is_asked(any_stack):
    key_id, token = any_stack.new_key(allow={"models": ["gpt-4o*", "claude-haiku-4-5"]})
    client, before = sdk(any_stack, token), any_stack.last_seq()
    ids = [model.id for model in client.models.list()]
    assert {"gpt-4o-mini", "claude-haiku-4-5"} < set(ids) and ids == sorted(ids)
    assert all(name.startswith("gpt-4o") or name == "claude-haiku-4-5" for name in ids), "of every provider that can be reached"
    assert {model.owned_by for model in client.models.list()} == {"openai", "anthropic"}
    assert client.models.retrieve("gpt-4o").object == "model"
    refused(lambda: client.models.retrieve("gpt-4.1"), "model_not_allowed", 403)
    assert isinstance(refused(lambda: client.models.retrieve("gpt-4o-nonesuch"), "unknown_model", 404), openai.NotFoundError)
    for base in (any_stack.base, any_stack.base + "/anthropic"):
        claude = anthropic.Anthropic(base_url=base, api_key=token, max_retries=0)
        listed = [model.id for model in claude.models.list()]
        assert listed == (ids if base == any_stack.base else ["claude-haiku-4-5"]), base
    assert claude.models.retrieve("claude-haiku-4-5").type == "model"
    assert any_stack.last_seq() == before, "the provider was asked"
    true, charged, ends = any_stack.books(key_id)
    assert (true, charged, len(ends)) == (0, 0, 6) and all(not end["tries"] for end in ends)


def test_models_follow_the_endpoints_of_the_policy(any_stack):
    _, token = any_stack.new_key(allow={"endpoints": ["GET /v1/models", "POST /v1/embeddings"]})
    ids = [model.id for model in sdk(any_stack, token).models.list()]
    assert ids and all(name.startswith("text-embedding") for name in ids)


# --- state -------------------------------------------------------------------------------------------------------------

def stored_as(stack, key_id):
    return [entry["store"] for entry in stack.calls_of(key_id)]


def test_nothing_is_kept_unless_the_policy_allows_it(any_stack):
    key_id, token = any_stack.new_key()
    client = sdk(any_stack, token)
    for store in ({}, {"store": True}, {"store": False}):
        made = client.responses.create(model="gpt-4o-mini", input="x", **store)
        client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "x"}], **store)
    refused(lambda: client.responses.retrieve(made.id), "state_not_owned", 403)
    refused(lambda: client.responses.create(model="gpt-4o-mini", input="x", background=True), "state_not_owned", 403)
    any_stack.settled(key_id)
    assert stored_as(any_stack, key_id) == ["false"] * 6
    key_id, token = any_stack.new_key(allow=STATE)
    client = sdk(any_stack, token)
    client.responses.create(model="gpt-4o-mini", input="x")
    client.responses.create(model="gpt-4o-mini", input="x", store=False)
    any_stack.settled(key_id)
    assert stored_as(any_stack, key_id) == ["absent", "false"]


def test_a_key_goes_on_at_once_with_what_it_has_made(any_stack):
    """The record of an answer comes up to 50 ms after it; on several workers, from another VM than the next request's."""
    key_id, token = any_stack.new_key("1.00", allow=STATE)

    def take(turn, last):
        client = sdk(any_stack, token)
        if turn % 2:
            return client.responses.create(model="gpt-4o-mini", input=f"turn {turn}", previous_response_id=last and last.id)
        events = list(client.responses.create(model="gpt-4o-mini", input=f"turn {turn}", previous_response_id=last and last.id, stream=True))
        return events[-1].response

    last = None
    for turn in range(12):
        try:
            last = take(turn, last)
        except openai.PermissionDeniedError:
            any_stack.settled(key_id)
            # Only where the record took longer, on this machine, than the service waits for one.
            if [entry["event"] for entry in any_stack.audit(key_id)][-2:] != ["REFUSED", "SETTLED"]:
                raise
            last = take(turn, last)
    client = sdk(any_stack, token)
    assert client.responses.retrieve(last.id).id == last.id
    assert client.responses.input_items.list(last.id, limit=5, order="asc").data
    item = last.output[0].id
    client.responses.create(model="gpt-4o-mini", input=[{"type": "item_reference", "id": item}, {"role": "user", "content": "and now?"}])
    client.responses.delete(last.id)
    any_stack.settled(key_id)
    refused(lambda: client.responses.retrieve(last.id), "state_not_owned", 403)
    exactly_paid(any_stack, key_id)


def test_stored_chats_belong_to_their_key(any_stack):
    _, mine = any_stack.new_key(allow=STATE)
    _, other = any_stack.new_key(allow=STATE)
    made = sdk(any_stack, mine).chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "x"}], store=True)
    refused(lambda: sdk(any_stack, other).chat.completions.retrieve(made.id), "state_not_owned", 403)
    assert sdk(any_stack, mine).chat.completions.retrieve(made.id).id == made.id
    assert sdk(any_stack, mine).chat.completions.messages.list(made.id).data
    refused(lambda: sdk(any_stack, mine).chat.completions.list(), "endpoint_not_allowed", 403)


def test_nobody_refers_to_what_another_key_of_the_account_made(any_stack):
    owner_id, owner = any_stack.new_key(allow=STATE)
    thief_id, thief = any_stack.new_key(allow=STATE)
    made = sdk(any_stack, owner).responses.create(model="gpt-4o-mini", input="a secret")
    any_stack.settled(owner_id)
    # The provider would hand it out: both keys have the same account.
    status, _, _ = call(any_stack.sim.api, "GET", f"/v1/responses/{made.id}", None, {"authorization": f"Bearer {CREDENTIALS[0]['secret']}"})
    assert status == 200
    client, before = sdk(any_stack, thief), any_stack.last_seq()

    def attempts(response, item):
        user = {"role": "user", "content": "and?"}
        ask = lambda **more: client.responses.create(model="gpt-4o-mini", **{"input": "and?", **more})
        return [
            lambda: ask(previous_response_id=response),
            lambda: ask(input=[{"type": "item_reference", "id": item}, user]),
            lambda: ask(input=[{"id": item}, user]),
            lambda: ask(input=[{"type": "image_generation_call", "id": item}, user]),
            lambda: ask(input=[{"type": "reasoning", "id": item, "summary": []}, user]),
            lambda: ask(input=[{"role": "user", "content": [{"type": "input_file", "file_id": item}]}]),
            lambda: ask(conversation=item),
            lambda: ask(tools=[{"type": "file_search", "vector_store_ids": [item]}]),
            lambda: client.responses.retrieve(response),
            lambda: client.responses.retrieve(response, stream=True),
            lambda: client.responses.delete(response),
            lambda: client.responses.cancel(response),
            lambda: client.responses.input_items.list(response),
            lambda: client.post(f"/responses/{response}", cast_to=object, body={}),
        ]

    theirs, nobodys = attempts(made.id, made.output[0].id), attempts("resp_0", "msg_0")
    for there, not_there in zip(theirs[:-1], nobodys[:-1]):
        assert refused(there, "state_not_owned", 403).message == refused(not_there, "state_not_owned", 403).message
    refused(theirs[-1], "endpoint_not_allowed", 403)
    assert any_stack.last_seq() == before, "something of it reached the provider"
    any_stack.books(thief_id)
    assert sdk(any_stack, owner).responses.retrieve(made.id).id == made.id


# --- what is not in the table --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("endpoints", [[], ["*"], ["POST *", "GET *"], ["POST /v1/*"], ["* /v1/*"], ["POST /v1/fil*"], ["anthropic:POST /v1/files"]])
def test_what_nobody_spelled_out_is_refused(any_stack, endpoints):
    key_id, token = any_stack.new_key(allow={"endpoints": endpoints})
    before = any_stack.last_seq()
    refused(lambda: sdk(any_stack, token).files.create(file=b"x", purpose="user_data"), "endpoint_not_allowed", 403)
    refused(lambda: sdk(any_stack, token).post("/vector_stores", cast_to=object, body={}), "endpoint_not_allowed", 403)
    assert any_stack.last_seq() == before
    assert [entry["code"] for entry in any_stack.audit(key_id) if entry["event"] == "REFUSED"] == ["endpoint_not_allowed"] * 2


def test_files_by_policy_belong_to_their_key(any_stack):
    owner_id, owner = any_stack.new_key(allow={**FILES, **STATE})
    _, thief = any_stack.new_key(allow={**FILES, **STATE})
    mine, theirs = sdk(any_stack, owner), sdk(any_stack, thief)
    content = b"\r\n--not the boundary\r\n" * 1_000
    file = mine.files.create(file=("notes.txt", content), purpose="user_data")
    assert mine.files.retrieve(file.id).bytes == len(content)
    # What users sent as input can't be had back; what is for batches can.
    for_a_batch = mine.files.create(file=("batch.jsonl", b'{"custom_id": "1"}\n'), purpose="batch")
    assert mine.files.content(for_a_batch.id).read() == b'{"custom_id": "1"}\n'
    question = [{"role": "user", "content": [{"type": "input_file", "file_id": file.id}, {"type": "input_text", "text": "what?"}]}]
    assert mine.responses.create(model="gpt-4o-mini", input=question).output_text
    before = any_stack.last_seq()
    for attempt in (lambda: theirs.files.retrieve(file.id), lambda: theirs.files.content(file.id), lambda: theirs.files.delete(file.id),
                    lambda: theirs.responses.create(model="gpt-4o-mini", input=question)):
        refused(attempt, "state_not_owned", 403)
    refused(lambda: theirs.files.list(), "endpoint_not_allowed", 403)
    assert any_stack.last_seq() == before
    assert mine.files.delete(file.id).deleted
    any_stack.settled(owner_id)
    refused(lambda: mine.files.retrieve(file.id), "state_not_owned", 403)


def test_a_list_shows_what_others_made_and_is_never_given(any_stack):
    _, token = any_stack.new_key(allow={"endpoints": ["GET /v1/files"], **STATE})
    before = any_stack.last_seq()
    refused(lambda: sdk(any_stack, token).files.list(), "state_not_owned", 403)
    assert any_stack.last_seq() == before


def test_what_has_no_price_needs_a_key_without_a_budget(any_stack):
    _, token = any_stack.new_key("1.00", allow=FILES)
    refused(lambda: sdk(any_stack, token).files.create(file=b"x", purpose="user_data"), "unbounded_input", 400)


# --- the credential -------------------------------------------------------------------------------------------------------

def test_a_reference_is_pinned_to_the_credential_that_made_the_object():
    second = {"id": "openai-2", "provider": "openai", "secret": "sk-proj-second-Hh2Jk4Lm6Np8Qr0St", "account": "openai-1"}
    with Stack() as stack:
        stack.sim.put("/control/credentials", [*CREDENTIALS, second])
        key_id, token = stack.new_key(allow=STATE)
        client = sdk(stack, token)
        made = client.responses.create(model="gpt-4o-mini", input="x")
        added = stack.admin("POST", "/v1/credentials", {"provider": "openai", "label": second["id"], "secret": second["secret"]})
        client.responses.create(model="gpt-4o-mini", input="x")
        client.responses.create(model="gpt-4o-mini", input="x", previous_response_id=made.id)
        stack.settled(key_id)
        first, both, pinned = [entry["credentials"] for entry in stack.audit(key_id) if entry["event"] == "ADMITTED"]
        assert (pinned, [entry["id"] for entry in both]) == (first, [first[0]["id"], added["id"]])
        stack.admin("DELETE", f"/v1/credentials/{first[0]['id']}")
        client.responses.create(model="gpt-4o-mini", input="x")
        error = refused(lambda: client.responses.retrieve(made.id), "pool_exhausted", 429)
        assert "not in use" in error.message
        assert wait_for("at rest", lambda: stack.sim.totals()["violation_count"] == 0)
