"""Taggers: the loss and the measures, the figures against seqeval's, and a run of the training loop."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForTokenClassification, BertConfig

from raylm.config import load_config
from raylm.config.data import DataSection
from raylm.data.loading import load_tokenizer
from raylm.data.samples.tagged import TaggedSentence
from raylm.data.samples.tagged_sets import TaggedInput
from raylm.data.samples.token_samples import IGNORED
from raylm.errors import RunFailure, UserError
from raylm.models.heads import TAGGER
from raylm.models.loading import load_config as model_config
from raylm.tasks.tagging.decoding import Decoder
from raylm.tasks.tagging.objective import TaggingObjective
from raylm.tasks.tagging.scoring import Counts, count, count_types
from raylm.tasks.tagging.sentences import SentenceSet, describe, open_sentences, tag_agreement
from raylm.training.inputs import validate
from raylm.training.reports.metrics import read_metrics
from tests.reading import write_encoder
from tests.tagging import tagged_rows, write_columns
from tests.training.loops import run_case, run_loops

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model")


def drawn(seed: int, letters: str) -> list[tuple[list[str], list[str]]]:
    """Tags, most of which follow no scheme, and others that are the same with probability 0.7."""
    draw = random.Random(seed)
    tags = ["O", "O", "O"] + [f"{letter}-{kind}" for kind in ("LOC", "PER", "ORG") for letter in letters]
    gold = [[draw.choice(tags) for _ in range(draw.randint(1, 12))] for _ in range(40)]
    return [(one, [tag if draw.random() < 0.7 else draw.choice(tags) for tag in one]) for one in gold]


# accuracy, precision, recall, F1, and each type's precision, recall, F1 and support, by seqeval 1.2.2.
SEQEVAL = {
    "BI": (
        (0.7544642857142857, 0.704225352112676, 0.7142857142857143, 0.7092198581560283),
        {
            "LOC": (0.6304347826086957, 0.7073170731707317, 0.6666666666666667, 41),
            "ORG": (0.75, 0.7924528301886793, 0.7706422018348623, 53),
            "PER": (0.725, 0.6304347826086957, 0.6744186046511628, 46),
        },
    ),
    "BIES": (
        (0.714859437751004, 0.7391304347826086, 0.7472527472527473, 0.7431693989071039),
        {
            "LOC": (0.6851851851851852, 0.6981132075471698, 0.6915887850467289, 53),
            "ORG": (0.7638888888888888, 0.7971014492753623, 0.7801418439716311, 69),
            "PER": (0.7586206896551724, 0.7333333333333333, 0.7457627118644068, 60),
        },
    ),
}


@pytest.mark.parametrize(("seed", "letters", "scheme"), [(1, "BI", "bio"), (2, "BIES", "bioes")])
def test_figures_are_seqevals(seed: int, letters: str, scheme: str) -> None:
    whole, types = SEQEVAL[letters]
    pairs = drawn(seed, letters)
    total = sum((count(*pair, scheme) for pair in pairs), Counts())
    assert (total.accuracy, total.precision, total.recall, total.f1) == pytest.approx(whole)
    found: dict[str, Counts] = {}
    for pair in pairs:
        for kind, one in count_types(*pair, scheme).items():
            found[kind] = found.get(kind, Counts()) + one
    assert set(found) == set(types)
    for kind, one in found.items():
        assert (one.precision, one.recall, one.f1, one.there) == pytest.approx(types[kind])


def test_tags_without_spans_count_by_tag() -> None:
    types = count_types(["X", "Y", "X"], ["X", "X", "X"], "none")
    assert (types["X"].precision, types["X"].recall, types["X"].there) == (pytest.approx(2 / 3), 1.0, 2)
    assert (types["Y"].f1, types["Y"].there, types["Y"].found) == (0.0, 1, 0)
    assert count(["X", "Y"], ["X", "X"], "none") == Counts(2, 1)


def test_loss_and_measures(encoder: Path, tmp_path: Path) -> None:
    row = (["anna", "zzz", "in", "berlin"], ["B-PER", "I-PER", "O", "B-LOC"])
    path = write_columns(tmp_path / "a.conll", [row] * 2)
    read = TaggedInput(DataSection(train=str(path), validation=str(path)))
    read.write(tmp_path / "set", load_tokenizer(encoder), 16)
    objective = TaggingObjective()
    samples = objective.samples(tmp_path / "set", "train", 16, 0)
    assert objective.settings(tmp_path / "set")["id2label"] == dict(enumerate(LABELS))
    assert objective.settings(tmp_path / "set")["tagging_scheme"] == "bio"
    batch = {name: torch.from_numpy(array) for name, array in samples.batch(np.arange(2)).items()}
    config = BertConfig(
        vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=5
    )
    model = AutoModelForTokenClassification.from_config(config).eval()
    logits = objective.logits(model, batch)
    assert logits.shape == (2, 8, 5)
    counted = batch["targets"] != IGNORED
    expected = functional.cross_entropy(logits[counted], batch["targets"][counted], reduction="sum")
    assert objective.summed_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.tokens(batch) == 16
    # The second word of the person is missed in the first row: one span of two is right there.
    said = functional.one_hot(batch["targets"].clamp(min=0), 5).float()
    said[0, 2] = functional.one_hot(torch.tensor(0), 5)
    sums = objective.measure(said, batch)
    assert sums.tolist() == [8, 7, 3, 4, 4]
    assert objective.figures(sums.tolist(), 2.0) == {"token_accuracy": 7 / 8, "span_f1": 3 / 4}
    objective.scheme = "none"
    assert objective.figures(sums.tolist(), 2.0) == {"token_accuracy": 7 / 8}


def sentences(*rows: tuple[list[str], list[str]]) -> list[TaggedSentence]:
    return [TaggedSentence(tuple(tokens), tuple(tags), "here") for tokens, tags in rows]


def logits_of(found: SentenceSet, tags: dict[int, list[str]], labels: list[str]) -> list[np.ndarray]:
    """What a model would give that says these tags of the words of windows; the other sub-words say something else."""
    outputs = []
    for numbers, batch in zip(found.batches.numbers, found.batches, strict=True):
        rows = np.zeros((*batch["input_ids"].shape, len(labels)), dtype=np.float32)
        rows[:, :, -1] = 1.0
        for row, number in enumerate(numbers):
            for place, tag in zip(found._windows[number].firsts, tags[number], strict=True):
                rows[row, place] = np.eye(len(labels))[labels.index(tag)]
        outputs.append(rows)
    return outputs


def test_figures_of_long_sentences(encoder: Path) -> None:
    tokenizer = load_tokenizer(encoder)
    given = sentences(
        (["anna", "zzz", "lives", "in", "berlin", "."], ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]),
        (["bert"], ["B-PER"]),
    )
    # Six tokens: the first sentence is read in two windows, the first of which ends within a person.
    read = SentenceSet(given, Decoder(LABELS, "bio"), tokenizer, 6, 2)
    assert [len(cut) for cut in read._cuts] == [2, 1]
    said = {0: ["B-PER", "I-PER"], 1: ["O", "O", "B-PER", "O"], 2: ["B-PER"]}
    outputs = logits_of(read, said, LABELS)
    assert read.tags(outputs) == [["B-PER", "I-PER", "O", "O", "B-PER", "O"], ["B-PER"]]
    figures = read.figures(outputs)
    assert figures["token_accuracy"] == pytest.approx(100 * 6 / 7)
    assert (figures["sentences"], figures["windows"], figures["words"], figures["spans"]) == (2, 3, 7, 3)
    assert [figures[f"span_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx([100 * 2 / 3] * 3)
    assert figures["labels"]["PER"] == pytest.approx({"precision": 200 / 3, "recall": 100, "f1": 80, "spans": 2})
    low, high = figures["span_f1_interval"]
    assert 0 <= low < 200 / 3 < high <= 100
    (first, second) = read.rows(outputs)
    assert first["found"][4] == "B-PER" and second == {"tokens": ["bert"], "tags": ["B-PER"], "found": ["B-PER"]}
    speeds = {"sentences_per_second": 1.0, "workers": 1}
    assert "F1 66.67%" in describe(figures | speeds | {"model": "m"})
    plain = SentenceSet(sentences((["bert"], ["X"])), Decoder(["X", "Y"], "none"), tokenizer, 6, 2)
    figures = plain.figures(logits_of(plain, {0: ["Y"]}, ["X", "Y"]))
    assert (figures["token_accuracy"], figures["labels"]["X"]["words"]) == (0.0, 1)
    assert "span_f1" not in figures and "spans" not in describe(figures | speeds | {"model": "m"})


def test_how_alike_exports_are(encoder: Path) -> None:
    given = sentences((["bert", "in", "berlin"], ["B-PER", "O", "B-LOC"]))
    read = SentenceSet(given, Decoder(LABELS, "bio"), load_tokenizer(encoder), 16, 2)
    one, other = (logits_of(read, {0: ["B-PER", "O", tag]}, LABELS) for tag in ("B-LOC", "O"))
    assert tag_agreement(read, one, one) == {"tags_agreement": 1.0}
    with pytest.raises(RunFailure, match=r"66\.7% of the words get the same tag, at least 95%"):
        tag_agreement(read, one, other)


def test_what_a_models_labels_say() -> None:
    names = dict(enumerate(LABELS))
    assert Decoder.of("", BertConfig(id2label=names)).scheme == "bio"
    assert Decoder.of("", BertConfig(id2label=names, tagging_scheme="none")).scheme == "none"
    assert Decoder.of("", BertConfig(id2label={0: "NN", 1: "VB"})).scheme == "none"


@pytest.mark.parametrize(("scheme", "name"), [("bio", "auto"), ("bioes", "auto"), ("none", "none")])
def test_training_and_evaluation(encoder: Path, tmp_path: Path, scheme: str, name: str) -> None:
    train = write_columns(tmp_path / "train.txt", tagged_rows(300, 0, scheme))
    dev = write_columns(tmp_path / "dev.txt", tagged_rows(40, 1, scheme))
    data = {"train": str(train), "validation": str(dev), "format": "conll"}
    values = {
        "run": {"name": "tagger", "storage": str(tmp_path)},
        "data": data,
        "model": {"path": str(encoder)},
        "objective": {"type": "tagging", "scheme": name},
        "training": {
            "steps": 40, "batch_size": 16, "sequence_length": 16, "learning_rate": 3e-3, "warmup_steps": 0,
            "evaluate_every_steps": 20,
        },
        "parallel": {"zero_stage": 1},
    }  # fmt: skip
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(values))
    (final,) = run_loops(run_case(path, workers=2, stage="finetune"))
    run = tmp_path / "tagger"
    (*_, last) = (line for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line)
    assert last["validation_token_accuracy"] > 0.95
    assert ("validation_span_f1" in last) == (scheme != "none")
    assert final["step"] == 40
    model, info = AutoModelForTokenClassification.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.architectures == ["BertForTokenClassification"]
    assert model.config.tagging_scheme == scheme
    measured = {
        "run": {"name": "evaluation", "storage": str(tmp_path)},
        "data": {**data, "train": str(dev)},
        "model": {"path": str(run)},
    }
    path.write_text(yaml.safe_dump(measured))
    config = load_config("evaluate", path)
    read = open_sentences(config, str(run / "model"))
    assert TAGGER.is_named_in(model_config(run / "model"))
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.inference_mode():
        outputs = [
            model(**{key: torch.from_numpy(batch[key]) for key in names}).logits.numpy() for batch in read.batches
        ]
    figures = read.figures(outputs)
    assert figures["token_accuracy"] == pytest.approx(100 * last["validation_token_accuracy"], abs=0.2)
    if scheme != "none":
        assert figures["span_f1"] == pytest.approx(100 * last["validation_span_f1"], abs=0.5)
    # Trained further, it keeps its tags and what they say.
    further = values | {"model": {"path": str(run)}, "run": {"name": "further", "storage": str(tmp_path)}}
    path.write_text(yaml.safe_dump(further | {"objective": {"type": "tagging"}}))
    checked = validate(load_config("finetune", path)).data
    assert (checked.scheme, checked.labels) == (scheme, list(model.config.id2label.values()))
    lines = [json.dumps(row) for row in read.rows(outputs)]
    assert len(lines) == 40
    dev.write_text("anna B-ORG\n" if scheme != "none" else "anna ORG\n")
    if scheme == "bioes":
        dev.write_text("anna S-ORG\n")
    with pytest.raises(UserError, match=r"dev\.txt:1: found the tag '.*ORG', allowed: the tags that the model has"):
        open_sentences(config, str(run / "model"))
