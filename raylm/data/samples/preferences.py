"""Preferences: a conversation with an answer that is preferred and one that is not, from rows and as samples on disk.

In: rows with ``prompt``, ``chosen`` and ``rejected``, each a text or messages; or with two whole conversations. Out: a
directory with ``tokenizer/`` and flat arrays, as :mod:`raylm.data.samples.array_sets` writes it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.data import DataSection
from raylm.data.padding import pad_right, padded_length
from raylm.data.samples.array_sets import SPLITS, ArraySamples, write_set
from raylm.data.samples.sides import with_sides
from raylm.data.samples.token_samples import IGNORED
from raylm.data.sources.conversations import messages_of
from raylm.data.sources.documents import Document, Split, make_conversation
from raylm.data.sources.segments import open_sources
from raylm.data.sources.streams import InputErrors
from raylm.data.sources.tables import TABLES, open_table
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "preferences"
ARRAYS = ("tokens", "rows")
# Of a row: where each of its two conversations begins, and how many tokens of it are kept and asked.
COLUMNS = 6


@dataclass(frozen=True)
class Preference:
    """Two conversations that differ in their last answer.

    Attributes:
        chosen, rejected: the preferred one, and the other.
        asked: the text of what is asked.
    """

    chosen: Document
    rejected: Document
    asked: str


def read_preferences(data: DataSection) -> Iterator[tuple[Split, Preference]]:
    """All preferences with their side; where there is no ``data.validation``, conversations are held out by the hash of
    what is asked.

    Raises:
        UserError: a source is wrong or of another format; names the file and the place.
    """
    return with_sides(data, functools.partial(_of_sources, data), lambda row: row.asked)


def _of_sources(data: DataSection, names: list[Any], key: str) -> Iterator[Preference]:
    errors = InputErrors.of(data)
    for source in open_sources(data, names, key):
        for segment in source.segments:
            if segment.format not in TABLES:
                allowed = ", ".join(TABLES)
                raise UserError(f"{key}: {source.name}: found the format {segment.format}, allowed: {allowed}")
            table = open_table(segment, data, errors)
            for number, row in table.rows:
                try:
                    yield _preference(row, data)
                except ValueError as error:
                    errors.bad("malformed", f"{table.place(number)}: {error}")
    errors.say(key)


def _preference(row: Mapping[str, Any], data: DataSection) -> Preference:
    """A row.

    Raises:
        ValueError: a column is missing, or there are no two answers to the same.
    """
    fields = data.fields
    if missing := [name for name in (fields.chosen, fields.rejected) if row.get(name) is None]:
        raise ValueError(f"no column '{missing[0]}'; columns found: {', '.join(row) or 'none'}")
    prompt = row.get(fields.prompt)
    asked = [] if prompt is None else messages_of(prompt, fields.prompt, "user")
    both = [asked + messages_of(row[name], name, "assistant") for name in (fields.chosen, fields.rejected)]
    for name, turns in zip((fields.chosen, fields.rejected), both, strict=True):
        if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip() or len(turns) < 2:
            raise ValueError(f"column '{name}': allowed: an answer of the assistant that says something, to a question")
    if both[0][:-1] != both[1][:-1]:
        raise ValueError(f"columns '{fields.chosen}' and '{fields.rejected}': they answer different conversations")
    if both[0] == both[1]:
        raise ValueError(f"columns '{fields.chosen}' and '{fields.rejected}': the same answer twice")
    # The answers before the last are the same on both sides.
    for turns in both:
        turns[:-1] = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in turns[:-1]]
    documents = [make_conversation(turns, []) for turns in both]
    return Preference(*documents, make_conversation(both[0][:-1], []).text)


class PreferenceInput:
    """All preferences of the ``data`` section, read and checked; make one before anything is written.

    Raises:
        UserError: bad input, or a side without a row.
    """

    def __init__(self, data: DataSection) -> None:
        self._template = data.chat_template
        self.rows: dict[Split, list[Preference]] = {"train": [], "validation": []}
        for side, row in read_preferences(data):
            self.rows[side].append(row)
        for side in SPLITS:
            if not self.rows[side]:
                raise UserError(
                    f"data: no preference is left for {side}; allowed: more rows, another data.validation_fraction, or "
                    "a data.validation source"
                )

    def write(self, directory: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> dict[str, Any]:
        """Write the directory; returns the manifest."""
        from raylm.data.tokens.conversation_encoding import ConversationEncoder
        from raylm.data.tokens.tokenizers import with_template

        with_template(tokenizer, self._template)

        def make_split(split: Split) -> tuple[dict[str, np.ndarray], dict[str, int]]:
            encoder = ConversationEncoder(directory / "tokenizer")
            sides = [
                encoder.encode([getattr(row, side) for row in self.rows[split]]) for side in ("chosen", "rejected")
            ]
            tokens: list[np.ndarray] = []
            rows, place = np.zeros((len(self.rows[split]), COLUMNS), dtype=np.int64), 0
            for number in range(len(rows)):
                pair = [(side[0][number], int(side[1][number, 0])) for side in sides]
                for half, (ids, answer) in enumerate(shortened(pair, sequence_length + 1)):
                    rows[number, 3 * half : 3 * half + 3] = place, len(ids), answer
                    tokens.append(ids)
                    place += len(ids)
            arrays = {"tokens": np.concatenate(tokens).astype(np.int32), "rows": rows}
            return arrays, {"preferences": len(rows), "tokens": place}

        return write_set(directory, KIND, tokenizer, make_split, sequence_length=sequence_length)


def shortened(pair: list[tuple[np.ndarray, int]], most: int) -> list[tuple[np.ndarray, int]]:
    """Two conversations of at most ``most`` tokens each, with the place of their answer.

    What is asked loses its beginning, the same of both, so far as the longer answer needs; then the answer its end.
    """
    longest = max(len(ids) - answer for ids, answer in pair)
    room = max(1, most - longest)
    found = []
    for ids, answer in pair:
        cut = max(0, answer - room) if len(ids) > most or any(len(other) > most for other, _ in pair) else 0
        found.append((ids[cut:][:most], answer - cut))
    return found


class PreferenceSamples(ArraySamples):
    """Preferences out of what :meth:`PreferenceInput.write` wrote.

    Args:
        reference: of each row the log-probabilities of both answers by the reference, float32 [rows, 2]; None where it
            has not been asked yet.
    """

    def __init__(self, directory: Path | str, split: Split, seed: int, reference: np.ndarray | None = None) -> None:
        super().__init__(directory, split, seed, ARRAYS)
        self._reference = reference

    def lengths(self) -> np.ndarray:
        """Of the longer of the two conversations, to which both are padded."""
        rows = np.asarray(self.arrays[-1])
        return np.maximum(rows[:, 1], rows[:, 4])

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """``input_ids`` and ``labels`` (:data:`IGNORED` but for the answers), int64 [n, 2, T], the preferred one first;
        ``targets``, int64 [n, 1], 0: that one is the right one; ``reference``, float32 [n, 2]."""
        tokens, numbers = self.arrays[0], self.numbers(indices)
        rows = np.asarray(self.arrays[-1][numbers]).reshape(-1, 3)
        longest = padded_length(int(rows[:, 1].max()) - 1, self.length)
        ids, labels = [], []
        for start, length, answer in rows.tolist():
            found = np.asarray(tokens[start : start + length], dtype=np.int64)
            ids.append(found[:-1])
            labels.append(np.where(np.arange(1, length) >= answer, found[1:], IGNORED))
        batch = {
            "input_ids": pad_right(ids, longest, self.pad_id).reshape(len(numbers), 2, longest),
            "labels": pad_right(labels, longest, IGNORED).reshape(len(numbers), 2, longest),
            "targets": np.zeros((len(numbers), 1), dtype=np.int64),
        }
        if self._reference is not None:
            batch["reference"] = self._reference[numbers]
        return batch
