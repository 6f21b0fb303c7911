"""The openai SDK through Keyward. Needs OPENAI_BASE_URL and OPENAI_API_KEY, which the SDK reads by itself."""

import json

from openai import OpenAI

MODEL = "gpt-4o-mini"
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}]

client = OpenAI()


def get_weather(city):
    return f"21 degrees and sunny in {city}"


def plain():
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Name a river in Paris."}])
    print("plain:", answer.choices[0].message.content)


def stream():
    chunks = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Count to five."}], stream=True)
    print("stream:", end=" ")
    for chunk in chunks:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def tools():
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    message = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
    messages.append(message)
    for call in message.tool_calls or []:
        result = get_weather(**json.loads(call.function.arguments))
        print("tool:", call.function.name, call.function.arguments, "->", result)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    print("tools:", answer.choices[0].message.content)


def responses():
    print("responses:", client.responses.create(model=MODEL, input="Name a bridge in Paris.").output_text)
    print("responses stream:", end=" ")
    for event in client.responses.create(model=MODEL, input="Count to three.", stream=True):
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
    print()


def embeddings():
    vectors = client.embeddings.create(model="text-embedding-3-small", input=["Seine", "Danube"]).data
    print("embeddings:", len(vectors), "vectors of", len(vectors[0].embedding))


if __name__ == "__main__":
    plain()
    stream()
    tools()
    responses()
    embeddings()
