"""The lines of a file that begin in a range of its bytes, and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

from raylm.config.data import DataSection
from raylm.data.sources.blocks import Segment
from raylm.data.sources.streams import BYTE_ORDER_MARK, InputErrors


class Lines:
    """The lines of a file that begin in a range of bytes, decoded.

    Lines that begin at p with start < p <= stop belong to the range, and the first line to the one that starts at 0:
    ranges that follow each other share out every line once.

    Args:
        path: the file.
        start, stop: the range; stop is None for a file that is read to its end.
        errors: what to do with what is not text; says the encoding.
        most_bytes: longest line.

    Attributes:
        count: lines of the range that were read.
    """

    def __init__(
        self, path: str, errors: InputErrors, most_bytes: int, start: int = 0, stop: int | None = None
    ) -> None:
        self.path, self.start, self.stop, self.most_bytes = path, start, stop, most_bytes
        self.count = 0
        self._errors = errors
        self._begin = 0
        self._before: int | None = None

    @classmethod
    def of(cls, segment: Segment, data: DataSection, errors: InputErrors) -> Lines:
        """Those of a segment."""
        return cls(segment.path, errors, data.max_document_bytes, segment.start, segment.stop)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """(offset, line with its end)."""
        return self.read(lambda offset: self.stop is None or offset <= self.stop)

    def read(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, str]]:
        """(offset, line with its end), from the range's start on, as long as ``wanted(offset)``."""
        self.count = 0
        with self._errors.open(self.path) as stream:
            offset = self.start
            if offset:
                stream.seek(offset)
                # A line that goes on beyond the range leaves nothing to read; all of it may be far more than the range.
                offset += self._pass(stream, None if self.stop is None else self.stop - offset + 1)
                if self.stop is not None and offset > self.stop:
                    return
            self._begin = offset
            while wanted(offset):
                raw = stream.readline(self.most_bytes + 1)
                if not raw:
                    return
                begin, offset = offset, offset + len(raw)
                self.count += 1
                if len(raw) > self.most_bytes:
                    offset += self._pass(stream) if not raw.endswith(b"\n") else 0
                    self._errors.bad(
                        "too long",
                        f"{self.place(self.count)}: a line of {offset - begin} bytes at byte {begin}; allowed: at "
                        f"most data.max_document_bytes ({self.most_bytes})",
                    )
                    continue
                content = raw.removeprefix(BYTE_ORDER_MARK) if begin == 0 else raw
                offset_of_text = begin + len(raw) - len(content)
                text = self._errors.decode(content, self.path, offset_of_text, self._here)
                if text is not None:
                    yield begin, text

    def place(self, count: int) -> str:
        """The file and the number, from 1, of the line that was read as the range's ``count``-th.

        What stands before the range is counted once, when the first mistake is to be named.
        """
        if self._before is None:
            self._before = self._line_ends(self._begin)
        return f"{self.path}:{self._before + count}"

    def _here(self) -> str:
        return self.place(self.count)

    def _line_ends(self, left: int) -> int:
        """Line ends in the first ``left`` bytes of the file."""
        found = 0
        with self._errors.open(self.path) as stream:
            while left > 0 and (piece := stream.read(min(left, 1 << 20))):
                found += piece.count(b"\n")
                left -= len(piece)
        return found

    @staticmethod
    def _pass(stream: BinaryIO, most_bytes: int | None = None) -> int:
        """Read to the end of the line, in pieces, or ``most_bytes`` of it; returns the bytes read."""
        count = 0
        while most_bytes is None or count < most_bytes:
            piece = stream.readline(1 << 20 if most_bytes is None else min(1 << 20, most_bytes - count))
            count += len(piece)
            if not piece or piece.endswith(b"\n"):
                break
        return count
