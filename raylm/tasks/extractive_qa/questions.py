"""Measuring an extractive reader: questions in the SQuAD format to exact match and F1.

Windows are sorted by length and grouped into batches by that alone, so that the figures do not depend on how many
workers share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.reading import ReadingSection
from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.data.loading import load_tokenizer
from raylm.data.samples.questions import Question, evaluation_questions
from raylm.data.samples.windows import Window, Windows, pad
from raylm.errors import UserError
from raylm.models.encoders import encoder_positions
from raylm.models.loading import load_config
from raylm.tasks.base import Batches, by_length
from raylm.tasks.extractive_qa.answers import compare, convention_of, summarize
from raylm.tasks.extractive_qa.spans import AnswerSpan, best_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QuestionSet:
    """Questions as windows of one model's tokens, and from the windows' scores back to answers.

    See :class:`raylm.tasks.base.ScoredSet`; what the model gives are scores [n, T, 2] of each token as an answer's
    first and last.

    Args:
        questions: at least one.
        tokenizer: the model's.
        section: how to read.
        batch_size: windows evaluated together.
    """

    def __init__(
        self, questions: list[Question], tokenizer: PreTrainedTokenizerBase, section: ReadingSection, batch_size: int
    ) -> None:
        self.questions, self._section = questions, section
        self.count, self.length, self.vocabulary_size = len(questions), section.sequence_length, len(tokenizer)
        cutter = Windows(tokenizer, section.sequence_length, section.overlap)
        self._windows: list[Window] = []
        self._ranges = []
        for question in questions:
            start = len(self._windows)
            self._windows += cutter.cut(question.question, question.context)
            self._ranges.append((start, len(self._windows)))
        numbers = by_length([len(window.input_ids) for window in self._windows], batch_size)
        pad_id = tokenizer.pad_token_id
        self.batches = Batches(
            numbers, lambda batch: pad([self._windows[number] for number in batch], pad_id, self.length)
        )

    def answers(self, outputs: Sequence[np.ndarray]) -> list[AnswerSpan]:
        """An answer to each question."""
        scores: list[Any] = [None] * len(self._windows)
        for batch, rows in zip(self.batches.numbers, outputs, strict=True):
            for number, row in zip(batch, rows, strict=True):
                scores[number] = row[: len(self._windows[number].input_ids)]
        section = self._section
        return [
            best_answer(
                question.context, self._windows[start:stop], scores[start:stop],
                section.max_answer_tokens, section.null_threshold,
            )
            for question, (start, stop) in zip(self.questions, self._ranges, strict=True)
        ]  # fmt: skip

    def figures(self, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        """Exact match and F1 in percent, and what they were counted by."""
        convention, answers = convention_of(self.questions), self.answers(outputs)
        results = [compare(a.text, q.answers, convention) for a, q in zip(answers, self.questions, strict=True)]
        counted = summarize(results, self.questions)
        return {**counted, "convention": convention, "windows": len(self._windows)}

    def rows(self, outputs: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        """Questions with the answer that was found and those that are accepted."""
        for question, answer in zip(self.questions, self.answers(outputs), strict=True):
            yield {
                "id": question.id, "question": question.question, "answer": answer.text, "start": answer.start,
                "end": answer.end, "score": answer.score, "no_answer": answer.no_answer,
                "null_margin": answer.null_margin, "accepted": list(question.answers),
            }  # fmt: skip


def open_questions(config: EvaluateConfig | CompressConfig, source: str) -> QuestionSet:
    """The questions of the ``data`` section as windows for the model at ``source``.

    Raises:
        UserError: bad input, or windows that are longer than the model's positions.
    """
    positions = encoder_positions(load_config(source))
    check_window(config.evaluation.reading, positions, "evaluation.reading.sequence_length")
    section = fitted(config.evaluation.reading, positions)
    questions = evaluation_questions(config.data, config.evaluation.split)
    return QuestionSet(questions, load_tokenizer(source), section, config.evaluation.batch_size)


def check_window(section: ReadingSection, positions: int | None, key: str) -> None:
    """Refuse windows that the file asks for and the model has no positions for.

    Raises:
        UserError: names ``key``.
    """
    asked = "sequence_length" in section.model_fields_set
    if asked and positions is not None and section.sequence_length > positions:
        raise UserError(f"{key}: found {section.sequence_length}, allowed: at most the model's {positions} positions")


def fitted(section: ReadingSection, positions: int | None) -> ReadingSection:
    """The section for a model of ``positions``, which may be fewer than the default window."""
    if positions is None or section.sequence_length <= positions:
        return section
    return section.model_copy(update={"sequence_length": positions, "overlap": min(section.overlap, positions // 3)})


def describe(report: dict[str, Any]) -> str:
    """The report in three lines."""
    sides = "".join(
        f"; {report[f'{side}_questions']:,} {side}: {report[f'{side}_exact_match']:.2f}% and "
        f"{report[f'{side}_f1']:.2f}%"
        for side in ("answerable", "unanswerable")
        if f"{side}_f1" in report
    )
    return (
        f"evaluate: {report['model']} on {report['questions']:,} questions\n"
        f"  quality    exact match {report['exact_match']:.2f}%, F1 {report['f1']:.2f}% (higher is better; counted as "
        f"{report['convention']} does){sides}\n"
        f"  speed      {report['questions_per_second']:,.1f} questions/s on {report['workers']:,} "
        f"worker{'s' if report['workers'] != 1 else ''}, {report['windows']:,} windows"
    )
