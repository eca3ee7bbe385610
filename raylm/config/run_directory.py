"""A stage's run directory, ``<storage>/<name>/``: who may use it, and what every stage leaves in it.

The same name resumes. ``config.yaml`` records what the run was started with; a start with another configuration is
refused with the differing keys named. ``.lock`` is held by the one command that runs. ``report.json``, written last,
says that the stage is done. A command that finds its input wrong leaves nothing of a run that it began. Needs neither
Ray nor torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylm.config.base import Section
from raylm.config.loading import differing_keys, read_configuration, to_yaml, validate
from raylm.config.yaml_text import parse_yaml
from raylm.errors import UserError, first_line

CONFIG, LOCK = "config.yaml", ".lock"
# What a command leaves that was killed before the run began.
NOT_BEGUN = {LOCK, f".{CONFIG}.partial"}


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
        self._kept = False

    def check(self) -> None:
        """Refuse a directory of another stage or of another configuration; write nothing.

        Raises:
            UserError: the name is taken; names the differing keys with both values.
        """
        saved_path = self.path / CONFIG
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.storage: {self.path} is a file, a directory is needed")
        if not saved_path.exists():
            if self.path.is_dir() and any(each.name not in NOT_BEGUN for each in self.path.iterdir()):
                raise UserError(f"run.name: {self.path} holds files but no config.yaml; choose another name")
            return
        saved = self.saved() or {}
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
        path = self.path / CONFIG
        if not path.exists():
            return None
        try:
            found = parse_yaml(read_configuration(path), CONFIG).values
        except UserError as error:
            raise self._damaged(path.name, str(error)) from None
        if not isinstance(found, dict):
            raise self._damaged(path.name, "it holds no sections")
        return found

    def create(self, resolved: Section | None = None) -> None:
        """Make the directory and write ``config.yaml``; call after everything else was validated.

        Args:
            resolved: what stands in it; by default the configuration as it was given.

        Raises:
            UserError: the storage is read-only or full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CONFIG, f"stage: {self.stage}\n{to_yaml(resolved or self._config)}")
        except OSError as error:
            raise UserError(f"run.storage: {self.path} cannot be written: {error.strerror}") from None

    @contextlib.contextmanager
    def begin(self, resolved: Section | None = None, *, resumes: bool = True) -> Iterator[None]:
        """Hold the run directory for the block, :meth:`create` it, and take back what is no use after a failure.

        Where the block raises a UserError before :meth:`keep` is called, a run that this command has begun is removed,
        as the corrected file would else be refused as another configuration. So are the directories made for it, if
        nothing else is in them.

        Args:
            resolved: see :meth:`create`.
            resumes: the stage goes on from what a failed start leaves. Without it, any failure takes the run back.

        Raises:
            UserError: the storage is read-only or full, another command holds the directory, or has begun another run
                there since :meth:`check`.
        """
        made = self._make()
        begins = False
        try:
            with exclusive(self.path):
                try:
                    self.check()
                    begins = self.saved() is None
                    self.create(resolved)
                    yield
                except BaseException as error:
                    if begins and not self._kept and (isinstance(error, UserError) or not resumes):
                        for entry in self.path.iterdir():
                            _remove(entry)
                    raise
        finally:
            _remove_empty(made)

    def keep(self) -> None:
        """From here on a failure leaves the run as it is."""
        self._kept = True

    def _make(self) -> list[Path]:
        """Make the directory and those above it; returns the ones that were missing, from the top."""
        made = []
        try:
            for directory in (*reversed(self.path.parents), self.path):
                if not directory.is_dir():
                    with contextlib.suppress(FileExistsError):
                        directory.mkdir()
                        made.append(directory)
        except OSError as error:
            _remove_empty(made)
            raise UserError(f"run.storage: {self.path} cannot be written: {error.strerror}") from None
        return made

    def report(self) -> dict[str, Any] | None:
        """The finished stage's ``report.json``, or None while it is not done.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / "report.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(path.name, first_line(error)) from None
        if not isinstance(found, dict):
            raise self._damaged(path.name, "it is no JSON object")
        return found

    def _damaged(self, name: str, reason: str) -> UserError:
        return UserError(
            f"run.name: {self.path / name} is damaged, or not of this version of raylm: {reason}; restore the file or "
            "choose another run.name"
        )

    def write_report(self, report: dict[str, Any]) -> None:
        """Write ``report.json``; its presence says that the stage is done."""
        write_atomically(self.path / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a run directory, so that two commands never run the same run at once; a dead command lets go.

    Raises:
        UserError: another command holds it, or it cannot be written.
    """
    try:
        stream = (directory / LOCK).open("w")
    except OSError as error:
        raise UserError(f"run.storage: {directory} cannot be written: {error.strerror}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_in_use(directory)) from None
        # A command that takes its run back removes the lock too: then what was opened here locks nothing.
        if not _is_file(stream.fileno(), directory / LOCK):
            raise UserError(_in_use(directory))
        yield


def _in_use(directory: Path) -> str:
    return f"run.name: {directory} is in use by another command that is still running"


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one under its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, the last first, up to the first one with something in it."""
    with contextlib.suppress(OSError):
        for directory in reversed(directories):
            directory.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash, sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
