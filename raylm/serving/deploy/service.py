"""What the routes work with: the model's name, tokenizer and engine, and its limits."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from jinja2 import TemplateError

from raylm.data.chat import neutralize
from raylm.serving.deploy.texts import TextOptions
from raylm.serving.engines.base import NO_BIAS, Constraint, Pooling, SamplingParameters
from raylm.serving.engines.client import Engine
from raylm.serving.engines.schemas import SchemaChecker
from raylm.serving.engines.stats import EngineStats
from raylm.serving.http.errors import RequestError
from raylm.serving.http.generation import GenerationRequest
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.requests import ChatRequest, CompletionRequest
from raylm.serving.tasks.prompts import ANSWER, PLAIN, ChatOptions, PromptOptions, TextWork, check_fits, token_ids
from raylm.tasks.base import GENERATION, Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raylm.serving.engines.adapted import AdaptedEngine
    from raylm.serving.engines.on_demand import OnDemandEngine

# Seeds are taken modulo this: engines want them in 63 bits, clients may send any integer.
SEEDS = 2**63
# OpenAI's default for completions; chat answers run as long as they may.
COMPLETION_TOKENS = 16
# Of a text that may be as long as it likes, where neither the model nor the server says how long.
DEFAULT_TOKENS = 256
Ids = TypeVar("Ids", bound=Sequence[int])


@dataclass
class ModelService:
    """A served model.

    Attributes:
        name: what requests call the model.
        engine: decodes token ids.
        tokenizer: of the model's directory, with its chat template.
        context_length: prompt and answer tokens together; None without a limit.
        max_new_tokens: most tokens of one text; None: as many as the context has room for.
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
        width: numbers of an embedding; None where that is not known.
        token_ids: whether it takes token ids to embed.
    """

    name: str
    engine: Engine | OnDemandEngine | AdaptedEngine
    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    max_new_tokens: int | None
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
    width: int | None = None
    token_ids: bool = True
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def task(self) -> str:
        """What the model does, by its name in ``/v1/models``."""
        return self.service.name

    @property
    def completion_tokens(self) -> int | None:
        """Tokens of a completion that does not say how many; None for as many as there may be."""
        return min(COMPLETION_TOKENS, self.max_new_tokens or COMPLETION_TOKENS)

    def check_request(self, request: CompletionRequest | ChatRequest) -> None:
        """Refuse what this kind of model does not do.

        Raises:
            RequestError: names the parameter.
        """

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {str(token): number for number, token in added if token.special}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(self.special_tokens.values())

    def text_options(self, request: GenerationRequest) -> TextOptions:
        """Where texts of ``request`` end. No text that is shown holds a special token: a stop string that is one ends
        the text by its id."""
        named = {self.special_tokens[stop]: stop for stop in request.stops if stop in self.special_tokens}
        return TextOptions(
            tuple(request.stops),
            named,
            include_stop=bool(request.include_stop_str_in_output),
            skip_special=request.skip_special_tokens is not False,
            min_tokens=request.min_tokens or 0,
        )

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

    def encode_prompt(
        self, prompt: str | list[int], parameter: str = "prompt", options: PromptOptions = PLAIN
    ) -> list[int]:
        """Token ids of a prompt, given or of a text.

        Raises:
            RequestError: there is none, or the model does not know one.
        """
        if isinstance(prompt, str):
            ids = token_ids(self.tokenizer, prompt, special=options.special)
            if not ids and options.special and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
            if not ids:
                raise RequestError(f"{parameter}: the text has no tokens, at least one is needed", parameter=parameter)
        else:
            ids = prompt
        return self.check_ids(self._cut(prompt, ids, options), parameter)

    def _cut(self, prompt: str | list[int], ids: list[int], options: PromptOptions) -> list[int]:
        """The last ones of ``ids``, as many as ``options`` let stay; the tokens around a text stay too."""
        if options.keep is None or len(ids) <= options.keep:
            return ids
        bare = token_ids(self.tokenizer, prompt, special=False) if isinstance(prompt, str) and options.special else ids
        before = next((at for at in range(len(ids) - len(bare) + 1) if ids[at : at + len(bare)] == bare), 0)
        around = len(ids) - len(bare)
        if around >= options.keep:
            return ids[-options.keep :]
        return [*ids[:before], *bare[len(bare) + around - options.keep :], *ids[before + len(bare) :]]

    def check_ids(self, ids: Ids, parameter: str) -> Ids:
        """``ids``, or a refusal where the model has no embedding of one: looked up, it would end the engine."""
        vocabulary = self.vocabulary or len(self.tokenizer)
        unknown = next((token for token in ids if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise RequestError(
                f"{parameter}: found token id {unknown}, allowed: 0 to {vocabulary - 1}", parameter=parameter
            )
        return ids

    def encode_messages(
        self, messages: Sequence[dict[str, str]], *, whole: bool = False, options: ChatOptions = ANSWER
    ) -> list[int]:
        """Token ids of a conversation by the model's own chat template, up to where the answer begins.

        Text that reads as a special token is defused: no message can end its own turn. Where the ``whole`` of it has
        to fit into the context, it is refused before it is tokenized.
        """
        templates = self.tokenizer.chat_template
        if not templates or (isinstance(templates, dict) and "default" not in templates):
            what = "several chat templates and none named default" if templates else "no chat template"
            raise RequestError(f"The model '{self.name}' has {what}; use /v1/completions", code="no_chat_template")
        safe = [message | {"content": neutralize(message["content"], self.special_tokens)} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                safe,
                tokenize=False,
                add_generation_prompt=options.answer,
                continue_final_message=options.continues,
                **options.arguments,
            )
        except (TemplateError, ValueError, TypeError, AttributeError, LookupError) as error:
            # What is not jinja's own comes of arguments that the template did not expect.
            raise RequestError(f"messages: the chat template refuses them: {error}", parameter="messages") from None
        # The template writes the special tokens itself.
        if whole and options.keep is None:
            check_fits(self, text, "messages")
        ids = token_ids(self.tokenizer, text, special=options.special)
        if not ids:
            raise RequestError("messages: they have no tokens, at least one is needed", parameter="messages")
        return self.check_ids(self._cut(text, ids, options), "messages")

    def parameters(
        self,
        request: GenerationRequest,
        max_tokens: int | None,
        prompt_tokens: int,
        *,
        temperature: float = 1.0,
        constraint: Constraint | None = None,
    ) -> SamplingParameters:
        """How to decode ``request`` after a prompt of ``prompt_tokens``.

        Args:
            max_tokens: what the request asks for; None takes what is allowed and fits.
            temperature: of a request that does not say.
            constraint: what the text must be.

        Raises:
            RequestError: more than the server allows, than the model's context holds, or than its engine does.
        """
        most = self._room(max_tokens, prompt_tokens)
        if (request.min_tokens or 0) > most:
            raise RequestError(
                f"min_tokens: found {request.min_tokens}, allowed: at most {most} (max_tokens)", parameter="min_tokens"
            )
        shaping = request.shaping()
        if shaping["top_k"] >= (self.vocabulary or len(self.tokenizer)):
            shaping["top_k"] = 0
        shaping["stop_token_ids"] += tuple(self.text_options(request).special_stops)
        self.check_ids([token for token, _ in shaping["logit_bias"]], "logit_bias")
        self.check_ids(shaping["stop_token_ids"], "stop_token_ids")
        if shaping["logit_bias"] and not self.biases:
            raise RequestError(NO_BIAS, parameter="logit_bias", code="not_supported")
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        return SamplingParameters(
            max_new_tokens=most,
            temperature=temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=seed % SEEDS,
            constraint=constraint,
            **shaping,
        )

    @property
    def biases(self) -> bool:
        """Whether the engine knows logit_bias."""
        return self.engine.name != "openvino"

    def _room(self, max_tokens: int | None, prompt_tokens: int) -> int:
        """Most tokens of a text after a prompt of ``prompt_tokens``.

        Raises:
            RequestError: it is less than ``max_tokens``, or none.
        """
        limit = self.max_new_tokens
        if max_tokens is not None and limit is not None and max_tokens > limit:
            raise RequestError(
                f"max_tokens: found {max_tokens}, allowed: at most {limit} (serving.max_new_tokens)",
                parameter="max_tokens",
            )
        if self.context_length is None:
            return max_tokens or limit or DEFAULT_TOKENS
        room = self.context_length - prompt_tokens
        if room < 1:
            raise RequestError(
                f"This model's maximum context length is {self.context_length} tokens, but the prompt has "
                f"{prompt_tokens}, and the answer needs at least 1",
                parameter="prompt",
                code="context_length_exceeded",
            )
        if max_tokens is not None and max_tokens > room:
            raise RequestError(
                f"max_tokens: found {max_tokens}, allowed: at most {room}, as this model's maximum context length is "
                f"{self.context_length} tokens and the prompt has {prompt_tokens}",
                parameter="max_tokens",
                code="context_length_exceeded",
            )
        return max_tokens or min(room, limit or room)

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
