"""Bytes of files: local or remote (fsspec), plain or compressed, and what to do with bad ones.

A remote path is a URI. ``s3://`` and ``gs://`` go through pyarrow, which takes ``?region=`` and the like as the storage
of a run does; everything else through fsspec's own file systems.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from raylm.config.data import DataSection
from raylm.data.sources.encodings import as_utf8, detected_encoding, is_wide, marked_encoding
from raylm.errors import UserError, first_line
from raylm.progress import print_line

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_SAMPLES = 5


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
    name = _name(path)
    return (name.with_suffix("") if is_compressed(path) else name).suffix.lower()


def is_compressed(path: str) -> bool:
    """Whether the file's name says that it is compressed."""
    return _name(path).suffix.lower() in COMPRESSED


def _name(path: str) -> PurePosixPath:
    # Of a URI, a query is no part of the name; a file of this machine may well have a question mark in its own.
    return PurePosixPath(path.partition("?")[0] if is_remote(path) else path)


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
    suffix = _name(path).suffix.lower()
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


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Refuse the file at ``path`` where it proves damaged or unreachable.

    Raises:
        UserError: names the file and the reason.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        again = "; it is damaged or cut off: write or fetch it again" if is_compressed(path) else ""
        raise UserError(f"{path}: cannot be read: {reason}{again}") from None


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

    def say(self, key: str) -> None:
        """Print how much was left out or mended of what ``key`` names, if anything was, with the first place."""
        if self.counts:
            found = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items())
            print_line(f"{key}: left out or mended: {found} (data.errors: {self.policy}); the first: {self.samples[0]}")

    def encoding_of(self, path: str) -> str:
        """The encoding of a file."""
        if self.encoding != "detect":
            return self.encoding
        if path not in self._detected:
            with open_bytes(path) as stream:
                self._detected[path] = detected_encoding(stream)
        return self._detected[path]

    def open(self, path: str) -> BinaryIO:
        """A file's bytes for :meth:`decode`, in an encoding in which a line feed is one byte.

        Raises:
            OSError: it cannot be opened.
        """
        stream, encoding = open_bytes(path), self.encoding_of(path)
        return as_utf8(stream, encoding) if is_wide(encoding) else stream

    def decode(self, content: bytes, path: str, offset: int, line: Callable[[], str] | None = None) -> str | None:
        """``content``, which stands at ``offset`` of the file, as text; None where it is to be skipped.

        ``line`` gives the place of content that is one line.

        A zero byte is no text either: files that hold some are binary, or were cut off by a crash.

        Raises:
            UserError: it is not in that encoding, unless ``policy`` says otherwise; names the byte.
        """
        zero = content.find(0)
        own = self.encoding_of(path)
        encoding = "utf-8" if is_wide(own) else own
        try:
            text = content.decode(encoding)
            if zero < 0:
                return text
            place = zero
        except UnicodeDecodeError as error:
            place = error.start if zero < 0 else min(zero, error.start)
        name = own.upper()
        if own == encoding:
            message = f"{path}: not {name} at byte {offset + place}: found 0x{content[place]:02x}"
        else:
            # Its bytes are not those of the file.
            where = line() if line is not None else "{}:{}".format(path, content.count(b"\n", 0, place) + 1)
            message = f"{where}: not {name}"
        message += f", allowed: {name} text"
        if offset == 0 and (marked := marked_encoding(content)) is not None:
            message += f"; it begins with the mark of {marked[:6].upper()}: data.encoding: {marked[:6]}"
        if self.policy == "replace":
            self.count("undecodable", message)
            return content.decode(encoding, errors="replace").replace("\0", "\ufffd")
        self.bad("undecodable", message)
        return None
