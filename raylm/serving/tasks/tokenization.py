"""/tokenize and /detokenize, as vLLM has them: what a model makes of a text, and the way back."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from raylm.serving.deploy.service import ModelService
from raylm.serving.http.bodies import Items, RequestBody
from raylm.serving.http.messages import MOST_MESSAGES, Message
from raylm.serving.http.requests import check_template_arguments
from raylm.serving.tasks.prompts import ChatOptions, check_fits, encode_messages, token_ids


class TokenizeRequest(RequestBody):
    """``POST /tokenize``: of a prompt or of messages."""

    model: str | None = None
    """Name of the model; by default the first one."""
    prompt: str | None = None
    """The text."""
    messages: Items[Message] | None = Field(default=None, min_length=1, max_length=MOST_MESSAGES)
    """A conversation, in place of a text."""
    add_special_tokens: bool | None = None
    """Let the tokenizer put its special tokens around the text; true by default for a prompt."""
    add_generation_prompt: bool | None = None
    """Of messages: let the chat template begin the assistant's answer; true by default."""
    continue_final_message: bool | None = None
    """Of messages: go on with the last one instead of answering it."""
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=64)
    """Of messages: what the chat template is given besides."""
    return_token_strs: bool | None = None
    """Give the tokens' names in the vocabulary too."""

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: allowed: either prompt or messages")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: allowed only without add_generation_prompt")
        check_template_arguments(self.chat_template_kwargs)
        return self


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    tokens: Items[int]
    """Token ids."""
    model: str | None = None
    """Name of the model; by default the first one."""


async def tokenize(service: ModelService, request: TokenizeRequest) -> dict[str, Any]:
    """Token ids, their number, and the model's context length."""
    if request.messages is not None:
        options = ChatOptions(
            special=bool(request.add_special_tokens),
            answer=not request.continue_final_message and request.add_generation_prompt is not False,
            continues=bool(request.continue_final_message),
            arguments=request.chat_template_kwargs or {},
        )
        ids = await encode_messages(service, [message.plain() for message in request.messages], options)
    else:
        text, special = request.prompt or "", request.add_special_tokens is not False
        service.admit(1)
        check_fits(service, text, "prompt")
        ids = await service.text_work.run(
            len(text), 1, lambda: list(token_ids(service.tokenizer, text, special=special))
        )
    names = service.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.context_length, "tokens": ids, "token_strs": names}


async def detokenize(service: ModelService, request: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids, special tokens included.

    Raises:
        RequestError: the model does not know one.
    """
    ids = service.check_ids(request.tokens, "tokens")
    service.admit(1)

    def decode() -> str:
        return service.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return {"prompt": await service.text_work.run(len(ids), 1, decode)}
