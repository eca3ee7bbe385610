"""From what a text must be to a grammar in EBNF, the same for every engine that follows one.

A JSON schema allows any white space between tokens, and small models go on with it for ever. Here one blank may stand
there, or the end of a line and the indentation of the next.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from raylm.serving.engines.base import Constraint

if TYPE_CHECKING:
    from xgrammar import Grammar

# Blanks and tabs at the beginning of a line.
MOST_INDENTATION = 16
# What xgrammar writes where white space may stand, when it is told how much of it.
_MARK = 7
WHITE_SPACE = "white_space"
# Literals and classes of characters are left as they are.
_LITERAL = r'"(?:[^"\\]|\\.)*"'
_KEPT = rf"{_LITERAL}|\[(?:[^\]\\]|\\.)*\]"
_PARTS = re.compile(rf"(?P<kept>{_KEPT})|(?P<white>\bwhitespace(?:_\d+)?\{{0, {_MARK}\}})|\{{(?P<least>\d+), -1\}}")
# Any character, as xgrammar writes a point of a regular expression, and what may not stand within a text of JSON.
_ANY, _NOT_WITHIN = r"[\0-\U0010ffff]", r"\"\\\0-\x1f"
_REGEX = re.compile(rf"{_KEPT}|\bRegex\((?P<pattern>{_LITERAL}), json_string=true\)")
_RULE = re.compile(rf"{_KEPT}|(?P<name>\broot(?:_\w+)?\b)")


def grammar_of(constraint: Constraint) -> Grammar:
    """The grammar of ``constraint``.

    Raises:
        RuntimeError: there is none.
    """
    import xgrammar

    if constraint.kind == "regex":
        return xgrammar.Grammar.from_regex(constraint.text)
    return xgrammar.Grammar.from_ebnf(_text_of(constraint))


def plain_text(constraint: Constraint) -> str:
    """The grammar of ``constraint`` in EBNF that older releases of xgrammar read as well.

    OpenVINO GenAI 2026.4 holds one that has no regular expressions within a grammar.

    Raises:
        RuntimeError: there is none.
    """
    import xgrammar

    if constraint.kind == "regex":
        return _bounded(str(xgrammar.Grammar.from_regex(constraint.text)))
    text = _text_of(constraint)
    if constraint.kind == "grammar":
        text = _bounded(str(xgrammar.Grammar.from_ebnf(text)))
    rules: list[str] = []

    def name(match: re.Match[str]) -> str:
        if match["pattern"] is None:
            return match[0]
        prefix = f"pattern_{len(rules)}"
        grammar = _bounded(str(xgrammar.Grammar.from_regex(json.loads(match["pattern"]))))
        grammar = grammar.replace("[^", rf"[^{_NOT_WITHIN}").replace(_ANY, f"[^{_NOT_WITHIN}]")
        rules.append(_RULE.sub(lambda rule: f"{prefix}_{rule['name']}" if rule["name"] else rule[0], grammar))
        return f"{prefix}_root"

    return "\n".join([_REGEX.sub(name, text), *rules])


def _text_of(constraint: Constraint) -> str:
    """EBNF."""
    import xgrammar

    if constraint.kind == "choice":
        return "root ::= " + " | ".join(_literal(text) for text in json.loads(constraint.text))
    if constraint.kind == "grammar":
        return constraint.text
    if constraint.compact:
        return _bounded(str(xgrammar.Grammar.from_json_schema(constraint.text, any_whitespace=False)))
    text = _bounded(str(xgrammar.Grammar.from_json_schema(constraint.text, max_whitespace_cnt=_MARK)))
    return f'{text}\n{WHITE_SPACE} ::= "" | " " | "\\n" [ \\t]{{0,{MOST_INDENTATION}}}\n'


def _literal(text: str) -> str:
    """``text`` as EBNF has it: all but letters and digits as their code points."""
    return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in text) + '"'


def _bounded(text: str) -> str:
    """xgrammar's own EBNF with white space of ours, and with repetitions as every release reads them."""

    def replace(match: re.Match[str]) -> str:
        if match["white"]:
            return WHITE_SPACE
        return match["kept"] or f"{{{match['least']},}}"

    return _PARTS.sub(replace, text)
