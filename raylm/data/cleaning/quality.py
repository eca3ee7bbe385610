"""Filters of published corpora: each takes a text and says why it is to be dropped, or nothing.

Gopher: Rae et al. 2021, "Scaling Language Models", section A.1.1 (arXiv 2112.11446); its table A1 is in
``repetition.py``. C4: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.2 (arXiv 1910.10683);
its list of bad words is left out.
"""

from __future__ import annotations

import re

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("•", "‣", "◦", "-", "*", "·")
ELLIPSES = ("...", "…")

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?:\s|$)")
_POLICY = re.compile(r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.I)


def gopher_quality(text: str, words: list[str]) -> str | None:
    """Why Gopher's quality rules drop the text, or None."""
    # Words as the paper counts them, between white space.
    tokens = text.split()
    count = len(tokens)
    if not 50 <= count <= 100_000:
        return "fewer than 50 words" if count < 50 else "more than 100,000 words"
    mean = sum(map(len, tokens)) / count
    if not 3 <= mean <= 10:
        return "mean length of words"
    if text.count("#") / count > 0.1 or (text.count("...") + text.count("…")) / count > 0.1:
        return "symbols"
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(line.endswith(ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "ellipses"
    # Most tokens are letters throughout; only where too few are, each is looked through.
    if (
        sum(map(str.isalpha, tokens)) < 0.8 * count
        and sum(any(map(str.isalpha, each)) for each in tokens) < 0.8 * count
    ):
        return "words without letters"
    if len(STOP_WORDS & {word.lower() for word in words}) < 2:
        return "stop words"
    return None


def c4_lines(text: str) -> tuple[str, str | None]:
    """The lines that C4 keeps, and why it drops the whole text, or None."""
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        return text, "lorem ipsum"
    if "{" in text:
        return text, "curly bracket"
    kept = []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped.endswith((".", "!", "?", '"', "”", "'", "’")) or stripped.endswith(ELLIPSES):
            continue
        if len(stripped.split()) < 5 or "javascript" in stripped.lower() or _POLICY.search(stripped):
            continue
        kept.append(stripped)
    cleaned = "\n".join(kept)
    sentences = len(_SENTENCE_END.findall(cleaned))
    return cleaned, None if sentences >= 3 else "fewer than 3 sentences"
