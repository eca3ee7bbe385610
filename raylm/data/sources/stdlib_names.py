"""Further names of what the standard library documents: ``posixpath.join`` is what people call ``os.path.join``.

In: the syntax trees of its modules by name. Out: the names under which a module offers what another one defines, as
far as its own imports say so; nothing is imported.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence


class PublicNames:
    """Where modules offer the definitions of other modules.

    A module offers an imported name where its ``__all__`` lists it; without a literal ``__all__``, where it takes the
    name from one of its own submodules or from a private module.

    Args:
        modules: dotted names with their syntax trees; of two with one name, the first is what others import from.
        packages: those of the names that are packages, whose relative imports start at themselves.
    """

    def __init__(self, modules: Sequence[tuple[str, ast.Module]], packages: set[str]) -> None:
        self._modules, self._packages = dict(reversed(modules)), packages
        self._offered: dict[str, list[str]] = defaultdict(list)
        for name, tree in modules:
            for offered, definition in self._imports(name, tree):
                if offered != definition and offered not in self._offered[definition]:
                    self._offered[definition].append(offered)

    def of(self, name: str) -> list[str]:
        """Further names of ``name``, such as ``asyncio.Queue.get`` of ``asyncio.queues.Queue.get``."""
        found: list[str] = []
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            rest = "".join(f".{part}" for part in parts[end:])
            found += [offered + rest for offered in self._offered.get(".".join(parts[:end]), ())]
        return [other for other in dict.fromkeys(found) if other != name]

    def _imports(self, name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
        """(name here, name there) of everything that the module offers from elsewhere."""
        listed = _literal_all(tree)
        for node in _top_level(tree):
            if isinstance(node, ast.Import):
                for item in node.names:
                    if item.asname and listed is not None and item.asname in listed:
                        yield f"{name}.{item.asname}", item.name
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(name, node)
                own = origin.startswith((f"{name}.", "_"))
                for item in node.names:
                    if item.name == "*":
                        pairs = [(each, each) for each in self._star(origin)] if own else []
                    else:
                        pairs = [(item.asname or item.name, item.name)]
                    for here, there in pairs:
                        if not here.startswith("_") and (here in listed if listed is not None else own):
                            yield f"{name}.{here}", f"{origin}.{there}"

    def _origin(self, name: str, node: ast.ImportFrom) -> str:
        """Absolute name of the module that ``node`` imports from."""
        if not node.level:
            return node.module or ""
        parts = name.split(".")
        climb = node.level - (name in self._packages)
        return ".".join(parts[: len(parts) - climb] + ([node.module] if node.module else []))

    def _star(self, origin: str) -> list[str]:
        """What ``from origin import *`` brings, of what is defined there."""
        tree = self._modules.get(origin)
        if tree is None:
            return []
        listed = _literal_all(tree)
        defined = [
            node.name
            for node in _top_level(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        return [name for name in defined if (name in listed if listed is not None else not name.startswith("_"))]


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements of the module itself, under conditions too."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _top_level(node)


def _literal_all(tree: ast.Module) -> set[str] | None:
    """The strings that the module lists in ``__all__``; None where it has none, or computes it from other modules'."""
    names: set[str] | None = None
    for node in _top_level(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            if not isinstance(node.value, ast.Tuple | ast.List):
                return None
            names = _strings(node.value)
        elif names is not None and (
            (isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "__all__")
            or (isinstance(node, ast.Expr) and ast.unparse(node).startswith("__all__."))
        ):
            names |= _strings(node)
    return names


def _strings(node: ast.AST) -> set[str]:
    return {item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)}
