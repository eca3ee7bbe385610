"""The floors of the house, from the code itself: nothing imports upwards, no modules import each other, and files and
functions are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; rooms of one line do not know each other.
FLOORS = (
    ("errors", "progress", "pages", "interrupts", "telemetry"),
    ("config", "recipes"),
    ("cluster",),
    ("data", "doctor"),
    ("models",),
    ("tasks",),
    ("parallel",),
    ("evaluation",),
    ("training", "serving", "launcher"),
    ("tuning",),
    ("compression",),
    ("reports", "quickstart"),
    ("cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def modules() -> dict[str, Path]:
    """All modules by name."""
    found = {}
    for path in sorted((ROOT / "raylm").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """The modules of raylm that a file imports, the line, and whether only for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_types |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            names = [name if name in MODULES else node.module for name in whole]
        else:
            continue
        for name in names:
            if name.startswith("raylm."):
                yield name, node.lineno, id(node) in for_types


def room(module: str) -> str:
    """``raylm.data.sources.readers`` is in ``data``."""
    return module.split(".")[1]


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES if name != "raylm"} == set(FLOOR_OF)


@pytest.mark.parametrize("here", FLOOR_OF)
def test_nothing_imports_upwards(here: str) -> None:
    wrong = [
        f"{module}, line {line}: {name}"
        for module, path in MODULES.items()
        if module != "raylm" and room(module) == here
        for name, line, _ in imports(path)
        if room(name) != here and FLOOR_OF[room(name)] >= FLOOR_OF[here]
    ]
    assert not wrong


def test_no_modules_import_each_other() -> None:
    """Not even inside of functions; for types alone they may."""
    needs = {name: {target for target, _, types in imports(path) if not types} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in sorted(needs[name]):
                visit(target, (*way, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_files_are_short() -> None:
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > LONGEST_FILE}
    assert not long


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    path = tmp_path / "low.py"
    path.write_text("def f():\n    from raylm.training.stage import validate\n    import raylm.errors\n")
    assert [(name, line) for name, line, _ in imports(path)] == [("raylm.training.stage", 2), ("raylm.errors", 3)]


def test_functions_are_short() -> None:
    long = [
        f"{name}.{node.name}: {length} lines"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert not long
