"""What a job takes along: the configuration's file, the modules of a loss and a head beside it, and raylm itself.

The nodes then run the code that submitted. What the configuration names must be where all nodes find it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import raylm
from raylm.config.base import is_path
from raylm.errors import UserError
from raylm.models.own_code import COMPILED, module_places

CONFIGURATION = "config.yaml"
# Of the nodes' temporary files, and of Ray's own limit on packages.
LARGEST_BYTES = 100 * 10**6


@contextlib.contextmanager
def packaged(path: Path, modules: Sequence[Path] = ()) -> Iterator[Path]:
    """A directory with the configuration's file at ``path`` and raylm, to be uploaded while the block lasts.

    Args:
        modules: files and folders that go beside the configuration's file; see :func:`own_modules`.

    Raises:
        UserError: it is larger than a package may be.
    """
    with tempfile.TemporaryDirectory(prefix="raylm-job-") as name:
        directory = Path(name)
        shutil.copyfile(path, directory / CONFIGURATION)
        for module in modules:
            if module.is_dir():
                shutil.copytree(module, directory / module.name, ignore=COMPILED)
            else:
                shutil.copyfile(module, directory / module.name)
        code(directory)
        yield directory


def own_modules(config: BaseModel, path: Path) -> list[Path]:
    """The files, or folders of packages, beside the YAML file at ``path`` that its losses and heads are imported from.

    What lies in another folder (``objective.imports_from``) or on the PYTHONPATH is the nodes' own.
    """
    objective, tuning = getattr(config, "objective", None), getattr(config, "tuning", None)
    folder = path.resolve().parent
    if objective is None or objective.imports_from != str(folder):
        return []
    names = [objective.loss, objective.head if ":" in objective.head else None]
    for key in ("objective.loss", "objective.head"):
        searched = tuning.space.get(key) if tuning is not None else None
        names += (searched.choice or searched.grid or []) if searched is not None else []
    return list(dict.fromkeys(place for name in names if name for place in module_places(str(name), folder)))


def code(directory: Path) -> None:
    """Put raylm itself into ``directory``.

    Raises:
        UserError: it is larger than a package may be.
    """
    source = Path(raylm.__file__).resolve().parent
    shutil.copytree(source, directory / "raylm", ignore=COMPILED)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    if size > LARGEST_BYTES:
        raise UserError(
            f"{source}: found {size / 1e6:.0f} MB of files, allowed in a job: {LARGEST_BYTES / 1e6:.0f} MB; remove "
            "what is no code"
        )


def check_paths(config: BaseModel) -> None:
    """Refuse paths that mean another place in a job than here.

    Raises:
        UserError: names the key and the path.
    """
    storage = config.run.storage  # type: ignore[attr-defined]
    if not _is_absolute(storage):
        raise UserError(
            f"run.storage: found {storage}, allowed in a job: an absolute path that all nodes share, or a URI; a "
            "relative one lies in the job's package, and its results are lost with it"
        )
    for key, value in paths_in(config):
        if not _is_absolute(value) and Path(value).exists():
            raise UserError(
                f"{key}: found {value}, allowed in a job: an absolute path that all nodes share; the job does not take "
                f"{Path(value).resolve()} along"
            )


def paths_in(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of all paths that are set in a configuration."""
    for name, field in type(config).model_fields.items():
        key, value = f"{prefix}{name}", getattr(config, name)
        yield from _paths_of(key, value, named=is_path(field))


def _paths_of(key: str, value: Any, *, named: bool) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        yield from paths_in(value, f"{key}.")
    elif isinstance(value, str):
        if named:
            yield key, value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths_of(key, item, named=named)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _paths_of(f"{key}.{name}", item, named=named)


def _is_absolute(path: str) -> bool:
    return "://" in path or Path(path).is_absolute()
