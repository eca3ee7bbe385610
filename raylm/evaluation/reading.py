"""Measuring an extractive reader: questions in the SQuAD format to exact match and F1.

Windows are sorted by length and grouped into batches by that alone, so that the figures do not depend on how many
workers share them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.reading import ReadingSection
from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.data.questions import Question, evaluation_questions
from raylm.data.windows import Window, Windows, pad
from raylm.errors import UserError
from raylm.evaluation.answers import compare, convention_of, summarize
from raylm.evaluation.spans import Answer, best_answer
from raylm.models.encoders import Encoder, TransformersEncoder, check_task, encoder_positions
from raylm.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QuestionSet:
    """Questions as windows of one model's tokens, and from the windows' scores back to answers.

    Attributes:
        windows: those of all questions, in order.
        batches: numbers of windows that are scored together.
        most: tokens of a window at most.

    Args:
        questions: at least one.
        tokenizer: the model's.
        section: how to read.
        batch_size: windows evaluated together.
    """

    def __init__(
        self, questions: list[Question], tokenizer: PreTrainedTokenizerBase, section: ReadingSection, batch_size: int
    ) -> None:
        self.questions, self._section, self.pad_id = questions, section, tokenizer.pad_token_id
        self.most = section.sequence_length
        cutter = Windows(tokenizer, section.sequence_length, section.overlap)
        self.windows: list[Window] = []
        self._ranges = []
        for question in questions:
            start = len(self.windows)
            self.windows += cutter.cut(question.question, question.context)
            self._ranges.append((start, len(self.windows)))
        order = sorted(range(len(self.windows)), key=lambda number: len(self.windows[number].input_ids))
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def answers(self, logits: list[np.ndarray]) -> list[Answer]:
        """An answer to each question from the ``logits`` of each window."""
        section = self._section
        return [
            best_answer(
                question.context, self.windows[start:stop], logits[start:stop],
                section.max_answer_tokens, section.null_threshold,
            )
            for question, (start, stop) in zip(self.questions, self._ranges, strict=True)
        ]  # fmt: skip

    def figures(self, answers: list[Answer]) -> dict[str, Any]:
        """Exact match and F1 in percent, and what they were counted by."""
        convention = convention_of(self.questions)
        results = [compare(a.text, q.answers, convention) for a, q in zip(answers, self.questions, strict=True)]
        return {**summarize(results, self.questions), "convention": convention}


def score_windows(reader: Encoder, windows: list[Window], pad_id: int, most: int) -> list[np.ndarray]:
    """Scores [T, 2] of each of the ``windows``, computed as one batch."""
    logits = reader.outputs(pad(windows, pad_id, most))
    return [scores[: len(window.input_ids)] for window, scores in zip(windows, logits, strict=True)]


class ReaderScorer:
    """What one Ray worker holds: a reader; scores one batch of windows a call."""

    def load(self, model_path: str, pad_id: int, most: int) -> None:
        """Load the model; not in the constructor, whose exceptions Ray does not hand on as they are."""
        self._reader, self._pad_id, self._most = TransformersEncoder(model_path, "extractive_qa"), pad_id, most

    def score(self, windows: list[Window]) -> list[np.ndarray]:
        """Scores of each window."""
        return score_windows(self._reader, windows, self._pad_id, self._most)


def open_questions(config: EvaluateConfig | CompressConfig, source: str) -> QuestionSet:
    """The questions of the ``data`` section as windows for the model at ``source``.

    Raises:
        UserError: bad input, or windows that are longer than the model's positions.
    """
    positions = encoder_positions(check_task(source, "extractive_qa"))
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


def evaluate_reader(source: str, questions: QuestionSet, config: EvaluateConfig, directory: Path) -> dict[str, Any]:
    """Answer all questions on Ray workers; writes ``answers.jsonl`` into ``directory``."""
    from raylm.evaluation.stage import score_batches, start_scorers

    batches = [[questions.windows[number] for number in batch] for batch in questions.batches]
    began = time.perf_counter()
    scorers = start_scorers(ReaderScorer, (source, questions.pad_id, questions.most), len(batches), config)
    found = score_batches(scorers, batches)
    seconds = time.perf_counter() - began
    logits: list[Any] = [None] * len(questions.windows)
    for number, batch in enumerate(questions.batches):
        for window, scores in zip(batch, found[number], strict=True):
            logits[window] = scores
    answers = questions.answers(logits)
    with (directory / "answers.jsonl").open("w", encoding="utf-8") as stream:
        for question, answer in zip(questions.questions, answers, strict=True):
            row = {
                "id": question.id, "question": question.question, "answer": answer.text, "start": answer.start,
                "end": answer.end, "score": answer.score, "no_answer": answer.no_answer,
                "null_margin": answer.null_margin, "accepted": list(question.answers),
            }  # fmt: skip
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        **questions.figures(answers),
        "windows": len(questions.windows),
        "workers": len(scorers),
        "seconds": seconds,
        "questions_per_second": len(answers) / seconds,
    }


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
