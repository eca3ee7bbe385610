"""Tensor- and pipeline-parallel training against a plain PyTorch loop, and checkpoints from layout to layout.

``tests/benchmarks/parity_table.py`` and ``resharding_matrix.py`` run all of it; here is a spread.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))

from families import BATCH, plain_loop
from layouts import case, largest_difference, run_cases

TOLERANCE = 1e-5
SOME = 10


@pytest.mark.slow
def test_parity_with_plain_loop(tmp_path: Path) -> None:
    cases = [
        case("llama-tied", "tp2", 0, "sgd"),
        # Clipping at ZeRO 0 is ours, over stages and parts; at ZeRO 1 it is DeepSpeed's.
        case("gpt2", "pp2", 0, "adamw"),
        case("bert", "tp2", 1, "adamw"),
        case("t5", "pp2", 0, "sgd"),
        case("llama", "dp2 x tp2", 0, "adamw"),
        case("llama-tied", "dp2 x pp2", 1, "sgd"),
        case("gpt2", "pp2 x tp2", 1, "adamw", checkpointing=True),
        case("llama-tied", "2 x 2 x 2", 0, "adamw"),
        case("gpt2", "2 x 2 x 2", 1, "sgd"),
        case("bert", "2 x 2 x 2", 0, "sgd"),
        case("t5", "2 x 2 x 2", 1, "adamw"),
        # Compiled blocks give the same.
        case("llama", "one", 1, "adamw", compile=True),
        # And it does not matter where stages begin.
        case("t5", "pp2 x tp2", 1, "sgd", balance="time"),
    ]
    for given in cases:
        given["steps"] = [0, SOME]
    for given, found in zip(cases, run_cases(cases, tmp_path), strict=True):
        expected = plain_loop(given["family"], given["optimizer"], SOME)
        assert largest_difference(found["loss"], expected["loss"]) < TOLERANCE, given
        assert largest_difference(found["gradient_norm"], expected["gradient_norm"]) < TOLERANCE, given
        assert abs(found["evaluation"] - expected["evaluation"]) < TOLERANCE, given


@pytest.mark.slow
def test_smoothed_labels_under_every_cut(tmp_path: Path) -> None:
    share = 0.1
    cases = [
        case("llama", "dp2", 3, "sgd", smooth=share),
        case("gpt2", "tp2", 0, "sgd", smooth=share),
        case("bert", "pp2 x tp2", 1, "adamw", smooth=share),
        case("t5", "dp2 x tp2", 1, "sgd", smooth=share),
    ]

    def smoothed(model: PreTrainedModel, data: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=data["input_ids"], **({"labels": data["targets"]} if encodes(model) else {})).logits
        return functional.cross_entropy(logits.flatten(0, 1), data["targets"].flatten(), label_smoothing=share)

    for given in cases:
        given["steps"] = [0, SOME]
    for given, found in zip(cases, run_cases(cases, tmp_path), strict=True):
        expected = plain_loop(given["family"], given["optimizer"], SOME, trained_loss=smoothed)
        for key in ("loss", "gradient_norm"):
            assert largest_difference(found[key], expected[key]) < TOLERANCE, given
        # Validation counts plain targets.
        assert abs(found["evaluation"] - expected["evaluation"]) < TOLERANCE, given


def encodes(model: PreTrainedModel) -> bool:
    return model.config.is_encoder_decoder


@pytest.mark.slow
def test_dropout_resumes_and_every_rank_sees_what_is_not_finite(tmp_path: Path) -> None:
    place = {"zero": 1, "optimizer": "adamw", "dropout": 0.3}
    folder = str(tmp_path / "checkpoint")
    cases = [
        case("bert", "tp2", **place, steps=[0, 9]),
        case("bert", "tp2", **place, steps=[0, 6], save=folder),
        case("bert", "tp2", **place, steps=[6, 9], load=folder),
        case("bert", "tp2", 1, "adamw", steps=[0, 9]),
        case("llama-tied", "pp2", 0, "adamw", steps=[0, 3], poison=2),
        case("llama-tied", "pp2", 1, "adamw", steps=[0, 3], poison=2),
    ]
    whole, first, rest, without, *poisoned = run_cases(cases, tmp_path)
    assert first["loss"] + rest["loss"] == whole["loss"]
    assert largest_difference(whole["loss"], without["loss"]) > 1e-3
    for found in poisoned:
        for norms in found["norms_of_all"]:
            assert [math.isfinite(norm) and norm >= 0 for norm in norms] == [True, True, False]


@pytest.mark.slow
def test_bf16_follows_fp32_and_its_checkpoints_move(tmp_path: Path) -> None:
    place = {"zero": 1, "optimizer": "adamw", "bf16": True}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    cases = [
        case("llama-tied", "pp2", **place, steps=[0, 4], save=first),
        case("llama-tied", "tp2", **place, steps=[4, 7], load=first, save=second),
        case("llama-tied", "dp2", **place | {"zero": 3}, steps=[7, SOME], load=second),
        case("gpt2", "dp2", **place | {"zero": 2}, steps=[0, SOME]),
        case("gpt2", "one", **place, compile=True, steps=[0, SOME]),
        # The fp32 weights of a checkpoint are the master weights: fp32 goes on from them, too.
        case("llama-tied", "one", 0, "adamw", steps=[7, SOME], load=second),
    ]
    *parts, accumulated, compiled, in_fp32 = [found["loss"] for found in run_cases(cases, tmp_path)]
    expected = plain_loop("llama-tied", "adamw", SOME)["loss"]
    # bf16 keeps eight bits of a number.
    assert largest_difference([loss for part in parts for loss in part], expected) < 2e-3
    assert largest_difference(in_fp32, expected[7:]) < 2e-3
    for losses in (accumulated, compiled):
        assert largest_difference(losses, plain_loop("gpt2", "adamw", SOME)["loss"]) < 2e-3


@pytest.mark.slow
def test_checkpoints_fit_any_layout(tmp_path: Path) -> None:
    first, second = [0, 4], [4, 7]
    ways = [("2 x 2 x 2", 1, "dp2", 3, "dp2 x tp2", 0), ("dp2", 3, "pp2 x tp2", 1, "2 x 2 x 2", 1)]
    cases = []
    for index, (one, zero, two, zero_two, three, zero_three) in enumerate(ways):
        folders = [str(tmp_path / f"{index}-{part}") for part in range(2)]
        cases.append(case("llama-tied", one, zero, "adamw", steps=first, save=folders[0]))
        cases.append(case("llama-tied", two, zero_two, "adamw", steps=second, load=folders[0], save=folders[1]))
        cases.append(case("llama-tied", three, zero_three, "adamw", steps=[7, SOME], load=folders[1]))
    found = run_cases(cases, tmp_path)
    expected = plain_loop("llama-tied", "adamw", SOME)["loss"]
    for index in range(len(ways)):
        parts = found[3 * index : 3 * index + 3]
        assert largest_difference([loss for part in parts for loss in part["loss"]], expected) < TOLERANCE, ways[index]
        samples = [sample for part in parts for step in part["samples"] for sample in step]
        assert samples == list(range(SOME * BATCH)), ways[index]
