"""Any causal model of transformers as an engine, decoding its requests together.

Requests join between two steps: newcomers are read in one left-padded batch, and their rows are put beside those that
are already decoding (:mod:`raylm.serving.engines.rows`). A model whose results left padding changes, or that keeps
something else than keys and values, is decoded one request at a time.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylm.errors import first_line
from raylm.models.lora import LoraLayer
from raylm.serving.engines.base import Backend, Constraint, EngineFailure, EngineRefusal, Event, Generate, Reading
from raylm.serving.engines.grammar import Grammar, Grammars
from raylm.serving.engines.row_adapters import RowAdapters
from raylm.serving.engines.rows import Rows, is_plain, left_pad, plain_cache
from raylm.serving.engines.sampling import Sampler

# Padded tokens of one batch of newcomers, so that reading prompts does not hold up those that decode for long.
TOKENS_PER_PREFILL = 2048
# What a model raises where it cannot read a text; among them is that memory does not suffice.
READING_ERRORS = (RuntimeError, ValueError, IndexError)
# Logits of a part of a text that is scored: 64 MB in fp32.
LOGITS_PER_PART = 1 << 24


class TransformersBackend(Backend):
    """Serves a loaded model.

    Args:
        model: a causal model, on the device it is to run on.
        end_ids: token ids that end a text.
        sequences: requests decoded together.
        tokenizer: of the model, for requests whose text must follow a schema; without it they are refused.
        adapters: layers of the adapters that requests may name.
        ends: by adapter, token ids that end its texts too.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: frozenset[int],
        *,
        sequences: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapters: dict[str, dict[str, LoraLayer]] | None = None,
        ends: dict[str, frozenset[int]] | None = None,
    ) -> None:
        super().__init__(sequences)
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        # Of requests that wait: where their text is to begin.
        self._begun: dict[int, Grammar] = {}
        self._model = model.eval()
        self._end_ids = end_ids
        self._ends = ends or {}
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._adapters = RowAdapters(model, adapters or {})
        # Of requests in work: which adapter their rows have.
        self._adapted: dict[int, str | None] = {}
        self.batches = self._padding_is_harmless()
        self._waiting: deque[Generate] = deque()
        self._samplers: dict[int, Sampler] = {}
        self._rows = Rows()
        # Requests of a model that cannot be batched: all ids so far, and what the model remembers of them.
        self._alone: dict[int, _Alone] = {}

    def admit(self, request: Generate) -> None:
        if request.parameters.constraint is not None:
            self._begun[request.number] = self._grammar(request.parameters.constraint)
        self._adapters.check(request.adapter)
        self._adapted[request.number] = request.adapter
        self._waiting.append(request)

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        newcomers = self._next_newcomers()
        for request in newcomers:
            grammar = self._begun.pop(request.number, None)
            end_ids = self._end_ids | self._ends.get(request.adapter or "", frozenset())
            self._samplers[request.number] = Sampler(request.parameters, end_ids, grammar, request.prompt_ids)
        if not self.batches:
            self._alone |= {request.number: _Alone(request) for request in newcomers}
            return [self._advance_alone(number) for number in list(self._alone)]
        if newcomers:
            # Those that decode pause for this step: a prompt's first token is what its sender waits for.
            return self._prefill(newcomers)
        return self._decode()

    def drop(self, number: int) -> None:
        self._waiting = deque(request for request in self._waiting if request.number != number)
        self._samplers.pop(number, None)
        self._begun.pop(number, None)
        self._adapted.pop(number, None)
        self._alone.pop(number, None)
        self._rows.keep(lambda row: row != number)

    def read(self, ids: list[int], adapter: str | None = None) -> Reading:
        """Read a whole text."""
        self._adapters.check(adapter)
        return _TransformersReading(self, ids, adapter)

    @torch.inference_mode()
    def parts(self, ids: list[int], adapter: str | None, *, logits: bool) -> Iterator[torch.Tensor]:
        """Read ``ids`` part by part, so that the logits of a long text are never all in memory.

        Args:
            logits: give logits [tokens, vocabulary] of each part; else its last hidden states [tokens, hidden size].
        """
        # What keeps more than keys and values is read in one pass.
        vocabulary = self._model.config.get_text_config().vocab_size
        size = max(1, LOGITS_PER_PART // vocabulary) if self.batches else len(ids)
        cache = plain_cache() if self.batches else None
        for start in range(0, len(ids), size):
            input_ids = torch.tensor([ids[start : start + size]])
            extra = {"output_hidden_states": not logits}
            with self._adapters.rows([adapter], input_ids.shape[1]):
                if cache is None:
                    output = self._model(input_ids=input_ids.to(self._model.device), **extra)
                else:
                    mask = torch.ones(1, start + input_ids.shape[1], dtype=torch.int64)
                    output = self._run(input_ids, mask, cache, 0 if logits else 1, **extra)
            yield output.logits[0] if logits else output.hidden_states[-1][0]

    def _grammar(self, constraint: Constraint) -> Grammar:
        if self._tokenizer is None:
            raise EngineRefusal(f"{constraint.parameter}: this model is served without its tokenizer")
        try:
            if self._grammars is None:
                columns = self._model.get_output_embeddings().weight.shape[0]
                self._grammars = Grammars(self._tokenizer, columns, self._end_ids)
            return self._grammars.begin(constraint)
        except (RuntimeError, ValueError, ImportError, AttributeError) as error:
            raise EngineRefusal(f"{constraint.parameter}: cannot be followed with this model: {error}") from None

    def _next_newcomers(self) -> list[Generate]:
        """The waiting requests that there is room for, oldest first."""
        newcomers: list[Generate] = []
        longest = 0
        while self._waiting and len(self._samplers) + len(newcomers) < self.sequences:
            longest = max(longest, len(self._waiting[0].prompt_ids))
            if newcomers and longest * (len(newcomers) + 1) > TOKENS_PER_PREFILL:
                break
            newcomers.append(self._waiting.popleft())
        return newcomers

    def _prefill(self, newcomers: list[Generate]) -> list[Event]:
        """Read the prompts, sample each one's first token, and let the rows join the others."""
        input_ids, mask = left_pad([request.prompt_ids for request in newcomers])
        cache = plain_cache()
        try:
            with self._adapters.rows([request.adapter for request in newcomers], input_ids.shape[1]):
                logits = self._forward(input_ids, mask, cache)
        except READING_ERRORS as error:
            return self._blame(newcomers, error)
        tokens, events = self._sample([request.number for request in newcomers], logits)
        joined = Rows([request.number for request in newcomers], cache, mask, tokens)
        joined.keep(self._samplers.__contains__)
        self._rows.join(joined)
        return events

    def _blame(self, newcomers: list[Generate], error: Exception) -> list[Event]:
        """Find whose prompt cannot be read, as memory does not suffice for it, and end that request alone."""
        if self._model.device.type == "cuda":
            # After some errors a GPU answers nothing any more: this raises then, and the engine ends.
            torch.cuda.synchronize()
        if len(newcomers) > 1:
            return [event for request in newcomers for event in self._prefill([request])]
        self._forget(newcomers[0].number)
        return [Event(newcomers[0].number, error=f"the prompt cannot be read: {first_line(error)}")]

    def _decode(self) -> list[Event]:
        """One more token for every row."""
        rows = self._rows
        rows.grow()
        with self._adapters.rows([self._adapted[number] for number in rows.numbers], 1):
            logits = self._forward(rows.last_tokens, rows.mask, rows.cache)
        rows.last_tokens, events = self._sample(rows.numbers, logits)
        rows.keep(self._samplers.__contains__)
        return events

    def _forward(self, input_ids: torch.Tensor, mask: torch.Tensor, cache: object) -> torch.Tensor:
        """Logits after the last column, [rows, vocabulary]; ``cache`` grows by the columns of ``input_ids``."""
        return self._run(input_ids, mask, cache, 1).logits[:, -1]

    def _run(self, input_ids: torch.Tensor, mask: torch.Tensor, cache: object, keep: int, **extra: Any) -> Any:
        """The model's output, with logits of the last ``keep`` columns where it can leave out others; of all for 0."""
        device = self._model.device
        if "position_ids" in self._takes:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            extra["position_ids"] = positions[:, -input_ids.shape[1] :].to(device)
        if "logits_to_keep" in self._takes:
            extra["logits_to_keep"] = keep
        return self._model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            use_cache=True,
            **extra,
        )

    def _sample(self, numbers: list[int], logits: torch.Tensor) -> tuple[torch.Tensor, list[Event]]:
        """The next token of each row, [rows, 1], and the events; requests that end lose their sampler.

        A schema that allows no further token, and logits that are not finite, end their own request only.
        """
        highest, likeliest = logits.max(dim=-1)
        finite, likeliest = highest.isfinite().tolist(), likeliest.tolist()
        tokens, events = [], []
        for row, number in enumerate(numbers):
            sampler = self._samplers[number]
            try:
                if not finite[row]:
                    raise EngineFailure("the model's output is not finite here")
                token = likeliest[row] if sampler.plain else sampler.draw(logits[row])
                events.append(Event(number, [token], sampler.account(token), cached=0))
            except EngineFailure as error:
                token = 0
                events.append(Event(number, error=str(error), refused=isinstance(error, EngineRefusal)))
            if events[-1].last:
                self._forget(number)
            tokens.append(token)
        return torch.tensor(tokens)[:, None], events

    def _forget(self, number: int) -> None:
        del self._samplers[number], self._adapted[number]

    def _advance_alone(self, number: int) -> Event:
        alone = self._alone[number]
        fresh = alone.ids if alone.memory is None else alone.ids[-1:]
        extra = {"past_key_values": alone.memory, "use_cache": True} if "past_key_values" in self._takes else {}
        if "logits_to_keep" in self._takes:
            extra["logits_to_keep"] = 1
        try:
            with self._adapters.rows([alone.request.adapter], len(fresh)):
                output = self._model(input_ids=torch.tensor([fresh], device=self._model.device), **extra)
        except READING_ERRORS as error:
            del self._alone[number]
            return self._blame([alone.request], error)[0]
        # Without a memory that can be handed back, the whole text is read again at each step.
        alone.memory = getattr(output, "past_key_values", None)
        _, (event,) = self._sample([number], output.logits[:, -1])
        alone.ids += event.tokens
        if event.last:
            del self._alone[number]
        return event

    @torch.inference_mode()
    def _padding_is_harmless(self) -> bool:
        """Whether a left-padded row gives what it gives alone, and leaves nothing but plain keys and values."""
        if not {"attention_mask", "past_key_values"} <= self._takes:
            return False
        short, long = [1, 2, 3], [3, 2, 1, 2, 3]
        last: list[torch.Tensor] = []
        for prompts in ([short], [short, long]):
            input_ids, mask = left_pad(prompts)
            cache = plain_cache()
            try:
                last.append(self._forward(input_ids, mask, cache)[0].float())
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
                # How a model refuses a cache or a mask that it does not know is its own affair.
                return False
            if not is_plain(cache) or cache.get_seq_length() != input_ids.shape[1]:
                return False
        return torch.allclose(last[0], last[1], rtol=1e-3, atol=1e-3)


class _TransformersReading(Reading):
    def __init__(self, backend: TransformersBackend, ids: list[int], adapter: str | None) -> None:
        self._backend, self._text = backend, (ids, adapter)

    def logits(self) -> Iterator[np.ndarray]:
        return (part.float().cpu().numpy() for part in self._backend.parts(*self._text, logits=True))

    def hidden(self) -> np.ndarray:
        parts = [part.float().cpu().numpy() for part in self._backend.parts(*self._text, logits=False)]
        return np.concatenate(parts)


class _Alone:
    """A request that is decoded by itself."""

    def __init__(self, request: Generate) -> None:
        self.request = request
        self.ids = list(request.prompt_ids)
        self.memory: object | None = None
