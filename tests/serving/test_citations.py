"""Sentences are followed by the passage that they rest on, however the text is cut into pieces."""

from __future__ import annotations

import pytest

from raylm.serving.tasks.citations import Citer

PASSAGES = ["Zebra\nThe zebra has stripes.", "Lion\nThe lion sleeps for twenty hours.", "北京是中国的首都。"]
ANSWER = "The lion sleeps twenty hours. It is e.g. happy! A zebra has stripes"
CITED = "The lion sleeps twenty hours. [2] It is e.g. happy! A zebra has stripes [1]"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("answer", "cited"), [(ANSWER, CITED), ("北京是首都。天气很好。", "北京是首都。 [3]天气很好。"), ("", "")]
)
def test_citations(size: int, answer: str, cited: str) -> None:
    citer = Citer(PASSAGES)
    pieces = [citer.push(answer[place : place + size]) for place in range(0, len(answer), size)]
    assert "".join([*pieces, citer.finish()]) == cited


def test_nothing_to_cite() -> None:
    citer = Citer([])
    assert citer.push("The lion sleeps. Yes.") + citer.finish() == "The lion sleeps. Yes."


def test_a_sentence_of_stop_words_rests_on_no_passage() -> None:
    citer = Citer(["What it is\nIt is what it is."])
    assert citer.push("It is what it is. ") + citer.finish() == "It is what it is. "
