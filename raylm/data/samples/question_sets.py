"""Questions as training samples: windows of tokens with the places of the answer, on disk and memory-mapped.

In: the ``data`` section and a model's tokenizer. Out: a directory with ``tokenizer/``, flat arrays of each split, and
``manifest.json``, which is written last. A sample is a window; a question with a long context has several, of which
those without the answer say so. The order is a function of (seed, number of the sample).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.data import DataSection
from raylm.data.samples.array_sets import SPLITS, ArraySamples, write_set
from raylm.data.samples.questions import Question, read_questions
from raylm.data.samples.windows import Window, Windows, pad
from raylm.data.sources.documents import Split
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARRAYS = ("tokens", "types", "windows")
KIND = "questions"


class QuestionInput:
    """All questions of the ``data`` section, read and checked; make one before anything is written.

    Args:
        data: the section.
        overlap: tokens that two windows of a long context share.

    Raises:
        UserError: bad input, or a side without a question.
    """

    def __init__(self, data: DataSection, overlap: int) -> None:
        self._overlap = overlap
        self.questions: dict[Split, list[Question]] = {"train": [], "validation": []}
        for side, question in read_questions(data):
            self.questions[side].append(question)
        for side in SPLITS:
            if not self.questions[side]:
                raise UserError(
                    f"data: no question is left for {side}; allowed: more paragraphs, another "
                    "data.validation_fraction (contexts are held out whole), or a data.validation source"
                )

    def write(self, directory: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> dict[str, Any]:
        """Write the directory; returns the manifest."""
        cutter = Windows(tokenizer, sequence_length, self._overlap)
        return write_set(
            directory,
            KIND,
            tokenizer,
            lambda split: _cut(split, self.questions[split], cutter),
            sequence_length=sequence_length,
            overlap=self._overlap,
        )


def _cut(split: Split, questions: list[Question], cutter: Windows) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    tokens, types, rows, place = [], [], [], 0
    for question in questions:
        for window in cutter.cut(question.question, question.context):
            targets = (window.null, window.null)
            if question.answers:
                targets = window.find(question.starts[0], question.starts[0] + len(question.answers[0]))
            tokens.append(window.input_ids)
            types.append(window.token_types)
            rows.append((place, len(window.input_ids), window.first, window.last, window.null, *targets))
            place += len(window.input_ids)
    if not rows:
        raise UserError(f"data: no {split} question has a context with a token")
    arrays = {
        "tokens": np.concatenate(tokens).astype(np.int32),
        "types": np.concatenate(types).astype(np.uint8),
        "windows": np.array(rows, dtype=np.int64),
    }
    counts = {
        "questions": len(questions),
        "without_answer": sum(not question.answers for question in questions),
        "windows": len(rows),
        "tokens": place,
    }
    return arrays, counts


class QuestionSamples(ArraySamples):
    """Windows of questions, out of what :meth:`QuestionInput.write` wrote."""

    def __init__(self, directory: Path | str, split: Split, seed: int) -> None:
        super().__init__(directory, split, seed, ARRAYS)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """What :func:`raylm.data.samples.windows.pad` returns, and ``targets`` int64 [n, 2]: first and last token."""
        rows = self.rows(indices)
        windows = []
        for start, length, first, last, null in rows[:, :5].tolist():
            ids, types = (np.asarray(a[start : start + length], dtype=np.int64) for a in self.arrays[:2])
            windows.append(Window(ids, types, first, last, np.zeros((0, 2), dtype=np.int64), null))
        return {**pad(windows, self.pad_id, self.length), "targets": rows[:, 5:]}
