"""The recipes: ready configurations of the stages, in a clone and in an installed wheel.

Their one source is ``jobs/recipes`` of the repository; the wheel holds a copy of it as ``raylm/jobs/recipes``. A
recipe's name is its path in there without the suffix, such as ``quickstart/pretrain``. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from raylm.errors import UserError

_STAGE = "# stage: "


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        name: such as ``quickstart/pretrain``.
        path: its file.
        stage: the stage that it configures: its first line says so (``# stage: NAME``), else its file's name.
        purpose: what it is for: the first sentence of its comment.
    """

    name: str
    path: Path
    stage: str
    purpose: str


def recipes_directory() -> Path:
    """Where the recipes are.

    Raises:
        UserError: this installation has none.
    """
    package = Path(__file__).resolve().parent
    for directory in (package / "jobs" / "recipes", package.parent / "jobs" / "recipes"):
        if directory.is_dir():
            return directory
    raise UserError(f"{package / 'jobs' / 'recipes'}: no such directory; install raylm again, its recipes are missing")


def all_recipes() -> list[Recipe]:
    """Every recipe, by name."""
    root = recipes_directory()
    paths = sorted(root.rglob("*.yaml"))
    return [_read(path.relative_to(root).with_suffix("").as_posix(), path) for path in paths]


def find_recipe(name: str) -> Recipe:
    """The recipe ``name``; its ``.yaml`` and the folders before it may be given or not, as long as one recipe is meant.

    Raises:
        UserError: there is no such recipe, or several; names the nearest.
    """
    wanted = name.removesuffix(".yaml").strip("/").removeprefix("jobs/recipes/")
    recipes = {recipe.name: recipe for recipe in all_recipes()}
    if wanted in recipes:
        return recipes[wanted]
    ends = [known for known in recipes if known.endswith(f"/{wanted}")]
    if len(ends) == 1:
        return recipes[ends[0]]
    near = ends or _nearest(wanted, list(recipes))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"recipe: found '{name}', {hint}`raylm recipes` lists them")


def _nearest(wanted: str, names: list[str]) -> list[str]:
    """Names that ``wanted`` is like, as a whole or in the part after the last ``/``; at most three."""
    lasts = {name: name.rpartition("/")[2] for name in names}
    last = wanted.rpartition("/")[2]
    alike = difflib.get_close_matches(last, set(lasts.values()), n=1, cutoff=0.7)
    if alike:
        return [name for name in names if lasts[name] in alike][:3]
    return difflib.get_close_matches(wanted, names, n=3, cutoff=0.7)


def listing(recipes: list[Recipe]) -> str:
    """A line a recipe: name, stage, purpose."""
    names = max(len(recipe.name) for recipe in recipes)
    stages = max(len(recipe.stage) for recipe in recipes)
    return "\n".join(f"{r.name.ljust(names)}  {r.stage.ljust(stages)}  {r.purpose}" for r in recipes)


def _read(name: str, path: Path) -> Recipe:
    lines = path.read_text(encoding="utf-8").splitlines()
    stage = path.stem
    if lines and lines[0].startswith(_STAGE):
        stage = lines.pop(0).removeprefix(_STAGE).strip()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if not text.startswith("raylm "):  # a command, not what it is for
            comment.append(text)
    return Recipe(name, path, stage, _first_sentence(" ".join(comment)))


def _first_sentence(text: str) -> str:
    """Up to the first full stop or semicolon that a space follows, or an example command."""
    ends = [place for mark in (". ", "; ", ": raylm ") if (place := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text.rstrip(".")
