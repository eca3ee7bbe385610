"""A stage's run directory, ``<storage>/<name>/``: who may use it, and what every stage leaves in it.

The same name resumes. ``config.yaml`` records what the run was started with; a start with another configuration is
refused with the differing keys named. ``report.json``, written last, says that the stage is done. Needs neither Ray
nor torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raylm.config.base import Section
from raylm.config.loading import differing_keys, to_yaml
from raylm.errors import UserError


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

    def check(self) -> None:
        """Refuse a directory of another stage or of another configuration; write nothing.

        Raises:
            UserError: the name is taken; names the differing keys with both values.
        """
        saved_path = self.path / "config.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.storage: {self.path} is a file, a directory is needed")
        if not saved_path.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(f"run.name: {self.path} holds files but no config.yaml; choose another name")
            return
        saved = self.saved() or {}
        stage = saved.pop("stage", None)
        if stage != self.stage:
            raise UserError(
                f"run.name: {self.path} belongs to a '{stage}' run, found stage '{self.stage}'; choose another name"
            )
        # A run of an older raylm has none of the keys that came later: they were what they are by default.
        with contextlib.suppress(ValidationError):
            saved = type(self._config).model_validate(saved).model_dump(mode="json")
        differences = differing_keys(type(self._config), saved, self._config.model_dump(mode="json"))
        if differences:
            raise UserError(
                f"run.name: {self.path} was started with another configuration: {'; '.join(differences)}. "
                "Choose another run.name, or restore these values to resume"
            )

    def saved(self) -> dict[str, Any] | None:
        """What ``config.yaml`` holds, with the ``stage``; None before the first start."""
        path = self.path / "config.yaml"
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else None

    def create(self, resolved: Section | None = None) -> None:
        """Make the directory and write ``config.yaml``; call after everything else was validated.

        Args:
            resolved: what stands in it; by default the configuration as it was given.

        Raises:
            UserError: the storage is read-only or full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "config.yaml", f"stage: {self.stage}\n{to_yaml(resolved or self._config)}")
        except OSError as error:
            raise UserError(f"run.storage: {self.path} cannot be written: {error.strerror}") from None

    def report(self) -> dict[str, Any] | None:
        """The finished stage's ``report.json``, or None while it is not done."""
        path = self.path / "report.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_report(self, report: dict[str, Any]) -> None:
        """Write ``report.json``; its presence says that the stage is done."""
        write_atomically(self.path / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash, sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
