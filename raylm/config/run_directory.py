"""A stage's run directory, ``<storage>/<name>/``: who may use it, and what every stage leaves in it.

The same name resumes. A stage holds the directory while it writes there; a second command is refused. ``config.yaml``
records what the run was started with; a start with another configuration is refused with the differing keys named.
``report.json``, written last, says that the stage is done. A command that finds its input wrong leaves nothing of a run
that it began. Needs neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from raylm.config.base import Section
from raylm.config.loading import differing_keys, read_configuration, to_yaml, validate
from raylm.config.yaml_text import parse_yaml
from raylm.errors import UserError

LOCK = ".lock"
# Who only looks whether a directory is held holds it for a moment.
LOOK_SECONDS = 0.5


class RunDirectory:
    """The directory of one run of one stage.

    Attributes:
        path: absolute path of ``<storage>/<name>``.
        stage: name of the stage that owns it.
    """

    def __init__(self, stage: str, config: Section) -> None:
        self.stage = stage
        self.path: Path = config.run.directory
        self._config = config
        self._held = self._begun = self._kept = False

    def check(self) -> None:
        """Refuse a directory that is in use, of another stage or of another configuration; write nothing.

        Raises:
            UserError: the name is taken; names the differing keys with both values.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.storage: {self.path} is a file, a directory is needed")
        if not self._held and is_held(self.path):
            raise _in_use(self.path)
        saved = self.saved()
        if saved is None:
            if self.path.is_dir() and any(path.name != LOCK for path in self.path.iterdir()):
                raise UserError(f"run.name: {self.path} holds files but no config.yaml; choose another name")
            return
        stage = saved.pop("stage", None)
        if not isinstance(stage, str):
            raise self._damaged("config.yaml", "it names no stage")
        if stage != self.stage:
            raise UserError(
                f"run.name: {self.path} belongs to a '{stage}' run, found stage '{self.stage}'; choose another name"
            )
        # A run of an older raylm has none of the keys that came later: they were what they are by default.
        try:
            saved = validate(type(self._config), saved, "config.yaml").model_dump(mode="json")
        except UserError as error:
            raise self._damaged("config.yaml", str(error)) from None
        differences = differing_keys(type(self._config), saved, self._config.model_dump(mode="json"))
        if differences:
            raise UserError(
                f"run.name: {self.path} was started with another configuration: {'; '.join(differences)}. "
                "Choose another run.name, or restore these values to resume"
            )

    def saved(self) -> dict[str, Any] | None:
        """What ``config.yaml`` holds, with the ``stage``; None before the first start.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            return None
        try:
            found = parse_yaml(read_configuration(path), path.name).values
        except UserError as error:
            raise self._damaged(path.name, str(error)) from None
        if not isinstance(found, dict):
            raise self._damaged(path.name, "it holds no sections")
        return found

    def _damaged(self, name: str, reason: str) -> UserError:
        return UserError(
            f"run.name: {self.path / name} is damaged, or not of this version of raylm: {reason}; restore the file or "
            "choose another run.name"
        )

    @contextlib.contextmanager
    def held(self, *, resumes: bool = True) -> Iterator[None]:
        """Hold the directory within the block, so that no other command writes there; a dead command lets go.

        Where the block raises a UserError before :meth:`keep`, a run that it has begun is taken back, as the corrected
        file would else be refused as another configuration. What had to be made for the run is then gone again, as it
        is where the block ends before :meth:`create`. Within the block of another call nothing is done.

        Args:
            resumes: the stage goes on from what a failed start leaves. Without it, any failure takes the run back.

        Raises:
            UserError: another command holds it, or the storage is read-only or full. Nothing was touched.
        """
        if self._held:
            yield
            return
        made: list[Path] = []
        try:
            for parent in reversed([self.path, *self.path.parents]):
                if not parent.exists():
                    parent.mkdir(exist_ok=True)
                    made.append(parent)
            lock = _take_lock(self.path)
        except OSError as error:
            _remove_empty(made)
            raise UserError(f"run.storage: {self.path} cannot be written: {error.strerror}") from None
        self._held, is_new = True, self.path in made
        with lock:
            try:
                yield
            except BaseException as error:
                if self._begun and not self._kept and (isinstance(error, UserError) or not resumes):
                    is_new = True
                    self._take_back()
                raise
            finally:
                self._held = False
                if is_new and [path.name for path in self.path.iterdir()] == [LOCK]:
                    (self.path / LOCK).unlink()
                    _remove_empty(made)

    def _take_back(self) -> None:
        """Remove what the run consists of; it was begun in an empty directory."""
        self._begun = False
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink(missing_ok=True)

    def keep(self) -> None:
        """From here on the run stays, whatever happens to it."""
        self._kept = True

    def create(self, resolved: Section | None = None) -> None:
        """Make the directory and write ``config.yaml``; call while it is :meth:`held`, after everything was validated.

        Args:
            resolved: what stands in it; by default the configuration as it was given.

        Raises:
            UserError: the storage is read-only or full, or another command has begun the run since :meth:`check`.
        """
        self.check()
        self._begun = self._begun or self.saved() is None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "config.yaml", f"stage: {self.stage}\n{to_yaml(resolved or self._config)}")
        except OSError as error:
            raise UserError(f"run.storage: {self.path} cannot be written: {error.strerror}") from None

    def report(self) -> dict[str, Any] | None:
        """The finished stage's ``report.json``, or None while it is not done; a damaged one does not count."""
        found = read_object(self.path / "report.json")
        return found or None

    def write_report(self, report: dict[str, Any]) -> None:
        """Write ``report.json``; its presence says that the stage is done."""
        write_atomically(self.path / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def is_held(directory: Path) -> bool:
    """Whether a command, of this process or another, holds the run directory."""
    try:
        with (directory / LOCK).open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _take_lock(directory: Path) -> IO[str]:
    """The lock file, held until it is closed."""
    path, deadline = directory / LOCK, time.monotonic() + LOOK_SECONDS
    while True:
        stream = path.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A start that failed takes away what it made.
            if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        except BlockingIOError:
            if time.monotonic() > deadline:
                stream.close()
                raise _in_use(directory) from None
            time.sleep(LOOK_SECONDS / 10)
        stream.close()


def _in_use(directory: Path) -> UserError:
    return UserError(f"run.name: {directory} is in use by another command that is still running")


def _remove_empty(made: list[Path]) -> None:
    for path in reversed(made):
        with contextlib.suppress(OSError):
            path.rmdir()


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of a run; None where there is no file, or it is damaged or no object."""
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        return None


def parse_object(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object that ``text`` is; None where it is damaged or no object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash, sees the old file or the new one, never a part."""
    # A name of its own: two starts of a run may write the same file, from hosts that do not see each other's locks.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
