"""From the names in ``data.train`` and ``data.validation`` to segments that tasks can read.

A source is an embedded corpus, files (a path, a glob, a directory, a URI), a hub dataset, or a directory that ``raylm
prepare`` made. Opening one checks that it exists and lists its files; nothing of their content is read.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.config.data import STDLIB_DOCS, STDLIB_PAIRS, DataSection, SourceSection
from raylm.data.sources.blocks import BY_LINES, SMALLEST_BLOCK, Segment
from raylm.data.sources.documents import document_files
from raylm.data.sources.encodings import is_wide, marked_encoding
from raylm.data.sources.folders import files_below, matches
from raylm.data.sources.streams import (
    COMPRESSED,
    file_system,
    is_compressed,
    is_remote,
    open_bytes,
    open_remote,
    plain_suffix,
    readable,
)
from raylm.errors import UserError, first_line

MANIFEST = "manifest.json"
SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".html": "text",
    ".htm": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".json": "json",
    ".conll": "conll",
    ".conllu": "conll",
    ".bio": "conll",
}


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
        name: what the user called it.
        weight: how often its training documents are taken.
        segments: what it consists of, in order.
    """

    name: str
    weight: float
    segments: tuple[Segment, ...]


def open_sources(data: DataSection, names: Sequence[str | SourceSection], key: str) -> list[Source]:
    """Sources for ``names``; ``key`` (data.train or data.validation) names them in errors.

    Raises:
        UserError: a path does not exist, a glob matches nothing, or a format is unknown.
    """
    sections = [SourceSection(path=name) if isinstance(name, str) else name for name in names]
    return [
        Source(section.path, section.weight, tuple(_segments(section, section.format or data.format, data, key)))
        for section in sections
    ]


def _segments(section: SourceSection, file_format: str, data: DataSection, key: str) -> list[Segment]:
    name = section.path
    if name in (STDLIB_DOCS, STDLIB_PAIRS):
        return [Segment(name, "stdlib", size=2 << 20)]
    if file_format == "hub":
        from raylm.data.sources.hub import hub_segments

        return hub_segments(name, data, key)
    if section.target is not None and file_format == "auto":
        # Files of parallel text are named by their language, such as train.en.
        file_format = "text"
    path = Path(name).expanduser()
    is_prepared = file_format == "auto" and not is_remote(name) and (path / MANIFEST).is_file()
    if file_format == "prepared" or is_prepared:
        return _prepared_segments(path, key)
    found = _remote_files(name, file_format, key) if is_remote(name) else _local_files(path, name, file_format, key)
    if section.target is not None:
        return [_parallel(section, found, key)]
    return [_uncut_if_wide(segment, data.encoding) for segment in found]


def _uncut_if_wide(segment: Segment, encoding: str) -> Segment:
    """The segment, without an end in bytes where what reads it gets other bytes than the file has."""
    if segment.format not in BY_LINES or segment.stop is None:
        return segment
    wide = is_wide(encoding)
    if encoding == "detect":
        with readable(segment.path), open_bytes(segment.path) as stream:
            wide = marked_encoding(stream.read(4)) is not None
    return replace(segment, stop=None) if wide else segment


def _prepared_segments(path: Path, key: str) -> list[Segment]:
    if not (path / MANIFEST).is_file():
        raise UserError(f"{key}: {path} is not a prepared directory (no {MANIFEST}); make one with raylm prepare")
    if not document_files(path, "train"):
        raise UserError(f"{key}: {path} holds no documents/train-*.parquet; prepare the data again")
    files = [*document_files(path, "train"), *document_files(path, "validation")]
    return [_local_segment(file, "documents") for file in files]


def _parallel(section: SourceSection, found: list[Segment], key: str) -> Segment:
    target = Path(section.target).expanduser()
    if len(found) != 1 or not (is_remote(section.target) or target.is_file()):
        problem = f"{section.target} does not exist" if len(found) == 1 else f"{section.path} is no single file"
        raise UserError(f"{key}: parallel text: {problem}; allowed: one file and one target")
    name = section.target if is_remote(section.target) else str(target)
    stamp = found[0].stamp if is_remote(section.target) else f"{found[0].stamp} {target.stat().st_mtime_ns}"
    return Segment(found[0].path, "parallel", size=found[0].size, stamp=stamp, target=name)


def _local_segment(file: Path, file_format: str) -> Segment:
    with readable(str(file)):
        found = file.stat()
    whole = None if is_compressed(str(file)) else found.st_size
    return Segment(str(file), file_format, 0, whole, found.st_size, str(found.st_mtime_ns))


def _cut(whole: Segment, source: Any) -> list[Segment]:
    """One segment a file; of a large Parquet file, one a row group.

    Args:
        whole: the file.
        source: what pyarrow reads it from.
    """
    if whole.format in BY_LINES:
        return [whole]
    if whole.format == "parquet" and whole.size >= SMALLEST_BLOCK:
        try:
            count = pq.read_metadata(source).num_row_groups
        except (pa.ArrowException, OSError):
            # Its reader will say what is wrong.
            count = 0
        if count:
            return [replace(whole, start=group, stop=group + 1, size=whole.size // count) for group in range(count)]
    return [replace(whole, stop=None)]


def _local_segments(file: Path, file_format: str) -> list[Segment]:
    return _cut(_local_segment(file, file_format), file)


def _known() -> str:
    return f"{', '.join(SUFFIXES)} (with {', '.join(COMPRESSED)} where it is compressed), or data.format"


def _format_of(path: str, file_format: str, key: str) -> str:
    if file_format != "auto":
        return file_format
    found = SUFFIXES.get(plain_suffix(path))
    if found is None:
        raise UserError(f"{key}: {path}: unknown suffix '{Path(path).suffix}', allowed: {_known()}")
    return found


def _usable(paths: list[str], file_format: str) -> list[str]:
    """Of a directory's files those whose suffix is known and of the format that is asked for."""
    formats = {path: SUFFIXES.get(plain_suffix(path)) for path in paths}
    return [path for path in paths if formats[path] and file_format in ("auto", formats[path])]


def _local_files(path: Path, name: str, file_format: str, key: str) -> list[Segment]:
    """Segments of all files that ``name`` stands for, sorted by name."""
    if path.is_dir():
        usable = _usable([str(file) for file in files_below(path)], file_format)
        if not usable:
            raise UserError(
                f"{key}: directory {name} holds no file of format {file_format}; allowed suffixes: {_known()}"
            )
        return [
            segment for file in usable for segment in _local_segments(Path(file), _format_of(file, file_format, key))
        ]
    if path.is_file():
        found = [path]
    elif glob.has_magic(name):
        found = matches(path)
        if not found:
            raise UserError(f"{key}: no file matches '{name}'")
    else:
        hint = "; a hub name needs data.format=hub" if name.count("/") <= 1 and not path.suffix else ""
        raise UserError(f"{key}: {name} does not exist{hint}")
    named = [(file, _format_of(str(file), file_format, key)) for file in found]
    return [segment for file, its_format in named for segment in _local_segments(file, its_format)]


def _remote_files(name: str, file_format: str, key: str) -> list[Segment]:
    """Segments of all files that a URI stands for: one file, a glob, or everything below it."""
    files, inner = file_system(name)
    prefix = name[: len(name.partition("?")[0]) - len(inner)] if name.partition("?")[0].endswith(inner) else ""
    query = name[len(name.partition("?")[0]) :] if name.startswith(("s3://", "gs://", "gcs://")) else ""
    try:
        _touch(files, inner)
        if files.isfile(inner):
            found = [inner]
        elif glob.has_magic(inner):
            found = [path for path in sorted(files.glob(inner)) if files.isfile(path)]
        else:
            found = _usable(sorted(files.find(inner)), file_format)
        if not found:
            raise UserError(f"{key}: {name}: no file there")
        infos = {path: files.info(path) for path in found}
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - each protocol raises its own library's errors
        raise UserError(f"{key}: {name} cannot be reached: {first_line(error)}") from None
    segments = []
    for path, info in infos.items():
        address = name if path == inner else f"{prefix}{path}{query}"
        size = int(info.get("size") or 0)
        whole = None if is_compressed(address) or not size else size
        stamp = str(info.get("etag") or info.get("ETag") or info.get("mtime") or info.get("sha") or "")
        segment = Segment(address, _format_of(address, file_format, key), 0, whole, size, stamp)
        is_large = segment.format == "parquet" and size >= SMALLEST_BLOCK
        segments += _cut(segment, open_remote(files, path) if is_large else None)
    return segments


def _touch(files: Any, path: str) -> None:
    """Raise the error of a server that does not answer: fsspec takes it for one that does not have the file."""
    if hasattr(files, "fs"):
        files.fs.get_file_info(path)
        return
    try:
        files.info(path)
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
