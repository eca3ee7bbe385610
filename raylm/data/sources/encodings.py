"""Encodings of text files: the one that a file's beginning tells, and UTF-16 and UTF-32 read as UTF-8.

What reads lines looks for a line feed of one byte. A file in which it has two or four is therefore read as UTF-8, and
what was no text in it stays no text.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from typing import Any, BinaryIO

DETECTED_BYTES = 64 << 10
# The marks of UTF-32 begin with those of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
NO_UTF8 = b"\xff"
PIECE_BYTES = 8 << 10


def is_wide(encoding: str) -> bool:
    """Whether a line feed is more than a byte in this encoding, by Python's own name for it."""
    return encoding.startswith(("utf-16", "utf-32"))


def marked_encoding(beginning: bytes) -> str | None:
    """The wide encoding whose byte order mark a file begins with."""
    return next((encoding for mark, encoding in MARKS.items() if beginning.startswith(mark)), None)


def detected_encoding(stream: BinaryIO) -> str:
    """The encoding that the beginning of a file is most likely in; UTF-8 where nothing fits it.

    Relies on charset_normalizer. UTF-16 and UTF-32 are known by their byte order mark alone.
    """
    import charset_normalizer

    content = stream.read(DETECTED_BYTES)
    if (marked := marked_encoding(content)) is not None:
        return marked
    # What is read may end within a character.
    content = content[: content.rfind(b"\n") + 1] or content
    with contextlib.suppress(UnicodeDecodeError):
        content.decode()
        return "utf-8"
    found = charset_normalizer.from_bytes(content, cp_exclusion=["utf_16", "utf_32", "utf_7"]).best()
    # GB 2312 and GBK are parts of it.
    return {"gb2312": "gb18030", "gbk": "gb18030"}.get(found.encoding, found.encoding) if found else "utf-8"


def as_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """A stream of UTF-16 or UTF-32 as one of UTF-8, in which a byte 0xff stands for what is no text.

    Args:
        stream: the file, from its beginning.
        encoding: its encoding. The byte order is that of the file's mark; without one, the least byte comes first.
    """
    return io.BufferedReader(_AsUtf8(stream, encoding), 1 << 16)


class _AsUtf8(io.RawIOBase):
    """See :func:`as_utf8`."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._piece = stream.read(PIECE_BYTES)
        ordered = encoding if encoding.endswith(("-le", "-be")) else f"{encoding}-le"
        marked = marked_encoding(self._piece)
        self._encoding = marked if marked and marked[:6] == encoding[:6] else ordered
        self._decoder = codecs.getincrementaldecoder(self._encoding)()
        self._ready = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See :class:`io.RawIOBase`."""
        while not self._ready:
            ended = not self._piece
            self._ready = self._recode(self._piece, ended)
            if ended:
                break
            self._piece = self._stream.read(PIECE_BYTES)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _recode(self, piece: bytes, ended: bool) -> bytes:
        found = b""
        while True:
            try:
                return found + self._decoder.decode(piece, ended).encode()
            except UnicodeDecodeError as error:
                # What the decoder held back from the piece before is in ``error.object`` too.
                self._decoder.reset()
                found += error.object[: error.start].decode(self._encoding).encode() + NO_UTF8
                piece = error.object[error.end :]

    def close(self) -> None:
        """Close the file too."""
        if not self.closed:
            self._stream.close()
        super().close()
