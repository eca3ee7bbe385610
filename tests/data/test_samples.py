from __future__ import annotations

import pickle

import numpy as np
import pytest

from raylm.data.samples.opening import open_samples
from raylm.data.samples.token_samples import IGNORED, PackedSamples, PairSamples
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError


def test_packed_epoch_counts_every_token_but_a_remainder_once(prepared_documents):
    shards = TokenShards(prepared_documents, "train")
    samples = open_samples(prepared_documents, "train", 32, seed=3)
    ring = shards.token_count - 1
    assert samples.count == ring // 32
    whole = shards.read(0, shards.token_count)
    for epoch in (0, 1):
        batch = samples.batch(np.arange(samples.count) + epoch * samples.count)
        assert batch["input_ids"].shape == batch["targets"].shape == (samples.count, 32)
        assert np.array_equal(batch["input_ids"][:, 1:], batch["targets"][:, :-1])
        seen = np.bincount(batch["targets"].ravel(), minlength=400)
        held = np.bincount(whole[1:], minlength=400)
        assert (seen <= held).all() and held.sum() - seen.sum() == ring % 32


def test_packed_windows_differ_between_epochs(prepared_documents):
    samples = open_samples(prepared_documents, "train", 32, seed=3)
    first = {row.tobytes() for row in samples.batch(np.arange(samples.count))["input_ids"]}
    second = {row.tobytes() for row in samples.batch(np.arange(samples.count) + samples.count)["input_ids"]}
    assert len(first) == samples.count and len(first & second) < samples.count // 10


def test_packed_sample_is_a_function_of_seed_and_number(prepared_documents):
    samples = open_samples(prepared_documents, "train", 16, seed=3)
    again = open_samples(prepared_documents, "train", 16, seed=3)
    numbers = np.array([0, 5, samples.count - 1, samples.count, 3 * samples.count + 7])
    together = samples.batch(numbers)["input_ids"]
    for row, number in zip(together, numbers, strict=True):
        assert np.array_equal(again.batch(np.array([number]))["input_ids"][0], row)
    other = open_samples(prepared_documents, "train", 16, seed=4)
    assert not np.array_equal(other.batch(numbers)["input_ids"], together)


@pytest.mark.parametrize("length", [7, 32, 100_000])
def test_packed_validation_targets_every_token_exactly_once_in_order(prepared_documents, length):
    shards = TokenShards(prepared_documents, "validation")
    samples = open_samples(prepared_documents, "validation", length, seed=0)
    batch = samples.batch(np.arange(samples.count))
    whole = shards.read(0, shards.token_count)
    assert np.array_equal(batch["targets"][batch["targets"] != IGNORED], whole[1:])
    counted = (batch["targets"] != IGNORED).ravel()
    assert np.array_equal(batch["input_ids"].ravel()[counted], whole[:-1])
    assert (batch["input_ids"].ravel()[~counted][1:] == shards.pad_id).all()


def test_packed_stream_ends_meet(prepared_documents):
    shards = TokenShards(prepared_documents, "train")
    assert shards.read(0, 1)[0] == shards.read(shards.token_count - 1, shards.token_count)[0] == shards.eos_id
    # A sample as long as the ring is one window, which starts at the shift and goes round.
    samples = PackedSamples(shards, shards.token_count - 1, seed=1)
    assert samples.count == 1
    rows = samples.batch(np.arange(2))["input_ids"]
    for row in rows:
        assert np.array_equal(np.sort(row), np.sort(shards.read(1, shards.token_count)))
    assert not np.array_equal(rows[0], rows[1])


def test_sequence_length_longer_than_the_training_set_is_refused(prepared_documents):
    tokens = TokenShards(prepared_documents, "train").token_count
    with pytest.raises(UserError, match=rf"sequence_length: found {tokens}, allowed: at most {tokens - 1}"):
        open_samples(prepared_documents, "train", tokens, seed=0)


def pair_rows(samples: PairSamples) -> dict[str, np.ndarray]:
    return samples.batch(np.arange(samples.count))


def test_pairs_count_the_loss_on_the_answer_alone(prepared_pairs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared_pairs / "tokenizer")
    samples = open_samples(prepared_pairs, "train", 512, seed=0)
    assert samples.count == TokenShards(prepared_pairs, "train").document_count
    assert (samples.shortened, samples.answers_cut, samples.left_out) == (0, 0, 0)
    batch = pair_rows(samples)
    numbers = set()
    for inputs, targets in zip(batch["input_ids"], batch["targets"], strict=True):
        answer = tokenizer.decode(targets[targets != IGNORED])
        number = int(answer.split()[1])
        numbers.add(number)
        assert answer == f"Item {number} is < |user|> number {number}.<|endoftext|>"
        context = f"Passage on item {number}. " + "More words follow here. " * 12 + "\n\n" if number % 2 else ""
        asked = f"<|user|>{context}What is item {number}?<|assistant|>"
        first = int(np.flatnonzero(targets != IGNORED)[0])
        assert tokenizer.decode(inputs[: first + 1]) == asked
        length = int((inputs != tokenizer.pad_token_id).sum())
        assert (inputs[length:] == tokenizer.pad_token_id).all() and (targets[length:] == IGNORED).all()
        assert targets[length - 1] == tokenizer.eos_token_id
    assert len(numbers) == samples.count
    everything = PairSamples(TokenShards(prepared_pairs, "train"), 512, 0, 1, answer_only=False)
    assert (pair_rows(everything)["targets"] != IGNORED).sum() == (batch["input_ids"] != tokenizer.pad_token_id).sum()


def test_pairs_are_padded_to_the_longest_of_the_batch(prepared_pairs):
    samples = open_samples(prepared_pairs, "validation", 512, seed=0)
    for number in range(samples.count):
        batch = samples.batch(np.array([number]))
        width = batch["input_ids"].shape[1]
        length = int((batch["input_ids"] != 1).sum())
        assert width % 8 == 0 and width - 8 < length <= width
    capped = open_samples(prepared_pairs, "validation", 45, seed=0)
    assert capped.batch(np.arange(capped.count))["input_ids"].shape[1] == 45


def test_a_pair_that_is_too_long_loses_the_end_of_its_context(prepared_pairs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared_pairs / "tokenizer")
    samples = open_samples(prepared_pairs, "train", 80, seed=0)
    full = open_samples(prepared_pairs, "train", 512, seed=0)
    batch, whole = pair_rows(samples), pair_rows(full)
    shortened = 0
    for inputs, targets, all_targets in zip(batch["input_ids"], batch["targets"], whole["targets"], strict=True):
        kept = targets[targets != IGNORED]
        assert np.array_equal(kept, all_targets[all_targets != IGNORED])
        text = tokenizer.decode(inputs)
        if "Passage" in text:
            shortened += 1
            number = int(text.split()[3].rstrip("."))
            assert text.startswith(f"<|user|>Passage on item {number}. More")
            assert f"\n\nWhat is item {number}?<|assistant|>" in text
            assert (inputs != tokenizer.pad_token_id).sum() == 80
    assert shortened == samples.shortened > 0
    assert samples.answers_cut == samples.left_out == 0


def test_pairs_without_room_for_an_answer_are_left_out_or_refused(prepared_pairs):
    short = open_samples(prepared_pairs, "train", 8, seed=0)
    assert short.answers_cut > 0 and short.left_out > 0
    assert short.count == TokenShards(prepared_pairs, "train").document_count - short.left_out
    assert ((pair_rows(short)["targets"] != IGNORED).sum(axis=1) > 0).all()
    # <|user|>, <|assistant|> and one token of the answer are two inputs and their targets.
    with pytest.raises(UserError, match=r"leaves no token of any answer .*; allowed: 2 or more"):
        open_samples(prepared_pairs, "train", 1, seed=0)
    open_samples(prepared_pairs, "train", 2, seed=0)


def test_validation_order_is_the_files_and_training_order_is_not(prepared_pairs):
    starts = TokenShards(prepared_pairs, "validation").index()[:, 0]
    first = TokenShards(prepared_pairs, "validation").take(starts + 6)
    batch = open_samples(prepared_pairs, "validation", 512, seed=5).batch(np.arange(len(starts)))
    assert np.array_equal(batch["input_ids"][:, 6], first)
    train = open_samples(prepared_pairs, "train", 512, seed=5)
    zero = train.batch(np.arange(train.count))["input_ids"]
    one = train.batch(np.arange(train.count) + train.count)["input_ids"]
    assert not np.array_equal(zero, one)
    assert sorted(map(bytes, zero)) == sorted(map(bytes, one))


def test_samples_travel_to_another_process_without_their_tokens(prepared_documents):
    samples = open_samples(prepared_documents, "train", 32, seed=3)
    expected = samples.batch(np.arange(4))
    content = pickle.dumps(samples)
    assert len(content) < 2000
    assert np.array_equal(pickle.loads(content).batch(np.arange(4))["targets"], expected["targets"])


def test_a_split_without_documents_is_refused(tmp_path, prepared_documents):
    import json
    import shutil

    directory = tmp_path / "copy"
    shutil.copytree(prepared_documents, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["splits"]["validation"] = {"documents": 0, "tokens": 0, "bytes": 0, "files": []}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no validation documents"):
        open_samples(directory, "validation", 32, seed=0)
