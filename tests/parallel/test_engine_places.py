"""The engines' places for later work, on every kind of layout against a plain PyTorch loop: parameters that are not
trained, a change of the model before training, one of the weights after each step, a second model in the loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from families import build, plain_loop, plain_loss, step_data
from layouts import case, largest_difference, run_cases

from raylm.tasks.causal import CausalObjective
from raylm.tasks.objective import IGNORED, ObjectiveModule

STEPS = 6
TRAINED, HALVED, MASKED = "_proj.weight", "input_layernorm.weight", "down_proj.weight"
PLACES = [("one", 0), ("dp2", 1), ("dp2", 2), ("tp2", 0), ("pp2", 1), ("dp2 x tp2", 1)]


def prepare(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(HALVED):
            parameter.data.mul_(0.5)
        parameter.requires_grad_(name.endswith(TRAINED))


@torch.no_grad()
def mask(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(MASKED):
            parameter[0].zero_()


@pytest.mark.slow
def test_what_is_frozen_changed_and_masked_is_so_under_every_layout(tmp_path: Path) -> None:
    asked = {"train": TRAINED, "halve": HALVED, "mask": MASKED, "steps": [0, STEPS]}
    cases = [case("llama", layout, zero, "adamw", **asked) for layout, zero in PLACES]
    expected = plain_loop("llama", "adamw", STEPS, prepare=prepare, after_step=mask)
    untouched = plain_loop("llama", "adamw", STEPS)
    assert largest_difference(expected["loss"], untouched["loss"]) > 1e-3
    for place, found in zip(PLACES, run_cases(cases, tmp_path), strict=True):
        assert largest_difference(found["loss"], expected["loss"]) < 1e-5, place
        assert largest_difference(found["gradient_norm"], expected["gradient_norm"]) < 1e-4, place
        assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=1e-5), place


@pytest.mark.slow
def test_frozen_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    saved, half = str(tmp_path / "saved"), STEPS // 2
    asked = {"train": TRAINED}
    cases = [
        case("llama", "dp2", 3, "adamw", **asked, steps=[0, STEPS]),
        case("llama", "dp2", 3, "adamw", **asked, steps=[0, half], save=saved),
        case("llama", "dp2", 1, "adamw", **asked, steps=[half, STEPS], load=saved),
        case("llama", "dp2 x tp2", 1, "adamw", **asked, steps=[half, STEPS], load=saved),
    ]
    whole, first, *resumed = run_cases(cases, tmp_path)
    assert first["loss"] == whole["loss"][:half]
    for found in resumed:
        assert largest_difference(found["loss"], whole["loss"][half:]) < 1e-5


class Imitation(CausalObjective):
    """Imagined: be like the other model."""

    def referred_loss(self, model, reference, batch):
        with torch.no_grad():
            wanted = self.logits(reference, batch).softmax(dim=-1)
        return functional.cross_entropy(self.logits(model, batch).flatten(0, 1), wanted.flatten(0, 1), reduction="sum")


def test_a_second_model_is_compared_with_and_nothing_else() -> None:
    model, teacher = build("llama"), build("llama")
    torch.manual_seed(1)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = step_data("llama", 0)
    module = ObjectiveModule(model, Imitation(), teacher).train()
    assert {name.removeprefix("model.") for name, _ in module.named_parameters()} == set(dict(model.named_parameters()))
    assert not any("reference" in name for name in module.state_dict())
    loss = module(**batch)
    loss.backward()
    wanted = teacher(batch["input_ids"]).logits.softmax(dim=-1)
    expected = -(wanted * model(batch["input_ids"]).logits.log_softmax(dim=-1)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())
    # Validation is the task's own.
    module.eval()
    with torch.no_grad():
        mean = module(**batch).item() / (batch["targets"] != IGNORED).sum().item()
        assert mean == pytest.approx(plain_loss(model, batch).item(), rel=1e-5)
