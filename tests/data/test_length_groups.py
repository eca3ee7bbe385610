"""Samples of about the same length in a batch: a pure function of seed and number, with less padding."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from raylm.config import load_config
from raylm.config.data import DataSection
from raylm.data.loading import load_tokenizer
from raylm.data.samples.array_sets import ArraySamples
from raylm.data.samples.labelled import LabelledInput, LabelledSamples
from raylm.data.samples.length_groups import BATCHES, LengthGroups
from raylm.data.samples.question_sets import QuestionInput, QuestionSamples
from raylm.data.samples.tagged_sets import TaggedInput, TaggedSamples
from raylm.data.samples.text_pairs import PairInput, PairSamples
from raylm.errors import UserError
from raylm.training.inputs import validate
from raylm.training.loop.batches import rank_samples
from raylm.training.reports.metrics import read_metrics
from tests.pairs import write_model, write_pairs
from tests.reading import write_encoder as write_reading_encoder
from tests.tagging import tagged_rows, write_columns
from tests.training.classifiers import LABELS, WORDS, write_encoder, write_run
from tests.training.loops import run_case, run_loops

LENGTHS = np.random.default_rng(3).integers(1, 200, 1003)


def write_texts(path: Path, count: int, seed: int) -> Path:
    """Labelled texts of 2 to 28 words."""
    draw = np.random.default_rng(seed)
    rows = [(" ".join(draw.choice(WORDS, draw.integers(2, 29))), str(draw.choice(LABELS))) for _ in range(count)]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


@pytest.mark.parametrize("batch_size", [1, 4, 7, 2000])
def test_every_epoch_has_each_sample_once(batch_size: int) -> None:
    groups, count = LengthGroups(LENGTHS, batch_size, seed=5), len(LENGTHS)
    epochs = [groups.numbers(np.arange(epoch * count, (epoch + 1) * count)) for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(count))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    other = LengthGroups(LENGTHS, batch_size, seed=6).numbers(np.arange(count))
    assert not np.array_equal(epochs[0], other)


def test_a_sample_depends_on_its_number_alone() -> None:
    whole = LengthGroups(LENGTHS, 8, seed=1).numbers(np.arange(4000))
    draw = np.random.default_rng(0)
    fresh = LengthGroups(LENGTHS, 8, seed=1)
    for _ in range(50):
        indices = draw.integers(0, 4000, 5)
        assert np.array_equal(fresh.numbers(indices), whole[indices])


def test_batches_of_a_group_are_alike_and_shuffled() -> None:
    groups = LengthGroups(LENGTHS, 8, seed=1)
    # The second epoch begins in the middle of a batch: 1003 is 125 batches and 3 samples.
    first, stop = 126 * 8, 250 * 8
    batches = LENGTHS[groups.numbers(np.arange(first, stop))].reshape(-1, 8)
    spread = batches.max(axis=1) - batches.min(axis=1)
    shuffled = LENGTHS[np.random.default_rng(0).permutation(len(LENGTHS))][: 124 * 8].reshape(-1, 8)
    assert spread.mean() < 0.1 * (shuffled.max(axis=1) - shuffled.min(axis=1)).mean()
    longest = batches[: BATCHES - 20].max(axis=1)
    assert not np.array_equal(longest, np.sort(longest)) and not np.array_equal(longest, np.sort(longest)[::-1])


def classification(directory: Path) -> tuple[ArraySamples, str]:
    tokenizer = load_tokenizer(write_encoder(directory / "encoder"))
    data = DataSection(train=str(write_texts(directory / "train.csv", 400, 1)), validation_fraction=0.2)
    LabelledInput(data).write(directory / "set", tokenizer, 32)
    return LabelledSamples(directory / "set", "train", 0), "input_ids"


def tagging(directory: Path) -> tuple[ArraySamples, str]:
    rows = tagged_rows(400, 1)
    draw = np.random.default_rng(0)
    rows = [(words * times, tags * times) for (words, tags), times in zip(rows, draw.integers(1, 6, 400), strict=True)]
    data = DataSection(train=str(write_columns(directory / "train.conll", rows)), validation_fraction=0.2)
    TaggedInput(data).write(directory / "set", load_tokenizer(write_reading_encoder(directory / "encoder")), 128)
    return TaggedSamples(directory / "set", "train", 0), "targets"


def sequence_to_sequence(directory: Path) -> tuple[ArraySamples, str]:
    source, target = write_pairs(directory, 400)
    for path in (source, target):
        lines = path.read_text().splitlines()
        path.write_text("".join(" ".join([line] * (1 + number % 7)) + "\n" for number, line in enumerate(lines)))
    tokenizer = load_tokenizer(write_model(directory / "t5", source, target))
    data = DataSection(train=[{"path": str(source), "target": str(target)}], validation_fraction=0.2)
    PairInput(data).write(directory / "set", tokenizer, 64)
    return PairSamples(directory / "set", "train", 0), "targets"


def extractive_qa(directory: Path) -> tuple[ArraySamples, str]:
    tokenizer = load_tokenizer(write_reading_encoder(directory / "encoder"))
    draw, rows = np.random.default_rng(1), []
    for number in range(300):
        answers = {"text": ["Ann"], "answer_start": [0]}
        context = " ".join(["Ann", *draw.choice(WORDS, draw.integers(2, 40))])
        rows.append({"id": str(number), "context": context, "question": "Who?", "answers": answers})
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    QuestionInput(DataSection(train=str(directory / "train.jsonl"), validation_fraction=0.2), 8).write(
        directory / "set", tokenizer, 128
    )
    return QuestionSamples(directory / "set", "train", 0), "input_ids"


@pytest.mark.parametrize("task", [classification, tagging, sequence_to_sequence, extractive_qa])
def test_padding_falls_and_workers_share_the_same_batches(tmp_path: Path, task) -> None:
    samples, name = task(tmp_path)
    steps = samples.count // 16

    def places() -> int:
        return sum(samples.batch(np.arange(step * 16, (step + 1) * 16))[name].size for step in range(steps))

    before = places()
    samples.group_by_length(16)
    after = places()
    # What is counted beside padding is nearly the same: the tokens of the samples.
    assert after < 0.85 * before
    for step in (0, steps - 1, steps, 3 * steps):
        whole = samples.numbers(rank_samples(step, 16, 0, 1)).tolist()
        shares = [samples.numbers(rank_samples(step, 16, rank, 3)).tolist() for rank in range(3)]
        assert list(itertools.chain(*shares)) == whole


def test_windows_of_text_have_no_lengths(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "a.txt").write_text("the fox jumps over the dog\n" * 50)
    path = write_run(
        tmp_path, "text", data={"train": str(tmp_path / "a.txt"), "validation": None, "validation_fraction": 0.2},
        model={"path": str(tiny_model)}, objective={"type": "causal"}, training={"group_by_length": True},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"training.group_by_length: found true, allowed with objective.type causal: f"):
        validate(load_config("finetune", path))
    assert not (tmp_path / "text").exists()


@pytest.mark.slow
def test_any_layout_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", dropout=0.0)
    write_texts(tmp_path / "train.csv", 130, 1)
    write_texts(tmp_path / "dev.csv", 16, 2)
    # Two epochs and a half of 8 batches and 2 samples.
    training = {
        "steps": 20, "sequence_length": 32, "group_by_length": True, "optimizer": "sgd", "learning_rate": 0.05,
        "evaluate_every_steps": None,
    }  # fmt: skip
    path = write_run(tmp_path, "one", training=training, checkpoint={"every_steps": 7})
    two, again = ["run.name=two", "parallel.micro_batch_size=4"], ["run.name=again", "training.steps=9"]
    run_loops(
        run_case(path, stage="finetune"),
        run_case(path, *two, workers=2, stage="finetune"),
        run_case(path, *again, workers=2, stage="finetune"),
        run_case(path, "run.name=again", "parallel.zero_stage=2", workers=1, stage="finetune"),
    )
    found = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two", "again")}
    losses = {name: [line["loss"] for line in lines] for name, lines in found.items()}
    assert len(losses["one"]) == 20
    for name in ("two", "again"):
        assert losses[name] == pytest.approx(losses["one"], abs=2e-6)
        assert [line["tokens"] for line in found[name]] == [line["tokens"] for line in found["one"]]
