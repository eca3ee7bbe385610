"""Held-out questions to the running server: how many it answers, and whether it is the passage that answers them.

In: the address of a server and the prepared pairs that its model was fine-tuned on, of which the validation split is
asked: neither the names in it nor their documentation were in training. Out: right answers with the passage that
retrieval finds, without any passage, and of a rule that takes the passage's first sentence.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

from raylm.data.sources.documents import Document, hash_share, read_documents
from raylm.data.sources.stdlib import opening_sentence, question_about
from raylm.data.words import normalized, words_of
from raylm.errors import RunFailure

# What the quickstart shows, those of them that this Python's documentation has and that are held out.
WELL_KNOWN = (
    "os.path.join", "textwrap.shorten", "textwrap.wrap", "logging.info", "asyncio.to_thread", "ast.literal_eval",
    "getpass.getuser", "inspect.currentframe", "pathlib.Path.exists", "contextlib.redirect_stderr", "copy",
)  # fmt: skip
# Word F1 from which an answer counts as right.
RIGHT = 0.8
AT_ONCE = 8
REQUEST_SECONDS = 120.0
# The longest sentence of the pairs has 94 tokens.
ANSWER_TOKENS = 100
_CITATION = re.compile(r" \[\d+\]")


@dataclass(frozen=True)
class ScoredAnswer:
    """What the server said to one question.

    Attributes:
        name: what was asked about.
        wanted: the first sentence of its documentation.
        answer: as the server gives it, with its citations.
        alone: the answer of the same model without a passage.
        rule: the first sentence of the passage that was found, without a model.
        source: title of that passage.
    """

    name: str
    wanted: str
    answer: str
    alone: str
    rule: str
    source: str

    @property
    def is_right(self) -> bool:
        """Whether the answer, without its citations, says what is wanted."""
        return word_f1(without_citations(self.answer), self.wanted) >= RIGHT

    @property
    def is_cited(self) -> bool:
        """Whether the answer says which passage it rests on."""
        return _CITATION.search(self.answer) is not None

    def as_dict(self) -> dict[str, str | bool]:
        """Everything, for JSON."""
        return {**vars(self), "is_right": self.is_right, "is_cited": self.is_cited}


@dataclass(frozen=True)
class HeldOutAnswers:
    """The answers to all questions, in the order in which they were asked."""

    answers: tuple[ScoredAnswer, ...]

    @property
    def with_passage(self) -> int:
        """Right answers of the model that sees the passage."""
        return sum(answer.is_right for answer in self.answers)

    @property
    def without_passage(self) -> int:
        """Right answers of the model alone."""
        return sum(word_f1(answer.alone, answer.wanted) >= RIGHT for answer in self.answers)

    @property
    def by_rule(self) -> int:
        """Questions that the found passage's first sentence answers."""
        return sum(word_f1(answer.rule, answer.wanted) >= RIGHT for answer in self.answers)

    @property
    def cited(self) -> int:
        """Answers that cite their passage."""
        return sum(answer.is_cited for answer in self.answers)

    def examples(self, count: int = 3) -> tuple[list[ScoredAnswer], list[ScoredAnswer]]:
        """The first ``count`` right answers, and the first wrong ones."""
        right = [answer for answer in self.answers if answer.is_right]
        wrong = [answer for answer in self.answers if not answer.is_right]
        return right[:count], wrong[:count]

    def lines(self) -> list[str]:
        """The figures, for people."""
        asked = len(self.answers)
        return [
            f'{asked} questions "{question_about("NAME")}" about names that were not in training. Right answers '
            f"(word F1 of {RIGHT} or more):",
            f"  with the passage that was found   {self.with_passage:>3} of {asked}",
            f"  the same model without a passage  {self.without_passage:>3} of {asked}",
            f"  the passage's first sentence      {self.by_rule:>3} of {asked}  (a rule, no model)",
            f"  answers that cite the passage     {self.cited:>3} of {asked}",
            "The model learned to copy the opening sentence of the passage it found; it does not understand it.",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Figures and answers, for JSON."""
        return {
            "questions": len(self.answers),
            "right_with_passage": self.with_passage,
            "right_without_passage": self.without_passage,
            "right_by_rule": self.by_rule,
            "cited": self.cited,
            "answers": [answer.as_dict() for answer in self.answers],
        }


def held_out_pairs(data_directory: Path, count: int) -> list[Document]:
    """``count`` pairs of the validation split of prepared pairs, chosen and ordered by their names' hashes.

    Raises:
        RunFailure: there are none.
    """
    pairs = sorted(
        read_documents(data_directory, "validation"), key=lambda pair: hash_share(pair.title, b"raylm-held-out")
    )
    if not pairs:
        raise RunFailure(f"{data_directory} has no held-out pairs")
    return pairs[:count]


def shown_names(data_directory: Path, collection: Path, count: int = 3) -> list[str]:
    """Names for the questions that the quickstart shows: well-known ones, as far as they are held out.

    Args:
        data_directory: the prepared pairs.
        collection: the prepared documents, which know the names' aliases.
    """
    titles = [pair.title for pair in held_out_pairs(data_directory, count=10**6)]
    aliases: dict[str, str] = {}
    for document in (*read_documents(collection, "train"), *read_documents(collection, "validation")):
        aliases |= dict.fromkeys((document.title, *document.aliases.split()), document.title)
    held_out = set(titles)
    known = [name for name in WELL_KNOWN if aliases.get(name) in held_out]
    # Any others where this Python's documentation holds out too few: short ones read best.
    rest = sorted((title for title in titles if title.count(".") == 1), key=len)
    return list(dict.fromkeys([*known, *rest, *titles]))[:count]


def described(name: str, reply: dict[str, Any]) -> list[str]:
    """Lines with the question about ``name``, and the answer and sources of the ``reply`` of ``/v1/qa``."""
    return [
        f"question: {question_about(name)}",
        f"answer:   {reply['answer']}",
        f"sources:  {', '.join(source['title'] or source['id'] for source in reply['sources'])}",
    ]


def ask_held_out(url: str, data_directory: Path, count: int = 100) -> HeldOutAnswers:
    """Ask the server at ``url`` about ``count`` held-out names, each with and without a passage.

    Args:
        url: of a server with a model and a collection, such as ``http://127.0.0.1:8000``.
        data_directory: the prepared pairs that the model was trained on.

    Raises:
        RunFailure: the server does not answer a question, or there is nothing to ask.
    """
    pairs = held_out_pairs(data_directory, count)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return HeldOutAnswers(tuple(pool.map(lambda pair: _ask(url, pair), pairs)))


def ask_question(url: str, question: str) -> dict[str, Any]:
    """The reply of ``/v1/qa``.

    Raises:
        RunFailure: there is none.
    """
    return _post(f"{url}/v1/qa", {"question": question, "max_tokens": ANSWER_TOKENS})


def _ask(url: str, pair: Document) -> ScoredAnswer:
    found = ask_question(url, pair.prompt)
    chat = {"messages": [{"role": "user", "content": pair.prompt}], "temperature": 0.0, "max_tokens": ANSWER_TOKENS}
    alone = _post(f"{url}/v1/chat/completions", chat)["choices"][0]["message"]["content"]
    sources = found["sources"]
    rule = opening_sentence(sources[0]["text"].partition("\n\n")[2]) if sources else ""
    source = sources[0]["title"] if sources else ""
    return ScoredAnswer(pair.title, pair.answer, found["answer"], alone, rule, source)


def streamed_answer(url: str, question: str) -> Iterator[str]:
    """The pieces of the answer of ``/v1/qa``, as they come.

    Raises:
        RunFailure: there is none, or it breaks off.
    """
    with _posted(f"{url}/v1/qa", {"question": question, "max_tokens": ANSWER_TOKENS, "stream": True}) as response:
        for line in response:
            if line.startswith(b"data: ") and b"[DONE]" not in line:
                yield json.loads(line[len(b"data: ") :]).get("answer", "")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    with _posted(url, body) as response:
        return json.load(response)


@contextmanager
def _posted(url: str, body: dict[str, Any]) -> Iterator[HTTPResponse]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            yield response
    except OSError as error:
        raise RunFailure(f"{url} does not answer: {error}") from None


def without_citations(answer: str) -> str:
    """``answer`` as the model wrote it."""
    return _CITATION.sub("", answer)


def word_f1(found: str, wanted: str) -> float:
    """F1 of the words of two texts, 0 to 1, whatever their case and order (as in Rajpurkar et al. 2016)."""
    counts: Sequence[Counter[str]] = [Counter(_words(text)) for text in (found, wanted)]
    common = (counts[0] & counts[1]).total()
    return 2 * common / (counts[0].total() + counts[1].total()) if common else 0.0


def _words(text: str) -> Iterator[str]:
    yield from words_of(normalized(text))
