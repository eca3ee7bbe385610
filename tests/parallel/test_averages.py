"""Averages of the weights under every layout and ZeRO stage, against torch's own over a plain loop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parent))

from families import plain_loop, plain_loss, step_data
from layouts import case, largest_difference, run_cases

TOLERANCE = 1e-5
STEPS = 8
DECAY = {"decay": 0.7, "warmup": False}


def plain_averages(family: str, optimizer: str) -> dict[str, Any]:
    """The plain loop with the loss of torch's average after each step."""
    found: dict[str, Any] = {"average": None, "evaluations": []}
    one = {name: values[:1] for name, values in step_data(family, 0).items()}

    def begin(model: torch.nn.Module) -> None:
        found["average"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY["decay"]))
        # Its first update would take the weights as they are then.
        found["average"].update_parameters(model)

    def average(model: torch.nn.Module) -> None:
        found["average"].update_parameters(model)
        with torch.no_grad():
            found["evaluations"].append(float(plain_loss(found["average"].module.eval(), one)))

    return found | plain_loop(family, optimizer, STEPS, prepare=begin, after_step=average)


@pytest.mark.slow
def test_averages_are_torch_s_under_every_layout(tmp_path: Path) -> None:
    cases = [
        case("llama-tied", "dp2", 0, "adamw"),
        case("llama", "dp2", 1, "sgd"),
        case("gpt2", "dp2", 2, "adamw"),
        case("bert", "dp2", 3, "adamw"),
        case("llama-tied", "pp2", 0, "adamw"),
        case("gpt2", "tp2", 1, "adamw"),
        case("t5", "pp2 x tp2", 1, "sgd"),
        case("llama-tied", "2 x 2 x 2", 1, "adamw"),
    ]
    for given in cases:
        given |= {"steps": [0, STEPS], "average": DECAY}
    for given, found in zip(cases, run_cases(cases, tmp_path), strict=True):
        expected = plain_averages(given["family"], given["optimizer"])
        assert largest_difference(found["evaluations"], expected["evaluations"]) < TOLERANCE, given
        # Training goes on from the weights themselves.
        assert largest_difference(found["loss"], expected["loss"]) < TOLERANCE, given


@pytest.mark.slow
def test_averages_go_on_from_a_checkpoint_in_another_layout(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    given = {"optimizer": "adamw", "average": {"decay": 0.9}}
    cases = [
        case("gpt2", "dp2", 3, steps=[0, STEPS], **given),
        case("gpt2", "dp2", 3, steps=[0, 3], save=first, **given),
        case("gpt2", "dp2", 3, steps=[3, STEPS], load=first, **given),
        case("gpt2", "pp2 x tp2", 1, steps=[3, 6], load=first, save=second, **given),
        case("gpt2", "dp2", 0, steps=[6, STEPS], load=second, **given),
        case("gpt2", "dp2", 1, steps=[0, 4], bf16=True, **given),
        case("gpt2", "dp2", 1, steps=[0, 2], bf16=True, save=str(tmp_path / "half"), **given),
        case("gpt2", "dp2", 1, steps=[2, 4], bf16=True, load=str(tmp_path / "half"), **given),
    ]
    whole, begun, rest, other, last, bf16, *halves = run_cases(cases, tmp_path)
    for key in ("loss", "evaluations"):
        assert begun[key] + rest[key] == whole[key]
        moved = begun[key] + other[key] + last[key]
        assert largest_difference(moved, whole[key]) < TOLERANCE
        assert halves[0][key] + halves[1][key] == bf16[key]
    assert largest_difference(bf16["evaluations"], whole["evaluations"][:4]) < 0.05
