"""From a request's texts to token ids: refused where they cannot fit, behind admission, and off the event loop if long.

A token stands for at most so many bytes of text. Where every byte of a text is in some token, a longer text than the
context's tokens can stand for is refused before it is tokenized; no text that fits ever is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from raylm.serving.http.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raylm.serving.deploy.service import ModelService

Result = TypeVar("Result")
# Characters that are tokenized in the event loop: they take it some milliseconds, a thread would take longer to answer.
MOST_INLINE = 4096


@dataclass(frozen=True)
class PromptOptions:
    """How a text becomes token ids.

    Attributes:
        special: with the tokens that the tokenizer puts around a text.
        keep: last tokens of it that stay; None for all.
    """

    special: bool = True
    keep: int | None = None


@dataclass(frozen=True)
class ChatOptions(PromptOptions):
    """How a conversation becomes token ids.

    Attributes:
        answer: the template begins the assistant's answer.
        continues: the last message is gone on with.
        arguments: that the template is given besides.
    """

    special: bool = False
    answer: bool = True
    continues: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


PLAIN, ANSWER = PromptOptions(), ChatOptions()


class TextWork:
    """Work with the texts of one model, in one thread: long texts wait for each other, and take nobody else's thread.

    Attributes:
        texts: in work and waiting.
    """

    def __init__(self) -> None:
        self.texts = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="texts")

    async def run(self, characters: int, texts: int, work: Callable[[], Result]) -> Result:
        """What ``work`` returns; it is done here and now where there are few ``characters``."""
        if characters <= MOST_INLINE:
            return work()
        self.texts += texts
        asked = asyncio.get_running_loop().run_in_executor(self._thread, work)
        # It goes on where the client has left, and counts until it has ended.
        asked.add_done_callback(lambda _: self._ended(texts))
        return await asked

    def _ended(self, texts: int) -> None:
        self.texts -= texts


async def encode_prompts(
    service: ModelService,
    prompts: Sequence[str | list[int]],
    parameter: str = "prompt",
    options: PromptOptions = PLAIN,
    places: int | None = None,
) -> list[list[int]]:
    """Token ids of all ``prompts``.

    Args:
        places: texts that they count as in the queue; by default each does.

    Raises:
        RequestError: the queue is full, or a prompt is longer than the context or has unknown ids.
    """
    places = len(prompts) if places is None else places
    service.admit(places)
    if options.keep is None:
        for prompt in prompts:
            check_fits(service, prompt, parameter)
    characters = sum(map(len, prompts))
    return await service.text_work.run(
        characters, places, lambda: [service.encode_prompt(prompt, parameter, options) for prompt in prompts]
    )


async def encode_messages(
    service: ModelService, messages: Sequence[dict[str, str]], options: ChatOptions = ANSWER
) -> list[int]:
    """Token ids of a conversation.

    Raises:
        RequestError: the queue is full, or the chat template refuses the messages.
    """
    service.admit(1)
    # Each message costs the template something, even one without text.
    characters = sum(len(message["content"]) + len("<|user|>") for message in messages)
    return await service.text_work.run(
        characters, 1, lambda: service.encode_messages(messages, whole=True, options=options)
    )


def kept_tokens(service: ModelService, wanted: int | None, answer: int = 0) -> int | None:
    """``truncate_prompt_tokens`` as tokens of a prompt that stay; None for all.

    Args:
        wanted: the request's; -1 for as many as the context has room for.
        answer: tokens to leave room for.

    Raises:
        RequestError: the context is shorter.
    """
    limit = service.context_length
    if wanted is None or (wanted == -1 and limit is None):
        return None
    if wanted == -1:
        return max(1, limit - answer)
    if limit is not None and wanted > limit:
        raise RequestError(
            f"truncate_prompt_tokens: found {wanted}, allowed: -1, or 1 to {limit}, this model's context length",
            parameter="truncate_prompt_tokens",
        )
    return wanted


def check_fits(service: ModelService, prompt: str | Sequence[int], parameter: str) -> None:
    """Refuse a prompt that is longer than the context whatever its tokens are."""
    if not isinstance(prompt, str):
        service.check_length(prompt, parameter)
        return
    limit = most_characters(service)
    if limit is not None and len(prompt) > limit:
        raise RequestError(
            f"This model's maximum context length is {service.context_length} tokens, which {limit} characters "
            f"at most can fit into, but {parameter} has {len(prompt)}",
            parameter=parameter,
            code="context_length_exceeded",
        )


def most_characters(service: ModelService) -> int | None:
    """Characters that the context can hold at most; None where that cannot be said."""
    if service.context_length is None:
        return None
    if service.token_bytes is None:
        service.token_bytes = longest_token(service.tokenizer) or 0
    # A character is at least one byte.
    return service.context_length * service.token_bytes or None


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Token ids of ``text``.

    Args:
        special: add the tokens that the tokenizer puts around a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(text) <= MOST_INLINE:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    # Neither offsets nor masks, which take longer than the tokens; and other threads run meanwhile.
    return backend.encode_batch_fast([text], add_special_tokens=special)[0].ids


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Bytes of text that a token stands for at most; None where some text may be in no token.

    That is said of byte-level tokenizers only (Radford et al. 2019), as of Llama 3, Qwen and raylm's own: a token for
    unknown words, or a normalizer that drops white space, stands for text of any length.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts: dict[str, Any] = json.loads(backend.to_str())
    alphabet = byte_alphabet()
    vocabulary = parts["model"].get("vocab")
    if parts["model"]["type"] != "BPE" or parts["normalizer"] is not None or not alphabet <= set(vocabulary):
        return None
    steps = parts["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    if any(step.get("type") not in ("ByteLevel", "Split", "Digits") for step in steps):
        return None
    if any(step.get("behavior") == "Removed" for step in steps):
        return None
    added = parts["added_tokens"]
    # These take the white space beside them, however much there is.
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    # A character of a byte-level token is a byte of text.
    return max([*map(len, vocabulary), *(len(token["content"].encode()) for token in added)])


def byte_alphabet() -> set[str]:
    """The characters that stand for the 256 bytes in byte-level tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())
