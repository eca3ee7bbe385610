"""How tags say where spans are: what a scheme allows, which one tags look like, and from tags to spans.

``bio`` is IOB2 (Tjong Kim Sang and Veenstra 1999): B-TYPE begins a span, I-TYPE goes on with it, O is outside.
``bioes`` also marks its end, E-TYPE, and spans of one word, S-TYPE. With ``none`` each tag stands for itself. What a
model says need not follow a scheme: :func:`spans` reads such tags as ``conlleval`` (CoNLL-2000) and the package seqeval
do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

OUTSIDE = "O"
PREFIXES = {"bio": "BI", "bioes": "BIES"}
# Of these and others, such as BILOU and BMES.
_PREFIXED = re.compile(r"[BIESLUM]-")

KnownScheme = Literal["bio", "bioes", "none"]


@dataclass(frozen=True, order=True)
class Span:
    """Words ``first`` to ``last``, both included, of a ``type``."""

    first: int
    last: int
    type: str


def scheme_of(tags: Collection[str]) -> KnownScheme:
    """What the different ``tags`` of a set look like; a few that do not fit are for :func:`mistake` to find."""
    inside = {tag for tag in tags if tag != OUTSIDE}
    letters = Counter(tag[0] for tag in inside if _PREFIXED.match(tag))
    if 2 * letters.total() <= len(inside):
        return "none"
    return "bio" if set(letters) <= {"B", "I"} else "bioes"


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and type; of O and of a tag without a prefix ("O", "") and (tag, "")."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def mistake(tags: Sequence[str], scheme: KnownScheme) -> tuple[int, str] | None:
    """The first tag of a sentence that the scheme does not allow: its number, and what is wrong; None where all fit."""
    if scheme == "none":
        return None
    letters = PREFIXES[scheme]
    known = ", ".join([OUTSIDE, *(f"{letter}-TYPE" for letter in letters)])
    before = OUTSIDE
    for number, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        if tag != OUTSIDE and (prefix not in letters or len(prefix) != 1 or not kind):
            return number, f"found the tag '{tag}', allowed with objective.scheme {scheme}: {known}"
        if not follows(before, tag, scheme):
            where = f"behind '{before}'" if number else "at the beginning"
            return number, f"found the tag '{tag}' {where}, which objective.scheme {scheme} does not allow{_hint(tag)}"
        before = tag
    if not follows(before, OUTSIDE, scheme):
        return len(tags) - 1, f"found the tag '{before}' at the end, which objective.scheme {scheme} does not allow"
    return None


def _hint(tag: str) -> str:
    return f": a span begins with B-{split_tag(tag)[1]}" if tag[0] == "I" else ""


def follows(before: str, tag: str, scheme: KnownScheme) -> bool:
    """Whether ``tag`` may stand behind ``before``; O stands for the beginning and the end of a sentence too."""
    if scheme == "none":
        return True
    (first, kind), (second, other) = split_tag(before), split_tag(tag)
    goes_on = second in ("I", "E")
    if goes_on and (first not in ("B", "I") or kind != other):
        return False
    # Only where ends are marked, a span that has begun must go on.
    return scheme == "bio" or first not in ("B", "I") or goes_on


def all_tags(found: Iterable[str], scheme: KnownScheme) -> list[str]:
    """The tags of a model for the tags that were found: O first, then every prefix of each type, sorted by type."""
    if scheme == "none":
        return sorted(set(found))
    types = sorted({split_tag(tag)[1] for tag in found if tag != OUTSIDE})
    return [OUTSIDE, *(f"{letter}-{kind}" for kind in types for letter in PREFIXES[scheme])]


def spans(tags: Sequence[str]) -> list[Span]:
    """The spans of a sentence, in order, by conlleval's rules.

    B, S and a tag of another type than the one before begin a span; so do I and E behind O, E or S.
    """
    found: list[Span] = []
    first, before, kind = 0, OUTSIDE, ""
    for number, tag in enumerate([*tags, OUTSIDE]):
        prefix, other = split_tag(tag)
        inside = before in ("B", "I")
        goes_on = inside and prefix in ("I", "E") and kind == other
        if before != OUTSIDE and not goes_on:
            found.append(Span(first, number - 1, kind))
        if prefix != OUTSIDE and not goes_on:
            first = number
        before, kind = prefix, other
    return found
