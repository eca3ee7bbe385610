"""Measuring a classifier: labelled texts to accuracy and macro-F1.

Texts are sorted by length and grouped into batches by that alone, so that the figures do not depend on how many workers
share them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.data.labelled import LabelledText, encode_texts, evaluation_labelled, pad_ids
from raylm.errors import UserError
from raylm.models.encoders import TransformersEncoder, check_task, encoder_positions, label_names
from raylm.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_DEFAULT = 512


class TextSet:
    """Labelled texts as one model's tokens, and from its logits to figures.

    Attributes:
        ids: token ids of each text.
        batches: numbers of texts that are read together.

    Args:
        texts: at least one.
        labels: the model's, in the order of its logits.
        tokenizer: the model's.
        most: tokens of a text that are read; the rest of it is left out.
        batch_size: texts read together.

    Raises:
        UserError: a text has a label that the model does not know.
    """

    def __init__(
        self,
        texts: list[LabelledText],
        labels: list[str],
        tokenizer: PreTrainedTokenizerBase,
        most: int,
        batch_size: int,
    ) -> None:
        numbers = {label: number for number, label in enumerate(labels)}
        unknown = next((text.label for text in texts if text.label not in numbers), None)
        if unknown is not None:
            raise UserError(f"data: found the label '{unknown}', allowed: the model's own ({', '.join(labels[:20])})")
        self.texts, self.labels, self.pad_id = texts, labels, tokenizer.pad_token_id
        self.targets = np.array([numbers[text.label] for text in texts])
        self.ids = encode_texts(tokenizer, [text.text for text in texts], most)
        order = sorted(range(len(texts)), key=lambda number: len(self.ids[number]))
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def figures(self, logits: np.ndarray) -> dict[str, Any]:
        """Accuracy and macro-F1 in percent from ``logits`` [texts, labels], and each label's own figures.

        Macro-F1 is the mean of the F1 of every label that stands in the texts or among the answers.
        """
        from sklearn.metrics import precision_recall_fscore_support

        found = logits.argmax(axis=1)
        present = np.union1d(self.targets, found)
        precision, recall, f1, support = precision_recall_fscore_support(
            self.targets, found, labels=present, zero_division=0.0
        )
        rows = zip(present.tolist(), precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
        return {
            "texts": len(self.texts),
            "accuracy": 100.0 * float((found == self.targets).mean()),
            "macro_f1": 100.0 * float(f1.mean()),
            "labels": {
                self.labels[number]: {"precision": 100 * p, "recall": 100 * r, "f1": 100 * f, "texts": count}
                for number, p, r, f, count in rows
            },
        }


class ClassifierScorer:
    """What one Ray worker holds: a classifier; reads one batch of texts a call."""

    def load(self, model_path: str, pad_id: int) -> None:
        """Load the model; not in the constructor, whose exceptions Ray does not hand on as they are."""
        self._classifier, self._pad_id = TransformersEncoder(model_path, "classification"), pad_id

    def score(self, ids: list[np.ndarray]) -> np.ndarray:
        """Logits [texts, labels]."""
        return self._classifier.outputs(pad_ids(ids, self._pad_id))


def open_texts(config: EvaluateConfig | CompressConfig, source: str) -> TextSet:
    """The labelled texts of the ``data`` section for the model at ``source``.

    Raises:
        UserError: bad input, or texts that are to be longer than the model's positions.
    """
    model_config = check_task(source, "classification")
    positions, asked = encoder_positions(model_config), config.evaluation.sequence_length
    if asked is not None and positions is not None and asked > positions:
        raise UserError(
            f"evaluation.sequence_length: found {asked}, allowed: at most the model's {positions} positions"
        )
    most = asked or min(positions or LONGEST_DEFAULT, LONGEST_DEFAULT)
    texts = evaluation_labelled(config.data, config.evaluation.split)
    return TextSet(texts, label_names(model_config), load_tokenizer(source), most, config.evaluation.batch_size)


def evaluate_classifier(source: str, texts: TextSet, config: EvaluateConfig, directory: Path) -> dict[str, Any]:
    """Classify all texts on Ray workers; writes ``predictions.jsonl`` into ``directory``."""
    from raylm.evaluation.stage import score_batches, start_scorers

    batches = [[texts.ids[number] for number in batch] for batch in texts.batches]
    began = time.perf_counter()
    scorers = start_scorers(ClassifierScorer, (source, texts.pad_id), len(batches), config)
    found = score_batches(scorers, batches)
    seconds = time.perf_counter() - began
    logits = np.zeros((len(texts.texts), len(texts.labels)), dtype=np.float32)
    for number, batch in enumerate(texts.batches):
        logits[batch] = found[number]
    with (directory / "predictions.jsonl").open("w", encoding="utf-8") as stream:
        for text, row in zip(texts.texts, softmax(logits), strict=True):
            best = int(row.argmax())
            line = {"text": text.text, "label": text.label, "found": texts.labels[best], "score": float(row[best])}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return {
        **texts.figures(logits),
        "workers": len(scorers),
        "seconds": seconds,
        "texts_per_second": len(texts.texts) / seconds,
    }


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
