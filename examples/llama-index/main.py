"""LlamaIndex through Keyward. OPENAI_API_KEY is read by itself; the base URL must be handed over as `api_base`."""

import json
import os

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

BASE = os.environ["OPENAI_BASE_URL"]

model = OpenAI(model="gpt-4o-mini", api_base=BASE)


def get_weather(city: str) -> str:
    """The weather in a city"""
    return f"21 degrees and sunny in {city}"


def plain():
    print("plain:", model.complete("Name a river in Paris."))


def stream():
    print("stream:", end=" ")
    for part in model.stream_chat([ChatMessage(role="user", content="Count to five.")]):
        print(part.delta, end="", flush=True)
    print()


def tools():
    offered = [FunctionTool.from_defaults(fn=get_weather)]
    messages = [ChatMessage(role="user", content="What is the weather in Paris?")]
    answer = model.chat_with_tools(offered, chat_history=messages)
    messages.append(answer.message)
    for call in model.get_tool_calls_from_response(answer, error_on_no_tool_call=False):
        result = get_weather(**call.tool_kwargs)
        print("tool:", call.tool_name, json.dumps(call.tool_kwargs), "->", result)
        messages.append(ChatMessage(role="tool", content=result, additional_kwargs={"tool_call_id": call.tool_id}))
    print("tools:", model.chat_with_tools(offered, chat_history=messages).message.content)


def embeddings():
    vectors = OpenAIEmbedding(model="text-embedding-3-small", api_base=BASE).get_text_embedding_batch(["Seine", "Danube"])
    print("embeddings:", len(vectors), "vectors of", len(vectors[0]))


if __name__ == "__main__":
    plain()
    stream()
    tools()
    embeddings()
