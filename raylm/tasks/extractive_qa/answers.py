"""How well found answers agree with the accepted ones: exact match and F1.

English and others: SQuAD's own normalisation (Rajpurkar et al. 2016, its evaluation script: lower case, without
punctuation and articles, F1 over words), as transformers keeps it. Chinese: CMRC 2018's (Cui et al. 2019, its
evaluation script): punctuation is left out, every Chinese character is a unit of its own, other text is cut into
words, and F1 is that of the longest run of units that both have. The best of the accepted answers counts.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal

from raylm.data.samples.questions import Question
from raylm.tasks.intervals import mean_interval

Convention = Literal["squad", "cmrc"]

HAN = re.compile(r"[\u4e00-\u9fff]")
# What the CMRC script leaves out, in its order.
PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》……·、「」（）－～『』")
_WORD = re.compile(r"[^\W\u4e00-\u9fff]+|[^\w\s]|_")
HAN_SHARE = 0.3


def convention_of(questions: list[Question]) -> Convention:
    """cmrc where a good part of the contexts' characters is Chinese, else squad."""
    contexts = {question.context for question in questions}
    characters = sum(map(len, contexts))
    chinese = sum(len(HAN.findall(context)) for context in contexts)
    return "cmrc" if chinese > HAN_SHARE * characters else "squad"


def compare(found: str, accepted: tuple[str, ...], convention: Convention) -> tuple[float, float]:
    """Exact match and F1, each 0 to 1, of a ``found`` answer (empty: none) with the best of the ``accepted``.

    Where nothing is accepted, the question has no answer, and finding none is right (Rajpurkar et al. 2018).
    """
    if not accepted:
        return (1.0, 1.0) if not found else (0.0, 0.0)
    if convention == "cmrc":
        pairs = [_compare_chinese(found, text) for text in accepted]
    else:
        from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

        pairs = [(float(compute_exact(text, found)), float(compute_f1(text, found))) for text in accepted]
    return max(exact for exact, _ in pairs), max(f1 for _, f1 in pairs)


def units(text: str) -> list[str]:
    """Chinese characters one by one, other text in words, without CMRC's punctuation."""
    kept = "".join(character for character in text.lower().strip() if character not in PUNCTUATION)
    found = [(match.start(), match.group()) for match in (*HAN.finditer(kept), *_WORD.finditer(kept))]
    return [unit for _, unit in sorted(found)]


def _compare_chinese(found: str, text: str) -> tuple[float, float]:
    one, other = units(found), units(text)
    exact = float(one == other)
    if not one or not other:
        return exact, exact
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    common = matcher.find_longest_match(0, len(one), 0, len(other)).size
    return exact, 2.0 * common / (len(one) + len(other))


def summarize(results: list[tuple[float, float]], questions: list[Question]) -> dict[str, Any]:
    """Means in percent, over all questions with their 95% intervals, and over those with and without an answer."""
    figures: dict[str, Any] = {"questions": len(questions)}
    has = [bool(question.answers) for question in questions]
    for name, chosen in (("", [True] * len(has)), ("answerable_", has), ("unanswerable_", [not h for h in has])):
        picked = [result for result, take in zip(results, chosen, strict=True) if take]
        if name and (len(picked) in (0, len(results))):
            continue
        figures[f"{name}exact_match"] = 100.0 * sum(exact for exact, _ in picked) / len(picked)
        figures[f"{name}f1"] = 100.0 * sum(f1 for _, f1 in picked) / len(picked)
        if name:
            figures[f"{name}questions"] = len(picked)
    for name, values in (("exact_match", [exact for exact, _ in results]), ("f1", [f1 for _, f1 in results])):
        figures[f"{name}_interval"] = [100.0 * end for end in mean_interval(values)]
    return figures
