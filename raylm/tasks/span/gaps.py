"""How well an encoder-decoder fills the gaps of a text: the loss of what stood in them.

In: the text of a stage's ``data`` section. Out: windows of it with spans hidden, always the same ones, and the loss of
the targets that a model was right or wrong about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.model import ObjectiveSection
from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.data.loading import load_tokenizer
from raylm.data.samples.evaluation_texts import evaluation_texts
from raylm.errors import UserError
from raylm.models.encoder_decoders import decoder_start
from raylm.models.loading import load_config
from raylm.tasks.base import Arrays, Batches, ScoredSet, by_length
from raylm.tasks.closeness import losses_correlation
from raylm.tasks.intervals import ratio_interval
from raylm.tasks.span.objective import Gaps, SpanObjective, corruption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As the authors trained on (T5, section 3.1.4).
DEFAULT_LENGTH = 512
SEED = 0


class GapWindows:
    """Windows with gaps; see :class:`raylm.tasks.base.ScoredSet`.

    A model gives the loss of each target, nats, fp32 [n, targets].

    Args:
        windows: tokens, int64 [count, width].
        gaps: hides spans.
        start: token that a decoder begins with.
        sizes: tokens of an input, and windows of a batch.
    """

    def __init__(
        self, windows: np.ndarray, gaps: Gaps, tokenizer: PreTrainedTokenizerBase, start: int, sizes: tuple[int, int]
    ) -> None:
        self._windows, self._gaps, self._tokenizer, self._start = windows, gaps, tokenizer, start
        self.count, self.vocabulary_size = len(windows), len(tokenizer)
        self.length, batch_size = sizes
        self.batches = Batches(by_length([self.length] * self.count, batch_size), self._make)

    def _make(self, numbers: list[int]) -> Arrays:
        """``input_ids`` [n, T], ``decoder_input_ids`` and ``targets`` [n, targets]."""
        batch = self._gaps.hide(self._windows[numbers], np.array(numbers, dtype=np.int64))
        decoder = np.roll(batch["targets"], 1, axis=1)
        decoder[:, 0] = self._start
        return batch | {"attention_mask": np.ones_like(batch["input_ids"]), "decoder_input_ids": decoder}

    def figures(self, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        """See :class:`raylm.tasks.base.ScoredSet`."""
        losses = np.concatenate(outputs).astype(np.float64)
        sums, counts = losses.sum(axis=1), np.full(len(losses), losses.shape[1])
        return {
            "gap_loss": float(sums.sum() / counts.sum()),
            "gap_loss_interval": list(ratio_interval(sums, counts)),
            "windows": self.count,
            "targets": int(counts.sum()),
        }

    def rows(self, outputs: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        """Each text with its gaps, what stood in them, and the loss, nats a target."""
        for batch, losses in zip(self.batches, outputs, strict=True):
            for text, target, found in zip(batch["input_ids"], batch["targets"], losses, strict=True):
                yield {
                    "text": self._tokenizer.decode(text),
                    "target": self._tokenizer.decode(target),
                    "loss": float(found.mean()),
                }


def open_gaps(config: EvaluateConfig | CompressConfig, source: str) -> GapWindows:
    """Windows of the ``data`` section's text for the encoder-decoder at ``source``.

    Raises:
        UserError: there is too little text, or the tokenizer lacks sentinels.
    """
    section, model = config.evaluation, load_config(source)
    length, tokenizer = section.sequence_length or DEFAULT_LENGTH, load_tokenizer(source)
    objective = ObjectiveSection()
    SpanObjective(objective).check_tokenizer(tokenizer, length, source)
    cut = corruption(length, objective.noise_fraction, objective.span_length)
    tokens = _tokens(config, tokenizer)
    count = len(tokens) // cut[0]
    if not count:
        raise UserError(
            f"data: found {len(tokens)} tokens in the {section.split} split, allowed: {cut[0]} or more, which a window "
            f"of evaluation.sequence_length {length} takes"
        )
    windows = tokens[: count * cut[0]].reshape(count, cut[0])
    most = config.compression.text_tokens if isinstance(config, CompressConfig) else None
    if most is not None and len(tokens) > most:
        windows = windows[np.linspace(0, count - 1, max(1, most // cut[0])).round().astype(int)]
    return GapWindows(
        windows, Gaps(cut, SEED, tokenizer), tokenizer, decoder_start(model), (length, section.batch_size)
    )


def _tokens(config: EvaluateConfig | CompressConfig, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The text, each document with its end, int64 [N]."""
    parts = [
        np.array([*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id])
        for text in evaluation_texts(config.data, config.evaluation.split)
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)


def closeness(scored: ScoredSet, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
    """How the losses of all targets by two models go together.

    Raises:
        RunFailure: they do not.
    """
    return losses_correlation(before, after)


def describe(report: dict[str, Any]) -> str:
    """The figures of a report as lines of text."""
    low, high = report["gap_loss_interval"]
    return (
        f"evaluate: {report['model']} on the gaps of {report['windows']:,} windows of text\n"
        f"  loss       {report['gap_loss']:.4f} nats a target (95% interval {low:.4f} to {high:.4f}); "
        f"lower is better; {report['targets']:,} targets"
    )
