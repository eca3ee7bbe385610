from __future__ import annotations

import random

import numpy as np
import pytest

from raylm.config.cleaning import DeduplicationSection
from raylm.data.cleaning import duplicates
from raylm.data.cleaning.duplicates import dropped_documents, duplicate_jobs, find_duplicates, jaccard
from raylm.data.cleaning.signatures import Signatures, shingle_hashes
from raylm.data.sources.documents import Document, make_pair
from raylm.data.words import normalized

WORDS = [f"w{number}" for number in range(3000)]


def document(seed: int, words: int = 200) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def edited(text: str, places: int, seed: int) -> str:
    draw, words = random.Random(seed), text.split()
    for place in draw.sample(range(len(words)), places):
        words[place] = f"edit{seed}"
    return " ".join(words)


def dropped(tmp_path, parts: list[list[str]], **options) -> set[int]:
    """Numbers of the documents that are dropped."""
    section = DeduplicationSection(**options)
    names, counts = [], []
    for number, texts in enumerate(parts):
        signatures = Signatures(section)
        signatures.add([Document(text=text) for text in texts])
        signatures.write(tmp_path / f"part{number}")
        names.append(f"part{number}")
        counts.append(len(texts))
    total = sum(counts)
    found = [find_duplicates(job, tmp_path, names, counts, section) for job in duplicate_jobs(section, total)]
    return set(dropped_documents(tmp_path, [record["file"] for record in found], 0, total).tolist())


def true_jaccard(left: str, right: str) -> float:
    return jaccard(*shingle_hashes([normalized(left), normalized(right)], 5))


def test_exact_duplicates_of_other_parts_and_forms_keep_the_first(tmp_path):
    texts = [document(seed) for seed in range(6)]
    parts = [texts[:3], ["  " + texts[1].upper().replace(" ", "\n"), texts[3]], [texts[3], texts[0], texts[5]]]
    assert dropped(tmp_path, parts, near=False) == {3, 5, 6}


@pytest.mark.parametrize("shares", [1, 3])
def test_near_duplicates_are_those_of_the_threshold(tmp_path, shares, monkeypatch):
    originals = [document(seed) for seed in range(40)]
    copies = [edited(text, 1 + number % 10, number) for number, text in enumerate(originals)]
    similar = [true_jaccard(*pair) for pair in zip(originals, copies, strict=True)]
    assert min(similar) < 0.7 and max(similar) > 0.9
    if shares > 1:
        monkeypatch.setattr(duplicates, "TASK_DOCUMENTS", 30)
    found = dropped(tmp_path, [originals[:25], originals[25:] + copies[:30], copies[30:]], threshold=0.8)
    assert found == {40 + number for number, value in enumerate(similar) if value >= 0.8}


def test_questions_about_one_passage_are_no_duplicates(tmp_path):
    """They share almost all of their words. Of the same passage the same question is one, in other words of a few."""
    passage, other = document(1, 400), document(2, 400)
    asked = [f"{document(10 + number, 12)}?" for number in range(6)]
    pairs = [make_pair(question, f"{number} apples", passage) for number, question in enumerate(asked)]
    pairs += [make_pair(asked[0], "0 apples", other)]
    assert min(true_jaccard(pairs[0].text, pair.text) for pair in pairs[1:6]) > 0.9
    long = document(30, 60)
    pairs += [make_pair(long, "yes", passage), make_pair(edited(long, 1, 0), "yes", passage)]
    pairs += [make_pair(asked[2].upper(), "2 apples", passage)]
    section = DeduplicationSection()
    signatures = Signatures(section)
    signatures.add(pairs)
    signatures.write(tmp_path / "part")
    jobs = duplicate_jobs(section, len(pairs))
    found = [find_duplicates(job, tmp_path, ["part"], [len(pairs)], section)["file"] for job in jobs]
    assert dropped_documents(tmp_path, found, 0, len(pairs)).tolist() == [8, 9]


def test_many_copies_and_short_and_empty_texts(tmp_path):
    parts = [["one two", "one two three", "", "one  TWO"], [document(1)] * 500, [edited(document(1), 1, 7), "!"]]
    # The empty text and "!" have no words at all: as near to each other as can be.
    assert dropped(tmp_path, parts, exact=False) == {3, *range(5, 504), 504, 505}
    assert dropped(tmp_path, parts) == {3, *range(5, 504), 504, 505}


def test_bands_find_what_the_threshold_asks_for():
    for threshold in (0.5, 0.8, 0.95):
        section = DeduplicationSection(threshold=threshold)
        bands, rows = section.layout
        assert bands * rows <= section.permutations and 1 - (1 - threshold**rows) ** bands >= 0.99
    assert DeduplicationSection(bands=16).layout == (16, 8)


def test_chinese_shingles_are_characters():
    left, right = shingle_hashes(["我们在图书馆里看书", "我们在图书馆里看报"], 3)
    assert len(left) == len(right) == 7 and len(np.intersect1d(left, right)) == 6
