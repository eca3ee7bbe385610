"""Encoder-decoders: both forms give the same losses and answers, and compress takes them from end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from raylm.compression import measuring
from raylm.compression.exporters.openvino import export_model
from raylm.compression.material import Material
from raylm.compression.quantization.four_bits import to_four_bits
from raylm.compression.quantization.samples import graph_samples
from raylm.compression.stage import compress
from raylm.config import load_config
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.quantization import QuantizeSection
from raylm.data.prepare.stage import prepare_directory
from raylm.errors import RunFailure, UserError
from raylm.evaluation.stage import evaluate
from raylm.models.encoder_decoders import OpenVinoEncoderDecoder, TransformersEncoderDecoder
from raylm.models.heads import SEQUENCE_TO_SEQUENCE
from raylm.tasks import find_task

LENGTH = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    words = ["river", "mountain", "cloud", "stone", "sings", "falls", "over", "under", "the", "a", "quiet", "old"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choice(words, 40)) for _ in range(60)))
    return path


@pytest.fixture(scope="module")
def model(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("t5")
    data = DataSection(train=str(text), text_unit="paragraph")
    prepare_directory(root / "data", data, TokenizerSection(vocab_size=300, sentinels=10))
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tokenizer")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model"


def write_config(directory: Path, model: Path, text: Path, **values: object) -> Path:
    path = directory / "config.yaml"
    given = {
        "run": {"name": "small", "storage": str(directory)},
        "data": {"train": str(text), "text_unit": "paragraph"},
        "model": {"path": str(model)},
        "evaluation": {"sequence_length": LENGTH},
    }
    path.write_text(yaml.safe_dump(given | values))
    return path


def test_an_export_gives_the_losses_and_answers_of_its_model(model: Path, text: Path, tmp_path: Path) -> None:
    export_model(str(model), tmp_path / "openvino", SEQUENCE_TO_SEQUENCE, None)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    forms = [TransformersEncoderDecoder(str(model)), OpenVinoEncoderDecoder(tmp_path, 1)]
    evaluation = find_task("span").evaluation
    examples = evaluation.open(load_config("compress", write_config(tmp_path, model, text)), str(model))
    batch = examples.batches[0]
    losses = [form.outputs(batch) for form in forms]
    assert losses[0].shape == batch["targets"].shape
    assert np.abs(losses[1] - losses[0]).max() < 1e-4
    plain = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    with torch.inference_mode():
        given = {name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask")}
        expected = float(plain(**given, labels=torch.from_numpy(batch["targets"])).loss)
    assert losses[0].mean() == pytest.approx(expected, rel=1e-5)
    assert examples.figures(losses[:1])["gap_loss"] == pytest.approx(expected, rel=1e-5)

    prompts = [row[:12].tolist() for row in batch["input_ids"][:3]]
    answers = [form.generate(prompts, 6) for form in forms]
    assert answers[0] == answers[1] and {len(one) for one in answers[0]} == {6}
    # One after the other they are the same: nothing is left of the answer before.
    assert [forms[1].generate([prompt], 6)[0] for prompt in prompts] == answers[0]
    assert evaluation.closeness(examples, losses[:1], losses[1:])["losses_correlation"] > 0.999
    with pytest.raises(RunFailure, match="losses do not agree with the model's: correlation"):
        evaluation.closeness(examples, losses[:1], [losses[1][:, ::-1]])


def test_both_graphs_have_four_bits(model: Path, tmp_path: Path) -> None:
    export_model(str(model), tmp_path / "fp32", SEQUENCE_TO_SEQUENCE, None)
    section = QuantizeSection(bits=4, group_size=64, method="data_free")
    sizes = {}
    for name, given in (("least", {}), ("fitted", {"megabytes": 0.21})):
        asked = section.model_copy(update=given)
        told = to_four_bits(tmp_path / "fp32", tmp_path / name, asked, None, 1, SEQUENCE_TO_SEQUENCE.graphs)
        parts = [(tmp_path / name / graph).with_suffix(".bin").stat().st_size for graph in SEQUENCE_TO_SEQUENCE.graphs]
        sizes[name] = sum(parts) / 1e6
        assert (told["eight_bit_share"] > 0) is (name == "fitted")
    plain = [(tmp_path / "fp32" / graph).with_suffix(".bin").stat().st_size for graph in SEQUENCE_TO_SEQUENCE.graphs]
    assert sizes["least"] < 0.25 * sum(plain) / 1e6
    assert sizes["least"] < sizes["fitted"] <= 0.21


def test_both_graphs_are_calibrated(model: Path, text: Path, tmp_path: Path) -> None:
    """The ways that look at activations give other weights than rounding to the nearest, in both graphs; the best is
    taken."""
    material = material_of(model, text, tmp_path)
    section = QuantizeSection(bits=4, group_size=64, samples=8, sequence_length=LENGTH)
    samples = graph_samples(material, SEQUENCE_TO_SEQUENCE, section)
    assert len(samples.calibration) == 8 and len(samples.held_out) == 4
    export_model(str(model), tmp_path / "fp32", SEQUENCE_TO_SEQUENCE, None)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    made = {}
    for way in ("data_free", "scale_estimation", "auto"):
        asked = section.model_copy(update={"method": way})
        with_statistics = dataclasses.replace(samples, statistics=tmp_path / f"{way}-statistics")
        told = to_four_bits(tmp_path / "fp32", tmp_path / way, asked, with_statistics, 1, SEQUENCE_TO_SEQUENCE.graphs)
        made[way] = [(tmp_path / way / name).with_suffix(".bin").read_bytes() for name in SEQUENCE_TO_SEQUENCE.graphs]
    assert told["way"] == min((one for one in told["losses"] if one != "fp32"), key=told["losses"].get)
    assert all(plain != aware for plain, aware in zip(made["data_free"], made["scale_estimation"], strict=True))
    plain = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    rows = samples.held_out
    with torch.inference_mode():
        losses = [
            float(plain(input_ids=torch.from_numpy(row["input_ids"]), labels=torch.from_numpy(row["targets"])).loss)
            for row in rows
        ]
    assert told["losses"]["fp32"] == pytest.approx(np.mean(losses), rel=1e-4)


def material_of(model: Path, text: Path, directory: Path) -> Material:
    """The training text of a compress run, prepared."""
    config = load_config("compress", write_config(directory, model, text))
    material = Material(config, find_task("span"), str(model))
    prepare_directory(directory / "prepared", config.data, TokenizerSection(path=str(model)))
    material.use(directory / "prepared")
    return material


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (
            {"bits": 4, "group_size": 32, "method": "keep"},
            "quantize.method: found keep, allowed for a sequence-to-sequence model: any other",
        ),
        ({"activations": "int8"}, "quantize.activations: found int8, allowed for a sequence-to-sequence model: float"),
        ({"cache_bits": 8}, "quantize.cache_bits: found 8, allowed for a sequence-to-sequence model: 32"),
    ],
)
def test_what_they_do_not_take_is_refused(
    model: Path, text: Path, tmp_path: Path, quantize: dict[str, object], message: str
) -> None:
    path = write_config(tmp_path, model, text, compression={"steps": [{"quantize": quantize}]})
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        compress(load_config("compress", path))
    assert not (tmp_path / "small").exists()


def test_too_little_text_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the river falls")
    path = write_config(tmp_path, model, tmp_path / "short.txt")
    with pytest.raises(UserError, match=r"^data: found .* tokens in the validation split, allowed: .* or more"):
        compress(load_config("compress", path))


@pytest.mark.slow
def test_from_model_to_export(
    ray_instance, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    training = {"steps": 10, "batch_size": 8, "sequence_length": LENGTH, "learning_rate": 1e-3}
    steps = [
        {"prune": {"neurons": 64, "samples": 8, "sequence_length": LENGTH, "recovery": {"training": training}}},
        {"prune": {"vocabulary": "used"}},
        {"quantize": {"bits": 8}},
    ]
    compression = {"steps": steps, "prompts": 4, "prompt_tokens": 8, "new_tokens": 8}
    path = write_config(tmp_path, model, text, compression=compression, resources={"workers": 1})
    compress(load_config("compress", path))
    assert "loss, nats a target" in capsys.readouterr().out
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert after["weight_bytes"] < 0.4 * before["weight_bytes"]
    assert after["parameters"] < before["parameters"]
    assert after["gap_loss"] < before["gap_loss"]
    assert report["losses_correlation"] > 0.95
    assert all(after[f"{kind}tokens_per_second"][batch] > 0 for kind in ("", "decode_") for batch in ("1", "8"))

    values = {"run": {"name": "measured", "storage": str(tmp_path)}, "resources": {"workers": 2}}
    path = write_config(tmp_path, model, text, **values)
    evaluate(load_config("evaluate", path))
    measured = json.loads((tmp_path / "measured" / "report.json").read_text())
    assert measured["gap_loss"] == pytest.approx(before["gap_loss"], rel=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "measured" / "gaps.jsonl").read_text().splitlines()]
    assert len(rows) == measured["windows"] and all("<extra_id_0>" in row["target"] for row in rows)
    assert np.mean([row["loss"] for row in rows]) == pytest.approx(measured["gap_loss"], rel=1e-6)
