"""What a provider is to get, as the vendors' own typed clients could have sent it."""

import pydantic
from google.genai import types as gemini


class GenerateContent(pydantic.BaseModel):
    """The body of generateContent, put together from the SDK's types; it has none for the whole."""

    model_config = pydantic.ConfigDict(extra="forbid")

    contents: list[gemini.Content] = pydantic.Field(min_length=1)
    systemInstruction: gemini.Content | None = None
    tools: list[gemini.Tool] | None = None
    toolConfig: gemini.ToolConfig | None = None
    generationConfig: gemini.GenerationConfig | None = None


class EmbedContent(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    model: str = pydantic.Field(pattern="^models/")
    content: gemini.Content
    outputDimensionality: int | None = None


class BatchEmbedContents(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    requests: list[EmbedContent]


def unknown(written, read, at: str = "") -> list[str]:
    """Paths that were written and that the types left out: a TypedDict takes fields it does not have, and drops them."""
    if isinstance(written, dict):
        if not isinstance(read, dict):
            return [f"{at}: not an object"]
        here = [f"{at}.{key}" for key in written if key not in read]
        return here + [path for key in written if key in read for path in unknown(written[key], read[key], f"{at}.{key}")]
    if isinstance(written, list):
        # An iterable that is validated as it is read.
        items = list(read)
        if len(items) != len(written):
            return [f"{at}: {len(items)} of {len(written)} items"]
        return [path for i, (a, b) in enumerate(zip(written, items)) for path in unknown(a, b, f"{at}[{i}]")]
    return []
