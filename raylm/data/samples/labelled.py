"""Texts with a class each: from rows of JSONL, CSV or Parquet files, and as training samples on disk.

In: the ``data`` section and a model's tokenizer. Out: :class:`LabelledText`, in the order of the files; or a directory
with ``tokenizer/``, flat arrays of each split, and ``manifest.json``, which is written last and names the labels. The
order of the samples is a function of (seed, number of the sample).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.data import DataSection
from raylm.data.padding import encoder_batch
from raylm.data.samples.array_sets import SPLITS, ArraySamples, write_set
from raylm.data.samples.sides import measured_on, with_sides
from raylm.data.sources.documents import Split
from raylm.data.sources.rows import Rows, rows_to_documents
from raylm.data.sources.segments import open_sources
from raylm.data.sources.streams import InputErrors
from raylm.data.sources.tables import open_table
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("jsonl", "json", "csv", "parquet", "hub")
ARRAYS = ("tokens", "rows")
KIND = "labelled"


@dataclass(frozen=True)
class LabelledText:
    """A text and the name of its class.

    Attributes:
        place: file and line or row, for messages.
    """

    text: str
    label: str
    place: str = field(default="data", compare=False)


def read_labelled(data: DataSection) -> Iterator[tuple[Split, LabelledText]]:
    """All texts with their side; where there is no ``data.validation`` a share is held out by the texts' hash.

    Raises:
        UserError: a source is wrong or of another format; names the file and the place.
    """
    return with_sides(data, functools.partial(_of_sources, data), lambda row: row.text)


def evaluation_labelled(data: DataSection, split: Split = "validation") -> list[LabelledText]:
    """The texts that a classifier is measured on: ``data.validation`` where it is given, else all of ``data.train``.

    Raises:
        UserError: a source is wrong, or holds no text.
    """
    return measured_on(data, split, functools.partial(_of_sources, data), "text with a label")


def _of_sources(data: DataSection, names: list[Any], key: str) -> Iterator[LabelledText]:
    errors = InputErrors.of(data)
    fields = data.fields.model_copy(update={"label": data.fields.label or "label"})
    labelled = data.model_copy(update={"fields": fields})
    for source in open_sources(data, names, key):
        for segment in source.segments:
            if segment.format not in FORMATS:
                raise UserError(
                    f"{key}: {source.name}: found the format {segment.format}, allowed with labels: "
                    f"{', '.join(FORMATS)}"
                )
            table, number = open_table(segment, labelled, errors), [0]
            followed = replace(table, rows=_noted(table.rows, number))
            for document in rows_to_documents(followed, fields, errors, needs_label=True):
                if document.text.strip():
                    yield LabelledText(document.text, document.label.strip(), table.place(number[0]))
                else:
                    errors.count("without a text", f"{source.name}: a row without a text")
    errors.say(key)


def _noted(rows: Rows, last: list[int]) -> Rows:
    """The rows; in ``last`` stands the number of the one that was given last, which becomes a text at once."""
    for number, row in rows:
        last[0] = number
        yield number, row


def in_order(labels: set[str]) -> list[str]:
    """Labels sorted: numbers by value, others by name."""
    if all(re.fullmatch("-?[0-9]{1,18}", label) for label in labels):
        # 1 and 01 are two labels.
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


class LabelledInput:
    """All texts of the ``data`` section, read and checked; make one before anything is written.

    Args:
        data: the section.
        known: the labels of a classifier that is trained further; None for a new one.

    Raises:
        UserError: bad input, a side without a text, fewer than two labels, or labels that are not ``known``.
    """

    def __init__(self, data: DataSection, known: Sequence[str] | None = None) -> None:
        self.texts: dict[Split, list[LabelledText]] = {"train": [], "validation": []}
        for side, text in read_labelled(data):
            self.texts[side].append(text)
        for side in SPLITS:
            if not self.texts[side]:
                raise UserError(
                    f"data: no text with a label is left for {side}; allowed: more rows, another "
                    "data.validation_fraction, or a data.validation source"
                )
        found = {text.label for text in self.texts["train"]}
        self.labels = in_order(found) if known is None else list(known)
        if len(self.labels) < 2:
            raise UserError(f"data.train: found one label only ('{self.labels[0]}'), allowed: two or more")
        for side in SPLITS:
            source = "the training texts have" if known is None else "model.path was trained with"
            check_labels(self.texts[side], self.labels, f"those that {source}")

    def write(self, directory: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> dict[str, Any]:
        """Write the directory; returns the manifest."""
        numbers = {label: number for number, label in enumerate(self.labels)}

        def make_split(split: Split) -> tuple[dict[str, np.ndarray], dict[str, int]]:
            texts = self.texts[split]
            ids = encode_texts(tokenizer, [text.text for text in texts], sequence_length)
            lengths = np.array([len(row) for row in ids], dtype=np.int64)
            starts = np.cumsum(lengths) - lengths
            arrays = {
                "tokens": np.concatenate(ids).astype(np.int32),
                "rows": np.stack([starts, lengths, np.array([numbers[text.label] for text in texts])], axis=1),
            }
            return arrays, {"texts": len(texts), "tokens": int(lengths.sum())}

        return write_set(directory, KIND, tokenizer, make_split, labels=self.labels, sequence_length=sequence_length)


def check_labels(texts: Sequence[LabelledText], labels: Sequence[str], source: str) -> None:
    """Refuse a label that is not among the ``labels``.

    Args:
        source: what those are.

    Raises:
        UserError: names the file and the line or row.
    """
    known = set(labels)
    for text in texts:
        if text.label not in known:
            raise UserError(f"{text.place}: found the label '{text.label}', allowed: {source} ({_named(labels)})")


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], most: int) -> list[np.ndarray]:
    """Token ids int64 [T] of each text; what is beyond ``most`` tokens is left out."""
    found = tokenizer(texts, truncation=True, max_length=most, padding=False, verbose=False)["input_ids"]
    return [np.array(ids, dtype=np.int64) for ids in found]


class LabelledSamples(ArraySamples):
    """Texts with the number of their class, out of what :meth:`LabelledInput.write` wrote."""

    def __init__(self, directory: Path | str, split: Split, seed: int) -> None:
        super().__init__(directory, split, seed, ARRAYS)

    def label_counts(self, labels: int) -> list[int]:
        """How many samples of an epoch each of so many labels has."""
        return np.bincount(self.arrays[-1][:, 2], minlength=labels).tolist()

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """What :func:`raylm.data.padding.encoder_batch` returns, and ``targets`` int64 [n, 1]."""
        tokens, rows = self.arrays[0], self.rows(indices)
        ids = [np.asarray(tokens[start : start + length], dtype=np.int64) for start, length, _ in rows.tolist()]
        return {**encoder_batch(ids, self.pad_id, self.length), "targets": rows[:, 2:]}


def _named(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:20])
    return f"{shown}, ..." if len(labels) > 20 else shown
