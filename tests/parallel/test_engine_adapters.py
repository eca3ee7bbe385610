"""LoRA and DoRA under ZeRO 0 to 3 against a plain PyTorch loop over peft's own layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from families import build, plain_loop
from layouts import case, largest_difference, run_cases

from raylm.config.adapter import AdapterSection
from raylm.models.adapters import adapted_layers, add_adapter, is_adapter
from raylm.models.heads import CAUSAL

STEPS = 5
LORA = {"rank": 4, "alpha": 16}
DORA = {"type": "dora", "rank": 4, "alpha": 8, "rank_stabilized": True, "targets": ["q_proj", "down_proj"]}
PLACES = [("one", 0), ("dp2", 0), ("dp2", 1), ("dp2", 2), ("dp2", 3)]


def plain(family: str, adapter: dict[str, Any]) -> dict[str, list[float]]:
    def prepare(model: torch.nn.Module) -> None:
        add_adapter(model, AdapterSection(**adapter), CAUSAL, 0)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad is is_adapter(name)

    return plain_loop(family, "adamw", STEPS, prepare=prepare)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "adapter"), [("llama", LORA), ("llama", DORA), ("gpt2", LORA)])
def test_losses_are_those_of_a_plain_loop(family: str, adapter: dict[str, Any], tmp_path: Path) -> None:
    # DoRA reads whole weights, which ZeRO 3 does not leave; the file is refused (test_adapters.py in tests/training).
    places = PLACES if adapter is LORA and family == "llama" else PLACES[:4]
    cases = [case(family, layout, zero, "adamw", adapt=adapter, steps=[0, STEPS]) for layout, zero in places]
    expected = plain(family, adapter)
    assert expected["loss"][-1] < expected["loss"][0]
    for place, found in zip(places, run_cases(cases, tmp_path), strict=True):
        assert largest_difference(found["loss"], expected["loss"]) < 1e-5, place
        assert largest_difference(found["gradient_norm"], expected["gradient_norm"]) < 1e-4, place
        assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=1e-5), place


@pytest.mark.slow
def test_checkpoints_hold_adapters_alone_and_go_on_under_another_stage(tmp_path: Path) -> None:
    saved, half = str(tmp_path / "saved"), 2
    cases = [
        case("llama", "dp2", 3, "adamw", adapt=LORA, steps=[0, STEPS]),
        case("llama", "dp2", 3, "adamw", adapt=LORA, steps=[0, half], save=saved),
        case("llama", "dp2", 1, "adamw", adapt=LORA, steps=[half, STEPS], load=saved),
        case("llama", "one", 0, "adamw", adapt=LORA, steps=[half, STEPS], load=saved),
    ]
    whole, first, *resumed = run_cases(cases, tmp_path)
    assert first["loss"] == whole["loss"][:half]
    for found in resumed:
        assert largest_difference(found["loss"], whole["loss"][half:]) < 1e-5
    (manifest,) = Path(saved).glob("*/checkpoint.json")
    names = json.loads(manifest.read_text())["shapes"]
    model = build("llama")
    assert len(names) == 2 * len(adapted_layers(model, AdapterSection(**LORA), CAUSAL))
    assert all(is_adapter(name) for name in names)
