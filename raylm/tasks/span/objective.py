"""The span objective: an encoder reads a text with gaps, a decoder writes what stood in them.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 3.1.4
and figure 2: 15% of the tokens are hidden in spans of mean length 3. Each span is one sentinel in the input; the
target is each sentinel followed by its span. Both end with the end-of-text token. As in the authors' code, the window
of text is as long as the input of ``sequence_length`` tokens that is left of it allows, the number of spans is fixed,
and a text begins with a token that is kept and ends with one that is hidden. What is drawn is a function of
(seed, sample), so that neither the number of workers nor a restart changes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from raylm.config.data import SENTINEL_TOKEN
from raylm.data.loading import load_tokenizer
from raylm.data.samples.noise import choose, draw
from raylm.data.samples.token_samples import IGNORED, PackedSamples, Samples
from raylm.data.sources.documents import Split
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError
from raylm.models.heads import SEQUENCE_TO_SEQUENCE, Head
from raylm.tasks.objective import Batch, Objective, input_tokens, need_documents

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_KEPT, _HIDDEN = 0, 1
SHORTEST = 5


class SpanObjective(Objective):
    """Cross-entropy of the hidden spans and the sentinels before them."""

    name: ClassVar[str] = "span"
    head: ClassVar[Head] = SEQUENCE_TO_SEQUENCE
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    predicts_tokens: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`."""
        tokenizer = load_tokenizer(Path(directory) / "tokenizer", "data.train")
        self.check_tokenizer(tokenizer, sequence_length, str(directory))
        return SpanSamples(directory, split, seed, tokenizer, self._cut(sequence_length))

    def _cut(self, sequence_length: int) -> tuple[int, int, int]:
        return corruption(sequence_length, self.section.noise_fraction, self.section.span_length)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, place: str) -> None:
        """See :class:`Objective`."""
        if sequence_length < SHORTEST:
            raise UserError(f"training.sequence_length: found {sequence_length}, allowed: {SHORTEST} or more")
        spans, found = self._cut(sequence_length)[2], len(sentinel_ids(tokenizer))
        if found < spans:
            raise UserError(
                f"objective.type: span needs {spans} sentinel tokens at training.sequence_length {sequence_length}, "
                f"and the tokenizer of {place} has {found}; raylm prepare with tokenizer.sentinels={spans} makes one"
            )

    def lengths(self, sequence_length: int) -> tuple[int, int]:
        """See :class:`Objective`."""
        _, hidden, spans = self._cut(sequence_length)
        return sequence_length, hidden + spans + 1

    def inputs(self, batch: Batch, config: PretrainedConfig) -> Batch:
        """``input_ids`` and ``decoder_input_ids``: the targets one place later, after the decoder's start token."""
        decoder = batch["targets"].roll(1, dims=1).masked_fill(batch["targets"].roll(1, dims=1) == IGNORED, 0)
        decoder[:, 0] = config.decoder_start_token_id
        return {"input_ids": batch["input_ids"], "decoder_input_ids": decoder}

    def tokens(self, batch: Batch) -> torch.Tensor:
        """The encoder's tokens."""
        return input_tokens(batch)


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokenizer's sentinels ``<extra_id_0>``, ``<extra_id_1>``, ... as far as they go."""
    vocabulary, ids = tokenizer.get_vocab(), []
    while (found := vocabulary.get(SENTINEL_TOKEN.format(len(ids)))) is not None:
        ids.append(found)
    return ids


def corruption(sequence_length: int, fraction: float, span_length: float) -> tuple[int, int, int]:
    """Tokens of a window, how many of them are hidden, and in how many spans.

    The window is the longest of which an input of at most ``sequence_length`` tokens is left: what is kept, a sentinel
    a span, and the end-of-text token.
    """

    def of(width: int) -> tuple[int, int, int]:
        hidden = min(max(round(width * fraction), 1), width - 1)
        spans = min(max(round(hidden / span_length), 1), hidden, width - hidden)
        return width, hidden, spans

    def left(cut: tuple[int, int, int]) -> int:
        return cut[0] - cut[1] + cut[2] + 1

    best = of(2)
    # What is left never gets shorter by more than rounding moves it.
    for width in range(2, int(sequence_length / max(1e-6, 1 - fraction)) + 4):
        if left(of(width)) <= sequence_length:
            best = of(width)
    return best


class SpanSamples:
    """Windows of text with spans hidden; see :class:`raylm.data.samples.token_samples.Samples`.

    Args:
        directory: a prepared directory of documents.
        split: train or validation.
        seed: decides the order and the spans.
        tokenizer: that of ``directory``.
        cut: what :func:`corruption` returned.
    """

    def __init__(
        self,
        directory: Path | str,
        split: Split,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        cut: tuple[int, int, int],
    ) -> None:
        shards = TokenShards(directory, split)
        need_documents(shards.kind, "span", directory)
        if not shards.document_count:
            raise UserError(f"{directory} has no {split} documents; prepare it with a data.{split} source")
        self._windows = PackedSamples(shards, cut[0], seed, shuffle=split == "train")
        self.count = self._windows.count
        # Validation has gaps of its own, the same at every evaluation.
        self._gaps = Gaps(cut, seed if split == "train" else ~seed, tokenizer)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """``input_ids`` int64 [n, kept + spans + 1] and ``targets`` int64 [n, hidden + spans + 1]."""
        indices = np.asarray(indices, dtype=np.int64)
        return self._gaps.hide(self._windows.windows(indices), indices)


class Gaps:
    """Hides spans of windows.

    Args:
        cut: what :func:`corruption` returned.
        seed: decides the spans.
        tokenizer: has the sentinels.
    """

    def __init__(self, cut: tuple[int, int, int], seed: int, tokenizer: PreTrainedTokenizerBase) -> None:
        width, self._hidden, self._spans = cut
        self._kept, self._seed = width - self._hidden, seed
        self._sentinels = np.array(sentinel_ids(tokenizer)[: self._spans], dtype=np.int64)
        self._end = tokenizer.eos_token_id

    def hide(self, tokens: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
        """``input_ids`` and ``targets`` of windows.

        Args:
            tokens: the windows, int64 [n, width].
            indices: their numbers, int64 [n].
        """
        rows = len(indices)
        kept, hidden = self._lengths(indices, self._kept, _KEPT), self._lengths(indices, self._hidden, _HIDDEN)
        # Kept and hidden runs take turns; [n, 2 * spans] lengths to whether each token is hidden, and in which span.
        runs = np.stack([kept, hidden], axis=2).reshape(rows, -1)
        starts = np.cumsum(runs, axis=1) - runs
        width = tokens.shape[1]
        run = np.zeros((rows, width), dtype=np.int64)
        np.put_along_axis(run, starts, 1, axis=1)
        run = np.cumsum(run, axis=1) - 1
        is_hidden, span = run % 2 == 1, run // 2
        inputs = self._interleave(tokens, ~is_hidden, span, self._kept, before=False)
        targets = self._interleave(tokens, is_hidden, span, self._hidden, before=True)
        return {"input_ids": inputs, "targets": targets}

    def _lengths(self, indices: np.ndarray, total: int, purpose: int) -> np.ndarray:
        """Lengths of the runs that ``total`` tokens are cut into, int64 [n, spans], each above 0."""
        first = choose(draw(self._seed, indices, total - 1, purpose), self._spans - 1)
        places = np.nonzero(first)[1].reshape(len(indices), self._spans - 1) + 1
        edges = np.pad(places, ((0, 0), (1, 1)), constant_values=0)
        edges[:, -1] = total
        return np.diff(edges, axis=1)

    def _interleave(
        self, tokens: np.ndarray, taken: np.ndarray, span: np.ndarray, count: int, *, before: bool
    ) -> np.ndarray:
        """The ``count`` tokens ``taken`` of each row with a sentinel before (or after) each span, and an end token."""
        rows = len(tokens)
        values, spans = tokens[taken].reshape(rows, count), span[taken].reshape(rows, count)
        result = np.empty((rows, count + self._spans + 1), dtype=np.int64)
        places = np.arange(count) + spans + (1 if before else 0)
        is_token = np.zeros(result.shape, dtype=bool)
        np.put_along_axis(is_token, places, True, axis=1)
        is_token[:, -1] = True
        result[~is_token] = np.tile(self._sentinels, rows)
        np.put_along_axis(result, places, values, axis=1)
        result[:, -1] = self._end
        return result
