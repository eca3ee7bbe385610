"""Questions about contexts from files in the SQuAD format, with all their answers and where these stand.

In: the ``data`` section. Out: :class:`Question`, in the order of the files. The layout is that of SQuAD 1.1 and 2.0
(Rajpurkar et al. 2016 and 2018): articles of paragraphs, each a context with its questions; CMRC 2018's flat list of
paragraphs (Cui et al. 2019), which gives no places, is read as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raylm.config.data import DataSection
from raylm.data.sources.documents import Split, hash_share
from raylm.data.sources.segments import open_sources
from raylm.data.sources.squad import read_articles
from raylm.data.sources.streams import InputErrors, damaged
from raylm.errors import UserError, first_line


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
    errors = InputErrors.of(data)
    sides: list[tuple[str, list[Any], Split | None]] = [
        ("data.train", data.train_sections, "train" if data.validation_sources else None),
        ("data.validation", data.validation_sources, "validation"),
    ]
    for key, names, sole in sides:
        for question in _of_sources(data, names, key, errors):
            side = sole or _side(question.context, data.validation_fraction)
            if split in (None, side):
                yield side, question


def evaluation_questions(data: DataSection, split: Split = "validation") -> list[Question]:
    """The questions that a reader is measured on: ``data.validation`` where it is given, else all of ``data.train``.

    Raises:
        UserError: a source is wrong, or holds no question.
    """
    key = "data.validation" if split == "validation" and data.validation_sources else "data.train"
    names = data.validation_sources if key == "data.validation" else data.train_sections
    found = list(_of_sources(data, names, key, InputErrors.of(data)))
    if not found:
        raise UserError(f"{key}: found no question")
    return found


def _of_sources(data: DataSection, names: list[Any], key: str, errors: InputErrors) -> Iterator[Question]:
    for source in open_sources(data, names, key):
        for segment in source.segments:
            if segment.format != "squad":
                raise UserError(
                    f"{key}: {source.name}: found the format {segment.format}, allowed with questions: squad "
                    "(a .json file in the SQuAD format)"
                )
            try:
                yield from read_file(segment.path, errors)
            except damaged() as error:
                reason = getattr(error, "strerror", None) or first_line(error)
                raise UserError(f"{segment.path}: cannot be read: {reason}") from None


def _side(context: str, validation_fraction: float) -> Split:
    return "validation" if hash_share(context, b"raylm-split") < validation_fraction else "train"


def read_file(path: str, errors: InputErrors) -> Iterator[Question]:
    """The questions of one file.

    Raises:
        UserError: it is not in the SQuAD format, or an answer does not stand where it says (``data.errors``: skip
            leaves such questions out).
    """
    articles = read_articles(path, errors, "articles with paragraphs")
    for number, article in enumerate(articles):
        paragraphs = article.get("paragraphs", [article]) if isinstance(article, dict) else [article]
        for paragraph in paragraphs:
            place = f"{path}: article {number}"
            try:
                context = paragraph.get("context") or paragraph["context_text"]
                rows = list(paragraph["qas"])
            except (KeyError, TypeError, AttributeError) as error:
                errors.bad("malformed", f"{place}: not a SQuAD paragraph: {_found(error)}")
                continue
            for row in rows:
                try:
                    yield _question(row, context, place)
                except (KeyError, TypeError, AttributeError) as error:
                    errors.bad("malformed", f"{place}: not a SQuAD question: {_found(error)}")
                except ValueError as error:
                    errors.bad("misplaced", str(error))


def _found(error: Exception) -> str:
    return f"found no {error}" if isinstance(error, KeyError) else "found another structure"


def _question(row: dict[str, Any], context: str, place: str) -> Question:
    """One question.

    Raises:
        ValueError: an answer does not stand in the context where it is said to.
    """
    name = str(row["id"] if "id" in row else row["query_id"])
    answers, starts = [], []
    for answer in [] if row.get("is_impossible") else row["answers"]:
        text = answer["text"] if isinstance(answer, dict) else answer
        start = answer.get("answer_start", -1) if isinstance(answer, dict) else -1
        if start < 0:
            start = context.find(text)
        if start < 0 or context[start : start + len(text)] != text or not text:
            found = context[max(start, 0) : max(start, 0) + len(text)]
            raise ValueError(
                f"{place}: question {name}: the answer '{text}' does not stand at character {start} of the context "
                f"(found '{found}')"
            )
        answers.append(text)
        starts.append(start)
    return Question(
        name, row["question"] if "question" in row else row["query_text"], context, tuple(answers), tuple(starts)
    )
