"""Blocks: the pieces that the input is cut into, by file and range, before anything is read.

The cut depends on the files alone, and what a block gives depends on the block alone: that is why the prepared set is
the same at any number of workers, and why a killed prepare goes on with the blocks that are left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raylm.data.sources.documents import Split

SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 20, 4 << 20
MOST_BLOCKS = 2048
FEW_BLOCKS = 32
MOST_SEGMENTS = 512
# Files of these formats can be entered at any line.
BY_LINES = ("text", "jsonl", "parallel")


@dataclass(frozen=True)
class Segment:
    """A range of a file, or of a dataset.

    Attributes:
        path: file, URI, hub name or embedded corpus.
        format: text, jsonl, csv, parquet, squad, conll, parallel, hub, stdlib or documents.
        start, stop: bytes of a text or JSONL file, row groups of a Parquet file, rows of a dataset; stop is None for
            all that follows.
        size: bytes, for sharing out.
        stamp: changes when the file changes.
        target: the translation of a parallel file.
    """

    path: str
    format: str
    start: int = 0
    stop: int | None = None
    size: int = 0
    stamp: str = ""
    target: str | None = None


@dataclass(frozen=True)
class Block:
    """What one task reads.

    Attributes:
        number: its place in the order of the whole input.
        source: number of its source, those of ``data.train`` first.
        sole_split: the one side that it gives to where there is a validation source.
        segments: what is read, in order.
    """

    number: int
    source: int
    sole_split: Split | None
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self.segments)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that :meth:`from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Block:
        """The block that ``to_json`` gave."""
        segments = tuple(Segment(**segment) for segment in value["segments"])
        return cls(**{**value, "segments": segments})


def block_bytes(total: int) -> int:
    """Size of a block: some blocks even of a small input, and few enough of a large one to map all their files."""
    return max(min(max(total // FEW_BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK), total // MOST_BLOCKS)


def cut(segments: Iterable[Segment], size: int) -> Iterator[tuple[Segment, ...]]:
    """Segments of one source, gathered or cut into the contents of blocks of about ``size`` bytes."""
    gathered: list[Segment] = []
    gathered_bytes = 0
    for segment in segments:
        for piece in _pieces(segment, size):
            if gathered and (gathered_bytes + piece.size > size or len(gathered) >= MOST_SEGMENTS):
                yield tuple(gathered)
                gathered, gathered_bytes = [], 0
            gathered.append(piece)
            gathered_bytes += piece.size
    if gathered:
        yield tuple(gathered)


def _pieces(segment: Segment, size: int) -> Iterator[Segment]:
    """Ranges of a file that can be entered in its middle; else the whole file."""
    if segment.stop is None or segment.format not in BY_LINES or segment.size <= size:
        yield segment
        return
    count = -(-segment.size // size)
    edges = [segment.size * number // count for number in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        yield Segment(segment.path, segment.format, start, stop, stop - start, segment.stamp)
