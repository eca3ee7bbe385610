"""Drawing one request's next token from logits, with random numbers of its own."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from raylm.serving.engines.base import FinishReason, SamplingParameters

if TYPE_CHECKING:
    from raylm.serving.engines.grammar import Grammar


class Sampler:
    """State of one request's decoding: random numbers and how many tokens it has.

    Args:
        parameters: temperature, top_p, seed and the length.
        end_ids: token ids that end a text.
        grammar: what the text must follow.
    """

    def __init__(self, parameters: SamplingParameters, end_ids: frozenset[int], grammar: Grammar | None = None) -> None:
        # Whether the likeliest token is always the one.
        self.plain = parameters.greedy and not parameters.penalizes and grammar is None
        self._grammar = grammar
        self._parameters = parameters
        self._end_ids = end_ids
        self._generated = 0
        self._counts: Counter[int] = Counter()
        self._random = torch.Generator().manual_seed(parameters.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """A token id drawn from ``logits`` [vocabulary] by temperature and nucleus (Holtzman et al. 2020)."""
        logits = self._penalize(logits.float().cpu())
        if self._grammar is not None:
            logits = self._grammar.allowed(logits)
        if self._parameters.greedy:
            return int(logits.argmax())
        logits = logits / self._parameters.temperature
        probabilities, tokens = logits.softmax(dim=-1).sort(descending=True)
        if self._parameters.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            # The likeliest token, before which nothing stands, always stays.
            probabilities = probabilities.masked_fill(before >= self._parameters.top_p, 0)
        chosen = torch.multinomial(probabilities, 1, generator=self._random)
        return int(tokens[chosen])

    def account(self, token: int) -> FinishReason | None:
        """Count ``token``; the reason if the request ends with it."""
        self._generated += 1
        self._counts[token] += 1
        if self._grammar is not None:
            self._grammar.accept(token)
        if token in self._end_ids or (self._grammar is not None and self._grammar.ended):
            return "stop"
        return "length" if self._generated >= self._parameters.max_new_tokens else None

    def _penalize(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits less OpenAI's penalties on what was generated before."""
        if not (self._counts and self._parameters.penalizes):
            return logits
        tokens = torch.tensor(list(self._counts))
        counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
        penalties = self._parameters.presence_penalty + self._parameters.frequency_penalty * counts
        return logits.index_add(0, tokens, -penalties)
