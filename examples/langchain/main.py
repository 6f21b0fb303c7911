"""LangChain through Keyward. Needs OPENAI_BASE_URL and OPENAI_API_KEY, which langchain-openai reads by itself."""

import json

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

model = ChatOpenAI(model="gpt-4o-mini")


@tool
def get_weather(city: str) -> str:
    """The weather in a city"""
    return f"21 degrees and sunny in {city}"


def plain():
    print("plain:", model.invoke("Name a river in Paris.").content)


def stream():
    print("stream:", end=" ")
    for chunk in model.stream("Count to five."):
        print(chunk.content, end="", flush=True)
    print()


def tools():
    with_tools = model.bind_tools([get_weather])
    messages = [HumanMessage("What is the weather in Paris?")]
    answer = with_tools.invoke(messages)
    messages.append(answer)
    for call in answer.tool_calls:
        result = get_weather.invoke(call)
        print("tool:", call["name"], json.dumps(call["args"]), "->", result.content)
        messages.append(result)
    print("tools:", with_tools.invoke(messages).content)


def embeddings():
    vectors = OpenAIEmbeddings(model="text-embedding-3-small").embed_documents(["Seine", "Danube"])
    print("embeddings:", len(vectors), "vectors of", len(vectors[0]))


if __name__ == "__main__":
    plain()
    stream()
    tools()
    embeddings()
