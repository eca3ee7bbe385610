"""What clients may send to each route: OpenAI's request bodies, vLLM's and our own, as far as they are supported."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from raylm.serving.http.bodies import Items, Prompts, RequestBody, as_list
from raylm.serving.http.generation import GenerationRequest
from raylm.serving.http.messages import MOST_MESSAGES, Message
from raylm.serving.tasks.structured import ResponseFormat, StructuredOutputs

# Texts that one request may ask for: its prompts times n.
MOST_CHOICES = 64
# Texts of one request to read, texts of one for embeddings, and likeliest tokens that one may ask for at each place.
MOST_INPUTS = 256
MOST_EMBEDDED = 2048
MOST_LOGPROBS = 20


def _some_left(tokens: int) -> int:
    if tokens == 0:
        raise ValueError("found 0, allowed: -1, or 1 and more")
    return tokens


Truncation = Annotated[int, Field(ge=-1), AfterValidator(_some_left)]
"""Last tokens of a text that are kept; -1: as many as there is room for."""
# Of transformers' apply_chat_template.
TEMPLATE_ARGUMENTS = frozenset(
    {
        "add_generation_prompt", "bos_token", "chat_template", "continue_final_message", "conversation", "documents",
        "eos_token", "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
        "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip


def check_template_arguments(arguments: dict[str, Any] | None) -> None:
    """Refuse arguments of a chat template that are the request's own or the server's.

    Raises:
        ValueError: names one.
    """
    if own := sorted(TEMPLATE_ARGUMENTS & set(arguments or {})):
        raise ValueError(f"chat_template_kwargs: found {own[0]}, which the request itself says")


class TextRequest(GenerationRequest):
    """What ``/v1/completions`` and ``/v1/chat/completions`` share."""

    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    """Number of texts for each prompt; default 1."""
    response_format: ResponseFormat | None = None
    """JSON that the text must follow: ``{"type": "json_schema", "json_schema": {"schema": ...}}`` or json_object."""
    structured_outputs: StructuredOutputs | None = None
    """What the text must be: one of json (a schema), json_object, regex, choice and grammar (EBNF)."""
    truncate_prompt_tokens: Truncation | None = None
    """Keep only this many last tokens of the prompt; -1: as many as leave room for max_tokens."""
    add_special_tokens: bool | None = None
    """Let the tokenizer put its special tokens around the prompt; true by default for prompts, and false for messages,
    whose chat template writes them."""
    return_token_ids: bool | None = None
    """Give the token ids of the prompt and of the text."""

    @model_validator(mode="after")
    def _one_form(self) -> TextRequest:
        forced = self.response_format is not None and self.response_format.type != "text"
        if forced and self.structured_outputs is not None:
            raise ValueError("structured_outputs: leave out response_format, which says what the text must be as well")
        return self


class CompletionRequest(TextRequest):
    """``POST /v1/completions``."""

    prompt: Prompts
    """Text, token ids, or a list of both."""
    echo: bool | None = None
    """Begin the text with the prompt; with max_tokens 0 nothing is generated."""
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    """Return each token's log-probability, and those of this many likeliest tokens. A stream sends all with its last
    piece."""

    @classmethod
    def _asked(cls, values: dict[Any, Any]) -> dict[Any, Any]:
        found = super()._asked(values)
        # Chat has it as true or false.
        return {name: value for name, value in found.items() if name != "logprobs" or value is not False}

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
    def prompts(self) -> list[str | list[int]]:
        """``prompt`` as a list of prompts."""
        return as_list(self.prompt)


class ChatRequest(TextRequest):
    """``POST /v1/chat/completions``."""

    messages: Items[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    """The conversation so far."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name of max_tokens."""
    add_generation_prompt: bool | None = None
    """Let the chat template begin the assistant's answer; true by default."""
    continue_final_message: bool | None = None
    """Go on with the last message instead of answering it."""
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=64)
    """What the chat template is given besides the messages, such as ``{"enable_thinking": false}``."""
    logprobs: bool | None = None
    """Return each token's log-probability. A stream sends all with its last piece."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    """Return the log-probabilities of this many likeliest tokens too; needs logprobs."""

    @model_validator(mode="after")
    def _something_to_say(self) -> ChatRequest:
        if self.max_tokens == 0:
            raise ValueError("max_tokens: at least 1 is needed")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: allowed only together with logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: allowed only without add_generation_prompt")
        check_template_arguments(self.chat_template_kwargs)
        return self


class EmbeddingRequest(RequestBody):
    """``POST /v1/embeddings``."""

    idle: ClassVar[dict[str, tuple[Any, ...]]] = {"normalize": (True,)}

    input: Prompts
    """Text, token ids, or a list of both, at most 2,048. A sentence encoder takes texts only (serving.token_ids)."""
    model: str | None = None
    """Name of the model; by default the first one that fits the route."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: little-endian fp32."""
    dimensions: int | None = Field(default=None, ge=1)
    """Length of the vectors: the model's own, and no other."""
    truncate_prompt_tokens: Truncation | None = None
    """Keep only this many last tokens of each text; -1: as many as the model takes."""

    @model_validator(mode="after")
    def _not_too_many(self) -> EmbeddingRequest:
        if not 0 < len(self.inputs) <= MOST_EMBEDDED:
            raise ValueError(f"input: found {len(self.inputs)} texts, allowed: 1 to {MOST_EMBEDDED}")
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
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
    null_threshold: float | None = Field(default=None, allow_inf_nan=False)
    """extractive: give no answer if the score (a logit) of no answer exceeds the best answer's score by more than this;
    by default the server's setting."""
    passages: int | None = Field(default=None, ge=1, le=20)
    """Number of passages to answer from; by default the server's setting."""

    @model_validator(mode="after")
    def _one_place(self) -> QuestionRequest:
        if self.context is not None and (self.collection is not None or self.passages is not None):
            raise ValueError("context: leave out collection and passages, which are for what is not given")
        return self
