"""Pruned shapes compute what the zeros they replace computed, and reload with stock transformers; zeros where theory
wants them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from raylm.compression.methods.base import Outlook
from raylm.compression.pruning.checks import pruned_config
from raylm.compression.pruning.cutting import inner_parameters
from raylm.compression.pruning.places import dimension, find_places
from raylm.compression.pruning.scan import block_sparsities, mean_loss
from raylm.compression.pruning.shapes import Surgery
from raylm.compression.pruning.zeros import linear_names, lowest, set_zeros, sparse_gpt
from raylm.config.pruning import PruneSection
from raylm.errors import UserError
from raylm.models.families import find_family
from raylm.models.families.build import why_invalid
from raylm.models.heads import CAUSAL
from raylm.models.layers import evenly, find_blocks, keep_layers
from tests.compression.small_models import (
    FAMILIES,
    HEADS,
    batches,
    build,
    cutter,
    logits,
    objective,
    of_heads,
    reloaded,
)


def with_dead(model: PreTrainedModel, places: list, kept: list[list[int]]) -> None:
    """Have all units but the kept ones give nothing to what they lead into."""
    with torch.no_grad():
        for place, numbers in zip(places, kept, strict=True):
            module = model.get_submodule(place.sink)
            weight = module.weight if dimension(module, "inputs") == 1 else module.weight.t()
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[place.inputs(numbers)] = False
            weight[:, gone] = 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_do_nothing_are_cut_exactly(family: str, tmp_path: Path) -> None:
    model = build(family)
    units = find_family(family).neurons
    places = find_places(model, units)
    generator = torch.Generator().manual_seed(2)
    kept = [sorted(torch.randperm(192, generator=generator)[:64].tolist()) for _ in places]
    with_dead(model, places, kept)
    expected = logits(family, model)
    # Every criterion finds them.
    for criterion in ("weight", "activation", "taylor"):
        found = cutter(family, criterion, neurons=64).units(model, units, 64)
        assert torch.allclose(logits(family, found), expected, atol=1e-5), criterion
    again = reloaded(family, found, tmp_path)
    assert torch.allclose(logits(family, again), expected, atol=1e-5)
    assert getattr(again.config, units.key) == 64
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_heads_that_do_nothing_are_cut_exactly(family: str, tmp_path: Path) -> None:
    model = build(family)
    units = find_family(family).heads
    places = find_places(model, units)
    # Of T5 the same everywhere, as the first block's table of positions serves all.
    kept = [[1]] * len(places) if family == "llama" else [[0, 3]] * len(places)
    with_dead(model, places, kept)
    expected = logits(family, model)
    found = reloaded(family, cutter(family, heads=2).units(model, units, len(kept[0])), tmp_path)
    assert torch.allclose(logits(family, found), expected, atol=1e-5)
    assert getattr(found.config, units.key) == 2
    assert getattr(found.config, units.size_key) == 32
    if family == "llama":
        assert found.config.num_key_value_heads == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_model_is_valid(family: str, tmp_path: Path) -> None:
    model, record = build(family), find_family(family)
    smaller = cutter(family, width=64).width(model, 64)
    again = reloaded(family, smaller, tmp_path)
    assert torch.equal(logits(family, again), logits(family, smaller))
    assert getattr(again.config, record.width_key) == 64
    # Its heads are as wide as before.
    sizes = {place.size // (2 if family == "llama" else 1) for place in find_places(again, record.heads)}
    assert sizes == {32}


def test_channels_without_content_are_cut_exactly() -> None:
    # RMSNorm divides by the root mean square, to which empty channels add nothing but their number.
    model = build("llama")
    kept = torch.arange(0, 128, 2)
    gone = torch.arange(1, 128, 2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, gone] = 0.0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[gone] = 0.0
            block.mlp.down_proj.weight[gone] = 0.0
    expected = logits("llama", model)
    assert cutter("llama", width=64)._channels(model, find_family("llama"), 64) == kept.tolist()
    surgery = Surgery(model, find_family("llama"))
    surgery.width(kept)
    smaller = surgery.build()
    # mean(x^2) over half as many channels is twice as large.
    with torch.no_grad():
        for name, module in smaller.named_modules():
            if name.endswith("norm"):
                module.weight.mul_(2**0.5)
                module.variance_epsilon *= 2
    assert torch.allclose(logits("llama", smaller), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_do_nothing_are_dropped_exactly(family: str, tmp_path: Path) -> None:
    model, record = build(family), find_family(family)
    with torch.no_grad():
        for place in [*find_places(model, record.heads), *find_places(model, record.neurons)]:
            if f"{place.stack}.1." in place.sink:
                module = model.get_submodule(place.sink)
                module.weight.zero_()
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
    expected = logits(family, model)
    found, numbers = cutter(family, layers=2).layers(model, 2)
    if family == "bert":
        # Its norms come after the sums, so that a block without content is not nothing.
        assert all(len(kept) == 2 for kept in numbers.values())
    else:
        assert all(kept == [0, 2] for kept in numbers.values())
        assert torch.allclose(logits(family, reloaded(family, found, tmp_path)), expected, atol=1e-5)
    assert [len(blocks.modules) for blocks in find_blocks(found)] == [2] * len(numbers)


def test_the_first_block_may_go_where_it_has_the_positions(tmp_path: Path) -> None:
    smaller = keep_layers(build("t5"), {"num_layers": [1, 2], "num_decoder_layers": [2]})
    again = reloaded("t5", smaller, tmp_path)
    assert torch.equal(logits("t5", again), logits("t5", smaller.eval()))


def test_layers_are_spread_evenly() -> None:
    assert evenly(30, 20)[:4] == [0, 2, 3, 5] and evenly(30, 20)[-1] == 29 and len(set(evenly(30, 20))) == 20
    assert (evenly(12, 6), evenly(6, 1), evenly(4, 4)) == ([0, 2, 4, 7, 9, 11], [5], [0, 1, 2, 3])


def outlook(family: str) -> Outlook:
    config = build(family).config
    return Outlook(config, config, HEADS[family], SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "section", "expected"),
    [
        ("llama", {"layers": 3}, "prune.layers: found 3, allowed: less than 3"),
        ("llama", {"heads": 3}, "prune.heads: found 3, allowed: a multiple of 2"),
        ("llama", {"neurons": 100}, "prune.neurons: found 100, allowed: a multiple of 64"),
        ("llama", {"neurons": 192}, "prune.neurons: found 192, allowed: less than 192"),
        ("llama", {"width": 256}, "prune.width: found 256, allowed: less than 128"),
        ("gpt2", {"width": 64, "rotate": True}, "prune.rotate: found true, allowed for a gpt2 model: false"),
        ("gpt2", {"heads": 2}, "prune.heads: found 2, allowed for a gpt2 model: leave it out and give width"),
        ("bert", {"heads": 2}, "prune.heads: found 2, allowed for a bert model: leave it out and give width"),
    ],
)
def test_refused(family: str, section: dict, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        pruned_config(PruneSection(**section), outlook(family))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_width_may_need_fewer_heads(tmp_path: Path) -> None:
    """transformers takes no Llama whose heads do not divide its width, in between neither."""
    model = of_heads(3, 192)
    config = model.config
    given = Outlook(config, config, CAUSAL, SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        pruned_config(PruneSection(width=128), given)
    assert "prune: found width 128, of which transformers takes no llama model: " in str(caught.value)
    assert "not a multiple of the number of attention heads (3)" in str(caught.value)
    told = pruned_config(PruneSection(width=128, heads=2), given)
    found, _ = cutter("llama", width=128, heads=2).shapes(model)
    again = reloaded("llama", found, tmp_path)
    assert (told.hidden_size, told.num_attention_heads, told.head_dim) == (128, 2, 64)
    assert (again.config.hidden_size, again.config.num_attention_heads, again.config.head_dim) == (128, 2, 64)
    assert torch.equal(logits("llama", again), logits("llama", found))


def test_a_budget_takes_no_number_of_heads_that_is_none() -> None:
    """Three of four heads do not divide a width of 128."""
    before = of_heads(4, 128)
    model, told = cutter("llama", keep=0.3).shapes(before)
    assert why_invalid(model.config) is None
    assert inner_parameters(model) <= 0.3 * inner_parameters(before)
    assert "heads" in {kind for row in told["scan"] for kind in (row["cut"], *row["others"])}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_told_beforehand(family: str) -> None:
    section = {"layers": 2, "width": 64, "neurons": 128} | ({"heads": 2} if family in ("llama", "t5") else {})
    told = pruned_config(PruneSection(**section), outlook(family))
    found, _ = cutter(family, **section).shapes(build(family))
    keys = set(told.to_dict()) - {"dtype", "architectures", "transformers_version", "_name_or_path"}
    assert {k: told.to_dict()[k] for k in keys} == {k: found.config.to_dict()[k] for k in keys}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", ["weight", "wanda", "sparsegpt"])
def test_zeros_are_as_many_as_asked_for(family: str, criterion: str) -> None:
    model = build(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found, _ = cutter(family, criterion, sparsity=0.5).zeros(model)
    touched = {f"{name}.weight" for names in linear_names(found) for name in names}
    for name, parameter in found.named_parameters():
        if name in touched:
            assert float((parameter == 0).float().mean()) == pytest.approx(0.5, abs=0.01), name
        else:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("criterion", ["weight", "wanda", "sparsegpt"])
def test_two_of_four(criterion: str) -> None:
    model, _ = cutter("gpt2", criterion, sparsity=0.5, pattern="2:4").zeros(build("gpt2"))
    for names in linear_names(model):
        for name in names:
            # GPT-2's matrices are [inputs, outputs].
            groups = model.get_submodule(name).weight.t().unflatten(1, (-1, 4))
            assert ((groups == 0).sum(dim=2) == 2).all()


def test_what_makes_up_for_zeros_is_better_than_what_does_not() -> None:
    """The outputs of a layer whose inputs are correlated and of different size."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    inputs = torch.randn(512, 64, generator=generator) @ mixing * torch.logspace(-1, 1, 64)
    weight = torch.randn(32, 64, generator=generator)
    expected = inputs @ weight.t()

    def error(pruned: torch.Tensor) -> float:
        return float((inputs @ pruned.t() - expected).square().mean())

    squares = inputs.square().mean(dim=0)
    magnitude = error(weight.masked_fill(lowest(weight, None, 0.5, "unstructured"), 0.0))
    wanda = error(weight.masked_fill(lowest(weight, squares.sqrt(), 0.5, "unstructured"), 0.0))
    better = error(sparse_gpt(weight, inputs.t() @ inputs / 512, 0.5, "unstructured"))
    assert better < 0.9 * wanda < 0.9 * 0.5 * magnitude


def test_sensitivity_spreads_zeros() -> None:
    model, task = build("llama"), objective("llama")
    weights = [p.clone() for p in model.parameters()]
    shares, table = block_sparsities(model, 0.5, task, batches("llama"))
    assert sum(shares) / 3 == pytest.approx(0.5) and sorted(shares) == pytest.approx([0.42, 0.5, 0.58])
    costs = [row["loss"] for row in table]
    assert shares[costs.index(max(costs))] == min(shares)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    set_zeros(model, "weight", shares, "unstructured", task, [])
    for share, names in zip(shares, linear_names(model), strict=True):
        zeros = torch.cat([(model.get_submodule(name).weight == 0).flatten() for name in names])
        assert float(zeros.float().mean()) == pytest.approx(share, abs=0.01)


def test_a_budget_is_kept_to() -> None:
    model = build("llama")
    found, told = cutter("llama", keep=0.6).shapes(model)
    assert inner_parameters(found) <= 0.6 * inner_parameters(model)
    assert [row["cut"] for row in told["scan"]] and all(row["others"] for row in told["scan"])
    last = told["scan"][-1]
    assert last["parameters"] == inner_parameters(found)
    assert last["loss"] == pytest.approx(mean_loss(found, objective("llama"), batches("llama")), rel=1e-5)


def test_only_linear_layers_of_blocks_get_zeros() -> None:
    model = build("bert")
    found = [name for names in linear_names(model) for name in names]
    assert len(found) == 3 * 6 and all(isinstance(model.get_submodule(name), nn.Linear) for name in found)
