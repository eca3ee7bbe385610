"""Everything in a README that can be wrong: commands, keys, YAML, requests, links.

In: Markdown and the folder that it lies in. Out: one line for each mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raylm.config import STAGES
from raylm.config.loading import validate
from raylm.config.yaml_text import parse_yaml
from raylm.errors import UserError
from tests.readme_commands import PLACEHOLDER, ROOT, Mistake, check_line, find_route

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ROUTE = re.compile(r"^(GET|POST|DELETE) (/\S*)$")
KEY = re.compile(r"^([a-z_]+(?:\.[a-z_]+)+)(?:[=:].*)?$")
FILE = re.compile(r"^(?:raylm|jobs|tests|cluster)/[\w./-]+\.\w+$")
# A row of a table of keys whose last column is a default: a number, true or false, or a word in backticks.
DEFAULT = re.compile(r"^\| `([a-z_]+(?:\.[a-z_]+)+)` \|.*\| (?:`(\w+)`|([\d.e+-]+|true|false)) \|$")
PROGRAMS = ("raylm", "bash", "python", "curl", "ray job", "serve deploy", "serve run", "pip install")


def blocks(markdown: str) -> list[tuple[str, str]]:
    """Fenced blocks as (language, text)."""
    return FENCE.findall(markdown)


def commands(markdown: str) -> list[str]:
    """Lines of ``bash`` blocks and indented lines that start with a program."""
    fenced = [line for language, text in blocks(markdown) if language == "bash" for line in text.splitlines()]
    indented = [
        line.strip()
        for line in FENCE.sub("", markdown).splitlines()
        if line.startswith("    ") and line.strip().startswith(PROGRAMS)
    ]
    return [line for line in fenced + indented if line.strip() and not line.startswith("#")]


def spans(markdown: str) -> list[str]:
    """Inline code."""
    return SPAN.findall(FENCE.sub("", markdown))


def mentions(markdown: str) -> list[str]:
    """Inline code that is a command."""
    return [span for span in spans(markdown) if span.startswith(tuple(f"{program} " for program in PROGRAMS))]


def mistakes(markdown: str, folder: Path) -> list[str]:
    """One line for each thing in ``markdown``, a file of ``folder``, that does not exist or does not parse."""
    found = [f"link {target}: {reason}" for target, reason in _bad_links(markdown, folder)]
    variables: dict[str, str] = {}
    checks: list[tuple[str, Callable[[str], None]]] = []
    checks += [(line, lambda text: check_line(text, variables)) for line in commands(markdown)]
    checks += [(line, lambda text: check_line(text, {}, mention=True)) for line in mentions(markdown)]
    checks += [(text, check_yaml) for language, text in blocks(markdown) if language == "yaml"]
    checks += [(span, check_span) for span in spans(markdown)]
    checks += [(row, check_default) for row in markdown.splitlines() if DEFAULT.match(row)]
    for text, check in checks:
        try:
            check(text)
        except Mistake as mistake:
            found.append(f"{text.strip().splitlines()[0]}: {mistake}")
    return found


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


def _bad_links(markdown: str, folder: Path) -> Iterator[tuple[str, str]]:
    for target in LINK.findall(FENCE.sub("", markdown)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (folder / path).resolve() if path else None
        if file is not None and not file.exists():
            yield target, "no such file"
        elif anchor:
            text = file.read_text(encoding="utf-8") if file else markdown
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
            if anchor not in map(slug, headings):
                yield target, "no such heading"


def check_span(span: str) -> None:
    """A key, a route or a file that the text names."""
    if match := ROUTE.match(span):
        find_route(match[1], match[2])
    elif FILE.match(span) and not PLACEHOLDER.search(span):
        if not (ROOT / span).exists():
            raise Mistake("no such file")
    elif (match := KEY.match(span)) and match[1].split(".")[0] in sections():
        find_fields(match[1])


def check_default(row: str) -> None:
    """The default in a row of a table of keys."""
    match = DEFAULT.match(row)
    assert match is not None
    if match[1].split(".")[0] not in sections():
        return
    stated = match[2] or parse_yaml(match[3], "row").values
    defaults = [field.get_default(call_default_factory=True) for field in find_fields(match[1])]
    if stated not in defaults:
        raise Mistake(f"default: found {stated}, allowed: {defaults[0]}")


def sections() -> dict[str, list[type[BaseModel]]]:
    """Section -> its models, which may differ between stages."""
    found: dict[str, list[type[BaseModel]]] = {}
    for stage in STAGES.values():
        for name, field in stage.model_fields.items():
            found.setdefault(name, []).extend(_models(field.annotation))
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def find_fields(key: str) -> list[FieldInfo]:
    """The fields that the dotted ``key`` may mean; none inside of a field that takes any keys."""
    first, *rest = key.split(".")
    models = sections()[first]
    for name in rest:
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        if not fields:
            raise Mistake(f"no such key: {name}")
        models = [model for field in fields for model in _models(field.annotation)]
        if not models:
            return fields if name == rest[-1] else []
    return fields


def check_yaml(text: str) -> None:
    """A YAML block, whose first line names its stage as a recipe's does."""
    first = text.splitlines()[0]
    stage = first.removeprefix("# stage: ")
    if stage not in STAGES:
        raise Mistake("the first line of a YAML block must be '# stage: STAGE'")
    try:
        validate(STAGES[stage], parse_yaml(text, "block").values, "block")
    except UserError as error:
        raise Mistake(str(error)) from None
