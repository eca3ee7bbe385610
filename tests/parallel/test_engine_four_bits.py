"""A base in 4 bits with adapters beside it, against what transformers loads; where bitsandbytes is installed."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from families import VOCABULARY, build, plain_loop
from layouts import case, largest_difference, run_cases

from raylm.config.adapter import AdapterSection
from raylm.models.adapters import add_adapter, is_adapter, linear_layers
from raylm.models.four_bits import BYTES, four_bit_layers, keep_in_four_bits
from raylm.models.heads import CAUSAL, MASKED, SEQUENCE_TO_SEQUENCE, Head
from raylm.models.weights import HeldWeights, make_outline
from raylm.parallel.engines.filling import fill

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra qlora)")

STEPS = 5
QLORA = {"rank": 4, "alpha": 16, "bits": 4}
HEADS = {"bert": MASKED, "t5": SEQUENCE_TO_SEQUENCE}
CPU = torch.device("cpu")


class Watched:
    """The weights of a model, which notes how many of those that it gave are still held."""

    def __init__(self, model: torch.nn.Module, watched: set[str]) -> None:
        self._weights, self._watched = HeldWeights(model), watched
        self._given: list[weakref.ref] = []
        self.most = 0

    def open(self, name: str) -> torch.Tensor:
        self.most = max(self.most, sum(one() is not None for one in self._given))
        values = self._weights.open(name).clone()
        if name in self._watched:
            self._given.append(weakref.ref(values))
        return values


def packed(whole: Any, head: Head, computed: torch.dtype) -> tuple[Any, Watched]:
    model = make_outline(whole.config, head).model
    watched = Watched(whole, {f"{name}.weight" for name in four_bit_layers(model, head)})
    keep_in_four_bits(model, head, computed)
    fill(model, {p: name for name, p in model.named_parameters()}, watched, CPU)
    return model.eval(), watched


@pytest.mark.parametrize(("family", "computed"), [
    ("llama", torch.float32), ("llama", torch.bfloat16), ("llama-tied", torch.float32), ("gpt2", torch.float32),
    ("bert", torch.float32), ("t5", torch.float32),
])  # fmt: skip
def test_the_base_is_what_transformers_loads_in_4_bits(family: str, computed: torch.dtype, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    whole, head = build(family), HEADS.get(family, CAUSAL)
    whole.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=computed
    )
    stock = type(whole).from_pretrained(tmp_path, quantization_config=settings, dtype=computed, device_map="cpu")
    model, watched = packed(whole, head, computed)
    of_stock = {name: p for name, p in stock.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
    ours = {name: p for name, p in model.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
    assert set(ours) == set(of_stock) and len(ours) >= 8
    for name, weight in ours.items():
        assert torch.equal(weight, of_stock[name]), name
        assert weight.quant_state == of_stock[name].quant_state, name
    # One weight at a time: each is in 4 bits before the next is read.
    assert watched.most == 0
    assert {p.dtype for name, p in model.named_parameters() if name not in ours} == {torch.float32}


def bytes_of(weight: Any) -> int:
    """Of a weight in 4 bits with its constants, but for the tables of numbers that each layer has."""
    state = weight.quant_state
    return weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


def test_weights_take_4_bits_and_constants() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    whole = LlamaForCausalLM(config)
    model, _ = packed(whole, CAUSAL, torch.float32)
    count = sum(layer.weight.numel() for layer in linear_layers(whole, CAUSAL).values())
    found = sum(bytes_of(layer.weight) for layer in linear_layers(model, CAUSAL).values())
    assert found == count * BYTES
    assert 8 * found / count == pytest.approx(4.127, abs=1e-3)


def test_training_goes_on_after_an_evaluation() -> None:
    """bitsandbytes packs weights for AVX-512 in evaluation, where a processor has it; nothing has a gradient then."""
    model, _ = packed(build("llama"), CAUSAL, torch.float32)
    add_adapter(model, AdapterSection(**QLORA), CAUSAL, 0)
    ids = torch.arange(2, 18).view(2, 8)

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for name, p in model.named_parameters() if is_adapter(name)]

    before = gradients()
    with torch.inference_mode():
        model.eval()(input_ids=ids)
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))
    assert sum(float(one.abs().sum()) for one in before) > 0


def plain() -> dict[str, list[float]]:
    def prepare(model: torch.nn.Module) -> None:
        for name, layer in linear_layers(model, CAUSAL).items():
            made = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            made.load_state_dict(layer.state_dict())
            made.support_avx512bf16_for_cpu = False
            model.set_submodule(name, made.to("cpu"))
        add_adapter(model, AdapterSection(**QLORA), CAUSAL, 0)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))

    return plain_loop("llama", "adamw", STEPS, prepare=prepare)


@pytest.mark.slow
def test_losses_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    saved, half = str(tmp_path / "saved"), 2
    places = [("one", 0), ("dp2", 1), ("dp2", 2)]
    cases = [case("llama", layout, zero, "adamw", adapt=QLORA, steps=[0, STEPS]) for layout, zero in places]
    cases += [
        case("llama", "dp2", 1, "adamw", adapt=QLORA, steps=[0, STEPS], bf16=True),
        case("llama", "dp2", 2, "adamw", adapt=QLORA, steps=[0, half], save=saved),
        case("llama", "dp2", 1, "adamw", adapt=QLORA, steps=[half, STEPS], load=saved),
    ]
    expected = plain()
    assert expected["loss"][-1] < expected["loss"][0]
    *found, in_bf16, _, resumed = run_cases(cases, tmp_path)
    for place, one in zip(places, found, strict=True):
        assert largest_difference(one["loss"], expected["loss"]) < 1e-5, place
        assert largest_difference(one["gradient_norm"], expected["gradient_norm"]) < 1e-4, place
        assert one["evaluation"] == pytest.approx(expected["evaluation"], abs=1e-5), place
    assert largest_difference(in_bf16["loss"], expected["loss"]) < 0.05
    assert largest_difference(resumed["loss"], expected["loss"][half:]) < 1e-5
