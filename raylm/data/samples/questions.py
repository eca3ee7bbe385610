"""Questions about contexts from files in the SQuAD format, with all their answers and where these stand.

In: the ``data`` section. Out: :class:`Question`, in the order of the files. :mod:`raylm.data.sources.squad` says which
layouts are read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raylm.config.data import DataSection
from raylm.data.samples.sides import measured_on, with_sides
from raylm.data.sources.documents import Split
from raylm.data.sources.rows import Table
from raylm.data.sources.segments import open_sources
from raylm.data.sources.squad import COLUMNS, answers_of, is_squad
from raylm.data.sources.streams import InputErrors
from raylm.data.sources.tables import open_table
from raylm.errors import UserError

FORMATS = ("json", "squad", "jsonl", "parquet", "hub")


@dataclass(frozen=True)
class Question:
    """A question and the context that it is about.

    Attributes:
        id: as in the file.
        question, context: texts.
        answers: the accepted texts; none where the context does not answer.
        starts: where each of them begins in the context, characters.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


def read_questions(data: DataSection, split: Split | None = None) -> Iterator[tuple[Split, Question]]:
    """All questions with their side.

    Where there is no ``data.validation``, paragraphs are held out by the hash of their context, so that no context is
    on both sides. With ``split`` only that side's are given; where nothing is held out, as in evaluation, all of
    ``data.train`` stand for the validation side as well (see :func:`evaluation_questions`).

    Raises:
        UserError: a source is wrong or of another format; names the file and the place.
    """
    for side, question in with_sides(data, functools.partial(_of_sources, data), lambda question: question.context):
        if split in (None, side):
            yield side, question


def evaluation_questions(data: DataSection, split: Split = "validation") -> list[Question]:
    """The questions that a reader is measured on: ``data.validation`` where it is given, else all of ``data.train``.

    Raises:
        UserError: a source is wrong, or holds no question.
    """
    return measured_on(data, split, functools.partial(_of_sources, data), "question")


def _of_sources(data: DataSection, names: list[Any], key: str) -> Iterator[Question]:
    errors = InputErrors.of(data)
    for source in open_sources(data, names, key):
        for segment in source.segments:
            if segment.format not in FORMATS:
                raise UserError(
                    f"{key}: {source.name}: found the format {segment.format}, allowed with questions: "
                    f"{', '.join(FORMATS)} (SQuAD, or rows with the columns id, question, context and answers)"
                )
            yield from questions_of(open_table(segment, data, errors), errors)
    errors.say(key)


def questions_of(table: Table, errors: InputErrors) -> Iterator[Question]:
    """The questions of one file.

    Raises:
        UserError: its rows are no questions, or an answer does not stand where it says (``data.errors``: skip leaves
            such questions out and counts them).
    """
    for number, row in table.rows:
        if not is_squad(list(row)):
            found = ", ".join(row) or "none"
            raise UserError(
                f"{table.place(number)}: found the columns {found}, allowed: those of SQuAD ({', '.join(COLUMNS)})"
            )
        try:
            yield _question(row, table.place(number))
        except Misplaced as error:
            errors.bad("misplaced", str(error))
        except ValueError as error:
            errors.bad("malformed", f"{table.place(number)}: not a SQuAD question: {error}")


class Misplaced(ValueError):
    """An answer does not stand in the context where it is said to."""


def _question(row: Mapping[str, Any], place: str) -> Question:
    """One question.

    Raises:
        Misplaced: see there.
        ValueError: a column is missing or of another type.
    """
    if row.get("id") is None:
        raise ValueError("found no 'id'")
    name, context, question = str(row["id"]), _text(row, "context"), _text(row, "question")
    answers, starts = [], []
    for text, given in answers_of(row):
        start = context.find(text) if given < 0 else given
        if start < 0 or context[start : start + len(text)] != text or not text:
            found = context[max(start, 0) : max(start, 0) + len(text)]
            raise Misplaced(
                f"{place}: question {name}: the answer '{text}' does not stand at character {start} of the context "
                f"(found '{found}')"
            )
        answers.append(text)
        starts.append(start)
    return Question(name, question, context, tuple(answers), tuple(starts))


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"column '{column}': found {type(row[column]).__name__}, allowed: text")
    return row[column]
