"""What client libraries send: replies sent back, nulls, advice, and mistakes named by their part."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raylm.serving.http.bodies import RequestBody
from raylm.serving.http.errors import _describe
from raylm.serving.http.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from raylm.serving.retrieval.collections import NewDocuments
from raylm.serving.tasks.classification import ClassifyRequest
from raylm.serving.tasks.ranking import RerankRequest, ScoreRequest
from raylm.serving.tasks.tagging import TagRequest
from raylm.serving.tasks.tokenization import TokenizeRequest

# As OpenAI's client 3.57 sends back what this server answered, with what others' servers add.
REPLY = {
    "role": "assistant", "content": "Yes.", "refusal": None, "annotations": None, "audio": None, "function_call": None,
    "tool_calls": None, "reasoning_content": None, "parsed": {"colour": "red"},
}  # fmt: skip
USER = {"role": "user", "content": "?"}
TEXT = {"type": "text", "text": "a"}
ADVICE = {
    "prompt_cache_key": "k", "safety_identifier": "s", "metadata": {"a": "b"}, "reasoning_effort": "low", "store": True,
    "user": "u", "service_tier": "flex", "stream_options": {"include_usage": True}, "verbosity": "low", "priority": 1,
}  # fmt: skip


def described(kind: type[RequestBody], body: Any) -> dict[str, Any]:
    """The error object of a wrong body."""
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate(body)
    first = refusal.value.errors()[0]
    return _describe(first | {"loc": ("body", *first["loc"])})["error"]


def test_replies_are_taken_back() -> None:
    asked = ChatRequest.model_validate({"messages": [USER, REPLY, USER]})
    assert [message.plain() for message in asked.messages] == [USER, {"role": "assistant", "content": "Yes."}, USER]


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ({"role": "assistant", "content": None, "refusal": "No."}, {"role": "assistant", "content": "No."}),
        ({"role": "assistant", "tool_calls": []}, {"role": "assistant", "content": ""}),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "tool", "content": "4", "tool_call_id": "c"}, {"role": "tool", "content": "4"}),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}],
            },
            {"role": "user", "content": "ab"},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No.", "text": None}]},
            {"role": "assistant", "content": "No."},
        ),
    ],
)
def test_messages_as_the_template_takes_them(message: dict[str, Any], plain: dict[str, str]) -> None:
    assert ChatRequest.model_validate({"messages": [message]}).messages[0].plain() == plain


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": "a"}),
        (ChatRequest, {"messages": [USER]}),
        (EmbeddingRequest, {"input": "a"}),
        (ClassifyRequest, {"input": "a"}),
        (TagRequest, {"input": "a"}),
        (RerankRequest, {"query": "a", "documents": ["b", {"text": "c", "more": None}]}),
        (ScoreRequest, {"text_1": "a", "text_2": ["b"]}),
        (TokenizeRequest, {"prompt": "a", "messages": None}),
        (NewDocuments, {"documents": [{"text": "a", "title": None, "id": None}]}),
    ],
)
def test_null_is_nothing_and_advice_changes_nothing(kind: type[RequestBody], body: dict[str, Any]) -> None:
    nulls = {name: None for name in kind.model_fields if name not in body} | {"nothing_known": None}
    bare = kind.model_validate(body)
    advice = {
        name: value for name, value in ADVICE.items() if name != "stream_options" or "stream" in kind.model_fields
    }
    assert kind.model_validate(body | nulls) == bare
    assert kind.model_validate(body | advice).model_copy(update={"stream_options": None}) == bare.model_copy(
        update={"stream_options": None}
    )


def test_null_in_a_schema_is_a_value() -> None:
    schema = {"properties": {"a": {"const": None, "enum": [None]}}, "default": None}
    asked = ChatRequest.model_validate(
        {
            "messages": [USER],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "strict": None, "description": None, "schema": schema},
            },
        }
    )
    assert asked.response_format is not None
    assert asked.response_format.json_schema is not None
    assert asked.response_format.json_schema.json_schema == schema


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("kind", "body", "parameter", "says"),
    [
        (
            ChatRequest,
            {"messages": [USER, {"role": "user", "content": [IMAGE]}]},
            "messages.1.content.0.image_url",
            "text",
        ),
        (ChatRequest, {"messages": [{"role": "user", "content": [USER]}]}, "messages.0.content.0.type", "Missing"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0",
            "missing",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content",
            "neither a text nor a list",
        ),
        (ChatRequest, {"messages": [{"role": "user", "content": None}]}, "messages.0", "content is missing"),
        (ChatRequest, {"messages": [USER, {"role": "king", "content": ""}]}, "messages.1.role", "'system'"),
        (ChatRequest, {"messages": [USER | {"tool_calls": [CALL]}]}, "messages.0.tool_calls", "leave it out"),
        (ChatRequest, {"messages": [USER | {"audio": {"id": "a"}}]}, "messages.0.audio", "leave it out"),
        (ChatRequest, {"messages": [USER | {"weight": 1}]}, "messages.0.weight", "Unsupported"),
        (ChatRequest, {"messages": [USER], "web_search_options": {}}, "web_search_options", "Unsupported"),
        (ChatRequest, {"messages": [USER], "bad_words": ["a"]}, "bad_words", "Unsupported"),
        (ChatRequest, {"messages": [USER], "stop": ["a", 5]}, "stop.1", "valid string"),
        (
            ChatRequest,
            {"messages": [USER], "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "only without add_generation_prompt",
        ),
        (
            ChatRequest,
            {"messages": [USER], "chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs",
            "found tokenize",
        ),
        (CompletionRequest, {"prompt": ["a", [1, -1]]}, "prompt.1.1", "greater than or equal to 0"),
        (CompletionRequest, {"prompt": None}, "prompt", "Missing"),
        (CompletionRequest, {"prompt": "a", "best_of": True}, "best_of", "Unsupported"),
        (EmbeddingRequest, {"input": ["a"] * 2049}, "input", "found 2049 texts, allowed: 1 to 2048"),
        (ScoreRequest, {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1", "found 2 texts, allowed: 1 or 1"),
        (RerankRequest, {"query": "a", "documents": ["a", 5]}, "documents.1", "neither a text nor an object"),
        (TokenizeRequest, {}, "prompt", "either prompt or messages"),
    ],
)
def test_a_mistake_names_its_part(kind: type[RequestBody], body: Any, parameter: str, says: str) -> None:
    error = described(kind, body)
    assert error["param"] == parameter
    assert says in error["message"]
    assert parameter in error["message"]
