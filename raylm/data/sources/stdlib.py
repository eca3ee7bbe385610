"""The embedded corpora: what the standard library of the running Python says about itself.

``stdlib-docs``: docstrings of its modules, classes, functions and methods, read with :mod:`ast` from source (nothing
is imported), and the language reference in ``pydoc_data.topics``. ``stdlib-pairs``: "What does NAME do?" and the first
sentence of NAME's docstring, perhaps with the passage that it is in as context. Both are keyed by the dotted name, so
that a passage and its question are on one side of the split.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from raylm.data.samples.passages import passage_spans
from raylm.data.sources.documents import Document, make_pair
from raylm.data.sources.stdlib_names import PublicNames
from raylm.errors import UserError

# Tests, vendored packages and programs whose docstrings are no documentation of the library.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
ANSWER_CHARACTERS = (15, 300)
# The end of a sentence: a stop, then white space and something that begins one.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")


def stdlib_documents() -> list[Document]:
    """Documents of ``stdlib-docs`` in the order of their files: a title line with the signature, then the docstring.

    Identical docstrings and repeated names are kept once, the first of them. ``aliases`` are other names under which
    the library offers the same thing, and those of its twins (``ntpath.basename``, ``posixpath.basename``).

    Raises:
        UserError: this Python comes without the sources of its library.
    """
    documents: dict[str, Document] = {}
    titles: set[str] = set()
    twins: dict[str, list[str]] = defaultdict(list)
    modules, packages = _modules()
    for title, heading, docstring in _docstrings(modules):
        body = inspect.cleandoc(docstring).strip()
        # Source files may hold what UTF-8 cannot (lone surrogates in escapes); such a text is of no use.
        if not body or title in titles or not _encodable(body):
            continue
        titles.add(title)
        if body not in documents:
            documents[body] = Document(text=f"{heading}\n\n{body}", title=title, split_key=title)
        elif title.rpartition(".")[2] == documents[body].title.rpartition(".")[2]:
            twins[body].append(title)
    public = PublicNames(modules, packages)
    named = []
    for body, document in documents.items():
        names = [document.title, *twins[body]]
        aliases = dict.fromkeys([*twins[body], *(other for name in names for other in public.of(name))])
        # A name that has a document of its own stands for that one.
        own = [alias for alias in aliases if alias not in titles or alias in twins[body]]
        named.append(replace(document, aliases=" ".join(own)))
    return named


def stdlib_pairs(documents: list[Document], with_context: bool) -> list[Document]:
    """Pairs of ``stdlib-pairs``: public names whose docstring begins with a sentence.

    Args:
        documents: those of :func:`stdlib_documents`.
        with_context: give each pair the passage with the answer as context, cut as retrieval cuts it; otherwise none
            has one.
    """
    pairs = []
    for document in documents:
        heading, _, body = document.text.partition("\n\n")
        answer = _first_sentence(body)
        private = any(part.startswith("_") for part in document.title.split("."))
        if private or heading.startswith("topic ") or answer is None:
            continue
        context = _passage_with(document.text, len(document.text) - len(body)) if with_context else ""
        prompt = question_about(document.title)
        pairs.append(make_pair(prompt, answer, context, title=document.title, split_key=document.title))
    return pairs


def question_about(name: str) -> str:
    """The question of the pair about ``name``."""
    return f"What does {name} do?"


def opening_sentence(body: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(body.split("\n\n", 1)[0].split())
    return _SENTENCE_END.split(paragraph, maxsplit=1)[0]


def _first_sentence(body: str) -> str | None:
    """The first sentence of a docstring, or None where it is a signature, too short or too long."""
    sentence = opening_sentence(body)
    shortest, longest = ANSWER_CHARACTERS
    if not shortest <= len(sentence) <= longest or " " not in sentence or "->" in sentence or not sentence[0].isalpha():
        return None
    return sentence


def _passage_with(text: str, place: int) -> str:
    """The passage of ``text`` that has the character at ``place`` in it."""
    return next(text[start:end] for start, end in passage_spans(text) if place < end)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _modules() -> tuple[list[tuple[str, ast.Module]], set[str]]:
    """The library's modules with their names, private twins last, and which of the names are packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not _excluded(path.relative_to(root))]
    if not paths:
        raise UserError(
            f"data.train: stdlib-docs: {root} has no Python source files; use a Python that comes with them"
        )
    modules: list[tuple[str, ast.Module]] = []
    packages: set[str] = set()
    # Public modules first: where a private twin documents the same name, the public one is kept.
    for path in sorted(paths, key=lambda path: (path.name.startswith("_py"), path.relative_to(root).as_posix())):
        name = _module_name(path.relative_to(root))
        try:
            module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            # Templates and files that are broken on purpose.
            continue
        modules.append((name, module))
        if path.name == "__init__.py":
            packages.add(name)
    return modules, packages


def _docstrings(modules: list[tuple[str, ast.Module]]) -> Iterator[tuple[str, str, str]]:
    """(dotted name, title line, docstring) of everything documented, and of the language reference's topics."""
    from pydoc_data.topics import topics

    for name, module in modules:
        docstring = ast.get_docstring(module, clean=False)
        if docstring:
            yield name, f"module {name}", docstring
        yield from _members(module, name)
    for topic, text in sorted(topics.items()):
        yield topic, f"topic {topic}", text


def _excluded(path: Path) -> bool:
    return any(part in EXCLUDED or part.startswith(("config-", "__hello__", "__phello__")) for part in path.parts)


def _module_name(path: Path) -> str:
    """``json/__init__.py`` is ``json``; ``_pydecimal.py``, the source twin of a C module, is ``decimal``."""
    parts = list(path.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    if parts[0].startswith("_py") and len(parts[0]) > 3 and parts[0] != "_pyrepl":
        parts[0] = parts[0].removeprefix("_py")
    return ".".join(parts)


def _members(parent: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield name, _heading(node, name), docstring
            if isinstance(node, ast.ClassDef):
                yield from _members(node, name)
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            # What is defined under a condition still belongs to the same parent.
            yield from _members(node, prefix)


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases if ast.unparse(base) != "object")
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}{name}({ast.unparse(node.args)}){returns}"
