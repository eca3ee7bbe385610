"""Where a run's files are: a local or shared directory, or any URI that Ray Train's storage takes.

In: a path or URI (``s3://bucket/runs?region=...``, ``gs://``, ``abfs://``, ``hdfs://``, ``fsspec+PROTOCOL://``), opened
by pyarrow.fs as Ray Train does. Out: whole-file reads and writes, random access, and copies. A write appears whole
or not at all. Object stores have no rename and no append, so nothing here needs either.
"""

from __future__ import annotations

import functools
import posixpath
import shutil
from pathlib import Path

from pyarrow import fs as arrow

from raylm.config.run_directory import write_atomically

COPY_CHUNK_BYTES = 8 << 20


class Storage:
    """A folder, local or remote; opened when it is first used, so that it travels by pickle.

    Attributes:
        uri: absolute local path or URI.
        local: the folder's path, or None where it is remote.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self.local = None if "://" in self.uri else Path(self.uri)

    def __truediv__(self, name: str) -> Storage:
        """The folder ``name`` in this one."""
        address, mark, query = self.uri.partition("?")
        return Storage(f"{address.rstrip('/')}/{name}{mark}{query}")

    def __str__(self) -> str:
        return self.uri.partition("?")[0]

    def __getstate__(self) -> dict:
        return {"uri": self.uri, "local": self.local}

    @functools.cached_property
    def _opened(self) -> tuple[arrow.FileSystem, str]:
        if self.local is not None:
            return arrow.LocalFileSystem(), str(self.local)
        return arrow.FileSystem.from_uri(self.uri)

    def _path(self, name: str) -> str:
        return posixpath.join(self._opened[1], name) if name else self._opened[1]

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders in ``folder``, sorted; none where it is missing."""
        selector = arrow.FileSelector(self._path(folder), allow_not_found=True)
        return sorted(info.base_name for info in self._opened[0].get_file_info(selector))

    def size(self, name: str) -> int | None:
        """Bytes of the file ``name``; None where there is none."""
        info = self._opened[0].get_file_info(self._path(name))
        return info.size if info.type == arrow.FileType.File else None

    def open(self, name: str):
        """The file ``name`` for random access: ``seek``, ``read``, ``readinto``.

        Raises:
            OSError: it is missing or cannot be read.
        """
        return self._opened[0].open_input_file(self._path(name))

    def read(self, name: str) -> bytes | None:
        """The content of the file ``name``; None where there is none."""
        try:
            with self._opened[0].open_input_stream(self._path(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        """Write the file ``name``, whole or not at all.

        Raises:
            OSError: the storage is full, read-only or unreachable.
        """
        if self.local is not None:
            path = self.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
            return
        with self._open_output(name) as stream:
            stream.write(text.encode())

    def _open_output(self, name: str):
        # An object store needs no folders but a bucket, which ``allow_bucket_creation`` makes; HDFS needs them all.
        self._opened[0].create_dir(posixpath.dirname(self._path(name)), recursive=True)
        return self._opened[0].open_output_stream(self._path(name))

    def remove(self, name: str) -> None:
        """Remove the file or folder ``name``, if it is there."""
        system, path = self._opened[0], self._path(name)
        kind = system.get_file_info(path).type
        if kind == arrow.FileType.Directory:
            system.delete_dir(path)
        elif kind != arrow.FileType.NotFound:
            system.delete_file(path)

    def upload(self, source: Path, name: str) -> None:
        """Copy the local file or folder ``source`` here as ``name``; a folder replaces what was there."""
        if source.is_dir():
            self.remove(name)
            for path in sorted(p for p in source.rglob("*") if p.is_file()):
                self.upload(path, f"{name}/{path.relative_to(source).as_posix()}")
            return
        with source.open("rb") as stream, self._open_output(name) as target:
            while block := stream.read(COPY_CHUNK_BYTES):
                target.write(block)

    def download(self, name: str, target: Path) -> bool:
        """Copy the file or folder ``name`` to ``target``, where it appears whole; False where there is none."""
        info = self._opened[0].get_file_info(self._path(name))
        if info.type == arrow.FileType.NotFound:
            return False
        partial = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_local(partial)
        if info.type == arrow.FileType.Directory:
            partial.mkdir()
            for child in self.names(name):
                self.download(f"{name}/{child}", partial / child)
            _remove_local(target)
        else:
            with self._opened[0].open_input_stream(self._path(name)) as stream, partial.open("wb") as output:
                shutil.copyfileobj(stream, output, COPY_CHUNK_BYTES)
        partial.replace(target)
        return True


def _remove_local(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
