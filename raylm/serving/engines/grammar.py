"""Tokens that a grammar allows, for the transformers engine: xgrammar (Dong et al. 2024) as a mask over logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from raylm.serving.engines.base import Constraint, EngineRefusal
from raylm.serving.engines.grammar_text import grammar_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Of compiled grammars, for each model.
CACHE_BYTES = 128 << 20


class Grammars:
    """Makes grammars for one model; compiled ones are kept.

    Args:
        tokenizer: the model's.
        vocabulary: columns of its logits.
        end_ids: token ids that end a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, end_ids: frozenset[int]) -> None:
        import xgrammar

        self._vocabulary = vocabulary
        information = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(end_ids) or None
        )
        self._ends = bool(end_ids)
        self._compiler = xgrammar.GrammarCompiler(information, max_threads=1, cache_limit_bytes=CACHE_BYTES)

    def begin(self, constraint: Constraint) -> Grammar:
        """A grammar at the beginning of a text.

        Raises:
            RuntimeError: it cannot be followed.
        """
        import xgrammar

        compiled = self._compiler.compile_grammar(grammar_of(constraint))
        # A model without an end token ends with the last brace.
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=not self._ends)
        return Grammar(matcher, self._vocabulary, constraint.parameter)


class Grammar:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int, parameter: str) -> None:
        import xgrammar

        self._matcher, self._parameter = matcher, parameter
        self._mask = xgrammar.allocate_token_bitmask(1, vocabulary)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_terminated()

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` fp32 [vocabulary], minus infinity where a token may not come.

        Raises:
            EngineRefusal: no token may come; a schema like ``{"$ref": "#"}`` allows no text at all.
        """
        import xgrammar

        logits = logits.clone()
        self._matcher.fill_next_token_bitmask(self._mask)
        if not self._mask.any():
            raise EngineRefusal(f"{self._parameter}: it allows no further token of this model")
        xgrammar.apply_token_bitmask_inplace(logits[None], self._mask)
        return logits

    def accept(self, token: int) -> None:
        """Go on behind ``token``."""
        self._matcher.accept_token(token)
