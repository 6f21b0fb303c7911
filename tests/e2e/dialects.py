"""One table of what applications ask of a model, and the drivers that ask it through each SDK. A driver gives what was answered as a
plain meaning, so that it can be held against the table whatever SDK asked and whatever provider answered."""

import base64
import json
import subprocess
from dataclasses import dataclass, field

import anthropic
import openai
import pydantic
from google import genai
from google.genai import errors as genai_errors
from google.genai import types
from harness import NODE_MODULES, ROOT
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, LLMMetadata, TextBlock
from llama_index.llms.openai import OpenAI as LlamaIndexOpenAI

# What Gemini takes for the signature of a call that another model made, or whose own was lost.
FOREIGN_CALL = "skip_thought_signature_validator"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="


def record(**properties):
    """A closed JSON schema of these properties, all of them needed."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


# The tools that are offered, by name.
TOOLS = {"weather": record(city={"type": "string"}, days={"type": "array", "items": {"type": "integer"}}), "time": record(zone={"type": "string"})}


class Person(pydantic.BaseModel):
    """A person."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str
    age: int


@dataclass(frozen=True)
class Meaning:
    """What an answer says, in no SDK's words. `finish`: stop, length, calls or filter."""

    text: str = ""
    calls: tuple = ()
    finish: str = "stop"


def called(*calls, text="", finish="calls"):
    return Meaning(text, tuple((name, json.dumps(arguments, sort_keys=True, ensure_ascii=False)) for name, arguments in calls), finish)


@dataclass(frozen=True)
class Answer:
    """A meaning, and how it came: tokens of prompt and completion, or None; in how many pieces the text; how the text parses where a form
    was asked for."""

    meaning: Meaning
    usage: tuple | None
    pieces: int = 1
    parsed: object = None


@dataclass(frozen=True)
class Scenario:
    """A conversation. Where `results` are given, the calls of the first answer are answered by them and the model is asked again.
    `user` steers the simulator (its README has the words)."""

    name: str
    user: str
    expected: tuple
    system: str | None = None
    history: tuple = ()
    stream: bool = False
    max_tokens: int = 300
    stop: tuple = ()
    tools: tuple = ()
    choice: str | None = None
    results: dict = field(default_factory=dict)
    form: type | None = None
    image: str | None = None

    def __str__(self):
        return self.name


WIDE = "né 🦀 да 語 ñu 😀 bär 日 né"
FOG = {"city": 'Zürich – "日本" 🦀\n\\', "days": [1, 2]}
NOON = {"zone": "Europe/Paris"}
BOTH = f"tool=weather args={json.dumps(FOG)} tool=time args={json.dumps(NOON)}"
TRICKY = 'Grüezi, 日本 😀 "quoted" \\ back\u2028\ttab </script> \x7f'
END = "THE END OF A LONG STORY, WHICH NO PIECE OF A STREAM HOLDS WHOLE"
PERSON = '{"age":7,"name":"the calm hill"}'

SCENARIOS = [
    Scenario("plain", "[[sim tokens=9 reasoning=0]] Hello", (Meaning("the calm hill wind soft blue moon sky rain"),), system="Be kind."),
    Scenario("unicode", f"[[sim echo=1]] {TRICKY}", (Meaning(TRICKY),), system="Sei kurz – 簡潔に 🦀"),
    Scenario("history", "[[sim echo=1]] And then?", (Meaning("And then?"),), history=(("user", "Hi"), ("assistant", "Hello!"))),
    Scenario("stream", "[[sim tokens=9 per_delta=2]] Hello", (Meaning("the calm hill wind soft blue moon sky rain"),), stream=True),
    Scenario("stream of unicode", "[[sim tokens=9 unicode=1 per_delta=1 split=1]]", (Meaning(WIDE),), stream=True),
    Scenario("length", "[[sim tokens=50 reasoning=0]]", (Meaning("the calm hill wind soft", finish="length"),), max_tokens=5),
    Scenario("length of a stream", "[[sim tokens=50 reasoning=0 per_delta=1]]", (Meaning("the calm hill wind soft", finish="length"),), max_tokens=5,
             stream=True),
    Scenario("long stop", f"[[sim echo=1]] one two {END} three", (Meaning("one two "),), stop=("no", END, "three")),
    Scenario("long stop of a stream", f"[[sim echo=1 per_delta=1]] one two {END} three", (Meaning("one two "),), stop=("no", END, "three"), stream=True),
    Scenario("two calls and their results", f"[[sim echo=1 {BOTH}]] How is it?", (called(("weather", FOG), ("time", NOON)), Meaning("How is it?")),
             tools=("weather", "time"), results={"weather": "fog", "time": '{"now": "12:00"}'}),
    Scenario("two calls of a stream and their results", f"[[sim echo=1 per_delta=1 {BOTH}]] How is it?",
             (called(("weather", FOG), ("time", NOON)), Meaning("How is it?")), tools=("weather", "time"), stream=True,
             results={"weather": "Nebel – 霧", "time": ""}),
    Scenario("words before a call", f"[[sim tokens=3 tool=time args={json.dumps(NOON)}]]", (called(("time", NOON), text="the calm hill"),), tools=("time",)),
    Scenario("a call that must be", "[[sim]] Hi", (called(("time", {})),), tools=("time", "weather"), choice="time"),
    Scenario("a form", "[[sim]] Who?", (Meaning(PERSON),), form=Person),
    Scenario("a form in a stream", "[[sim per_delta=1]] Who?", (Meaning(PERSON),), form=Person, stream=True),
    Scenario("an image", "[[sim echo=1]] What is this?", (Meaning("What is this?"),), image=PNG),
]


# A client reads all certificates of the machine when it is made: one connection pool serves all clients of an SDK.
OPENAI_POOL, ANTHROPIC_POOL = openai.DefaultHttpxClient(), anthropic.DefaultHttpxClient()


@dataclass(frozen=True)
class At:
    """Where an SDK is pointed: the base of OpenAI's dialect, the server's own address, a key, and Azure's version, for its own client."""

    openai: str
    server: str
    key: str
    azure: str | None = None


def canonical(arguments):
    """Arguments of a call as text, whoever wrote them."""
    return json.dumps(json.loads(arguments) if isinstance(arguments, str) else arguments, sort_keys=True, ensure_ascii=False)


# --- openai ------------------------------------------------------------------------------------------------------------

FINISH = {"stop": "stop", "length": "length", "tool_calls": "calls", "content_filter": "filter"}


def functions(names):
    return [{"type": "function", "function": {"name": name, "description": f"Über {name}", "parameters": TOOLS[name]}} for name in names]


def chat(model, scenario):
    """The body in OpenAI's dialect, without the form."""
    said = scenario.user
    if scenario.image:
        said = [{"type": "text", "text": said}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{scenario.image}"}}]
    messages = [{"role": role, "content": text} for role, text in scenario.history] + [{"role": "user", "content": said}]
    if scenario.system:
        messages.insert(0, {"role": "system", "content": scenario.system})
    body = {"model": model, "messages": messages, "max_tokens": scenario.max_tokens}
    if scenario.stop:
        body["stop"] = list(scenario.stop)
    if scenario.tools:
        body["tools"] = functions(scenario.tools)
    if scenario.choice:
        body["tool_choice"] = {"type": "function", "function": {"name": scenario.choice}}
    return body


def openai_client(at):
    more = {"api_key": at.key, "max_retries": 0, "http_client": OPENAI_POOL}
    if at.azure:
        return openai.AzureOpenAI(azure_endpoint=at.server, api_version=at.azure, **more)
    return openai.OpenAI(base_url=at.openai, **more)


def openai_python(at, model, scenario):
    """The messages are echoed as the SDK gave them: what a provider put beside a call must come back by itself."""
    client, body, answers = openai_client(at), chat(model, scenario), []
    while True:
        if scenario.stream:
            message, answer = openai_stream(client, body, scenario)
        else:
            message, answer = openai_whole(client, body, scenario)
        answers.append(answer)
        if not (scenario.results and message.tool_calls):
            return answers
        results = [{"role": "tool", "tool_call_id": call.id, "content": scenario.results[call.function.name]} for call in message.tool_calls]
        body["messages"] = [*body["messages"], message, *results]


def openai_whole(client, body, scenario):
    if scenario.form:
        made = client.chat.completions.parse(**body, response_format=scenario.form)
    else:
        made = client.chat.completions.create(**body)
    return made.choices[0].message, openai_answer(made, 1, made.choices[0].message.parsed if scenario.form else None)


def openai_stream(client, body, scenario):
    """With the SDK's own helper, which puts the message together."""
    options = {"response_format": scenario.form} if scenario.form else {}
    pieces, usages, last = 0, 0, None
    with client.chat.completions.stream(**body, **options, stream_options={"include_usage": True}) as events:
        try:
            for event in events:
                if event.type == "chunk":
                    last = event.chunk
                    usages += last.usage is not None
                    pieces += any(choice.delta.content for choice in last.choices)
            made = events.get_final_completion()
        except openai.LengthFinishReasonError as cut:
            # The helper gives no message that is cut off, but has it. Usage comes after the last choice.
            return cut.completion.choices[0].message, openai_answer(cut.completion, pieces, None)
    assert usages == 1 and last.usage and not last.choices, "usage comes once, last, by itself"
    return made.choices[0].message, openai_answer(made, pieces, made.choices[0].message.parsed if scenario.form else None)


def openai_answer(made, pieces, parsed):
    message = made.choices[0].message
    calls = message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls) and all(call.id for call in calls)
    meaning = Meaning(message.content or "", tuple((call.function.name, canonical(call.function.arguments)) for call in calls),
                      FINISH[made.choices[0].finish_reason])
    return Answer(meaning, made.usage and (made.usage.prompt_tokens, made.usage.completion_tokens), pieces, parsed)


class Node:
    """The openai SDK of Node, in a process of its own: a line of JSON goes in, a line comes out."""

    def __init__(self, directory):
        script = directory / "dialects.mjs"
        script.write_text((ROOT / "tests/e2e/node/dialects.mjs").read_text())
        (directory / "node_modules").symlink_to(NODE_MODULES)
        self.process = subprocess.Popen(["node", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, at, model, scenario):
        form = scenario.form and {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": strict(scenario.form)}}
        task = {"at": vars(at), "body": chat(model, scenario) | ({"response_format": form} if form else {}), "stream": scenario.stream,
                "results": scenario.results}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        if "error" in said:
            raise NodeError(said["error"])
        return [node_answer(one, scenario) for one in said["answers"]]

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


class NodeError(Exception):
    """An exception of the SDK in Node: its class, and what it has of the answer."""

    def __init__(self, told):
        super().__init__(told["message"])
        self.kind, self.status_code, self.code, self.headers = told["kind"], told["status"], told["code"], told["headers"]


def node_answer(said, scenario):
    meaning = Meaning(said["text"], tuple((name, canonical(arguments)) for name, arguments in said["calls"]), FINISH[said["finish"]])
    return Answer(meaning, said["usage"] and tuple(said["usage"]), said["pieces"], scenario.form and scenario.form.model_validate_json(said["text"]))


def strict(form):
    schema = form.model_json_schema()
    return record(**schema["properties"])


# --- frameworks on top of openai ---------------------------------------------------------------------------------------


def langchain(at, model, scenario):
    """ChatOpenAI. It keeps nothing that a provider put beside a call."""
    llm = ChatOpenAI(model=model, base_url=at.openai, api_key=at.key, max_retries=0, max_completion_tokens=scenario.max_tokens,
                     stop_sequences=list(scenario.stop) or None, stream_usage=True)
    if scenario.tools:
        llm = llm.bind_tools(functions(scenario.tools), tool_choice=scenario.choice)
    if scenario.form:
        llm = llm.bind(response_format=scenario.form)
    said = scenario.user
    if scenario.image:
        said = [{"type": "text", "text": said}, {"type": "image", "base64": scenario.image, "mime_type": "image/png"}]
    messages = [{"user": HumanMessage, "assistant": AIMessage}[role](text) for role, text in scenario.history] + [HumanMessage(said)]
    if scenario.system:
        messages.insert(0, SystemMessage(scenario.system))
    answers = []
    while True:
        if scenario.stream:
            chunks = list(llm.stream(messages))
            made, pieces = sum(chunks[1:], chunks[0]), sum(bool(chunk.text) for chunk in chunks)
        else:
            made, pieces = llm.invoke(messages), 1
        assert not made.invalid_tool_calls
        calls = tuple((call["name"], canonical(call["args"])) for call in made.tool_calls)
        usage = made.usage_metadata and (made.usage_metadata["input_tokens"], made.usage_metadata["output_tokens"])
        parsed = scenario.form.model_validate_json(made.text) if scenario.form else None
        answers.append(Answer(Meaning(str(made.text), calls, FINISH[made.response_metadata["finish_reason"]]), usage, pieces, parsed))
        if not (scenario.results and made.tool_calls):
            return answers
        messages += [made, *(ToolMessage(scenario.results[call["name"]], tool_call_id=call["id"]) for call in made.tool_calls)]


class AnyModel(LlamaIndexOpenAI):
    """LlamaIndex's OpenAI for models that it has no table of, as its OpenAILike is."""

    @property
    def metadata(self):
        return LLMMetadata(context_window=100_000, is_chat_model=True, is_function_calling_model=True, model_name=self.model)


def llama_index(at, model, scenario):
    llm = AnyModel(model=model, api_base=at.openai, api_key=at.key, max_retries=0, max_tokens=scenario.max_tokens, http_client=OPENAI_POOL)
    more = {name: value for name, value in chat(model, scenario).items() if name in ("stop", "tools", "tool_choice")}
    if scenario.form:
        more["response_format"] = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": strict(scenario.form)}}
    if scenario.stream:
        more["stream_options"] = {"include_usage": True}
    said = ChatMessage(role="user", blocks=[TextBlock(text=scenario.user)])
    if scenario.image:
        said.blocks.append(ImageBlock(image=base64.b64decode(scenario.image), image_mimetype="image/png"))
    messages = [ChatMessage(role=role, content=text) for role, text in scenario.history] + [said]
    if scenario.system:
        messages.insert(0, ChatMessage(role="system", content=scenario.system))
    answers = []
    while True:
        finish, usage, pieces = None, None, 0
        for made in llm.stream_chat(messages, **more) if scenario.stream else [llm.chat(messages, **more)]:
            pieces += bool(made.delta)
            usage = made.additional_kwargs and (made.additional_kwargs["prompt_tokens"], made.additional_kwargs["completion_tokens"]) or usage
            for choice in made.raw.choices:
                finish = choice.finish_reason or finish
        calls = made.message.additional_kwargs.get("tool_calls", [])
        text = "".join(block.text for block in made.message.blocks if isinstance(block, TextBlock))
        meaning = Meaning(text, tuple((call.function.name, canonical(call.function.arguments)) for call in calls), FINISH[finish])
        parsed = scenario.form.model_validate_json(text) if scenario.form else None
        answers.append(Answer(meaning, usage, pieces if scenario.stream else 1, parsed))
        if not (scenario.results and calls):
            return answers
        messages.append(made.message)
        messages += [ChatMessage(role="tool", content=scenario.results[call.function.name], additional_kwargs={"tool_call_id": call.id})
                     for call in calls]


# --- anthropic ---------------------------------------------------------------------------------------------------------

STOP_REASON = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "calls", "refusal": "filter"}


def anthropic_client(at):
    return anthropic.Anthropic(base_url=at.server, api_key=at.key, max_retries=0, http_client=ANTHROPIC_POOL)


def anthropic_python(at, model, scenario):
    """The messages are echoed as the SDK gave them, thoughts included."""
    said = scenario.user
    if scenario.image:
        source = {"type": "base64", "media_type": "image/png", "data": scenario.image}
        said = [{"type": "text", "text": said}, {"type": "image", "source": source}]
    messages = [{"role": role, "content": text} for role, text in scenario.history] + [{"role": "user", "content": said}]
    options = {
        "system": scenario.system,
        "stop_sequences": list(scenario.stop),
        "tools": [{"name": name, "description": f"Über {name}", "input_schema": TOOLS[name]} for name in scenario.tools],
        "tool_choice": scenario.choice and {"type": "tool", "name": scenario.choice},
        "output_format": scenario.form,
    }
    body = {"model": model, "max_tokens": scenario.max_tokens, **{name: value for name, value in options.items() if value}}
    client, answers = anthropic_client(at), []
    while True:
        if scenario.stream:
            with client.messages.stream(**body, messages=messages) as events:
                pieces = sum(event.type == "content_block_delta" and event.delta.type == "text_delta" for event in events)
                made = events.get_final_message()
        else:
            made, pieces = (client.messages.parse if scenario.form else client.messages.create)(**body, messages=messages), 1
        type(made).model_validate(made.to_dict(mode="json"))
        uses = [block for block in made.content if block.type == "tool_use"]
        text = "".join(block.text for block in made.content if block.type == "text")
        meaning = Meaning(text, tuple((use.name, canonical(use.input)) for use in uses), STOP_REASON[made.stop_reason])
        answers.append(Answer(meaning, (made.usage.input_tokens, made.usage.output_tokens), pieces, made.parsed_output if scenario.form else None))
        if not (scenario.results and uses):
            return answers
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": scenario.results[use.name]} for use in uses]
        messages += [{"role": "assistant", "content": made.content}, {"role": "user", "content": results}]


# --- google-genai, for reference ---------------------------------------------------------------------------------------


def google(at, model, scenario):
    """Gemini's own client, straight to the provider: what the other drivers get of Gemini is held against it."""
    parts = [types.Part(text=scenario.user)]
    if scenario.image:
        parts.append(types.Part.from_bytes(data=base64.b64decode(scenario.image), mime_type="image/png"))
    roles = {"user": "user", "assistant": "model"}
    contents = [types.Content(role=roles[role], parts=[types.Part(text=text)]) for role, text in scenario.history]
    contents.append(types.Content(role="user", parts=parts))
    declared = [types.FunctionDeclaration(name=name, parameters_json_schema=TOOLS[name]) for name in scenario.tools]
    calling = scenario.choice and types.FunctionCallingConfig(mode="ANY", allowed_function_names=[scenario.choice])
    config = types.GenerateContentConfig(
        system_instruction=scenario.system, max_output_tokens=scenario.max_tokens, stop_sequences=list(scenario.stop) or None,
        tools=[types.Tool(function_declarations=declared)] if declared else None,
        tool_config=calling and types.ToolConfig(function_calling_config=calling),
        response_mime_type="application/json" if scenario.form else None,
        response_json_schema=scenario.form and strict(scenario.form),
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True))
    client, answers = genai.Client(api_key=at.key, http_options=types.HttpOptions(base_url=at.server)), []
    while True:
        ask = {"model": model, "contents": contents, "config": config}
        made = list(client.models.generate_content_stream(**ask)) if scenario.stream else [client.models.generate_content(**ask)]
        said = [part for one in made for part in one.candidates[0].content.parts]
        calls = [part.function_call for part in said if part.function_call]
        text = "".join(part.text or "" for part in said if not part.thought)
        reason = {"STOP": "stop", "MAX_TOKENS": "length"}[made[-1].candidates[0].finish_reason]
        meaning = Meaning(text, tuple((call.name, canonical(call.args)) for call in calls), "calls" if calls else reason)
        usage = made[-1].usage_metadata
        # A count of nothing is left out.
        output = (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0)
        parsed = scenario.form.model_validate_json(text) if scenario.form else None
        answers.append(Answer(meaning, (usage.prompt_token_count, output), sum(bool(one.text) for one in made), parsed))
        if not (scenario.results and calls):
            return answers
        given = [types.Part.from_function_response(name=call.name, response={"result": scenario.results[call.name]}) for call in calls]
        contents += [types.Content(role="model", parts=said), types.Content(role="user", parts=given)]


# --- errors ------------------------------------------------------------------------------------------------------------

KINDS = ("RateLimitError", "AuthenticationError", "PermissionDeniedError", "NotFoundError", "BadRequestError", "InternalServerError")


def kind(error):
    """The class of an SDK's exception that applications catch: a subclass of it is one too."""
    if isinstance(error, NodeError):
        return error.kind
    names = [base.__name__ for base in type(error).__mro__]
    if isinstance(error, genai_errors.APIError):
        return {400: "BadRequestError", 429: "RateLimitError"}.get(error.code, "InternalServerError" if error.code >= 500 else "APIError")
    return next((name for name in (*KINDS, "APIConnectionError", "APIStatusError", "APIError") if name in names), names[0])


def headers(error):
    """Of the answer that an exception is about."""
    return error.headers if isinstance(error, NodeError) else dict(error.response.headers)
