"""What all requests for a text share: how it is sampled, where it ends, and how it is sent.

The parameters beyond OpenAI's are vLLM's (https://docs.vllm.ai, "Sampling Parameters") and mean what they mean there. A
parameter that is not supported is refused by name, unless it has the value that changes nothing: clients send
``"suffix": ""`` or ``"best_of": 1`` without meaning anything by it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from raylm.serving.engines.base import SamplingParameters
from raylm.serving.http.bodies import Items, Part, RequestBody, Texts

MOST_STOPS = 4
# Of logit_bias and stop_token_ids.
MOST_TOKENS = 1024
LARGEST_BIAS = 100.0

# Parameters of OpenAI's, vLLM's and llama.cpp's that are not supported, and their values that change nothing.
IDLE: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "detokenize": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True, False),
    "length_penalty": (1,),
    "logprobs": (False,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n_probs": (0,),
    "repeat_penalty": (1,),
    "spaces_between_special_tokens": (True, False),
    "suffix": ("",),
    "tfs_z": (1,),
    "thinking_token_budget": (-1,),
    "timings_per_token": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}


class StreamOptions(Part):
    """``stream_options``."""

    include_usage: bool = False
    """Send the token counts in a last event."""
    continuous_usage_stats: bool = False
    """Send the token counts so far with every event."""
    include_obfuscation: bool = False
    """Accepted for OpenAI's client; nothing is added."""


class GenerationRequest(RequestBody):
    """What all routes that generate text share."""

    idle: ClassVar[dict[str, tuple[Any, ...]]] = IDLE

    model: str | None = None
    """Name of the model; by default the first one that fits the route."""
    max_tokens: int | None = Field(default=None, ge=0)
    """Most tokens to generate."""
    min_tokens: int | None = Field(default=None, ge=0)
    """Tokens to generate before an end token, one of stop_token_ids or a stop string may end the text."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Divides the logits; 0 takes the likeliest token each time; default 1."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Share of the probability to sample from; default 1."""
    top_k: int | None = Field(default=None, ge=-1)
    """Sample from this many likeliest tokens; 0 and -1 are all of them."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Sample from tokens of at least this share of the likeliest one's probability; default 0."""
    seed: int | None = None
    """Seed of the sampling; the same seed gives the same text."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Subtracted from the logit of every token that was generated before."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Subtracted from a token's logit once for each time that it was generated before."""
    repetition_penalty: float | None = Field(default=None, gt=0, le=1e6)
    """Divides the logits above 0, and multiplies those below, of every token in the prompt and of those that were
    generated before; default 1."""
    logit_bias: dict[str, Annotated[float, Field(ge=-LARGEST_BIAS, le=LARGEST_BIAS)]] | None = Field(
        default=None, max_length=MOST_TOKENS
    )
    """Token ids, and what is added to the logit of each, -100 to 100. Not with the engine openvino."""
    stop: Texts | None = None
    """Strings that end the text, at most 4; the text ends before them. A string that is a special token works too."""
    stop_token_ids: Items[Annotated[int, Field(ge=0)]] | None = Field(default=None, max_length=MOST_TOKENS)
    """Token ids that end the text. It contains them unless they are special tokens."""
    include_stop_str_in_output: bool | None = None
    """Let the text end behind the stop string, not before it."""
    ignore_eos: bool | None = None
    """Go on behind the model's end tokens."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; true by default."""
    stream: bool | None = None
    """Send the text as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """Has no effect without stream."""

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MOST_STOPS:
            raise ValueError(f"at most {MOST_STOPS} strings are allowed, found {len(value)}")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _of_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"found {key!r}, allowed: token ids")
        return value

    @property
    def stops(self) -> list[str]:
        """``stop`` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def shaping(self) -> dict[str, Any]:
        """The fields of :class:`SamplingParameters` that change which tokens are likely, and which end the text."""
        return {
            "top_k": max(self.top_k or 0, 0),
            "min_p": self.min_p or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "logit_bias": tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items() if bias),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "min_tokens": self.min_tokens or 0,
            "ignore_eos": bool(self.ignore_eos),
        }

    @property
    def plain(self) -> bool:
        """Whether the likeliest tokens are the model's own, and only its end tokens end the text."""
        shaped = SamplingParameters(1, **self.shaping())
        return not (shaped.shapes_logits or shaped.stop_token_ids or self.stops)
