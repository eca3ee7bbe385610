"""4-bit weights: what is written is what training rounds to, bit for bit; the best way is taken; what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from raylm.compression.exporters import openvino as exporter
from raylm.compression.exporters.openvino import graph_inputs
from raylm.compression.methods import Steps
from raylm.compression.quantization.four_bits import WAYS, to_four_bits
from raylm.compression.quantization.int8_activations import to_int8_activations
from raylm.compression.quantization.samples import GraphSamples
from raylm.config.loading import validate
from raylm.config.quantization import QuantizeSection
from raylm.config.stages import CompressConfig
from raylm.errors import UserError
from raylm.models.heads import CAUSAL, CLASSIFIER, Head
from raylm.models.openvino import EXPORT_MODEL, engine_properties, read_settings, write_settings
from raylm.models.rounding import kept_whole, rounded, rounded_layers
from tests.conftest import make_tiny_model

GROUP = 32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights as uneven as trained ones."""
    directory = make_tiny_model(tmp_path_factory.mktemp("llama") / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) * 8)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export in fp32."""
    directory = tmp_path_factory.mktemp("plain") / "fp32"
    exporter.export_model(llama, directory, CAUSAL, None)
    return directory


def samples(count: int = 6) -> GraphSamples:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = generator.integers(0, 200, (1, 17))
        rows.append({"input_ids": ids[:, :-1], "targets": ids[:, 1:]})
    return GraphSamples(CAUSAL, [graph_inputs(row["input_ids"]) for row in rows[:4]], rows[4:])


def dequantized(export: Path) -> list[np.ndarray]:
    """The matrices of 4 bits of an export as it computes with them, fp32 [outputs, inputs]."""
    graph = openvino.Core().read_model(export / EXPORT_MODEL)
    found = []
    for op in graph.get_ops():
        # (codes - zero points) x scales, [outputs, groups, inputs of a group].
        if op.get_type_name() != "Subtract" or op.input_value(0).get_node().get_type_name() != "Convert":
            continue
        codes, zero = (op.input_value(number).get_node().input_value(0).get_node() for number in (0, 1))
        if codes.get_element_type() != openvino.Type.u4:
            continue
        multiply = next(iter(op.output(0).get_target_inputs())).get_node()
        scale = multiply.input_value(1).get_node()
        codes, zero = (unpacked(one) for one in (codes, zero))
        scale = scale.get_data().astype(np.float32)
        codes, zero = codes.astype(np.float32), zero.astype(np.float32)
        found.append(((codes - zero) * scale).reshape(codes.shape[0], -1))
    return found


def unpacked(constant: Any) -> np.ndarray:
    """Numbers of 4 bits, the first in the low half of a byte."""
    raw = constant.get_data().ravel()
    halves = np.stack([raw & 15, raw >> 4], axis=-1)
    return halves.reshape(constant.get_output_shape(0)).astype(np.float32)


def test_training_rounds_as_the_export_does(llama: Path, plain: Path, tmp_path: Path) -> None:
    section = QuantizeSection(bits=4, group_size=GROUP, method="data_free")
    told = to_four_bits(plain, tmp_path / "out", section, None, 1)
    assert told == {"way": "data_free", "eight_bit_share": 0.0}
    model = AutoModelForCausalLM.from_pretrained(llama)
    expected = [rounded(layer.module.weight, GROUP).numpy() for layer in rounded_layers(model, kept_whole(model))]
    found = dequantized(tmp_path / "out")
    assert len(found) == len(expected) == 2 * 7
    for one in expected:
        assert any(one.shape == other.shape and np.array_equal(one, other) for other in found)
    assert not any(np.array_equal(one, layer.module.weight.detach().numpy())
                   for one, layer in zip(expected, rounded_layers(model, kept_whole(model)), strict=True))  # fmt: skip


def test_groups_without_a_range_and_of_one_sign() -> None:
    weight = torch.stack(
        [torch.zeros(64), torch.full((64,), 3.0), torch.linspace(1, 2, 64), torch.linspace(-2, -1, 64)]
    )
    found = rounded(weight, 32)
    assert torch.equal(found[0], torch.zeros(64))
    # Zero is always among the values, so that what is far from it has few of them.
    assert torch.allclose(found, weight, atol=0.08)


def test_what_is_measured_once_gives_the_same_weights(plain: Path, tmp_path: Path) -> None:
    section = QuantizeSection(bits=4, group_size=GROUP, method="awq_scale_estimation")
    kept = dataclasses.replace(samples(), statistics=tmp_path / "statistics")
    for name, given in (("first", kept), ("again", kept), ("anew", samples())):
        to_four_bits(plain, tmp_path / name, section, given, 1)
    assert any((tmp_path / "statistics").iterdir())
    written = [(tmp_path / name / EXPORT_MODEL).with_suffix(".bin").read_bytes() for name in ("first", "again", "anew")]
    assert written[0] == written[1] == written[2]


def test_the_best_way_on_held_out_text_is_taken(plain: Path, tmp_path: Path) -> None:
    section = QuantizeSection(bits=4, group_size=GROUP, samples=4, sequence_length=16)
    told = to_four_bits(plain, tmp_path / "out", section, samples(), 1)
    losses = dict(told["losses"])
    assert set(losses) == {"fp32", *WAYS}
    del losses["fp32"]
    assert losses[told["way"]] == min(losses.values()) <= losses["data_free"]
    compiled = openvino.Core().compile_model(
        openvino.Core().read_model(tmp_path / "out" / EXPORT_MODEL), "CPU", engine_properties(tmp_path / "out", 1)
    )
    assert samples().loss({EXPORT_MODEL: compiled}, None) == pytest.approx(losses[told["way"]], rel=1e-4)


def test_a_size_is_kept_to(plain: Path, tmp_path: Path) -> None:
    whole = QuantizeSection(bits=4, group_size=GROUP, method="data_free")
    to_four_bits(plain, tmp_path / "four", whole, None, 1)
    weights = Path(EXPORT_MODEL).with_suffix(".bin")
    four = (tmp_path / "four" / weights).stat().st_size / 1e6
    limit = four * 1.15
    section = whole.model_copy(update={"megabytes": limit, "samples": 4})
    told = to_four_bits(plain, tmp_path / "mixed", section, samples(), 1)
    size = (tmp_path / "mixed" / weights).stat().st_size / 1e6
    assert four < size <= limit and 0 < told["eight_bit_share"] < 1
    with pytest.raises(UserError, match=r"quantize.megabytes: found 0.01, allowed: 0\.\d+ or more"):
        to_four_bits(plain, tmp_path / "no", section.model_copy(update={"megabytes": 0.01}), samples(), 1)


def test_how_an_export_wants_to_be_run(tmp_path: Path) -> None:
    assert engine_properties(tmp_path, 2)["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 32
    assert "KV_CACHE_PRECISION" not in engine_properties(tmp_path, 2, cached=True)
    write_settings(tmp_path, {"activation_group": 0, "cache_bits": 8})
    assert read_settings(tmp_path) == {"activation_group": 0, "cache_bits": 8}
    found = engine_properties(tmp_path, 2, cached=True)
    assert (found["DYNAMIC_QUANTIZATION_GROUP_SIZE"], found["KV_CACHE_PRECISION"]) == (0, "u8")


def test_what_the_engine_says_of_itself(plain: Path) -> None:
    scorer = exporter.OpenVINOScorer(plain, 1)
    assert scorer.ran["precision"] == "f32" and scorer.ran["activation_group"] == "32" and scorer.ran["cpu"]


def steps(**quantize: object) -> Steps:
    values = {
        "run": {"name": "x"},
        "data": {"train": "a.txt"},
        "model": {"path": "m"},
        "compression": {"steps": [{"quantize": quantize}]},
    }
    return Steps(validate(CompressConfig, values, "file.yaml"))


SMOL = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, vocab_size=64)


@pytest.mark.parametrize(
    ("quantize", "head", "expected"),
    [
        ({"bits": 4, "group_size": 128}, CAUSAL, "found 128, allowed for matrices of 576, 1536 inputs: 32, 64"),
        ({"bits": 8, "activations": "int8"}, CAUSAL, "activations: found int8, allowed for a text generator: float"),
        ({"bits": 8, "cache_bits": 8}, CLASSIFIER, "cache_bits: found 8, allowed for a classifier: 32"),
    ],
)
def test_refused_for_a_model(quantize: dict, head: Head, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        steps(**quantize).check(SMOL, head)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [
        ({"bits": 8, "method": "awq"}, "method: found awq, allowed with bits 8: auto, data_free"),
        ({"bits": 8, "megabytes": 80.0}, "megabytes: allowed with bits 4 only"),
        ({"bits": 8, "recovery": {"training": {"steps": 1}}}, "recovery: allowed with bits 4 only"),
        ({"bits": 4, "group_size": 48}, "group_size: found 48, allowed: 32, 64 or 128"),
    ],
)
def test_refused(quantize: dict, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        steps(**quantize)
    assert expected in str(caught.value)


def test_the_matrices_of_gpt2_lie_the_other_way() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16))
    layers = rounded_layers(model, kept_whole(model))
    assert sorted(layer.inputs for layer in layers) == [64, 64, 64, 256]
    assert all(layer.transposed for layer in layers)


def on_a_grid(directory: Path) -> Path:
    """The tiny model with the weights that a Q4_1 file would have: minimum + scale x code, both in half precision."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(directory))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in rounded_layers(model, kept_whole(model)):
            groups = layer.module.weight.unflatten(1, (-1, GROUP))
            codes = torch.randint(0, 16, groups.shape, generator=generator).float()
            codes[..., 0], codes[..., 1] = 0, 15
            scale = (0.01 + 0.1 * torch.rand(*groups.shape[:2], 1, generator=generator)).half().float()
            # Of both signs, as weights are.
            low = (-15 * scale * torch.rand(*groups.shape[:2], 1, generator=generator)).half().float()
            layer.module.weight.copy_((low + scale * codes).flatten(1))
    model.save_pretrained(directory)
    return directory


def test_weights_of_four_bits_are_kept_as_they_are(tmp_path: Path, llama: Path, plain: Path) -> None:
    model = on_a_grid(tmp_path / "grid")
    exporter.export_model(model, tmp_path / "fp32", CAUSAL, None)
    section = QuantizeSection(bits=4, group_size=GROUP, method="keep")
    told = to_four_bits(tmp_path / "fp32", tmp_path / "kept", section, None, 1)
    assert told["matrices"] == 2 * 7
    rounded_again = section.model_copy(update={"method": "data_free"})
    to_four_bits(tmp_path / "fp32", tmp_path / "again", rounded_again, None, 1)
    ids = np.arange(5, 37)[None]
    # Exact activations, so that only the weights differ.
    write_settings(tmp_path / "fp32", {"activation_group": 0})
    found = {}
    for name in ("fp32", "kept", "again"):
        write_settings(tmp_path / name, {"activation_group": 0})
        found[name] = exporter.OpenVINOScorer(tmp_path / name, 1).logits(ids)
    error = {name: float(np.abs(found[name] - found["fp32"]).mean()) for name in ("kept", "again")}
    # What is left is the embedding, of 8 bits.
    assert error["kept"] < 0.2 * error["again"]
    with pytest.raises(UserError, match=r"quantize.method: found keep, allowed for weights that have 16"):
        to_four_bits(plain, tmp_path / "no", section, None, 1)


def test_products_in_eight_bits_altogether(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    exporter.export_model(tmp_path / "model", tmp_path / "fp32", CLASSIFIER, None)
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(12):
        ids = generator.integers(5, 100, (1, 16))
        rows.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    held = GraphSamples(CLASSIFIER, rows[:8], rows[8:])
    assert to_int8_activations(tmp_path / "fp32", tmp_path / "int8", held) == {"way": "smooth_quant"}
    graphs = {name: openvino.Core().read_model(tmp_path / name / EXPORT_MODEL) for name in ("fp32", "int8")}
    # Activations are rounded by a node, weights are stored in 8 bits.
    assert any(op.get_type_name() == "FakeQuantize" for op in graphs["int8"].get_ops())
    compiled = {name: {EXPORT_MODEL: openvino.Core().compile_model(graph, "CPU")} for name, graph in graphs.items()}
    reference = held.outputs(compiled["fp32"])
    assert held.loss(compiled["fp32"], reference) == 0
    assert 0 < held.loss(compiled["int8"], reference) < 0.05
