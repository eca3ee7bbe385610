"""What engines and those who ask them agree on: parameters, events, commands, and the backend that decodes.

A backend owns the model and runs in a process of its own (:mod:`raylm.serving.engines.process`); the replica's event
loop talks to it through an :class:`~raylm.serving.engines.client.Engine`. Commands go one way, lists of events the
other. Imports neither torch nor OpenVINO.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length"]
Pooling = Literal["mean", "first", "last"]
ConstraintKind = Literal["json", "regex", "choice", "grammar"]

# Below this, logits divided by the temperature may overflow: the likeliest token is taken.
LEAST_TEMPERATURE = 1e-3
# Below this only the likeliest token is left, and in fp32 it may be 0, which engines refuse.
LEAST_TOP_P = 1e-6
NO_BIAS = "logit_bias: the engine openvino has none; serving.engine: transformers has"


class EngineFailure(Exception):
    """A request, or the whole engine, failed; the text says why."""


class EngineRefusal(EngineFailure):
    """The engine cannot do what the request asks for; the text says why."""


class EngineTimeout(EngineFailure):
    """A request took longer than it may."""


def reason_of(error: Exception) -> str:
    """What the grammar library's C++ says, without its place in the source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1].rpartition(".cc:")[2].partition(": ")[2] or lines[-1]


@dataclass(frozen=True)
class Constraint:
    """What a text must be.

    Attributes:
        kind: json: of a schema; choice: one of several texts.
        text: the schema as JSON, the regular expression, the texts as a JSON array, or the grammar in EBNF.
        parameter: of the request that asks for it.
        compact: json: no white space but one blank behind a comma and a colon.
    """

    kind: ConstraintKind
    text: str
    parameter: str = "response_format"
    compact: bool = False


@dataclass(frozen=True)
class SamplingParameters:
    """How one request is decoded.

    The logits are changed in vLLM's order: logit_bias, min_tokens, the penalties, the temperature, min_p, top_k, top_p.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_p: sample from the smallest set of tokens whose probabilities sum to this, at least one; [0, 1].
        top_k: sample from this many likeliest tokens, and those as likely as the last of them; 0 for all.
        min_p: sample from tokens of at least this share of the likeliest one's probability; [0, 1].
        seed: of the request's own random numbers; the same seed draws the same tokens whatever runs beside it.
        presence_penalty: taken from the logit of every token that was generated before.
        frequency_penalty: taken from a token's logit as many times as it was generated before.
        repetition_penalty: divides the logits above 0, and multiplies those below, of every token of the prompt and of
            those that were generated before (Keskar et al. 2019).
        logit_bias: token ids, and what is added to the logit of each.
        stop_token_ids: token ids that end the text besides the model's own.
        min_tokens: tokens to generate before any of those may come.
        ignore_eos: the model's own end tokens end nothing.
        constraint: what the text must be.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    constraint: Constraint | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < LEAST_TEMPERATURE or self.top_p < LEAST_TOP_P or self.top_k == 1 or self.min_p >= 1

    @property
    def penalizes(self) -> bool:
        """Whether what was generated changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def shapes_logits(self) -> bool:
        """Whether the likeliest token may be another one than the model's own."""
        return self.penalizes or bool(self.logit_bias or self.min_tokens)

    def ends(self, end_ids: frozenset[int]) -> frozenset[int]:
        """Token ids that end a text of a model whose own are ``end_ids``."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else end_ids)


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities, natural logarithm, of a text under the model.

    Attributes:
        chosen: fp32 [tokens - 1]; entry i is that of token i + 1 after tokens 0 to i.
        top_ids: int64 [tokens, top]; the likeliest tokens after tokens 0 to i, likeliest first.
        top: fp32 [tokens, top]; their log-probabilities.
    """

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


@dataclass
class Event:
    """What a step brought one request: ids or a result, and at the end the reason or the error."""

    number: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    result: Any = None
    refused: bool = False
    """With an error: it is the request's own fault."""
    cached: int | None = None
    """With the first tokens: tokens of the prompt that were read for an earlier request; None if the engine does not
    say."""

    @property
    def last(self) -> bool:
        """Whether the request is over."""
        return self.finish_reason is not None or self.error is not None or self.result is not None


@dataclass(frozen=True)
class Generate:
    """Command: go on from ``prompt_ids``; answered by events with tokens.

    Attributes:
        adapter: name of the one that the model is to have in this request; also of the commands below.
    """

    number: int
    prompt_ids: list[int]
    parameters: SamplingParameters
    adapter: str | None = None


@dataclass(frozen=True)
class Score:
    """Command: read ``ids`` and say how likely each was; answered by :class:`TokenScores`."""

    number: int
    ids: list[int]
    top: int
    adapter: str | None = None


@dataclass(frozen=True)
class Embed:
    """Command: read ``ids`` and pool the last hidden states; answered by a vector, fp32 [hidden size]."""

    number: int
    ids: list[int]
    pooling: Pooling
    adapter: str | None = None


@dataclass(frozen=True)
class Encode:
    """Command of an encoder with a task: read ``ids``; answered by fp32 [tokens, 2] (reader) or [labels] (classifier).

    Attributes:
        types: which of two texts each id belongs to; all the first where it is None.
    """

    number: int
    ids: list[int]
    types: list[int] | None = None


@dataclass(frozen=True)
class Cancel:
    """Command: drop a request, wherever it stands."""

    number: int


@dataclass(frozen=True)
class Ping:
    """Command: give a sign of life; answered by :class:`Alive`, or by anything else before it."""


@dataclass(frozen=True)
class Close:
    """Command: end the process."""


@dataclass(frozen=True)
class Load:
    """Message: the share of the key-value cache in use, 0 to 1."""

    cache_usage: float


@dataclass(frozen=True)
class Alive:
    """Message: the step that ran when the sign of life was asked for has ended."""


@dataclass(frozen=True)
class Ready:
    """First message of a backend that could load its model."""

    name: str


Command = Generate | Score | Embed | Encode | Cancel | Ping | Close


class Backend(abc.ABC):
    """Decodes many requests together.

    A subclass says how a request joins, how all of them go one step further, and how one leaves early.

    Args:
        sequences: requests decoded together; more wait their turn.
    """

    name: str

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences

    @abc.abstractmethod
    def admit(self, request: Generate) -> None:
        """Let a request join; a RuntimeError or ValueError fails this request alone."""

    @abc.abstractmethod
    def advance(self) -> list[Event]:
        """Go one step further with every request that has room."""

    @abc.abstractmethod
    def drop(self, number: int) -> None:
        """Free what a request that was admitted and has not ended holds."""

    @abc.abstractmethod
    def read(self, ids: list[int], adapter: str | None = None) -> Reading:
        """Read a whole text at once, for its logits and hidden states."""

    def cache_usage(self) -> float | None:
        """Share of the key-value cache in use, 0 to 1; None where the cache has no size of its own."""
        return None


class Reading(abc.ABC):
    """A text that the model has read."""

    @abc.abstractmethod
    def logits(self) -> Iterator[np.ndarray]:
        """Logits after each token in consecutive parts, each fp32 [tokens of the part, vocabulary]."""

    @abc.abstractmethod
    def hidden(self) -> np.ndarray:
        """Last hidden states, fp32 [tokens, hidden size]."""
