"""Served encoder-decoders: a prompt, or the last message of the user, is the source, and what they write the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from raylm.data.samples.text_pairs import encode_sources
from raylm.serving.deploy.service import ModelService
from raylm.serving.engines.base import SamplingParameters
from raylm.serving.http.errors import RequestError
from raylm.serving.http.generation import GenerationRequest
from raylm.serving.http.requests import ChatRequest, CompletionRequest
from raylm.serving.tasks.prompts import ANSWER, PLAIN, ChatOptions, PromptOptions, check_fits

# What such a model does not do, with the reason.
_REFUSED = {
    "echo": "its prompt is no part of the text that it writes",
    "logprobs": "it gives no log-probabilities here",
    "response_format": "it follows no schema",
    "structured_outputs": "it follows no schema",
    "chat_template_kwargs": "it has no chat template",
    "continue_final_message": "it has no chat template",
    "add_special_tokens": "its source ends with an end token in any case",
}


@dataclass
class SourceService(ModelService):
    """A served encoder-decoder.

    Attributes:
        context_length: most tokens of a source, and most of an answer; None without a limit.
        prefix: what the model's sources begin with; not put before token ids.
    """

    prefix: str = ""

    @property
    def completion_tokens(self) -> int | None:
        """As many as it takes: an answer ends by itself."""
        return None

    @property
    def biases(self) -> bool:
        """See :class:`ModelService`; what is drawn is drawn here."""
        return True

    def check_request(self, request: CompletionRequest | ChatRequest) -> None:
        """See :class:`ModelService`."""
        for name, reason in _REFUSED.items():
            value = getattr(request, name, None)
            if value is None or value is False or value == {} or getattr(value, "type", None) == "text":
                continue
            raise RequestError(
                f"{name}: the model '{self.name}' is {self.service.what}: {reason}; leave it out", parameter=name
            )

    def encode_prompt(
        self, prompt: str | list[int], parameter: str = "prompt", options: PromptOptions = PLAIN
    ) -> list[int]:
        """Token ids of a source; token ids as they are. Of too long a one the end, and the end token, stay."""
        if not isinstance(prompt, str):
            found = self.check_ids(prompt, parameter)
        else:
            (ids,), _ = encode_sources(self.tokenizer, [prompt], prefix=self.prefix)
            found = self.check_ids(ids.tolist(), parameter)
        if options.keep is not None:
            return found[-options.keep :]
        if isinstance(prompt, str):
            self.check_length(found, parameter)
        return found

    def encode_messages(
        self, messages: Sequence[dict[str, str]], *, whole: bool = False, options: ChatOptions = ANSWER
    ) -> list[int]:
        """Token ids of the last message of the user; no other is read."""
        said = [message["content"] for message in messages if message["role"] == "user"]
        if not said:
            raise RequestError("messages: found none of the user, whose last one is the source", parameter="messages")
        if options.keep is None:
            check_fits(self, said[-1], "messages")
        return self.encode_prompt(said[-1], "messages", options)

    def parameters(
        self, request: GenerationRequest, max_tokens: int | None, prompt_tokens: int, **options: Any
    ) -> SamplingParameters:
        """See :class:`ModelService`; source and answer have positions of their own, and without a temperature the
        likeliest tokens are taken."""
        found = super().parameters(request, max_tokens, 0, **{"temperature": 0.0} | options)
        # What is penalized is what the model has written, and not its source.
        if self.context_length is None:
            return found
        # The decoder's first position is the start token's.
        return replace(found, max_new_tokens=min(found.max_new_tokens, self.context_length - 1))
