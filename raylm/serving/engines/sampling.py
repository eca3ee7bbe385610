"""Drawing one request's next token from logits, with random numbers of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from raylm.serving.engines.base import EngineRefusal, FinishReason, SamplingParameters

if TYPE_CHECKING:
    from raylm.serving.engines.grammar import Grammar

# A logit that a repetition penalty has made larger would divide by a small temperature to infinity.
LARGEST_LOGIT = 1e30


class Sampler:
    """State of one request's decoding: random numbers, and which tokens it has.

    Args:
        parameters: how to decode.
        end_ids: token ids that end a text of the model.
        grammar: what the text must follow.
        prompt: token ids of the prompt, for the repetition penalty.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        end_ids: frozenset[int],
        grammar: Grammar | None = None,
        prompt: Sequence[int] = (),
    ) -> None:
        # Whether the likeliest token is always the one.
        self.plain = parameters.greedy and not parameters.shapes_logits and grammar is None
        self._grammar = grammar
        self._parameters = parameters
        self._ends = parameters.ends(end_ids)
        # As vLLM has it, the model's own end tokens are among them even where they end nothing.
        self._too_early = sorted(self._ends | end_ids)
        self._generated = 0
        self._counts: Counter[int] = Counter()
        self._prompt = frozenset(prompt) if parameters.repetition_penalty != 1 else frozenset()
        self._random = torch.Generator().manual_seed(parameters.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """A token id drawn from ``logits`` [vocabulary].

        Raises:
            EngineRefusal: no token may come.
        """
        logits = logits.float().cpu()
        if self._parameters.shapes_logits:
            logits = self._penalize(self._bias(logits.clone()))
        if self._grammar is not None:
            logits = self._grammar.allowed(logits)
        if logits.max() == -torch.inf:
            raise EngineRefusal("min_tokens: the text must end here, as nothing else may follow")
        if self._parameters.greedy:
            return int(logits.argmax())
        logits = logits / self._parameters.temperature
        probabilities, tokens = logits.softmax(dim=-1).sort(descending=True)
        chosen = torch.multinomial(self._cut(probabilities), 1, generator=self._random)
        return int(tokens[chosen])

    def account(self, token: int) -> FinishReason | None:
        """Count ``token``; the reason if the request ends with it."""
        self._generated += 1
        self._counts[token] += 1
        if self._grammar is not None:
            self._grammar.accept(token)
        if token in self._ends or (self._grammar is not None and self._grammar.ended):
            return "stop"
        return "length" if self._generated >= self._parameters.max_new_tokens else None

    def _bias(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits with what the request adds to some, and without the ends that come too early; in place."""
        for token, bias in self._parameters.logit_bias:
            logits[token] += bias
        if self._generated < self._parameters.min_tokens:
            logits[self._too_early] = -torch.inf
        return logits

    def _penalize(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits with the penalties on what came before; in place."""
        repetition = self._parameters.repetition_penalty
        if repetition != 1 and (seen := sorted(self._prompt | self._counts.keys())):
            some = logits[seen]
            some = torch.where(some > 0, some / repetition, some * repetition)
            logits[seen] = some.clamp(max=LARGEST_LOGIT)
        if self._counts and (self._parameters.presence_penalty or self._parameters.frequency_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            penalties = self._parameters.presence_penalty + self._parameters.frequency_penalty * counts
            logits[list(self._counts)] -= penalties
        return logits

    def _cut(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Probabilities, likeliest first, with 0 for those that are not to be drawn: by min_p (Nguyen et al. 2024), by
        number, and by nucleus (Holtzman et al. 2020)."""
        parameters = self._parameters
        if parameters.min_p or 0 < parameters.top_k < len(probabilities):
            least = parameters.min_p * probabilities[0]
            kept = probabilities >= least
            if 0 < parameters.top_k < len(probabilities):
                kept &= probabilities >= probabilities[parameters.top_k - 1]
            probabilities = probabilities.masked_fill(~kept, 0)
            probabilities = probabilities / probabilities.sum()
        if parameters.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            # The likeliest token, before which nothing stands, always stays.
            probabilities = probabilities.masked_fill(before >= parameters.top_p, 0)
        return probabilities
