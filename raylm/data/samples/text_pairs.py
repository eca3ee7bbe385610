"""Pairs of texts for an encoder-decoder: from parallel text, rows, prepared pairs, and as training samples on disk.

In: the ``data`` section and a model's tokenizer. Out: :class:`TextPair`, in the order of the files; or a directory with
``tokenizer/``, flat arrays of each split, and ``manifest.json``, which is written last. No chat template is applied:
the source is plain text for the encoder, the target is what the decoder writes. The order of the samples is a function
of (seed, number of the sample).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.data import DataSection
from raylm.data.chat import user_message
from raylm.data.padding import pad_right, padded_length
from raylm.data.samples.array_sets import SPLITS, ArraySamples, write_set
from raylm.data.samples.token_samples import IGNORED
from raylm.data.sources.documents import Document, Split, hash_share, side_of
from raylm.data.sources.readers import READERS
from raylm.data.sources.segments import open_sources
from raylm.data.sources.streams import InputErrors, readable
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARRAYS = ("sources", "targets", "rows")
KIND = "text_pairs"
ALLOWED = (
    "pairs: two aligned text files ({path: FILE, target: FILE}), data.format parallel, or rows with the columns "
    "data.fields.prompt and data.fields.answer"
)
# Texts that are tokenized together: their ids as Python lists take far more memory than the arrays.
AT_ONCE = 4096


@dataclass(frozen=True)
class TextPair:
    """What is read and what is to be written."""

    source: str
    target: str


def read_pairs(data: DataSection) -> Iterator[tuple[Split, TextPair]]:
    """All pairs with their side; where there is no ``data.validation`` a share is held out by the texts' hash.

    Raises:
        UserError: a source is wrong or holds no pairs; names the file and the place.
    """
    sides: list[tuple[str, list[Any], Split | None]] = [
        ("data.train", data.train_sections, "train" if data.validation_sources else None),
        ("data.validation", data.validation_sources, "validation"),
    ]
    for key, names, sole in sides:
        for document in _of_sources(data, names, key):
            if (side := side_of(document, sole, data.validation_fraction)) is not None:
                yield side, _pair(document)


def evaluation_pairs(data: DataSection, split: Split = "validation") -> list[TextPair]:
    """The pairs that a model is measured on: ``data.validation`` where it is given, else those of ``data.train`` (of a
    prepared directory its ``split``).

    Raises:
        UserError: a source is wrong, or holds no pair.
    """
    use_validation = split == "validation" and bool(data.validation_sources)
    key = "data.validation" if use_validation else "data.train"
    names: list[Any] = data.validation_sources if use_validation else data.train_sections
    found = [_pair(document) for document in _of_sources(data, names, key) if document.split in (None, split)]
    if not found:
        raise UserError(f"{key}: found no pair, allowed: {ALLOWED}")
    return found


def _of_sources(data: DataSection, names: list[Any], key: str) -> Iterator[Document]:
    errors = InputErrors.of(data)
    for source in open_sources(data, names, key):
        for segment in source.segments:
            with readable(segment.path):
                for document in READERS[segment.format](segment, data, errors):
                    if document.kind == "pairs":
                        yield document
                    elif not document.text.strip():
                        errors.count("with an empty side", f"{source.name}: a pair without a source or a target")
                    else:
                        raise UserError(f"{key}: {source.name}: found {document.kind}, allowed: {ALLOWED}")
    errors.say(key)


def _pair(document: Document) -> TextPair:
    return TextPair(user_message(document.prompt, document.context).strip(), document.answer.strip())


class PairInput:
    """All pairs of the ``data`` section, read and checked; make one before anything is written.

    Args:
        data: the section.
        prefix: what every source begins with for the model.
        target_length: most tokens of a target; None for as many as of a source.

    Raises:
        UserError: bad input, or a side without a pair.
    """

    def __init__(self, data: DataSection, prefix: str = "", target_length: int | None = None) -> None:
        self._prefix, self._target_length = prefix, target_length
        self.pairs: dict[Split, list[TextPair]] = {"train": [], "validation": []}
        for side, pair in read_pairs(data):
            self.pairs[side].append(pair)
        for side in SPLITS:
            if not self.pairs[side]:
                raise UserError(
                    f"data: no pair with two sides is left for {side}; allowed: more pairs, another "
                    "data.validation_fraction, or a data.validation source"
                )

    def texts(self, most_bytes: int) -> Iterator[str]:
        """Training texts for a new tokenizer, of larger sets about ``most_bytes``, chosen by hash."""
        texts = [text for pair in self.pairs["train"] for text in (self._prefix + pair.source, pair.target)]
        share = most_bytes / max(1, sum(len(text.encode()) for text in texts))
        return (text for text in texts if share >= 1 or hash_share(text, b"raylm-sample") < share)

    def write(self, directory: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> dict[str, Any]:
        """Write the directory; returns the manifest."""
        target_length = self._target_length or sequence_length

        def make_split(split: Split) -> tuple[dict[str, np.ndarray], dict[str, int]]:
            pairs = self.pairs[split]
            sources, cut_sources = encode_sources(
                tokenizer, [pair.source for pair in pairs], sequence_length, self._prefix
            )
            targets, cut_targets = encode_targets(tokenizer, [pair.target for pair in pairs], target_length)
            places = [place for ids in (sources, targets) for place in _places(ids)]
            arrays = {
                "sources": np.concatenate(sources).astype(np.int32),
                "targets": np.concatenate(targets).astype(np.int32),
                "rows": np.stack(places, axis=1),
            }
            counts = {
                "pairs": len(pairs),
                "source_tokens": int(places[1].sum()),
                "target_tokens": int(places[3].sum()),
                "cut_sources": cut_sources,
                "cut_targets": cut_targets,
            }
            return arrays, counts

        return write_set(
            directory,
            KIND,
            tokenizer,
            make_split,
            sequence_length=sequence_length,
            target_length=target_length,
            source_prefix=self._prefix,
        )


def _places(ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where each row begins among all tokens, and how many it has; int64 [n]."""
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    return np.cumsum(lengths) - lengths, lengths


def encode_sources(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int | None = None, prefix: str = ""
) -> tuple[list[np.ndarray], int]:
    """Token ids int64 [T] of each text for an encoder, an end token last, and how many texts were cut.

    The tokenizer's own special tokens stand around a text; one that adds no end, as those that raylm makes, gets it.

    Args:
        most: tokens of a text; the end token stays where one is cut.
        prefix: stands before each text.
    """
    return _encoded(tokenizer, "text", [prefix + text for text in texts], most)


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int | None = None
) -> tuple[list[np.ndarray], int]:
    """As :func:`encode_sources`, of what a decoder writes: some tokenizers have another vocabulary for it."""
    return _encoded(tokenizer, "text_target", list(texts), most)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, argument: str, texts: list[str], most: int | None
) -> tuple[list[np.ndarray], int]:
    end, found, cut = tokenizer.eos_token_id, [], 0
    for start in range(0, len(texts), AT_ONCE):
        for ids in tokenizer(**{argument: texts[start : start + AT_ONCE]}, verbose=False)["input_ids"]:
            whole = ids if ids and ids[-1] == end else [*ids, end]
            if most is not None and len(whole) > most:
                whole, cut = [*whole[: most - 1], end], cut + 1
            found.append(np.array(whole, dtype=np.int64))
    return found, cut


class PairSamples(ArraySamples):
    """Pairs out of what :meth:`PairInput.write` wrote."""

    def __init__(self, directory: Path | str, split: Split, seed: int) -> None:
        super().__init__(directory, split, seed, ARRAYS)

    def lengths(self) -> np.ndarray:
        """Of source and target together."""
        rows = np.asarray(self.arrays[-1])
        return rows[:, 1] + rows[:, 3]

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """What :func:`pair_batch` returns."""
        rows = self.rows(indices).tolist()
        sources = [np.asarray(self.arrays[0][start : start + length]) for start, length, _, _ in rows]
        targets = [np.asarray(self.arrays[1][start : start + length]) for _, _, start, length in rows]
        return pair_batch(sources, targets, self.pad_id)


def pair_batch(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], pad_id: int) -> dict[str, np.ndarray]:
    """Pairs padded to the longest of them, up to a multiple of eight.

    Returns:
        input_ids, attention_mask: int64 [n, T].
        targets: int64 [n, L], :data:`IGNORED` behind the end.
    """
    length = padded_length(max(map(len, sources)))
    return {
        "input_ids": pad_right(sources, length, pad_id),
        "attention_mask": pad_right([np.ones(len(row), dtype=np.int64) for row in sources], length),
        "targets": pad_right(targets, padded_length(max(map(len, targets))), IGNORED),
    }
