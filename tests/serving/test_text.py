"""Text comes piece by piece without ever being wrong: characters stay whole, stop strings stay out."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from raylm.data.loading import load_tokenizer
from raylm.serving.tasks.text import REPLACEMENT, IncrementalDecoder, StopStrings


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_pieces_of_many_bytes(tiny_model: Path, size: int) -> None:
    tokenizer = load_tokenizer(tiny_model)
    text = "naïve 漢字 and 😀🏳️‍🌈 the quick\nbrown  fox"
    ids = tokenizer(text)["input_ids"]
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join([*pieces, decoder.finish()]) == text
    assert sum(bool(piece) for piece in pieces) > len(text) / (2 * size)  # it does stream


def test_any_ids_give_the_whole_text(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.integers(0, len(tokenizer), size=60).tolist()
        decoder = IncrementalDecoder(tokenizer)
        text = "".join([decoder.push([token]) for token in ids]) + decoder.finish()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_bytes_that_are_no_text_take_no_square_of_their_number(tiny_model: Path) -> None:
    """Ids of a prompt are named one after the other: those of 30,000 halves of characters took minutes."""
    tokenizer = load_tokenizer(tiny_model)
    half, letter = tokenizer("é")["input_ids"][0], tokenizer("a")["input_ids"][0]
    for ids in ([half] * 30_000, [letter, half] * 15_000):
        decoder, began = IncrementalDecoder(tokenizer), time.process_time()
        text = "".join([decoder.push([token]) for token in ids]) + decoder.finish()
        assert time.process_time() - began < 30
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("size", [41, 50])
def test_large_pieces_that_end_within_a_character(tiny_model: Path, size: int) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenizer("😀" * 200)["input_ids"]
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join([*pieces, decoder.finish()]) == "😀" * 200
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_incomplete_character_at_the_end(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenizer("ok😀")["input_ids"][:-1]
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push(ids) == "ok"
    assert set(decoder.finish()) == {REPLACEMENT}


def test_stop_strings() -> None:
    stops = StopStrings(["STOP", "\n\n"])
    assert [stops.push(piece) for piece in ("one S", "T", "and\n", "two")] == ["one ", "", "STand", "\ntwo"]
    assert not stops.found
    assert stops.push(" ST") == " "
    assert stops.push("OP not this") == ""
    assert stops.found


def test_the_first_stop_string_counts() -> None:
    stops = StopStrings(["b", "ab"])
    assert stops.push("xxab") == "xx"
    assert stops.found


def test_what_was_held_back_comes_at_the_end() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the EN") == "the "
    assert stops.finish() == "EN"
    assert not stops.found
