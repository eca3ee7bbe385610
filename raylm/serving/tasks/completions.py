"""/v1/completions and /v1/chat/completions: from a request to prompts, parameters and the reply."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from fastapi.responses import JSONResponse, Response

from raylm.serving.deploy.service import ModelService
from raylm.serving.deploy.texts import TextPiece, Usage
from raylm.serving.engines.base import Constraint
from raylm.serving.http.replies import ChatReply, CompletionReply, send_reply
from raylm.serving.http.requests import ChatRequest, CompletionRequest, TextRequest
from raylm.serving.tasks.logprobs import chat_logprobs, completion_logprobs, describe, score
from raylm.serving.tasks.prompts import ChatOptions, PromptOptions, encode_messages, encode_prompts, kept_tokens
from raylm.serving.tasks.structured import wanted_constraint


async def complete(service: ModelService, request: CompletionRequest) -> Response:
    """Text that goes on from each prompt, or answers it."""
    service.check_request(request)
    wanted = request.max_tokens or service.completion_tokens
    room = wanted if request.max_tokens is None else request.max_tokens
    options = PromptOptions(
        special=request.add_special_tokens is not False,
        keep=kept_tokens(service, request.truncate_prompt_tokens, 1 if room is None else room),
    )
    prompts = await encode_prompts(service, request.prompts, options=options)
    echoes = [
        _echo(service, prompt, ids, cut=options.keep is not None)
        for prompt, ids in zip(request.prompts, prompts, strict=True)
    ]
    if only_scores(request):
        return await _score(service, request, prompts, echoes)
    choices = request.n or 1
    constraint = await _constraint(service, request)
    parameters = [service.parameters(request, wanted, len(prompt), constraint=constraint) for prompt in prompts]
    repeated = [echo for echo in echoes for _ in range(choices)] if request.echo else ()
    logprobs = None
    if request.logprobs is not None:
        logprobs = functools.partial(completion_logprobs, service, top=request.logprobs, echo=bool(request.echo))
    reply = CompletionReply(service, repeated, _shown(request, prompts, choices))
    return await send_reply(service, request, reply, prompts, parameters, choices, logprobs)


async def chat(service: ModelService, request: ChatRequest) -> Response:
    """The assistant's next message in a conversation."""
    service.check_request(request)
    wanted = request.max_completion_tokens or request.max_tokens
    options = ChatOptions(
        special=bool(request.add_special_tokens),
        keep=kept_tokens(service, request.truncate_prompt_tokens, wanted or 1),
        answer=not request.continue_final_message and request.add_generation_prompt is not False,
        continues=bool(request.continue_final_message),
        arguments=request.chat_template_kwargs or {},
    )
    prompt = await encode_messages(service, [message.plain() for message in request.messages], options)
    constraint = await _constraint(service, request)
    parameters = service.parameters(request, wanted, len(prompt), constraint=constraint)
    logprobs = functools.partial(chat_logprobs, service, top=request.top_logprobs or 0) if request.logprobs else None
    reply = ChatReply(service, _shown(request, [prompt], 1))
    return await send_reply(service, request, reply, [prompt], [parameters], request.n or 1, logprobs)


def _shown(request: TextRequest, prompts: list[list[int]], choices: int) -> list[list[int]] | None:
    """The prompt of each text, where the answer is to show it."""
    return [prompt for prompt in prompts for _ in range(choices)] if request.return_token_ids else None


async def _constraint(service: ModelService, request: TextRequest) -> Constraint | None:
    # OpenVINO GenAI compiles with a library of its own.
    source = None if service.engine.name == "openvino" else service.tokenizer.name_or_path
    return await wanted_constraint(request.response_format, request.structured_outputs, service.schemas, source or None)


def only_scores(request: CompletionRequest) -> bool:
    """Whether the answer can be read off the prompts' own scores: what evaluation harnesses ask for.

    That is an echo with log-probabilities and no token after it, or only the likeliest one.
    """
    if not request.echo or request.stream or (request.n or 1) > 1:
        return False
    if request.max_tokens == 0:
        return True
    forced = request.response_format is not None and request.response_format.type != "text"
    as_is = request.plain and not forced and request.structured_outputs is None
    shown = request.skip_special_tokens is not False
    return request.max_tokens == 1 and request.logprobs is not None and request.temperature == 0 and as_is and shown


async def _score(
    service: ModelService, request: CompletionRequest, prompts: list[list[int]], echoes: list[str]
) -> Response:
    for prompt in prompts:
        service.check_length([*prompt, *range(request.max_tokens or 0)], "prompt")
    service.admit(len(prompts))
    usage, pieces = Usage(prompt_tokens=sum(map(len, prompts))), []
    scored = await score(service, prompts, request.logprobs or 0)
    for index, (prompt, scores) in enumerate(zip(prompts, scored, strict=True)):
        # The likeliest token after the prompt is the answer, where there is to be one.
        tokens = scores.top_ids[-1, : request.max_tokens].tolist()
        usage.completion_tokens += len(tokens)
        logprobs = None
        if request.logprobs is not None:
            chosen = np.concatenate([scores.chosen, scores.top[-1, : len(tokens)]])
            logprobs = await describe(
                service, dataclasses.replace(scores, chosen=chosen), [*prompt, *tokens], 0, request.logprobs
            )
        text = service.tokenizer.decode(tokens, skip_special_tokens=True)
        pieces.append(TextPiece(index, text, "length", tuple(tokens), logprobs, tuple(tokens)))
    return JSONResponse(CompletionReply(service, echoes, _shown(request, prompts, 1)).whole(pieces, usage))


def _echo(service: ModelService, prompt: str | list[int], ids: list[int], *, cut: bool) -> str:
    if isinstance(prompt, str) and not cut:
        return prompt
    return service.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
