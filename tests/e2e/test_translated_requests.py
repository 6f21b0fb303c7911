"""The tables of translated requests against the vendors' own typed clients: what a table says a provider is to get must be what
that provider's SDK could have sent. No Envoy is needed."""

import json
from pathlib import Path

import pydantic
import pytest
from anthropic.types import message_create_params
from openai.types.chat import completion_create_params
from vendor_types import BatchEmbedContents, GenerateContent, unknown

TABLES = Path(__file__).parents[2] / "core/tests/translate/requests"


def cases():
    for path in sorted(TABLES.glob("*.json")):
        table = json.loads(path.read_text())
        for case in table["cases"]:
            terms = table["terms"] | case.get("terms", {})
            # A copy has whatever fields the caller wrote.
            if "expect" in case and adapter(table["form"], terms):
                yield pytest.param(table["form"], terms, case["expect"], id=f"{path.stem}: {case['name']}")


def adapter(form: str, terms: dict):
    match form, terms["to"]:
        case "embeddings", "gemini":
            return pydantic.TypeAdapter(BatchEmbedContents)
        case _, "gemini":
            return pydantic.TypeAdapter(GenerateContent)
        case _, "anthropic":
            return pydantic.TypeAdapter(message_create_params.MessageCreateParams)
        case "messages", "openai":
            return pydantic.TypeAdapter(completion_create_params.CompletionCreateParams)
    return None


@pytest.mark.parametrize(("form", "terms", "expected"), list(cases()))
def test_a_provider_could_have_been_sent_this_by_its_own_client(form, terms, expected):
    types = adapter(form, terms)
    read = types.validate_python(expected)
    if terms["to"] == "gemini":
        # The SDK's models forbid what they don't know; bytes must be Base64, as they are in JSON.
        types.validate_json(json.dumps(expected))
        return
    # The types are of Anthropic's version 2026-10-21, which takes no temperature; requests go under 2023-06-01, which does.
    older = {".temperature", ".top_p"} if terms["to"] == "anthropic" else set()
    assert set(unknown(expected, read)) <= older


def test_the_types_find_what_is_wrong():
    """The check itself: each of these is a mistake that a table could have."""
    good = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}
    messages = adapter("chat", {"to": "anthropic"})
    assert unknown(good, messages.validate_python(good)) == []
    for bad in ({"seed": 1}, {"thinking": {"type": "enabled", "budget_tokens": 1, "x": 1}}, {"tools": [{"name": "a"}]}, {"max_tokens": None}):
        wrong = good | bad
        try:
            found = unknown(wrong, messages.validate_python(wrong))
        except pydantic.ValidationError:
            continue
        assert found, bad
    content = adapter("chat", {"to": "gemini"})
    for bad in ({"contents": []}, {"contents": [{"parts": [{"texts": "a"}]}]}, {"contents": [{"parts": []}], "generationConfig": {"n": 1}}):
        with pytest.raises(pydantic.ValidationError):
            content.validate_python(bad)


def test_every_direction_has_a_table():
    assert {path.stem for path in TABLES.glob("*.json")} == {
        "anthropic_to_gemini",
        "anthropic_to_openai",
        "embeddings",
        "openai_to_anthropic",
        "openai_to_gemini",
        "openai_to_openai",
    }
