"""The engine against a plain PyTorch loop: same losses and gradient norms at every ZeRO stage, any number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from parity_process import STEPS, build, step_data, training_section

from raylm.training.optimizers import is_hidden_matrix

SCRIPT = Path(__file__).parent / "parity_process.py"
TOLERANCE = 1e-5


def run_processes(count: int, output: Path, cases: list[str]) -> dict[str, dict[str, list[float]]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    result = subprocess.run([*command, str(SCRIPT), str(output), *cases], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(output.read_text())


def plain_loop(optimizer_name: str, family: str = "llama") -> dict[str, list[float]]:
    """One process, plain PyTorch: no Ray, no DeepSpeed, no code of raylm's engine or optimizers."""
    section = training_section(optimizer_name)
    model = build(family)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if optimizer_name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=tuple(section.betas), eps=section.epsilon)
    else:
        optimizer = torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum)
    losses, norms = [], []
    for step in range(STEPS):
        data = step_data(step, family)
        if family.endswith("-documents"):
            # Each document alone, as the model would see it without packing.
            total = 0.0
            for ids, targets, positions in zip(*data_of(data), strict=True):
                for piece in torch.tensor_split(torch.arange(len(ids)), (positions[1:] == 0).nonzero()[:, 0] + 1):
                    logits = model(input_ids=ids[piece][None]).logits[0]
                    total = total + functional.cross_entropy(logits, targets[piece], reduction="sum")
            loss = total / data["targets"].numel()
        elif family == "llama":
            logits = model(input_ids=data["input_ids"]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), data["targets"].flatten(), ignore_index=-100)
        else:  # transformers' own loss, and its own shift of the targets
            loss = model(input_ids=data["input_ids"], labels=data["targets"]).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), section.gradient_clipping or 1e9)))
        optimizer.step()
        losses.append(loss.item())
    return {"loss": losses, "gradient_norm": norms}


def data_of(data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return data["input_ids"], data["targets"], data["position_ids"]


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_parity_with_plain_loop(count: int, tmp_path: Path) -> None:
    families = ("llama", "bert", "t5")
    cases = [f"{optimizer}:{stage}:{f}" for f in families for optimizer in ("adamw", "sgd") for stage in range(4)]
    # Documents this short make SGD at its rate jump, and a jump enlarges rounding differences a thousand times.
    packed = ("llama-documents", "gpt2-documents")
    cases += [f"adamw:{stage}:{family}" for family in packed for stage in (0, 3)]
    results = run_processes(count, tmp_path / "losses.json", cases)
    for family in (*families, *packed):
        for optimizer in ("adamw", "sgd") if family in families else ("adamw",):
            expected = plain_loop(optimizer, family)
            assert expected["loss"][-1] < expected["loss"][0]
            for stage in range(4) if family in families else (0, 3):
                found = results[f"{optimizer}:{stage}:{family}"]
                assert largest_difference(found["loss"], expected["loss"]) < TOLERANCE, (family, optimizer, stage)
                # Norms are some hundred times larger than the differences in loss.
                norms = largest_difference(found["gradient_norm"], expected["gradient_norm"])
                assert norms < 10 * TOLERANCE, (family, optimizer, stage)


@pytest.mark.slow
def test_muon_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    cases = [f"muon:{stage}{family}" for family in ("", ":gpt2") for stage in range(4)]
    results = {count: run_processes(count, tmp_path / f"{count}.json", cases) for count in (1, 2)}
    for family in ("", ":gpt2"):
        expected = results[1][f"muon:0{family}"]["loss"]
        assert expected[-1] < expected[0]
        for count, found in results.items():
            for stage in range(4):
                # Five rounds of a steep polynomial enlarge rounding differences.
                difference = largest_difference(found[f"muon:{stage}{family}"]["loss"], expected)
                assert difference < 1e-3, (count, stage, family)


@pytest.mark.slow
def test_checkpoints_fit_any_stage_and_any_number_of_workers(tmp_path: Path) -> None:
    stores = {stage: tmp_path / f"zero{stage}" for stage in range(4)}
    saved = run_processes(2, tmp_path / "saved.json", [f"adamw:{s}:save={d}" for s, d in stores.items()])
    loads = [f"adamw:{target}:load={stores[source]}" for source in range(4) for target in range(4)]
    for count in (1, 2):
        loaded = run_processes(count, tmp_path / f"loaded{count}.json", loads)
        for case, found in loaded.items():
            whole = saved[f"adamw:0:save={stores[0]}"]["loss"][STEPS // 2 :]
            assert largest_difference(found["loss"], whole) < TOLERANCE, (count, case)
    muon = run_processes(2, tmp_path / "muon.json", [f"muon:2:save={tmp_path / 'muon'}"])
    moved = run_processes(1, tmp_path / "moved.json", [f"muon:{s}:load={tmp_path / 'muon'}" for s in (0, 3)])
    for target, found in moved.items():
        assert largest_difference(found["loss"], next(iter(muon.values()))["loss"][STEPS // 2 :]) < 1e-3, target
    same = json.loads((tmp_path / "loaded2.json").read_text())
    for stage, store in stores.items():
        # The same layout repeats the bits.
        whole = saved[f"adamw:{stage}:save={store}"]["loss"][STEPS // 2 :]
        assert same[f"adamw:{stage}:load={store}"]["loss"] == whole, stage


def test_muon_takes_hidden_matrices_only() -> None:
    chosen = {name for name, p in build("gpt2").named_parameters() if is_hidden_matrix(name, p)}
    assert "transformer.h.0.attn.c_attn.weight" in chosen
    assert not any(part in name for name in chosen for part in ("wte", "wpe", "bias", "ln_"))
