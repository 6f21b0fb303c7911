"""The anthropic SDK through Keyward. Needs ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY, which the SDK reads by itself."""

import json

from anthropic import Anthropic

MODEL = "claude-haiku-4-5"
TOOLS = [{
    "name": "get_weather", "description": "The weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}]

client = Anthropic()


def get_weather(city):
    return f"21 degrees and sunny in {city}"


def text(message):
    return "".join(block.text for block in message.content if block.type == "text")


def plain():
    messages = [{"role": "user", "content": "Name a river in Paris."}]
    print("plain:", text(client.messages.create(model=MODEL, max_tokens=200, messages=messages)))


def stream():
    print("stream:", end=" ")
    with client.messages.stream(model=MODEL, max_tokens=200, messages=[{"role": "user", "content": "Count to five."}]) as parts:
        for part in parts.text_stream:
            print(part, end="", flush=True)
    print()


def tools():
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.messages.create(model=MODEL, max_tokens=200, messages=messages, tools=TOOLS)
    results = []
    for use in answer.content:
        if use.type == "tool_use":
            result = get_weather(**use.input)
            print("tool:", use.name, json.dumps(use.input), "->", result)
            results.append({"type": "tool_result", "tool_use_id": use.id, "content": result})
    if results:
        messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
        answer = client.messages.create(model=MODEL, max_tokens=200, messages=messages, tools=TOOLS)
    print("tools:", text(answer))


if __name__ == "__main__":
    plain()
    stream()
    tools()
