"""Tagged sentences as training samples: windows of a model's tokens on disk, with the number of each word's tag.

The order of the samples is a function of (seed, number of the sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.data import DataSection
from raylm.config.model import Scheme
from raylm.data.padding import encoder_batch, pad_right
from raylm.data.samples.array_sets import SPLITS, ArraySamples, write_set
from raylm.data.samples.tag_schemes import KnownScheme, all_tags, scheme_of
from raylm.data.samples.tagged import TaggedSentence, fitting, read_tagged
from raylm.data.samples.token_samples import IGNORED
from raylm.data.samples.word_windows import WordWindows
from raylm.data.sources.documents import Split
from raylm.data.tokens.shards import read_manifest
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARRAYS = ("tokens", "targets", "rows")
KIND = "tagged"
MOST_NAMED = 20


class TaggedInput:
    """All sentences of the ``data`` section, read and checked; make one before anything is written.

    Args:
        data: the section.
        scheme: what the tags must follow; auto for what those of the training sentences look like.
        known: the tags of a tagger that is trained further; None for a new one.

    Attributes:
        scheme: which one it is.
        labels: the model's tags, by number.

    Raises:
        UserError: bad input, a side without a sentence, fewer than two tags, or tags that are not ``known``.
    """

    def __init__(self, data: DataSection, scheme: Scheme = "auto", known: Sequence[str] | None = None) -> None:
        read: dict[Split, list[TaggedSentence]] = {"train": [], "validation": []}
        for side, sentence in read_tagged(data):
            read[side].append(sentence)
        found = {tag for sentence in read["train"] for tag in sentence.tags}
        self.scheme: KnownScheme = scheme_of(found) if scheme == "auto" else scheme
        self.sentences = {side: list(fitting(sentences, self.scheme, data)) for side, sentences in read.items()}
        for side in SPLITS:
            if not self.sentences[side]:
                raise UserError(
                    f"data: no sentence is left for {side}; allowed: more sentences, another data.validation_fraction, "
                    "or a data.validation source"
                )
        found = {tag for sentence in self.sentences["train"] for tag in sentence.tags}
        self.labels = all_tags(found, self.scheme) if known is None else list(known)
        if len(self.labels) < 2:
            raise UserError(f"data.train: found one tag only ('{self.labels[0]}'), allowed: two or more")
        source = "data.train has" if known is None else "model.path was trained with"
        for side in SPLITS:
            check_known(self.sentences[side], self.labels, source)

    def write(self, directory: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> dict[str, Any]:
        """Write the directory; returns the manifest."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        windows = WordWindows(tokenizer, sequence_length)

        def make_split(split: Split) -> tuple[dict[str, np.ndarray], dict[str, int]]:
            sentences, ids, targets = self.sentences[split], [], []
            for sentence, cut in zip(sentences, windows.cut([one.tokens for one in sentences]), strict=True):
                tags = np.array([numbers[tag] for tag in sentence.tags], dtype=np.int32)
                for window in cut:
                    row = np.full(len(window.ids), IGNORED, dtype=np.int32)
                    row[window.firsts] = tags[window.start : window.start + len(window.firsts)]
                    ids.append(window.ids.astype(np.int32))
                    targets.append(row)
            lengths = np.array([len(row) for row in ids], dtype=np.int64)
            arrays = {
                "tokens": np.concatenate(ids),
                "targets": np.concatenate(targets),
                "rows": np.stack([np.cumsum(lengths) - lengths, lengths], axis=1),
            }
            counts = {
                "sentences": len(sentences),
                "windows": len(ids),
                "words": sum(len(sentence.tokens) for sentence in sentences),
                "tokens": int(lengths.sum()),
            }
            return arrays, counts

        settings = {"labels": self.labels, "scheme": self.scheme, "sequence_length": sequence_length}
        return write_set(directory, KIND, tokenizer, make_split, **settings)


class TaggedSamples(ArraySamples):
    """Windows with the numbers of their words' tags, out of what :meth:`TaggedInput.write` wrote.

    Attributes:
        labels, scheme: as in :class:`TaggedInput`.
    """

    def __init__(self, directory: Path | str, split: Split, seed: int) -> None:
        super().__init__(directory, split, seed, ARRAYS)
        manifest = read_manifest(Path(directory))
        self.labels, self.scheme = manifest["labels"], manifest["scheme"]

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """What :func:`raylm.data.padding.encoder_batch` returns, and ``targets`` int64 [n, length]: the number of the
        tag at the first sub-word of each word, else ``IGNORED``."""
        tokens, targets, _ = self.arrays
        places = [slice(start, start + length) for start, length in self.rows(indices).tolist()]
        batch = encoder_batch([np.asarray(tokens[place], dtype=np.int64) for place in places], self.pad_id, self.length)
        width = batch["input_ids"].shape[1]
        return {**batch, "targets": pad_right([targets[place] for place in places], width, IGNORED)}


def check_known(sentences: Sequence[TaggedSentence], labels: Sequence[str], source: str) -> None:
    """Refuse a tag that is not among the ``labels``.

    Args:
        source: where those come from, with its verb.

    Raises:
        UserError: names the file and the line or row.
    """
    known = set(labels)
    for sentence in sentences:
        for number, tag in enumerate(sentence.tags):
            if tag not in known:
                shown = ", ".join(labels[:MOST_NAMED]) + (", ..." if len(labels) > MOST_NAMED else "")
                raise UserError(
                    f"{sentence.place(number)}: found the tag '{tag}', allowed: the tags that {source} ({shown})"
                )
