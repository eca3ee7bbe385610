"""YAML text in, plain values out: dictionaries whose keys are text, lists, text, numbers, booleans and null.

Scalars are read as YAML 1.2 does: dates, ``007`` and ``12:30`` are text. Of YAML 1.1 stay merge keys (``<<: *base``)
and ``yes``, ``no``, ``on`` and ``off``. Whatever the text holds, reading it takes bounded time and memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from raylm.errors import UserError

DEEPEST = 32
MOST_VALUES = 100_000
# Of what is no text: no number that means something is longer.
LONGEST_NUMBER = 100
_CORE = "tag:yaml.org,2002:"
_PARTS = ("null", "bool", "int", "float", "str", "seq", "map")
_MERGE, _TEXT = f"{_CORE}merge", f"{_CORE}str"
# Around an override's value that is YAML; any other is one scalar.
_BRACKETS = ("[]", "{}", '""', "''")

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Parsed:
    """What a YAML text holds.

    Attributes:
        values: its value.
        written: the text of each unquoted scalar that was read as a number, boolean or null, by its place: keys and
            numbers of items, from the top.
    """

    values: Any
    written: dict[Place, str]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}
    # Without sets, binaries, dates and ordered maps, which no key takes. None says that a tag is unknown.
    yaml_constructors: ClassVar[dict] = {
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, *(f"{_CORE}{part}" for part in _PARTS))
    }

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _mistake("expected keys with values", node)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def check(self, node: yaml.Node) -> None:
        """Refuse what is too deep or too much, a key that is given twice or is no text, and a tag that does not fit.

        Comes before anything is constructed: an alias repeats what it stands for, to any size.
        """
        waiting, count = [(node, 0)], 0
        while waiting:
            current, depth = waiting.pop()
            count += 1
            if depth > DEEPEST:
                raise _mistake(f"more than {DEEPEST} sections or lists inside of each other", current)
            if count > MOST_VALUES:
                raise _mistake(f"more than {MOST_VALUES} values, those repeated by aliases included", current)
            if isinstance(current, yaml.MappingNode):
                self._check_keys(current)
                waiting += [(value, depth + 1) for _, value in current.value]
            elif isinstance(current, yaml.SequenceNode):
                waiting += [(item, depth + 1) for item in current.value]
            elif current.tag != _TEXT:
                self._check_scalar(current)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _mistake("a key must be text", key)
            if key.tag != _MERGE and key.value in seen:
                raise _mistake(f"key '{key.value[:LONGEST_NUMBER]}' is given twice", key)
            seen.add(key.value)

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        if node.tag.startswith(_CORE) and node.tag != self.resolve(yaml.ScalarNode, node.value, (True, False)):
            raise _mistake(f"the tag !!{node.tag.removeprefix(_CORE)} does not fit '{node.value[:20]}'", node)
        if len(node.value) > LONGEST_NUMBER:
            raise _mistake(f"a number of {len(node.value)} characters", node)


def _mistake(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)", "-+0123456789"),
    # 1e-3 is text in YAML 1.1; users mean the number.
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=e))(?:e[-+]?[0-9]+)?",
        "-+0123456789.",
    ),
    ("float", r"[-+]?\.inf|\.nan", "-+."),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(
        f"{_CORE}{_tag}", re.compile(rf"^(?:{_pattern})$", re.IGNORECASE if _tag == "float" else 0), list(_first)
    )


def parse_yaml(text: str, origin: str) -> Parsed:
    """Parse YAML ``text``; ``origin`` names it in errors.

    Raises:
        UserError: the text is not YAML, or too deep or too much of it; names origin and line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Parsed(None, {})
        loader.check(node)
        values = loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{origin}: more than {DEEPEST} sections or lists inside of each other") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        hint = "; text that begins with * or & needs quotes" if "alias" in str(error) or "anchor" in str(error) else ""
        raise UserError(f"{origin}{where}: not valid YAML: {problem}{hint}") from None
    return Parsed(values, dict(_written(node, ())))


def parse_value(text: str, origin: str) -> Parsed:
    """Parse what follows ``KEY=`` on the command line: a list, a section or a quoted text in YAML, else one scalar.

    So ``*.txt``, ``a: b`` and ``[x].txt`` are what they seem.

    Raises:
        UserError: a list, section or quoted text is not YAML.
    """
    text = text.strip()
    if len(text) > 1 and text[0] + text[-1] in _BRACKETS:
        return parse_yaml(text, origin)
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    if tag in (_TEXT, _MERGE):
        return Parsed(text, {})
    if len(text) > LONGEST_NUMBER:
        raise UserError(f"{origin[:LONGEST_NUMBER]}: found a number of {len(text)} characters")
    return Parsed(loader.construct_document(yaml.ScalarNode(tag, text)), {(): text})


def _written(node: yaml.Node, place: Place) -> list[tuple[Place, str]]:
    if isinstance(node, yaml.ScalarNode):
        return [] if node.tag == _TEXT else [(place, node.value)]
    if isinstance(node, yaml.MappingNode):
        inner = [(key.value, value) for key, value in node.value]
    else:
        inner = list(enumerate(node.value))
    return [found for key, value in inner for found in _written(value, (*place, key))]
