"""Chains over the tags of a sentence, against all sequences written out, and taggers that have one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, BertConfig

from raylm.compression.exporters.openvino import export_model
from raylm.config import load_config
from raylm.config.loading import validate as validated
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer
from raylm.errors import UserError
from raylm.models.chains import Chain, read_chain
from raylm.models.encoders import OpenVinoEncoder
from raylm.models.heads import TAGGER
from raylm.models.loading import load_config as model_config
from raylm.models.loading import load_model
from raylm.models.taggers import LinearChain
from raylm.models.weights import DrawnWeights, make_outline
from raylm.serving.stage import check_model
from raylm.tasks.tagging.decoding import Decoder, followers
from raylm.tasks.tagging.sentences import open_sentences
from raylm.training.inputs import validate
from raylm.training.reports.metrics import read_metrics
from tests.reading import write_encoder
from tests.tagging import tagged_rows, write_columns
from tests.training.loops import run_case, run_loops

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def drawn_chain(tags: int, seed: int = 0) -> LinearChain:
    torch.manual_seed(seed)
    chain = LinearChain(tags)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.normal_()
    return chain


def score(chain: Chain, logits: np.ndarray, tags: tuple[int, ...]) -> float:
    """Of one sequence, as Lafferty et al. 2001 have it."""
    total = chain.starts[tags[0]] + chain.ends[tags[-1]] + sum(row[tag] for row, tag in zip(logits, tags, strict=True))
    return float(total + sum(chain.transitions[pair] for pair in itertools.pairwise(tags)))


def test_loss_is_that_of_all_sequences_written_out() -> None:
    chain = drawn_chain(3)
    logits = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    no = -100
    targets = torch.tensor(
        [[no, 0, no, 2, 1, no, 1], [no, 2, no, no, no, no, no], [no] * 7, [0, 1, 2, 0, 1, 2, 0]], dtype=torch.long
    )
    scores, expected = chain(), 0.0
    for row, given in zip(logits.detach().numpy(), targets.numpy(), strict=True):
        words = given != no
        if words.any():
            every = [score(scores, row[words], one) for one in itertools.product(range(3), repeat=int(words.sum()))]
            expected += np.logaddexp.reduce(every) - score(scores, row[words], tuple(given[words]))
    found = chain(logits, targets)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # Its gradient is what each tag's probability is less the right one, 0 where there is no word.
    (gradient,) = torch.autograd.grad(found, logits)
    for row, given, slope in zip(logits.detach().numpy(), targets.numpy(), gradient.numpy(), strict=True):
        words = given != no
        assert not slope[~words].any()
        if words.any():
            right = np.eye(3)[given[words]]
            np.testing.assert_allclose(slope[words], scores.probabilities(row[words]) - right, atol=1e-5)


@pytest.mark.parametrize("words", [1, 2, 5])
def test_path_and_probabilities_are_those_of_all_sequences(words: int) -> None:
    chain = drawn_chain(5)().within(followers(LABELS, "bio"))
    logits = np.random.default_rng(words).normal(size=(words, 5)) * 3
    every = list(itertools.product(range(5), repeat=words))
    scores = np.array([score(chain, logits, one) for one in every])
    assert tuple(chain.path(logits)) == every[int(scores.argmax())]
    shares = np.exp(scores - np.logaddexp.reduce(scores))
    expected = [[shares[[one[place] == tag for one in every]].sum() for tag in range(5)] for place in range(words)]
    np.testing.assert_allclose(chain.probabilities(logits), expected, atol=1e-9)


def test_what_the_scheme_does_not_allow_is_never_chosen() -> None:
    plain = Chain(np.zeros((5, 5)), np.zeros(5), np.zeros(5))
    # I-PER is the likeliest of both words, and behind I-LOC.
    logits = np.array([[0, 0, 0, 1, 5.0], [0, 0, 4.0, 0, 5], [0, 0, 9.0, 0, 0]])
    assert [LABELS[tag] for tag in plain.path(logits)] == ["I-PER", "I-PER", "I-LOC"]
    decoder = Decoder(LABELS, "bio", plain.within(followers(LABELS, "bio")))
    assert decoder.tags(logits) == ["B-LOC", "I-LOC", "I-LOC"]
    tags, scores = decoder.scored(logits)
    assert tags == decoder.tags(logits) and all(0 < one <= 1 for one in scores)
    # A window may begin within a span.
    part = plain.within(followers(LABELS, "bio", whole=False))
    assert [LABELS[tag] for tag in part.path(logits[1:])] == ["I-LOC", "I-LOC"]


def test_a_new_chain_scores_nothing() -> None:
    config = BertConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.update({"id2label": dict(enumerate(LABELS)), "tagging_head": "crf"})
    outline = make_outline(config, TAGGER)
    drawn = DrawnWeights(outline, 0)
    assert drawn.open("crf.transitions").shape == (5, 5) and not drawn.open("crf.transitions").any()
    assert drawn.open("classifier.weight").any()
    assert type(outline.model).__name__ == "BertForTokenClassification"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``crf`` and ``linear`` of the same training, with ZeRO 1 and 3."""
    directory = tmp_path_factory.mktemp("chains")
    encoder = write_encoder(directory / "encoder")
    train = write_columns(directory / "train.conll", tagged_rows(300, 0))
    dev = write_columns(directory / "dev.conll", tagged_rows(40, 1))
    cases = []
    for name, head, stage in (("crf", "crf", 1), ("third", "crf", 3), ("linear", "linear", 1)):
        values = {
            "run": {"name": name, "storage": str(directory)},
            "data": {"train": str(train), "validation": str(dev)},
            "model": {"path": str(encoder)},
            "objective": {"type": "tagging", "head": head},
            "training": {
                "steps": 40, "batch_size": 16, "sequence_length": 16, "learning_rate": 2e-3, "warmup_steps": 0,
                "evaluate_every_steps": 20,
            },
            "parallel": {"zero_stage": stage},
        }  # fmt: skip
        path = directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        cases.append(run_case(path, workers=2, stage="finetune"))
    run_loops(*cases)
    return directory


def measured(run: Path) -> dict:
    return [line for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line][-1]


def test_training_beside_a_linear_head(trained: Path) -> None:
    chain, third, linear = (measured(trained / name) for name in ("crf", "third", "linear"))
    assert third["validation_loss"] == pytest.approx(chain["validation_loss"], rel=1e-3)
    assert chain["validation_span_f1"] == pytest.approx(third["validation_span_f1"], abs=0.02)
    assert chain["validation_span_f1"] > 0.95
    assert chain["validation_span_f1"] >= linear["validation_span_f1"] - 0.02
    weights = load_file(trained / "crf" / "model" / "model.safetensors")
    # It has learnt that a name of two words is one person's: I-PER behind B-PER, not B-PER.
    transitions = weights["crf.transitions"]
    assert transitions[3, 4] > transitions[3, 3] + 0.1


def test_other_tools_load_its_logits(trained: Path) -> None:
    directory = trained / "crf" / "model"
    stock, info = AutoModelForTokenClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {"crf.transitions", "crf.starts", "crf.ends"}
    ours = load_model(directory, head=TAGGER)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert torch.equal(stock.eval()(ids).logits, ours.eval()(ids).logits)
    export_model(str(directory), directory / "openvino", TAGGER)
    batch = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 20), np.int64)}
    batch["token_type_ids"] = np.zeros_like(batch["attention_mask"])
    with torch.inference_mode():
        difference = np.abs(OpenVinoEncoder(directory, TAGGER, 1).outputs(batch) - ours(ids).logits.numpy())
    assert difference.max() < 0.3


def test_evaluation_decodes_with_it(trained: Path) -> None:
    directory = trained / "crf" / "model"
    path = trained / "evaluate.yaml"
    values = {
        "run": {"name": "evaluation", "storage": str(trained)},
        "data": {"train": str(trained / "dev.conll")},
        "model": {"path": str(directory)},
    }
    path.write_text(yaml.safe_dump(values))
    read = open_sentences(load_config("evaluate", path), str(directory))
    model = load_model(directory, head=TAGGER).eval()
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.inference_mode():
        outputs = [
            model(**{key: torch.from_numpy(batch[key]) for key in names}).logits.numpy() for batch in read.batches
        ]
    assert read.figures(outputs)["span_f1"] == pytest.approx(100 * measured(trained / "crf")["validation_span_f1"])
    assert np.array_equal(read.decoder.chain.transitions[3, 4], model.crf().transitions[3, 4])
    # Logits that say nothing but what is not allowed.
    wrong = [np.broadcast_to(np.eye(5, dtype=np.float32)[4] * 9, (*one.shape[:2], 5)) for one in outputs]
    assert all(tags[0] == "B-PER" and set(tags[1:]) <= {"I-PER"} for tags in read.tags(wrong))


def test_refusals(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "further.yaml"
    values = yaml.safe_load((trained / "linear.yaml").read_text())
    values |= {"model": {"path": str(trained / "crf")}, "run": {"name": "further", "storage": str(tmp_path)}}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"objective\.head: found linear, allowed: crf, as the model at model\.path"):
        validate(load_config("finetune", path))
    for key, section in (("adapter", {"type": "lora"}), ("distillation", {"teacher": str(trained / "crf")})):
        path.write_text(yaml.safe_dump(values | {"objective": {"type": "tagging", "head": "crf"}, key: section}))
        with pytest.raises(UserError, match=rf"objective\.head: found crf, allowed with {key}: linear"):
            load_config("finetune", path)
    bare = trained / "bare"
    model = AutoModelForTokenClassification.from_pretrained(trained / "linear" / "model")
    model.save_pretrained(bare)
    load_tokenizer(trained / "linear").save_pretrained(bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"tagging_head": "crf"}))
    with pytest.raises(UserError, match=r"lack crf\.transitions, crf\.starts, crf\.ends, which the tagger decodes"):
        read_chain(bare, model_config(bare))
    values = {"run": {"name": "x", "storage": str(tmp_path)}, "model": {"path": str(bare)}}
    served = validated(ServeConfig, values, "test")
    with pytest.raises(UserError, match=r"lack crf\.transitions"):
        check_model(served)
