"""Bytes of files: local or remote (fsspec), plain or compressed, a line at a time, and what to do with bad ones.

A remote path is a URI. ``s3://`` and ``gs://`` go through pyarrow, which takes ``?region=`` and the like as the storage
of a run does; everything else through fsspec's own file systems.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from raylm.config.data import DataSection
from raylm.errors import UserError, first_line

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_SAMPLES = 5
DETECTED_BYTES = 64 << 10


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URI."""
    return "://" in path


def file_system(path: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a local path or a URI.

    Raises:
        UserError: no file system goes by that protocol, or its library is not installed.
    """
    import fsspec

    protocol = path.split("://")[0] if is_remote(path) else "file"
    try:
        if protocol in ("s3", "gs", "gcs"):
            from fsspec.implementations.arrow import ArrowFSWrapper
            from pyarrow.fs import FileSystem

            found, inner = FileSystem.from_uri(path)
            return ArrowFSWrapper(found), inner
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{path}: {first_line(error)}") from None


def plain_suffix(path: str) -> str:
    """The suffix under a compressed file's own: ``a.jsonl.gz`` gives ``.jsonl``."""
    name = PurePosixPath(path.partition("?")[0])
    return (name.with_suffix("") if is_compressed(path) else name).suffix.lower()


def is_compressed(path: str) -> bool:
    """Whether the file's name says that it is compressed."""
    return PurePosixPath(path.partition("?")[0]).suffix.lower() in COMPRESSED


def open_remote(files: Any, path: str) -> Any:
    """A file of :func:`file_system` for reading at any place."""
    # What fsspec's wrapper of pyarrow gives cannot be buffered.
    return files.fs.open_input_file(path) if hasattr(files, "fs") else files.open(path, "rb")


def open_bytes(path: str) -> BinaryIO:
    """The file's content as a binary stream, decompressed.

    Raises:
        OSError: it cannot be opened.
    """
    if is_remote(path):
        files, inner = file_system(path)
        # fsspec's own readline knows no limit.
        stream = io.BufferedReader(open_remote(files, inner), 1 << 20)
    else:
        stream = open(path, "rb")  # noqa: SIM115, PTH123 - the caller closes it
    suffix = PurePosixPath(path.partition("?")[0]).suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if suffix == ".xz":
        return lzma.LZMAFile(stream)
    if suffix == ".bz2":
        return bz2.BZ2File(stream)
    if suffix == ".zst":
        # pyarrow's reader says so where a file was cut off.
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"), 1 << 20)
    return stream


def damaged() -> tuple[type[BaseException], ...]:
    """What reading a damaged or unreachable file raises."""
    return OSError, EOFError, lzma.LZMAError, pa.ArrowException


@dataclass
class InputErrors:
    """What is done with bad input, and the count of it.

    Attributes:
        policy: strict, replace or skip (``data.errors``).
        counts: by kind of mistake, how often it was skipped or replaced.
        samples: the first messages.
        encoding: of text (``data.encoding``).
    """

    policy: str
    counts: dict[str, int] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    encoding: str = "utf-8"
    _detected: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, data: DataSection) -> InputErrors:
        """What ``data`` says."""
        return cls(data.errors, encoding=data.encoding)

    def bad(self, kind: str, message: str) -> None:
        """Count one mistake whose row is skipped.

        Raises:
            UserError: unless ``policy`` is skip.
        """
        if self.policy != "skip":
            raise UserError(message)
        self.count(kind, message)

    def count(self, kind: str, message: str) -> None:
        """Count one mistake."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.samples) < MOST_SAMPLES:
            self.samples.append(message)

    def _encoding_of(self, path: str) -> str:
        if path not in self._detected:
            self._detected[path] = detected_encoding(path)
        return self._detected[path]

    def decode(self, content: bytes, path: str, offset: int) -> str | None:
        """``content``, which stands at ``offset`` of the file, as text; None where it is to be skipped.

        A zero byte is no text either: files that hold some are binary, or were cut off by a crash.

        Raises:
            UserError: it is not in that encoding, unless ``policy`` says otherwise; names the byte.
        """
        zero = content.find(0)
        encoding = self._encoding_of(path) if self.encoding == "detect" else self.encoding
        try:
            text = content.decode(encoding)
            if zero < 0:
                return text
            place = zero
        except UnicodeDecodeError as error:
            place = error.start if zero < 0 else min(zero, error.start)
        name = encoding.upper()
        message = f"{path}: not {name} at byte {offset + place}: found 0x{content[place]:02x}, allowed: {name} text"
        if self.policy == "replace":
            self.count("undecodable", message)
            return content.decode(encoding, errors="replace").replace("\0", "\ufffd")
        self.bad("undecodable", message)
        return None


def detected_encoding(path: str) -> str:
    """The encoding that the beginning of a file is most likely in; UTF-8 where nothing fits it.

    Relies on charset_normalizer. Encodings in which a line feed is more than a byte are not looked for.
    """
    import charset_normalizer

    with open_bytes(path) as stream:
        content = stream.read(DETECTED_BYTES)
    # What is read may end within a character.
    content = content[: content.rfind(b"\n") + 1] or content
    with contextlib.suppress(UnicodeDecodeError):
        content.decode()
        return "utf-8"
    found = charset_normalizer.from_bytes(content, cp_exclusion=["utf_16", "utf_32", "utf_7"]).best()
    # GB 2312 and GBK are parts of it.
    return {"gb2312": "gb18030", "gbk": "gb18030"}.get(found.encoding, found.encoding) if found else "utf-8"


class Lines:
    """The lines of a file that begin in a range of bytes, decoded.

    Lines that begin at p with start < p <= stop belong to the range, and the first line to the one that starts at 0:
    ranges that follow each other share out every line once.

    Args:
        path: the file.
        start, stop: the range; stop is None for a file that is read to its end.
        errors: what to do with what is not text; says the encoding.
        most_bytes: longest line.
    """

    def __init__(
        self, path: str, errors: InputErrors, most_bytes: int, start: int = 0, stop: int | None = None
    ) -> None:
        self.path, self.start, self.stop, self.most_bytes = path, start, stop, most_bytes
        self._errors = errors

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """(offset, line with its end)."""
        return self.read(lambda offset: self.stop is None or offset <= self.stop)

    def read(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, str]]:
        """(offset, line with its end), from the range's start on, as long as ``wanted(offset)``."""
        with open_bytes(self.path) as stream:
            offset = self.start
            if offset:
                stream.seek(offset)
                # A line that goes on beyond the range leaves nothing to read; all of it may be far more than the range.
                offset += self._pass(stream, None if self.stop is None else self.stop - offset + 1)
                if self.stop is not None and offset > self.stop:
                    return
            while wanted(offset):
                raw = stream.readline(self.most_bytes + 1)
                if not raw:
                    return
                begin, offset = offset, offset + len(raw)
                if len(raw) > self.most_bytes:
                    offset += self._pass(stream) if not raw.endswith(b"\n") else 0
                    self._errors.bad(
                        "too long",
                        f"{self.path}:{line_number(self.path, begin)}: a line of {offset - begin} bytes at byte "
                        f"{begin}; allowed: at most data.max_document_bytes ({self.most_bytes})",
                    )
                    continue
                content = raw.removeprefix(BYTE_ORDER_MARK) if begin == 0 else raw
                text = self._errors.decode(content, self.path, begin + len(raw) - len(content))
                if text is not None:
                    yield begin, text

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


def line_number(path: str, offset: int) -> int:
    """Number, from 1, of the line that begins at ``offset``; counted when a mistake is to be named."""
    number, left = 1, offset
    with open_bytes(path) as stream:
        while left > 0 and (piece := stream.read(min(left, 1 << 20))):
            number += piece.count(b"\n")
            left -= len(piece)
    return number
