"""Files of this machine in folders and by patterns, through symbolic links, sorted by name."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from raylm.data.sources.streams import readable

ANY_FOLDERS = "**"


def files_below(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones; a link to a folder that holds the link is passed over.

    Links to nothing are among them: whoever opens the files says so.

    Raises:
        UserError: a folder cannot be read.
    """
    found: list[Path] = []
    _gather(str(folder), (_identity(str(folder)),), found)
    return sorted(found)


def _gather(folder: str, above: tuple[tuple[int, int], ...], found: list[Path]) -> None:
    with readable(folder), os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in shown:
        if _is_file(path := Path(entry.path)):
            found.append(path)
        elif entry.is_dir() and (own := _identity(entry.path)) not in above:
            _gather(entry.path, (*above, own), found)


def _is_file(path: Path) -> bool:
    return path.is_file() or (path.is_symlink() and not path.exists())


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)  # noqa: PTH116 - a string, as scandir has it
    return found.st_dev, found.st_ino


def matches(pattern: Path) -> list[Path]:
    """The files that a pattern of the shell stands for, but hidden ones; ``**`` is any number of folders.

    Raises:
        UserError: a folder cannot be read.
    """
    parts = pattern.parts
    if ANY_FOLDERS not in parts:
        return sorted(file for file in _glob(str(pattern)) if _is_file(file) and not file.name.startswith("."))
    # glob's own ``**`` goes through a link to a folder above it again and again.
    first = parts.index(ANY_FOLDERS)
    folders = [folder for folder in _glob(str(Path(*parts[:first]))) if folder.is_dir()]
    return sorted(
        file
        for folder in folders
        for file in files_below(folder)
        if _fits(file.relative_to(folder).parts, parts[first:])
    )


def _glob(pattern: str) -> list[Path]:
    return [Path(path) for path in glob.glob(pattern, include_hidden=True)]  # noqa: PTH207 - follows links


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the parts of a path are what the parts of a pattern say."""
    if not patterns:
        return not names
    if patterns[0] == ANY_FOLDERS:
        return any(_fits(names[start:], patterns[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])
