"""Decontamination: the n-grams of evaluation sets, and the documents that hold them.

As for GPT-3 (Brown et al. 2020, appendix C), a document is held to contain evaluation text where
n words in a row agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from raylm.config.cleaning import DecontaminationSection
from raylm.data.cleaning.signatures import save, shingle_hashes, shingle_sets, word_hashes
from raylm.data.words import WordTable

FILE = "contamination.npy"


class Contamination:
    """The n-grams of the evaluation sets.

    Args:
        grams: their hashes, uint64, sorted.
        section: length and share.
    """

    def __init__(self, grams: np.ndarray, section: DecontaminationSection) -> None:
        self._grams, self._section = grams, section
        self._table = WordTable()

    @classmethod
    def load(cls, work: Path, section: DecontaminationSection | None) -> Contamination | None:
        """What :func:`collect` has left in the work directory; None where nothing is asked for."""
        return cls(np.load(work / FILE), section) if section is not None else None

    def found_in(self, text: str, hashes: np.ndarray | None = None) -> bool:
        """Whether more of the n-grams of ``text`` than ``max_overlap`` are among them.

        Args:
            text: a document.
            hashes: of its words where they are known, see :func:`~raylm.data.cleaning.signatures.word_hashes`.
        """
        self._table.trim()
        found, _ = shingle_sets([word_hashes(text, self._table, hashes)], self._section.ngram_words)
        if not len(self._grams):
            return False
        places = np.minimum(np.searchsorted(self._grams, found), len(self._grams) - 1)
        shared = int(np.count_nonzero(self._grams[places] == found))
        return shared > self._section.max_overlap * len(found)


def collect(work: Path, texts: Iterable[str], section: DecontaminationSection) -> int:
    """Write the n-grams of ``texts`` into the work directory; returns how many there are.

    A text that is shorter than an n-gram counts as one of its own length, so that it is found only where a document is
    nothing but this text.
    """
    rows = [np.empty(0, dtype=np.uint64)]
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 1024:
            rows.append(np.unique(np.concatenate(shingle_hashes(batch, section.ngram_words))))
            batch = []
    if batch:
        rows.append(np.unique(np.concatenate(shingle_hashes(batch, section.ngram_words))))
    grams = np.unique(np.concatenate(rows))
    save(work / FILE, grams)
    return len(grams)
