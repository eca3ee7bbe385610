"""Questions in the SQuAD format (Rajpurkar et al. 2016 and 2018), in any of its layouts, as rows of one.

The layouts: articles of paragraphs, each a context with its questions; the flat list of paragraphs of CMRC 2018 (Cui et
al. 2019), which gives no places of answers; and the rows of the ``datasets`` library, with ``answers`` a dictionary of
the lists ``text`` and ``answer_start``. The last is what all are read as.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raylm.data.sources.streams import InputErrors

CONTEXT = "context"
COLUMNS = ("id", "question", CONTEXT, "answers")
NO_START = -1


def is_squad(columns: Sequence[str]) -> bool:
    """Whether rows with these columns are questions."""
    return all(name in columns for name in COLUMNS if name != "id")


def is_article(item: Any) -> bool:
    """Whether an item of a list is an article or a paragraph, and no row."""
    return isinstance(item, dict) and ("paragraphs" in item or "qas" in item)


def article_rows(path: str, articles: list[Any], errors: InputErrors) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the article, row) of every question.

    Raises:
        UserError: a paragraph or a question is not as SQuAD has it, unless ``errors`` says otherwise.
    """
    for number, article in enumerate(articles):
        paragraphs = article.get("paragraphs", [article]) if isinstance(article, dict) else [article]
        for paragraph in paragraphs if isinstance(paragraphs, list) else [paragraphs]:
            place = f"{path}: article {number}"
            try:
                context = paragraph.get("context") or paragraph["context_text"]
                questions = list(paragraph["qas"])
            except (KeyError, TypeError, AttributeError) as error:
                errors.bad("malformed", f"{place}: not a SQuAD paragraph: {_found(error)}")
                continue
            for question in questions:
                try:
                    row = {
                        "question": question["question"] if "question" in question else question["query_text"],
                        "context": context,
                        "answers": None if question.get("is_impossible") else question["answers"],
                    }
                except (KeyError, TypeError, AttributeError) as error:
                    errors.bad("malformed", f"{place}: not a SQuAD question: {_found(error)}")
                    continue
                name = question.get("id", question.get("query_id"))
                yield number, row if name is None else {"id": name, **row}


def _found(error: Exception) -> str:
    return f"found no {error}" if isinstance(error, KeyError) else "found another structure"


def answers_of(row: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(text, first character in the context) of each answer; ``NO_START`` where the row does not say it.

    Raises:
        ValueError: the column ``answers`` is something else.
    """
    answers = row.get("answers")
    if answers is None or row.get("is_impossible"):
        return []
    if isinstance(answers, Mapping):
        texts = _listed(answers.get("text"))
        starts = _listed(answers.get("answer_start")) or [NO_START] * len(texts)
        if len(starts) != len(texts):
            raise ValueError(f"column 'answers': found {len(texts)} of text and {len(starts)} of answer_start")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(answers, list):
        pairs = [
            (answer.get("text"), answer.get("answer_start", NO_START)) if isinstance(answer, Mapping)
            else (answer, NO_START)
            for answer in answers
        ]  # fmt: skip
    else:
        raise ValueError(f"column 'answers': found {type(answers).__name__}, allowed: {_ALLOWED}")
    if not all(isinstance(text, str) and isinstance(start, int | None) for text, start in pairs):
        raise ValueError(f"column 'answers': found another structure, allowed: {_ALLOWED}")
    return [(text, NO_START if start is None else start) for text, start in pairs]


_ALLOWED = "a list of answers with text and answer_start, or a dictionary of the lists text and answer_start"


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
