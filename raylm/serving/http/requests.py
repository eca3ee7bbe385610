"""What clients may send: OpenAI's request bodies, as far as they are supported.

A parameter that is not supported is refused by name, unless it has the value that changes nothing: clients send
``"logprobs": null`` or ``"frequency_penalty": 0`` without meaning anything by it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from raylm.serving.http.bodies import Items, RequestBody
from raylm.serving.tasks.structured import ResponseFormat

# Texts that one request may ask for: its prompts times n.
MOST_CHOICES = 64
# Texts of one request for embeddings, and likeliest tokens that a request may ask for at each place.
MOST_INPUTS = 256
MOST_LOGPROBS = 20
# Messages of one conversation, and parts of one message.
MOST_MESSAGES = 10_000
TokenIds = Annotated[Items[Annotated[int, Field(ge=0)]], Field(min_length=1)]

# Parameters of OpenAI's that are not supported, and the values besides null that change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    """Send the token counts in a last event."""
    include_obfuscation: bool = False
    """Accepted for OpenAI's client; nothing is added."""


class GenerationRequest(RequestBody):
    """What all routes that generate text share."""

    model: str | None = None
    """Name of the model; by default the first one that fits the route."""
    max_tokens: int | None = Field(default=None, ge=0)
    """Most tokens to generate."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Divides the logits; 0 takes the likeliest token each time; default 1."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Share of the probability to sample from; default 1."""
    seed: int | None = None
    """Seed of the sampling; the same seed gives the same text."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Subtracted from the logit of every token that was generated before."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Subtracted from a token's logit once for each time that it was generated before."""
    stop: str | Items[str] | None = None
    """Strings that end the text, at most 4; the text ends before them."""
    stream: bool | None = None
    """Send the text as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """Only together with stream."""
    user: str | None = None
    """The client's name for its user; has no effect."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("logprobs") is False:
            values = {name: value for name, value in values.items() if name != "logprobs"}
        return {name: value for name, value in values.items() if name in cls.model_fields or not _idle(name, value)}

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 4:
            raise ValueError(f"at most 4 strings are allowed, found {len(value)}")
        return value

    @property
    def stops(self) -> list[str]:
        """``stop`` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def _idle(name: str, value: Any) -> bool:
    """Whether an unsupported parameter is given with a value that changes nothing."""
    if name not in _WITHOUT_EFFECT:
        return False
    # True == 1 in Python, but "logprobs": 0 asks for something and "logprobs": false does not.
    return value is None or any(
        value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in _WITHOUT_EFFECT[name]
    )


def as_list(texts: str | list) -> list[str] | list[list[int]]:
    """One text or one list of token ids as a list of them; a list as it is."""
    return [texts] if isinstance(texts, str) or (texts and isinstance(texts[0], int)) else texts


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: str | TokenIds | Items[str] | Items[TokenIds]
    """Text, token ids, or a list of either."""
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    """Number of completions of each prompt; default 1."""
    echo: bool | None = None
    """Begin the text with the prompt; with max_tokens 0 nothing is generated."""
    response_format: ResponseFormat | None = None
    """JSON that the text must follow: ``{"type": "json_schema", "json_schema": {"schema": ...}}`` or json_object."""
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    """Return each token's log-probability, and those of this many likeliest tokens. A stream sends all with its last
    piece."""

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        prompts = self.prompts
        if not prompts:
            raise ValueError("prompt: at least one is needed")
        if len(prompts) * (self.n or 1) > MOST_CHOICES:
            raise ValueError(f"at most {MOST_CHOICES} completions a request are allowed (prompts times n)")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is allowed only together with echo")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """``prompt`` as a list of prompts."""
        return as_list(self.prompt)


class TextPart(BaseModel):
    """A part of a message's content; only text is supported."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[Items[TextPart], Field(max_length=MOST_MESSAGES)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message as a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Items[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    """The conversation so far."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name of max_tokens."""
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    """Number of answers; default 1."""
    response_format: ResponseFormat | None = None
    """JSON that the answer must follow: ``{"type": "json_schema", "json_schema": {"schema": ...}}`` or json_object."""
    logprobs: bool | None = None
    """Return each token's log-probability. A stream sends all with its last piece."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    """Return the log-probabilities of this many likeliest tokens too; needs logprobs."""

    @model_validator(mode="after")
    def _something_to_say(self) -> ChatRequest:
        if self.max_tokens == 0:
            raise ValueError("max_tokens: at least 1 is needed")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: allowed only together with logprobs")
        return self


class EmbeddingRequest(RequestBody):
    """``POST /v1/embeddings``."""

    input: str | TokenIds | Items[str] | Items[TokenIds]
    """Text, token ids, or a list of either."""
    model: str | None = None
    """Name of the model; by default the first one that fits the route."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: little-endian fp32."""
    user: str | None = None
    """The client's name for its user; has no effect."""

    @model_validator(mode="after")
    def _not_too_many(self) -> EmbeddingRequest:
        if not 0 < len(self.inputs) <= MOST_INPUTS:
            raise ValueError(f"input: found {len(self.inputs)} texts, allowed: 1 to {MOST_INPUTS}")
        return self

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """``input`` as a list."""
        return as_list(self.input)


class QuestionRequest(GenerationRequest):
    """``POST /v1/qa``: a question to a collection, or about a given context."""

    question: str = Field(min_length=1)
    """The question."""
    collection: str | None = None
    """Collection to search; by default the one that the server was started with."""
    context: str | None = Field(default=None, min_length=1)
    """Text to answer from, instead of a collection."""
    mode: Literal["extractive", "generative"] | None = None
    """extractive: a reader points at the answer (sampling has no effect). generative: a model writes it. By default
    extractive for a context if a reader is served, else generative."""
    null_threshold: float | None = None
    """extractive: give no answer if the score (a logit) of no answer exceeds the best answer's score by more than this;
    by default the server's setting."""
    passages: int | None = Field(default=None, ge=1, le=20)
    """Number of passages to answer from; by default the server's setting."""

    @model_validator(mode="after")
    def _one_place(self) -> QuestionRequest:
        if self.context is not None and (self.collection is not None or self.passages is not None):
            raise ValueError("context: leave out collection and passages, which are for what is not given")
        return self
