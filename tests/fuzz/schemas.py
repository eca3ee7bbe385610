"""Hostile schemas of response_format against the HTTP application: python -m tests.fuzz.schemas MINUTES [--seed N]."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.fuzz.application import Attack, run

TYPES = [
    "string",
    "integer",
    "number",
    "boolean",
    "null",
    "array",
    "object",
    "nonsense",
    "",
    None,
    3,
    ["string", "null"],
]
NUMBERS = [0, 1, -1, 2, 10, 300, 65_536, 10**6, 10**9, 2**63, 10**30, -(10**18), 0.5, 1e308, float("nan"), float("inf")]
FORMATS = ["date", "date-time", "uuid", "email", "ipv4", "ipv6", "uri", "hostname", "regex", "nonsense"]
WORDS = ["a", "", "\x00", "\ud800", "é", "中" * 50, "'\"\\", "a" * 5000, "$ref", "properties", "\u2028", "🙂"]
PATTERNS = [
    "^[a-z]+$",
    "(",
    ")",
    "[",
    "]",
    "*",
    "a{3,1}",
    "a{99999999}",
    "(a|a)*b",
    "(a*)*$",
    "\\",
    "\\d{1,9999}",
    "(?=a)b",
    "(?<n>a)",
    "(?i)a",
    "[^]",
    "[z-a]",
    "\\u{110000}",
    "\\p{L}",
    "^$",
    "",
    "a|",
    "|",
    ".",
    "\\1",
    "[\\s\\S]*",
    "(" * 30 + "a" + ")" * 30,
    "([a-z]{1,100}){1,100}",
    "(" * 2000 + ")" * 2000,
    "\x00",
    "\ud800",
    "[\ud800-\udfff]",
    "$^",
    "a{,5}",
    "{",
    "}",
    "a**",
    "(?:)",
]
REFS = [
    "#",
    "#/$defs/a",
    "#/$defs/b",
    "#/",
    "#/nowhere",
    "http://localhost/x",
    "",
    "#/$defs",
    "#/properties/a",
    None,
    5,
]


def value(chance: random.Random, depth: int) -> Any:
    """Any JSON, also where a schema belongs."""
    kind = chance.randrange(7)
    if kind == 0 and depth:
        return [value(chance, depth - 1) for _ in range(chance.randrange(4))]
    if kind == 1 and depth:
        return {chance.choice(WORDS): value(chance, depth - 1) for _ in range(chance.randrange(4))}
    return chance.choice([None, True, False, chance.choice(NUMBERS), chance.choice(WORDS), chance.random()])


def schema(chance: random.Random, depth: int) -> Any:
    """A schema with any keywords."""
    if chance.random() < 0.06:
        return value(chance, 2)
    found: dict[str, Any] = {}
    if chance.random() < 0.8:
        found["type"] = chance.choice(TYPES[:7] if chance.random() < 0.9 else TYPES)
    for _ in range(chance.randrange(4)):
        key = chance.choice(list(KEYWORDS))
        found[key] = KEYWORDS[key](chance, depth - 1) if depth else value(chance, 1)
    return found


def named(chance: random.Random, depth: int) -> dict[str, Any]:
    return {chance.choice(["a", "b", "c", *WORDS]): schema(chance, depth) for _ in range(chance.randrange(5))}


def several(chance: random.Random, depth: int) -> list[Any]:
    return [schema(chance, depth) for _ in range(chance.randrange(4))]


KEYWORDS: dict[str, Any] = {
    "properties": named, "patternProperties": lambda c, d: {c.choice(PATTERNS): schema(c, d)}, "$defs": named,
    "items": schema, "prefixItems": several, "anyOf": several, "oneOf": several, "allOf": several, "not": schema,
    "additionalProperties": lambda c, d: c.choice([True, False, schema(c, d)]), "unevaluatedProperties": schema,
    "propertyNames": schema, "contains": schema, "if": schema, "then": schema, "unevaluatedItems": schema,
    "enum": lambda c, d: [value(c, 2) for _ in range(c.randrange(6))], "const": lambda c, d: value(c, 2),
    "required": lambda c, d: c.choice([["a"], ["a", "b", "zz"], [], "a", None, [None]]),
    "pattern": lambda c, d: c.choice(PATTERNS), "format": lambda c, d: c.choice(FORMATS),
    "$ref": lambda c, d: c.choice(REFS),
    **{key: (lambda c, d: c.choice(NUMBERS)) for key in (
        "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minimum", "maximum",
        "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minContains", "maxContains")},
}  # fmt: skip


def nested(key: str, levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        found = {key: {"a": found} if key == "properties" else [found, found][: 1 + (key != "items")]}
        if key == "items":
            found = {"type": "array", "items": found["items"][0]}
    return found


def large(chance: random.Random) -> tuple[str, Any]:
    """Schemas that are too much of one thing, some of them just within the bounds."""
    count = chance.choice([3, 20, 100, 400, 1000, 1500, 5000])
    properties = {f"p{number}": {"type": "integer"} for number in range(count)}
    group = chance.choice([5, 32, 33, 900, 40_000])
    repeated = chance.choice([5, 100, 5000, 10**5, 10**6])
    kinds = {
        "properties": {"type": "object", "properties": properties},
        "required": {"type": "object", "properties": properties, "required": list(properties)},
        "counted": {"type": "object", "properties": properties, chance.choice(["minProperties", "maxProperties"]): 3},
        "groups": {"type": "string", "pattern": "(" * group + "a" + ")" * group},
        "length": {"type": "string", "minLength": chance.choice([0, repeated]), "maxLength": repeated},
        "items": {"type": "array", "items": schema(chance, 1), "minItems": repeated, "maxItems": repeated},
        "repetition": {"type": "string", "pattern": f"^([a-z]{{1,{count}}}){{1,{count}}}$"},
        "enum": {"enum": [f"{number} value" for number in range(count * 2)]},
        "alternatives": {"pattern": "|".join(f"w{number}" for number in range(count // 8))},
        "arrays": nested("items", min(count, 300)),
        "objects": nested("properties", min(count, 300)),
        "any of": nested("anyOf", chance.randrange(3, 12)),
        "references": {
            "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(20)} | {"d20": {}},
            "$ref": "#/$defs/d0",
        },
        "loop": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "tree": {"type": "object", "properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}, "required": ["l"]},
        "words": {"properties": {word * chance.randrange(1, 20): {} for word in WORDS}},
    }
    name = chance.choice(list(kinds))
    return name, kinds[name]


def attack(chance: random.Random) -> Attack:
    """One request with a schema."""
    what, made = large(chance) if chance.random() < 0.4 else ("random", schema(chance, chance.randrange(1, 7)))
    format_: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": made}}
    if chance.random() < 0.05:
        format_ = chance.choice([{"type": "json_object"}, {"type": "json_schema"}, made, {"type": value(chance, 2)}])
    body = {
        "model": chance.choice(["tiny", "openvino"]),
        "messages": [{"role": "user", "content": "?"}],
        "max_tokens": chance.randrange(1, 12),
        "temperature": chance.choice([0, 1]),
        "response_format": format_,
    }
    return Attack("/v1/chat/completions", json.dumps(body).encode(), what=what)


if __name__ == "__main__":
    run(attack, __doc__, encoders=False, exported=True)
