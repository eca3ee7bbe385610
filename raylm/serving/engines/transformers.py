"""Any causal model of transformers as an engine, decoding its requests together.

Requests join between two steps: newcomers are read in one left-padded batch, and their rows are put beside those that
are already decoding (:mod:`raylm.serving.engines.rows`). A model whose results left padding changes, or that keeps
something else than keys and values, is decoded one request at a time.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylm.serving.engines.base import Backend, EngineRefusal, Event, Generate, Reading
from raylm.serving.engines.grammar import Grammar, Grammars
from raylm.serving.engines.rows import Rows, is_plain, left_pad, plain_cache
from raylm.serving.engines.sampling import Sampler

# Padded tokens of one batch of newcomers, so that reading prompts does not hold up those that decode for long.
TOKENS_PER_PREFILL = 2048


class TransformersBackend(Backend):
    """Serves a loaded model.

    Args:
        model: a causal model, on the device it is to run on.
        end_ids: token ids that end a text.
        sequences: requests decoded together.
        tokenizer: of the model, for requests whose text must follow a schema; without it they are refused.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: frozenset[int],
        *,
        sequences: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(sequences)
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        # Of requests that wait: where their text is to begin.
        self._begun: dict[int, Grammar] = {}
        self._model = model.eval()
        self._end_ids = end_ids
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self.batches = self._padding_is_harmless()
        self._waiting: deque[Generate] = deque()
        self._samplers: dict[int, Sampler] = {}
        self._rows = Rows()
        # Requests of a model that cannot be batched: all ids so far, and what the model remembers of them.
        self._alone: dict[int, _Alone] = {}

    def admit(self, request: Generate) -> None:
        if request.parameters.schema is not None:
            self._begun[request.number] = self._grammar(request.parameters.schema)
        self._waiting.append(request)

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        newcomers = self._next_newcomers()
        for request in newcomers:
            grammar = self._begun.pop(request.number, None)
            self._samplers[request.number] = Sampler(request.parameters, self._end_ids, grammar)
        if not self.batches:
            self._alone |= {request.number: _Alone(request.prompt_ids) for request in newcomers}
            return [self._advance_alone(number) for number in list(self._alone)]
        if newcomers:
            # Those that decode pause for this step: a prompt's first token is what its sender waits for.
            return self._prefill(newcomers)
        return self._decode()

    def drop(self, number: int) -> None:
        self._waiting = deque(request for request in self._waiting if request.number != number)
        self._samplers.pop(number, None)
        self._begun.pop(number, None)
        self._alone.pop(number, None)
        self._rows.keep(lambda row: row != number)

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Reading:
        """Read a whole text in one pass."""
        input_ids = torch.tensor([ids], device=self._model.device)
        output = self._model(input_ids=input_ids, output_hidden_states=True)
        return _TransformersReading(output.logits[0], output.hidden_states[-1][0])

    def _grammar(self, schema: str) -> Grammar:
        if self._tokenizer is None:
            raise EngineRefusal("response_format: this model is served without its tokenizer")
        try:
            if self._grammars is None:
                columns = self._model.get_output_embeddings().weight.shape[0]
                self._grammars = Grammars(self._tokenizer, columns, self._end_ids)
            return self._grammars.begin(schema)
        except (RuntimeError, ValueError, ImportError, AttributeError) as error:
            raise EngineRefusal(f"response_format: cannot be followed with this model: {error}") from None

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
        logits = self._forward(input_ids, mask, cache)
        tokens, events = self._sample([request.number for request in newcomers], logits)
        joined = Rows([request.number for request in newcomers], cache, mask, tokens)
        joined.keep(self._samplers.__contains__)
        self._rows.join(joined)
        return events

    def _decode(self) -> list[Event]:
        """One more token for every row."""
        rows = self._rows
        rows.grow()
        logits = self._forward(rows.last_tokens, rows.mask, rows.cache)
        rows.last_tokens, events = self._sample(rows.numbers, logits)
        rows.keep(self._samplers.__contains__)
        return events

    def _forward(self, input_ids: torch.Tensor, mask: torch.Tensor, cache: object) -> torch.Tensor:
        """Logits after the last column, [rows, vocabulary]; ``cache`` grows by the columns of ``input_ids``."""
        device = self._model.device
        extra: dict = {}
        if "position_ids" in self._takes:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            extra["position_ids"] = positions[:, -input_ids.shape[1] :].to(device)
        if "logits_to_keep" in self._takes:
            extra["logits_to_keep"] = 1
        return self._model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            use_cache=True,
            **extra,
        ).logits[:, -1]

    def _sample(self, numbers: list[int], logits: torch.Tensor) -> tuple[torch.Tensor, list[Event]]:
        """The next token of each row, [rows, 1], and the events; requests that end lose their sampler.

        A schema that allows no further token ends its own request only.
        """
        likeliest = logits.argmax(dim=-1).tolist()
        tokens, events = [], []
        for row, number in enumerate(numbers):
            sampler = self._samplers[number]
            try:
                token = likeliest[row] if sampler.plain else sampler.draw(logits[row])
            except EngineRefusal as error:
                del self._samplers[number]
                tokens.append(0)
                events.append(Event(number, error=str(error), refused=True))
                continue
            reason = sampler.account(token)
            if reason:
                del self._samplers[number]
            tokens.append(token)
            events.append(Event(number, [token], reason))
        return torch.tensor(tokens)[:, None], events

    def _advance_alone(self, number: int) -> Event:
        alone = self._alone[number]
        fresh = alone.ids if alone.memory is None else alone.ids[-1:]
        extra = {"past_key_values": alone.memory, "use_cache": True} if "past_key_values" in self._takes else {}
        output = self._model(input_ids=torch.tensor([fresh], device=self._model.device), **extra)
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
    """Logits [tokens, vocabulary] and last hidden states [tokens, hidden size] of one text."""

    def __init__(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        self._logits, self._hidden = logits, hidden

    def logits(self) -> Iterator[np.ndarray]:
        yield self._logits.float().cpu().numpy()

    def hidden(self) -> np.ndarray:
        return self._hidden.float().cpu().numpy()


class _Alone:
    """A request that is decoded by itself."""

    def __init__(self, prompt_ids: list[int]) -> None:
        self.ids = list(prompt_ids)
        self.memory: object | None = None
