"""Training beside a teacher, and with rounded weights, on every data-parallel layout against a plain PyTorch loop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from families import build_teacher, plain_loop, plain_loss
from layouts import case, largest_difference, run_cases

from raylm.models.rounding import kept_whole, rounded, rounded_layers

STEPS, TEMPERATURE, GROUP = 5, 2.0, 32
LAYOUTS = [("one", 0), ("dp2", 1), ("dp2", 2), ("dp2", 3)]
SECTION = {"logits": 0.7, "targets": 0.3, "hidden": 0.5, "temperature": TEMPERATURE}


def distilled(family: str):
    teacher = build_teacher(family)

    def loss(model, data):
        counted = data["targets"] != -100
        ask = {"input_ids": data["input_ids"], "output_hidden_states": True}
        found = model(**ask)
        with torch.no_grad():
            wanted = teacher(**ask)
        one, other = (output.logits[counted] / TEMPERATURE for output in (found, wanted))
        divergence = functional.kl_div(
            one.log_softmax(dim=-1), other.log_softmax(dim=-1), reduction="sum", log_target=True
        )
        apart = torch.stack(
            [
                (a - b).square().mean(dim=(1, 2))
                for a, b in zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True)
            ]
        ).mean(dim=0)
        total = 0.7 * TEMPERATURE**2 * divergence + 0.5 * (apart * counted.sum(dim=1)).sum()
        return total / counted.sum() + 0.3 * plain_loss(model, data)

    return loss


def rounding(model: torch.nn.Module) -> None:
    """Written out: rounded on the way forward, nothing on the way back."""
    for layer in rounded_layers(model, kept_whole(model)):
        module = layer.module

        def forward(inputs, module=module):
            weight = module.weight
            return functional.linear(inputs, weight + (rounded(weight, GROUP) - weight).detach(), module.bias)

        module.forward = forward


@pytest.mark.slow
def test_learning_from_a_teacher(tmp_path: Path) -> None:
    expected = plain_loop("llama", "adamw", STEPS, trained_loss=distilled("llama"))
    cases = [case("llama", name, zero, "adamw", teach=SECTION, steps=[0, STEPS]) for name, zero in LAYOUTS]
    for layout, found in zip(LAYOUTS, run_cases(cases, tmp_path), strict=True):
        assert largest_difference(found["loss"], expected["loss"]) < 1e-5, layout
        assert largest_difference(found["gradient_norm"], expected["gradient_norm"]) < 1e-4, layout
        # Validation is the task's own loss.
        assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=1e-5), layout


@pytest.mark.slow
def test_training_with_rounded_weights(tmp_path: Path) -> None:
    expected = plain_loop("llama", "adamw", STEPS, prepare=rounding)
    plain = plain_loop("llama", "adamw", STEPS)
    assert largest_difference(expected["loss"], plain["loss"]) > 1e-4
    cases = [case("llama", name, zero, "adamw", round=GROUP, steps=[0, STEPS]) for name, zero in LAYOUTS]
    for layout, found in zip(LAYOUTS, run_cases(cases, tmp_path), strict=True):
        assert largest_difference(found["loss"], expected["loss"]) < 1e-5, layout
        assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=1e-5), layout
