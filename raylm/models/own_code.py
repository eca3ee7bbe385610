"""Code of the user's own, by its import path: found, imported, and told apart from other code of the same name.

In: ``module:attribute`` and a folder that comes last on Python's path. Out: the attribute, or one line that says why
there is none. What is done with it is the caller's: :mod:`raylm.tasks.own_loss`, :mod:`raylm.models.own_heads`.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import raylm
from raylm.errors import UserError, first_line

COMPILED = shutil.ignore_patterns("__pycache__", "*.pyc")
# Where packages of other people lie, which are installed rather than copied.
INSTALLED = ("site-packages", "dist-packages")


def import_attribute(name: str, key: str, folder: str | None) -> Any:
    """What ``name`` (``module:attribute``) names; its module is imported from the PYTHONPATH or from ``folder``.

    Args:
        key: of the configuration, for the message.

    Raises:
        UserError: there is no such module or attribute.
    """
    module_name, _, attribute = name.partition(":")
    # It stays there: the module may import others of the folder later. It is last, so that a file of the user's with a
    # common name hides no library.
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of the user's raises while it is imported
        where = f" from {folder} or the PYTHONPATH" if folder is not None else " from the PYTHONPATH"
        raise UserError(f"{key}: cannot import {module_name}{where}: {told(error)}") from error
    place = getattr(found, "__file__", None) or module_name
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key}: found '{name}', allowed: what {place} has; it has no '{attribute}'")
        found = getattr(found, part)
    return found


def module_places(name: str, folder: Path) -> list[Path]:
    """The file in ``folder`` that ``module:attribute`` is imported from, or the folder of its package; none where it
    lies elsewhere."""
    top = name.partition(":")[0].partition(".")[0]
    return [place for place in (folder / top, folder / f"{top}.py") if place.exists() and top != "raylm"]


def copy_module(name: str, folder: str | None, output: Path) -> None:
    """Put the module of ``name``, which was imported, into the folder ``output`` if it lies in ``folder``, or beside
    raylm itself in the package of a job."""
    module = sys.modules[name.partition(":")[0].partition(".")[0]]
    given = (getattr(module, "__file__", None), *getattr(module, "__path__", ()))
    origins = {Path(place).resolve() for place in given if place}
    # Other nodes than the one that read the file have the package of a job in another place.
    packaged = Path(raylm.__file__).resolve().parents[1]
    folders = [] if packaged.name in INSTALLED else [packaged]
    for place in (place for one in filter(None, (folder, *folders)) for place in module_places(name, Path(one))):
        if place.resolve() not in origins or (output / place.name).exists():
            continue
        if place.is_dir():
            shutil.copytree(place, output / place.name, ignore=COMPILED)
        else:
            shutil.copyfile(place, output / place.name)


def refuse_other_code(name: str, key: str, folder: str) -> None:
    """Refuse a module that was imported from elsewhere and is another than the one of that name in ``folder``.

    Raises:
        UserError: names both files.
    """
    module = sys.modules[name.partition(":")[0]]
    relative = Path(*name.partition(":")[0].split("."))
    origin = Path(str(getattr(module, "__file__", None)))
    for meant in (Path(folder, f"{relative}.py"), Path(folder, relative, "__init__.py")):
        same = origin.is_file() and meant.is_file() and origin.read_bytes() == meant.read_bytes()
        if meant.is_file() and not same:
            raise UserError(
                f"{key}: found the module {origin}, allowed: one like {meant}, which the model was trained with; take "
                "the other off the PYTHONPATH, or serve the models apart"
            )


def told(error: Exception) -> str:
    """An exception of the user's code in one line, with its class."""
    return f"{type(error).__name__}: {first_line(error)}"
