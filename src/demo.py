"""What `keyward demo` runs with the openai SDK: unmodified, but for base URL and key. Prints what it saw as JSON."""

import json
import sys
import urllib.request

import openai

base, token, control = sys.argv[1:4]
client = openai.OpenAI(base_url=base + "/v1", api_key=token, max_retries=0)


def ask(text, **more):
    return client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": text}], **more)


def running():
    with urllib.request.urlopen(control + "/control/totals") as answer:
        return json.load(answer)["running"]


seen = {"sdk": openai.__version__, "answer": ask("Hello").choices[0].message.content}

chunks, still_running = 0, 0
for chunk in ask("[[sim tokens=30 pace_ms=150 per_delta=3]]", stream=True):
    if chunk.choices and chunk.choices[0].delta.content:
        chunks += 1
        still_running += 1 if chunks <= 5 and running() else 0
seen["chunks"], seen["chunks_while_running"] = chunks, still_running

tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
call = ask('[[sim tool=get_weather args={"city":"Paris"}]]', tools=[tool]).choices[0].message.tool_calls[0]
seen["tool"] = [call.function.name, json.loads(call.function.arguments)]

try:
    client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hello"}])
except openai.PermissionDeniedError as error:
    seen["refused"] = [type(error).__name__, error.code]

print(json.dumps(seen))
