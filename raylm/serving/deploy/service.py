"""What the routes work with: the model's name, tokenizer and engine, its limits, and texts in generation."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from raylm.data.chat import neutralize
from raylm.serving.deploy.watch import TextWatch
from raylm.serving.engines.base import EngineTimeout, FinishReason, Pooling, SamplingParameters
from raylm.serving.engines.client import Engine
from raylm.serving.engines.schemas import SchemaChecker
from raylm.serving.engines.stats import EngineStats
from raylm.serving.http import request_log
from raylm.serving.http.errors import RequestError
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.requests import ChatRequest, CompletionRequest, GenerationRequest
from raylm.serving.tasks.prompts import TextWork, check_fits, token_ids
from raylm.serving.tasks.text import IncrementalDecoder, StopStrings
from raylm.tasks import all_tasks
from raylm.tasks.base import GENERATION, Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raylm.serving.engines.adapted import AdaptedEngine
    from raylm.serving.engines.on_demand import OnDemandEngine

# Seeds are taken modulo this: engines want them in 63 bits, clients may send any integer.
SEEDS = 2**63
# OpenAI's default for completions; chat answers run as long as they may.
COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class TextPiece:
    """A part of one text, as it is streamed: ``finish_reason`` comes with the last one."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    tokens: tuple[int, ...] = ()
    """With the last piece: all ids of the text."""
    logprobs: dict[str, Any] | None = None


@dataclass
class Usage:
    """Token counts of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """OpenAI's usage object."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class ModelService:
    """A served model.

    Attributes:
        name: what requests call the model.
        engine: decodes token ids.
        tokenizer: of the model's directory, with its chat template.
        context_length: prompt and answer tokens together; None without a limit.
        max_new_tokens: most tokens of one text.
        capacity: texts in work and waiting together; more are refused with 503.
        queue_seconds: longest that a text may be expected to wait for its turn.
        request_seconds: a text that takes longer is ended.
        pooling: how hidden states become an embedding.
        metrics: counts the texts.
        service: what the model is offered for.
        schemas: compiles the schemas of response_format.
        text_work: where long texts become tokens.
        token_bytes: of text that one token stands for at most; 0 where that cannot be said, None until it is asked for.
        vocabulary: rows of the model's embedding, often more than the tokenizer has ids; None: as many as those.
        parent: of an adapter, the name of the model that it belongs to.
    """

    name: str
    engine: Engine | OnDemandEngine | AdaptedEngine
    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    max_new_tokens: int
    capacity: int
    queue_seconds: float = math.inf
    request_seconds: float = 600.0
    pooling: Pooling = "mean"
    metrics: ServerMetrics | None = None
    service: Service = GENERATION
    schemas: SchemaChecker = field(default_factory=SchemaChecker, repr=False)
    text_work: TextWork = field(default_factory=TextWork, repr=False)
    token_bytes: int | None = field(default=None, repr=False)
    vocabulary: int | None = None
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def task(self) -> str:
        """What the model does, by its name in ``/v1/models``."""
        return self.service.name

    @property
    def completion_tokens(self) -> int | None:
        """Tokens of a completion that does not say how many; None for as many as there may be."""
        return min(COMPLETION_TOKENS, self.max_new_tokens)

    def check_request(self, request: CompletionRequest | ChatRequest) -> None:
        """Refuse what this kind of model does not do.

        Raises:
            RequestError: names the parameter.
        """

    def load(self) -> EngineStats:
        """What the engine has in work for this name, and its counters."""
        return self.engine.own_stats()

    def check_model(self, name: str | None) -> None:
        """Refuse any other model's name; none at all is taken for this one."""
        if name is not None and name != self.name:
            raise RequestError(
                f"The model '{name}' does not exist; served is '{self.name}'",
                status=404,
                parameter="model",
                code="model_not_found",
            )

    def encode_prompt(self, prompt: str | list[int], parameter: str = "prompt") -> list[int]:
        """Token ids of a prompt, given or of a text.

        Raises:
            RequestError: there is none, or the model does not know one.
        """
        if isinstance(prompt, str):
            ids = token_ids(self.tokenizer, prompt, special=True)
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
            if not ids:
                raise RequestError(f"{parameter}: the text has no tokens, at least one is needed", parameter=parameter)
            return self.check_ids(ids, parameter)
        return self.check_ids(prompt, parameter)

    def check_ids(self, ids: list[int], parameter: str) -> list[int]:
        """``ids``, or a refusal where the model has no embedding of one: looked up, it would end the engine."""
        vocabulary = self.vocabulary or len(self.tokenizer)
        unknown = next((token for token in ids if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise RequestError(
                f"{parameter}: found token id {unknown}, allowed: 0 to {vocabulary - 1}", parameter=parameter
            )
        return ids

    def encode_messages(self, messages: Sequence[dict[str, str]], *, whole: bool = False) -> list[int]:
        """Token ids of a conversation by the model's own chat template, up to where the answer begins.

        Text that reads as a special token is defused: no message can end its own turn. Where the ``whole`` of it has
        to fit into the context, it is refused before it is tokenized.
        """
        templates = self.tokenizer.chat_template
        if not templates or (isinstance(templates, dict) and "default" not in templates):
            what = "several chat templates and none named default" if templates else "no chat template"
            raise RequestError(f"The model '{self.name}' has {what}; use /v1/completions", code="no_chat_template")
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        safe = [message | {"content": neutralize(message["content"], special)} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise RequestError(f"messages: the chat template refuses them: {error}", parameter="messages") from None
        # The template writes the special tokens itself.
        if whole:
            check_fits(self, text, "messages")
        ids = token_ids(self.tokenizer, text, special=False)
        if not ids:
            raise RequestError("messages: they have no tokens, at least one is needed", parameter="messages")
        return self.check_ids(ids, "messages")

    def parameters(
        self,
        request: GenerationRequest,
        max_tokens: int | None,
        prompt_tokens: int,
        *,
        temperature: float = 1.0,
        schema: str | None = None,
    ) -> SamplingParameters:
        """How to decode ``request`` after a prompt of ``prompt_tokens``.

        Args:
            max_tokens: what the request asks for; None takes what is allowed and fits.
            temperature: of a request that does not say.
            schema: JSON schema that the text must follow.

        Raises:
            RequestError: more than the server allows, or than the model's context holds.
        """
        if max_tokens is not None and max_tokens > self.max_new_tokens:
            raise RequestError(
                f"max_tokens: found {max_tokens}, allowed: at most {self.max_new_tokens}", parameter="max_tokens"
            )
        room = self.max_new_tokens
        if self.context_length is not None:
            room = self.context_length - prompt_tokens
            if room < (max_tokens or 1):
                raise RequestError(
                    f"This model's maximum context length is {self.context_length} tokens, but the request needs "
                    f"{prompt_tokens + (max_tokens or 1)}: {prompt_tokens} of the prompt and at least "
                    f"{max_tokens or 1} of the answer",
                    parameter="max_tokens" if max_tokens and room > 0 else "prompt",
                    code="context_length_exceeded",
                )
        temperature = temperature if request.temperature is None else request.temperature
        top_p = 1.0 if request.top_p is None else request.top_p
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        return SamplingParameters(
            max_new_tokens=max_tokens or min(room, self.max_new_tokens),
            temperature=temperature,
            top_p=top_p,
            seed=seed % SEEDS,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            schema=schema,
        )

    def check_length(self, ids: Sequence[int], parameter: str) -> None:
        """Refuse a text that is longer than the model's context."""
        if self.context_length is not None and len(ids) > self.context_length:
            raise RequestError(
                f"This model's maximum context length is {self.context_length} tokens, but the text has {len(ids)}",
                parameter=parameter,
                code="context_length_exceeded",
            )

    def token_text(self, token: int) -> str:
        """What one token id reads, special tokens included."""
        return self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def admit(self, texts: int) -> None:
        """Refuse ``texts`` more where the queue is full, or where they would wait too long."""
        stats = self.engine.stats()
        full = stats.running + stats.waiting + self.text_work.texts + texts > self.capacity
        if full or stats.wait_seconds > self.queue_seconds:
            # By then the queue is short enough again, if nobody else comes.
            wait = max(1, math.ceil(stats.wait_seconds - (0 if full else self.queue_seconds)))
            raise RequestError(
                f"The server is busy: {stats.running} texts in work, {stats.waiting} waiting; try again later",
                status=503,
                code="server_busy",
                kind="server_error",
                headers={"Retry-After": str(wait)},
            )

    async def generate(
        self, prompts: Sequence[list[int]], parameters: Sequence[SamplingParameters], stops: Sequence[str], usage: Usage
    ) -> AsyncIterator[TextPiece]:
        """Generate the texts of all ``prompts`` side by side, and give their pieces as they come.

        When the caller stops listening, the engine stops generating.

        Args:
            prompts: one list of token ids per text.
            parameters: one per text.
            stops: strings before which a text ends.
            usage: counts completion tokens on the way.
        """
        if len(prompts) == 1:
            async for piece in self._text(0, prompts[0], parameters[0], stops, usage):
                yield piece
            return
        pieces: asyncio.Queue[TextPiece | None] = asyncio.Queue()

        async def follow(index: int) -> None:
            try:
                async for piece in self._text(index, prompts[index], parameters[index], stops, usage):
                    pieces.put_nowait(piece)
            finally:
                pieces.put_nowait(None)

        tasks = [asyncio.create_task(follow(index)) for index in range(len(prompts))]
        try:
            ended = 0
            while ended < len(tasks):
                piece = await pieces.get()
                if piece is None:
                    ended += 1
                else:
                    yield piece
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _text(
        self, index: int, prompt: list[int], parameters: SamplingParameters, stops: Sequence[str], usage: Usage
    ) -> AsyncIterator[TextPiece]:
        decoder, stopping = IncrementalDecoder(self.tokenizer), StopStrings(stops)
        late = EngineTimeout(f"the text was not ready within {self.request_seconds:g} s (serving.request_seconds)")
        ids: list[int] = []
        watch = TextWatch(self)
        request_log.note(model=self.name)
        request_log.count(texts=1, prompt_tokens=len(prompt))
        with contextlib.ExitStack() as stack:
            stack.enter_context(watch)
            stream = (await self.engine.open()).submit(prompt, parameters)
            stack.callback(stream.cancel)
            timer = asyncio.get_running_loop().call_later(self.request_seconds, stream.cancel, late)
            stack.callback(timer.cancel)
            async for tokens in stream:
                watch.tokens(len(tokens))
                usage.completion_tokens += len(tokens)
                ids += tokens
                text = stopping.push(decoder.push(tokens))
                if stopping.found:
                    watch.reason = "stop"
                    yield TextPiece(index, text, "stop", tuple(ids))
                    return
                if text:
                    yield TextPiece(index, text)
            watch.reason = stream.finish_reason
            text = stopping.push(decoder.finish())
            if stopping.found:
                yield TextPiece(index, text, "stop", tuple(ids))
                return
            yield TextPiece(index, text + stopping.finish(), stream.finish_reason, tuple(ids))


class Models:
    """The models of one application.

    Args:
        services: at least one; the first answers requests that name none.
    """

    def __init__(self, services: Sequence[ModelService]) -> None:
        self.services = list(services)
        for service in self.services:
            # One process for the schemas of all.
            service.schemas = self.services[0].schemas
        self._by_name = {service.name: service for service in services}

    def find(self, name: str | None, *tasks: str) -> ModelService:
        """The model called ``name``, or the first one; where ``tasks`` are given, one that does any of them.

        Raises:
            RequestError: status 404, or 400 where the named model does something else.
        """
        if name is None:
            for task in tasks:
                if (found := next((s for s in self.services if s.task == task), None)) is not None:
                    return found
            if not tasks:
                return self.services[0]
            raise RequestError(
                f"This server does not serve {_in_words(tasks)}; serving.models takes more",
                status=404,
                parameter="model",
                code="model_not_found",
            )
        if name not in self._by_name:
            served = ", ".join(f"'{known}'" for known in self._by_name)
            raise RequestError(
                f"The model '{name}' does not exist; served: {served}",
                status=404,
                parameter="model",
                code="model_not_found",
            )
        found = self._by_name[name]
        if tasks and found.task not in tasks:
            raise RequestError(
                f"The model '{name}' is {found.service.what}; this needs {_in_words(tasks)}",
                parameter="model",
                code="model_not_supported",
            )
        return found


def _in_words(tasks: Sequence[str]) -> str:
    """Models that do any of the ``tasks``."""
    known = {task.service.name: task.service.what for task in all_tasks()}
    return " or ".join(known[task] for task in tasks)
