"""Text that is made to be slow: four times as much of it takes about four times as long, not sixteen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest

from raylm.config.augmentation import MethodSection
from raylm.data.augmentation.prompts import pair_in
from raylm.data.augmentation.served_model import Unanswered
from raylm.data.augmentation.word_edits import make_variant
from raylm.data.cleaning.changes import html_to_text, mask_addresses, mask_emails, mask_phones
from raylm.data.cleaning.changes import without_control_characters as without_controls
from raylm.data.cleaning.quality import c4_lines, gopher_quality
from raylm.data.words import normalized, words_of

CHARACTERS = 200_000


def pair_or_none(text: str) -> object:
    with contextlib.suppress(Unanswered):
        return pair_in(text)
    return None


def edited(method: str) -> Callable[[str], object]:
    return lambda text: make_variant(text, MethodSection(method=method), None, "key")


FUNCTIONS: dict[str, Callable[[str], object]] = {
    "html": html_to_text,
    "controls": without_controls,
    "emails": mask_emails,
    "addresses": mask_addresses,
    "phones": mask_phones,
    "c4": c4_lines,
    "gopher": lambda text: gopher_quality(text, words_of(text)),
    "normalized": normalized,
    "pair": pair_or_none,
    **{method: edited(method) for method in ("swap", "delete", "span_mask")},
}
PIECES = (
    "a", "@", "a@", "a.", "a@b.", "a@b.1", "@a.b1", "a-", "1", "1.", "1:", ":", "+1", "(12) ", "12-", " ", "\n", " x",
    "\t \n", ".", ".'", "!)", ")", "{", "中", "中。", "e\u0301", "\u0301", "ﷺ", "x\n\n", "\r", "…", "uses ", "<", "&",
    "&amp", "<!--", "<b>", "<p>", "<div>", "<b><p>", "</p>", "<span>", "<a href=x>", "<table>", "<td>", "<script>",
    "<svg>", "question:", "question: x\n", "\nanswer", "answer :",
)  # fmt: skip
TAILS = {"emails": "@ x", "html": "<p>"}


def seconds(function: Callable[[str], object], text: str) -> float:
    """Of the CPU, the least of some runs: a busy machine only makes them longer."""
    found = []
    for _ in range(3):
        began = time.thread_time()
        function(text)
        found.append(time.thread_time() - began)
        if found[-1] > 1:
            break
    return min(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_time_grows_with_the_text(name: str) -> None:
    slow = {}
    for piece in PIECES:
        text = piece * (CHARACTERS // len(piece)) + TAILS.get(name, "")
        # What takes no time need not be compared.
        if (whole := seconds(FUNCTIONS[name], text)) > 0.2:
            quarter = seconds(FUNCTIONS[name], text[: len(text) // 4] + TAILS.get(name, ""))
            if whole > 9 * quarter:
                slow[piece] = (round(quarter, 3), round(whole, 3))
    assert not slow, f"seconds of a quarter and of all: {slow}"


def test_end_tags_of_nothing_are_not_looked_for_in_a_deep_page() -> None:
    def page(count: int) -> str:
        return "<span>" * count + "</x>" * count + "text"

    assert html_to_text(page(20_000)) == "text"
    assert seconds(html_to_text, page(20_000)) < 9 * seconds(html_to_text, page(5000)) + 0.15


def test_a_page_that_is_too_deep_keeps_its_text() -> None:
    page = "<div>" * 1000 + "one &amp; two<script>if (a < b) hidden()</script><p>three</p>" + "</div>" * 1000 + "end"
    assert html_to_text(page) == "one & two\n\nthree\n\nend"
    # What is closed again is not deep.
    assert html_to_text("<div><b>one</b>, <i>two</i></div>" * 600).count("one, two") == 600
