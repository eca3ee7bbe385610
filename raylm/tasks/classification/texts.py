"""Measuring a classifier: labelled texts to accuracy and macro-F1.

Texts are sorted by length and grouped into batches by that alone, so that the figures do not depend on how many workers
share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.data.loading import load_tokenizer
from raylm.data.padding import encoder_batch
from raylm.data.samples.labelled import LabelledText, check_labels, encode_texts, evaluation_labelled
from raylm.errors import UserError
from raylm.models.encoders import encoder_positions, label_names
from raylm.models.loading import load_config
from raylm.tasks.base import Batches, by_length
from raylm.tasks.intervals import mean_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_DEFAULT = 512
SPEED_LENGTH = 384


class TextSet:
    """Labelled texts as one model's tokens, and from its logits to figures.

    See :class:`raylm.tasks.base.ScoredSet`; what the model gives are logits [n, labels].

    Args:
        texts: at least one.
        labels: the model's, in the order of its logits.
        tokenizer: the model's.
        length: tokens of a text that are read; the rest of it is left out.
        batch_size: texts read together.

    Raises:
        UserError: a text has a label that the model does not know.
    """

    def __init__(
        self,
        texts: list[LabelledText],
        labels: list[str],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        batch_size: int,
    ) -> None:
        numbers = {label: number for number, label in enumerate(labels)}
        check_labels(texts, labels, "the model's own")
        self.texts, self.labels = texts, labels
        self.count, self.length, self.vocabulary_size = len(texts), length, len(tokenizer)
        self.targets = np.array([numbers[text.label] for text in texts])
        ids = encode_texts(tokenizer, [text.text for text in texts], length)
        pad_id = tokenizer.pad_token_id
        self.batches = Batches(
            by_length([len(row) for row in ids], batch_size),
            lambda batch: encoder_batch([ids[number] for number in batch], pad_id),
        )

    def logits(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Logits [texts, labels] in the order of the texts."""
        logits = np.zeros((len(self.texts), len(self.labels)), dtype=np.float32)
        for batch, rows in zip(self.batches.numbers, outputs, strict=True):
            logits[batch] = rows
        return logits

    def figures(self, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        """Accuracy and macro-F1 in percent, the 95% interval of the first, each label's own figures, and
        ``confusion``: of the texts of each label, how many were given which one (without zeros).

        Macro-F1 is the mean of the F1 of every label that stands in the texts or among the answers.
        """
        from sklearn.metrics import precision_recall_fscore_support

        found = self.logits(outputs).argmax(axis=1)
        present = np.union1d(self.targets, found)
        precision, recall, f1, support = precision_recall_fscore_support(
            self.targets, found, labels=present, zero_division=0.0
        )
        rows = zip(present.tolist(), precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
        return {
            "texts": len(self.texts),
            "accuracy": 100.0 * float((found == self.targets).mean()),
            "accuracy_interval": mean_interval(100.0 * (found == self.targets)),
            "macro_f1": 100.0 * float(f1.mean()),
            "labels": {
                self.labels[number]: {"precision": 100 * p, "recall": 100 * r, "f1": 100 * f, "texts": count}
                for number, p, r, f, count in rows
            },
            "confusion": self._confusion(found),
        }

    def _confusion(self, found: np.ndarray) -> dict[str, dict[str, int]]:
        pairs, counts = np.unique(np.stack([self.targets, found]), axis=1, return_counts=True)
        rows: dict[str, dict[str, int]] = {}
        for (label, given), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            rows.setdefault(self.labels[label], {})[self.labels[given]] = count
        return rows

    def rows(self, outputs: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        """Texts with their label, and the likeliest one with its probability."""
        for text, row in zip(self.texts, softmax(self.logits(outputs)), strict=True):
            best = int(row.argmax())
            yield {"text": text.text, "label": text.label, "found": self.labels[best], "score": float(row[best])}


def open_texts(config: EvaluateConfig | CompressConfig, source: str) -> TextSet:
    """The labelled texts of the ``data`` section for the model at ``source``.

    Raises:
        UserError: bad input, or texts that are to be longer than the model's positions.
    """
    model_config = load_config(source)
    positions, asked = encoder_positions(model_config), config.evaluation.sequence_length
    if asked is not None and positions is not None and asked > positions:
        raise UserError(
            f"evaluation.sequence_length: found {asked}, allowed: at most the model's {positions} positions"
        )
    most = asked or min(positions or LONGEST_DEFAULT, LONGEST_DEFAULT)
    texts = evaluation_labelled(config.data, config.evaluation.split)
    found = TextSet(texts, label_names(model_config), load_tokenizer(source), most, config.evaluation.batch_size)
    found.length = asked or min(most, SPEED_LENGTH)
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities fp64 of the last dimension."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def describe(report: dict[str, Any]) -> str:
    """The report in three lines."""
    return (
        f"evaluate: {report['model']} on {report['texts']:,} labelled texts\n"
        f"  quality    accuracy {report['accuracy']:.2f}%, macro-F1 {report['macro_f1']:.2f}% over "
        f"{len(report['labels'])} labels (higher is better)\n"
        f"  speed      {report['texts_per_second']:,.0f} texts/s on {report['workers']:,} "
        f"worker{'s' if report['workers'] != 1 else ''}"
    )
