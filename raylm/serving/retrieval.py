"""Passages of a prepared directory's documents, found by BM25 (Robertson and Zaragoza 2009) over text and title.

Documents are cut into passages at paragraphs. Dotted names count as a whole and by their parts, so that
``json.dumps`` finds the document of that title before all others that mention it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np
import pyarrow.parquet as parquet

from raylm.errors import UserError

COLUMNS = ("id", "title", "text")
OPTIONAL_COLUMNS = ("aliases",)
# Passages end at the first paragraph end after this many characters: about a hundred words.
PASSAGE_CHARACTERS = 600
# How much a match in the title counts against one in the text.
TITLE_WEIGHT = 2.0

_DOTTED = re.compile(r"\w+(?:\.\w+)*")
# Scripts without spaces between words: Chinese characters and Japanese kana count one by one.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Passage:
    """A piece of a document, with the document's id, title and other names."""

    id: str
    title: str
    text: str
    aliases: str = ""


@dataclass(frozen=True)
class Match:
    """A passage and how well it fits, higher is better."""

    passage: Passage
    score: float


def tokenize(text: str) -> list[str]:
    """Words of ``text`` in lower case; ``os.path.join`` gives the whole name, ``os``, ``path`` and ``join``.

    Names with underscores count as a whole and by their parts too.
    """
    words: list[str] = []
    for name in _DOTTED.findall(text.lower()):
        parts = name.split(".")
        if len(parts) > 1:
            words.append(name)
        for part in parts:
            words.append(part)
            words += [piece for piece in part.split("_") if piece] if "_" in part.strip("_") else []
            characters = _UNSPACED.findall(part)
            words += characters if len(part) > 1 else []
    return words


def split_passages(text: str) -> Iterator[str]:
    """Cut ``text`` between paragraphs into pieces of some :data:`PASSAGE_CHARACTERS`."""
    gathered: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        gathered.append(paragraph)
        size += len(paragraph)
        if size >= PASSAGE_CHARACTERS:
            yield "\n\n".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield "\n\n".join(gathered)


def collection_files(directory: str | Path, key: str = "serving.collection") -> list[Path]:
    """The document files of a directory that ``raylm prepare`` made; checks that they can be read.

    Raises:
        UserError: no such directory, no documents in it, or files of another kind.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise UserError(f"{key}: {directory} does not exist; allowed: a directory made by `raylm prepare`")
    files = sorted((root / "documents").glob("*.parquet"))
    if not files:
        raise UserError(f"{key}: {directory} has no documents/*.parquet; allowed: a directory made by `raylm prepare`")
    rows = 0
    for file in files:
        try:
            description = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {file} cannot be read: {error}") from None
        missing = [column for column in COLUMNS if column not in description.schema_arrow.names]
        if missing:
            raise UserError(f"{key}: {file} has no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
        rows += description.metadata.num_rows
    if not rows:
        raise UserError(f"{key}: {directory} holds no documents")
    return files


class Collection:
    """Passages that can be searched.

    Args:
        passages: at least one.
    """

    def __init__(self, passages: list[Passage]) -> None:
        self.passages = passages
        self._text_index = _index([tokenize(passage.text) for passage in passages])
        self._title_index = _index([tokenize(f"{passage.title} {passage.aliases}") for passage in passages])

    @classmethod
    def open(cls, directory: str | Path) -> Collection:
        """Read the documents of a prepared directory and index their passages."""
        passages = []
        for file in collection_files(directory):
            names = set(parquet.read_schema(file).names)
            columns = [*COLUMNS, *(name for name in OPTIONAL_COLUMNS if name in names)]
            for row in parquet.read_table(file, columns=columns).to_pylist():
                title, aliases = row["title"] or "", row.get("aliases") or ""
                passages += [Passage(row["id"], title, piece, aliases) for piece in split_passages(row["text"] or "")]
        return cls(passages)

    def search(self, question: str, count: int) -> list[Match]:
        """The best passages of the ``count`` best documents for ``question``, best first.

        Only passages that share a word with it, and one passage a document: further ones of the same would leave no
        room for others.
        """
        words = tokenize(question)
        scores = _scores(self._text_index, words) + TITLE_WEIGHT * _scores(self._title_index, words)
        found: dict[str, Match] = {}
        # Stable: of equal passages the earlier one in its document comes first.
        for place in np.argsort(-scores, kind="stable"):
            if scores[place] <= 0 or len(found) == count:
                break
            passage = self.passages[place]
            found.setdefault(passage.id, Match(passage, float(scores[place])))
        return list(found.values())


def _index(texts: list[list[str]]) -> bm25s.BM25:
    index = bm25s.BM25(backend="numpy")
    index.index(texts, show_progress=False)
    return index


def _scores(index: bm25s.BM25, words: list[str]) -> np.ndarray:
    ids = index.get_tokens_ids(words)
    return index.get_scores_from_ids(ids) if ids else np.zeros(index.scores["num_docs"], dtype=np.float32)
