"""Readers of one segment each: text, rows, parallel text, embedded corpora and prepared sets to documents, streaming.

Every mistake is named by its place, and ``data.errors`` decides whether it ends the reading. Empty texts are passed on
(they are counted and dropped later); nothing else is lost silently.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from raylm.config.data import DataSection
from raylm.data.sources.blocks import Block, Segment
from raylm.data.sources.documents import Document, read_row_groups
from raylm.data.sources.lines import Lines
from raylm.data.sources.rows import Rows, Table, rows_to_documents
from raylm.data.sources.streams import BYTE_ORDER_MARK, InputErrors, readable
from raylm.data.sources.tables import TABLES, open_table
from raylm.errors import UserError


def read_block(block: Block, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """The documents of a block, in order.

    Raises:
        UserError: bad input; names the file and the place.
    """
    for segment in block.segments:
        with readable(segment.path):
            yield from READERS[segment.format](segment, data, errors)


def read_text(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of a text file: the whole file, its paragraphs or its lines (``data.text_unit``)."""
    if data.text_unit == "file":
        with errors.open(segment.path) as stream:
            raw = stream.read(data.max_document_bytes + 1)
        if len(raw) > data.max_document_bytes:
            errors.bad(
                "too long",
                f"{segment.path}: one document of more than data.max_document_bytes ({data.max_document_bytes}); "
                "allowed: a larger limit, or data.text_unit: paragraph or line",
            )
            return
        content = raw.removeprefix(BYTE_ORDER_MARK)
        text = errors.decode(content, segment.path, len(raw) - len(content))
        if text is not None:
            yield Document(text=text)
        return
    lines = Lines.of(segment, data, errors)
    if data.text_unit == "line":
        for _, line in lines:
            yield Document(text=line.rstrip("\r\n"))
    else:
        yield from _paragraphs(segment, lines)


def _paragraphs(segment: Segment, lines: Lines) -> Iterator[Document]:
    """Paragraphs of a range: from its first blank line on (the file's first range: from the beginning) to the first
    blank line of the next range, which is a line that begins after ``stop``."""
    paragraph: list[str] = []
    waiting = segment.start > 0
    for offset, line in lines.read(lambda _: True):
        if not line.strip():
            waiting = False
            if paragraph:
                yield Document(text="".join(paragraph).rstrip("\r\n"))
                paragraph = []
            if segment.stop is not None and offset > segment.stop:
                return
        elif not waiting:
            paragraph.append(line)
    if paragraph:
        yield Document(text="".join(paragraph).rstrip("\r\n"))


def read_table(
    segment: Segment, data: DataSection, errors: InputErrors, needs_label: bool = False
) -> Iterator[Document]:
    """Documents of a format with rows; with ``needs_label``, a text without a label is a bad row."""
    return rows_to_documents(open_table(segment, data, errors), data.fields, errors, needs_label)


def read_parallel(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Pairs of two text files of which line n of the second translates line n of the first; without a target, of one
    with both on a line and a tab between. Further columns are passed over, as some collections name sources there."""
    if segment.target is None:
        return read_columns(segment, data, errors)
    path, target = segment.path, str(segment.target)

    def rows() -> Rows:
        # A line that is skipped on one side only would shift the rest: bad bytes are replaced, never skipped.
        policy = InputErrors("strict" if errors.policy == "strict" else "replace", encoding=data.encoding)
        sides = (iter(Lines(name, policy, data.max_document_bytes)) for name in (path, target))
        for number, (left, right) in enumerate(itertools.zip_longest(*sides), start=1):
            if left is None or right is None:
                shorter = path if left is None else target
                raise UserError(f"{shorter}: ends after line {number - 1}; allowed: as many lines as in the other file")
            yield number, {data.fields.prompt: left[1].rstrip("\r\n"), data.fields.answer: right[1].rstrip("\r\n")}
        for kind, count in policy.counts.items():
            errors.counts[kind] = errors.counts.get(kind, 0) + count

    fields = data.fields.model_copy(update={"context": None, "label": None})
    return rows_to_documents(Table(path, rows(), lambda number: f"{path}:{number}"), fields, errors)


def read_columns(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Pairs of a text file with a prompt, a tab and an answer on each line."""
    lines = Lines.of(segment, data, errors)

    def rows() -> Rows:
        for _, line in lines:
            columns = line.rstrip("\r\n").split("\t")
            if len(columns) > 1:
                yield lines.count, {data.fields.prompt: columns[0], data.fields.answer: columns[1]}
            elif line.strip():
                found = "found no tab, allowed: a text, a tab and its translation"
                errors.bad("malformed", f"{lines.place(lines.count)}: {found}")

    fields = data.fields.model_copy(update={"context": None, "label": None})
    return rows_to_documents(Table(segment.path, rows(), lines.place), fields, errors)


def read_stdlib(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of an embedded corpus."""
    from raylm.config.data import STDLIB_PAIRS
    from raylm.data.sources.stdlib import stdlib_documents, stdlib_pairs

    documents = stdlib_documents()
    if segment.path == STDLIB_PAIRS:
        documents = stdlib_pairs(documents, with_context=data.fields.context is not None)
    yield from documents


def read_prepared(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of one file of a prepared directory, each on the side where it was."""
    split = Path(segment.path).name.partition("-")[0]
    for group in read_row_groups(Path(segment.path)):
        for document in group:
            yield document.on_side(split)


def refuse_columns(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Column files are no running text.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{segment.path}: found the format conll, words with tags, allowed for running text: text, jsonl, json, csv, "
        "parquet; tags are for objective.type: tagging"
    )


READERS: dict[str, Callable[[Segment, DataSection, InputErrors], Iterator[Document]]] = {
    **dict.fromkeys(TABLES, read_table),
    "text": read_text,
    "parallel": read_parallel,
    "stdlib": read_stdlib,
    "documents": read_prepared,
    "conll": refuse_columns,
}
