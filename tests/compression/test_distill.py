"""Students: what they are made of, what is refused, and that they learn more with a teacher than without."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from raylm.compression import measuring
from raylm.compression.methods import Steps
from raylm.compression.methods.base import Candidate
from raylm.compression.methods.distill import METHOD
from raylm.compression.stage import compress
from raylm.config import load_config
from raylm.config.compression import DistillSection
from raylm.config.loading import validate
from raylm.config.stages import CompressConfig
from raylm.errors import UserError
from raylm.models.heads import CAUSAL
from tests.conftest import make_tiny_model

TRAINING = {"steps": 2, "batch_size": 4, "sequence_length": 16}


def config(model: Path, **distill: object) -> CompressConfig:
    steps = [{"distill": {"training": TRAINING, **distill}}]
    values = {
        "run": {"name": "x"},
        "data": {"train": "a.txt"},
        "model": {"path": str(model)},
        "compression": {"steps": steps},
    }
    return validate(CompressConfig, values, "file.yaml")


def made(model: Path, output: Path, **student: object) -> tuple[torch.nn.Module, dict]:
    section = DistillSection(training=TRAINING, student=student)  # type: ignore[arg-type]
    told = METHOD.apply(section, Candidate(model, model, CAUSAL, None), output)  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_pretrained(output), told


def test_a_student_of_some_layers(tiny_model: Path, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model)
    student, told = made(tiny_model, tmp_path / "student", layers=1)
    assert told == {"layers": {"num_hidden_layers": [1]}}
    assert student.config.num_hidden_layers == 1
    kept, old = student.model.layers[0].state_dict(), teacher.model.layers[1].state_dict()
    assert all(torch.equal(kept[name], old[name]) for name in old)
    assert (tmp_path / "student" / "tokenizer.json").is_file()
    student, _ = made(tiny_model, tmp_path / "first", keep_layers=[0])
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)


def test_a_student_of_another_shape(tiny_model: Path, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model)
    student, told = made(tiny_model, tmp_path / "student", config={"intermediate_size": 64})
    assert told["drawn_weights"] == 2 * 3
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert student.model.layers[0].mlp.up_proj.weight.shape == (64, 64)


def other_tokenizer(model: Path, output: Path) -> Path:
    shutil.copytree(model, output)
    path = output / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(values))
    return output


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"student": {"layers": 3}}, "distill.student.layers: found 3, allowed: at most 2"),
        (
            {"student": {"keep_layers": [1, 0]}},
            "distill.student.keep_layers: found [1, 0], allowed: rising numbers from 0",
        ),
        ({"student": {"config": {"intermediate_size": 512}}}, "distill.student: found "),
        ({"student": {"config": {"depth": 3}}}, "distill.student.config: found 'depth', allowed: keys of a llama conf"),
        (
            {"student": {"config": {"hidden_size": 32}}, "distillation": {"hidden": 1.0}},
            "distill.distillation.hidden: found 1 with widths of 32 and 64",
        ),
        (
            {"distillation": {"hidden": 1.0, "layer_map": [0, 2]}},
            "distill.distillation.layer_map: found [0, 2], allowed: 2 numbers from 0 to 1",
        ),
        ({"distillation": {"teacher": "OTHER"}}, "distill.distillation.teacher: found "),
        ({"student": {"path": "OTHER"}}, "distill.student.path: found "),
    ],
)
def test_refused(tiny_model: Path, tmp_path: Path, section: dict, expected: str) -> None:
    other = other_tokenizer(tiny_model, tmp_path / "other")
    section = json.loads(json.dumps(section).replace("OTHER", str(other)))
    run = config(tiny_model, **section)
    with pytest.raises(UserError) as caught:
        Steps(run).check(LlamaConfig.from_pretrained(tiny_model), CAUSAL)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def write(directory: Path, model: Path, name: str, **distill: object) -> Path:
    text = directory / "text.txt"
    if not text.exists():
        # The same few sentences: there is something to learn in few steps.
        lines = [
            f"the {colour} fox jumps over the lazy dog {number}\n" for number in range(60) for colour in ("red", "old")
        ]
        text.write_text("".join(lines))
    training = {"steps": 12, "batch_size": 8, "sequence_length": 32, "learning_rate": 3e-3, "precision": "fp32",
                "schedule": "constant", "optimizer": "adamw", "weight_decay": 0.0}  # fmt: skip
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(text), "text_unit": "line", "validation_fraction": 0.2},
        "model": {"path": str(model)},
        "compression": {
            "prompts": 4, "prompt_tokens": 8, "new_tokens": 4,
            "steps": [{"distill": {"training": training, **distill}}, {"quantize": {"bits": 8}}],
        },
        "evaluation": {"sequence_length": 32},
        "resources": {"workers": 1},
    }  # fmt: skip
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_a_chain_killed_half_way_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    model = make_tiny_model(tmp_path / "model")
    path = write(tmp_path, model, "chain", student={"layers": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "raylm.cli", "compress", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    step, end = tmp_path / "chain" / "steps" / "01-distill", time.monotonic() + 240
    while not (step / "training" / "model").is_dir():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "chain" / "report.json").exists()
    stamp = (step / "made" / "model.safetensors").stat().st_mtime_ns
    compress(load_config("compress", path))
    assert (step / "made" / "model.safetensors").stat().st_mtime_ns == stamp
    report = json.loads((tmp_path / "chain" / "report.json").read_text())
    assert [one["method"] for one in report["steps"]] == ["distill", "quantize"]
    assert report["steps"][0]["training"]["step"] == 12
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["steps"][0]["figures"]["bits_per_byte"] == pytest.approx(report["after"]["bits_per_byte"], rel=0.01)
    assert "distillation into 1 layers" in (tmp_path / "chain" / "model" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "chain" / "model").config.num_hidden_layers == 1


@pytest.mark.slow
def test_training_with_rounded_weights_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    model = make_tiny_model(tmp_path / "model")
    path = write(tmp_path, model, "rounded")
    values = yaml.safe_load(path.read_text())
    training = values["compression"]["steps"][0]["distill"]["training"]
    prune = {"sparsity": 0.5, "importance": "weight", "recovery": {"training": training}}
    quantize = {"bits": 4, "group_size": 32, "recovery": {"training": training}}
    values["compression"]["steps"] = [{"prune": prune}, {"quantize": quantize}]
    path.write_text(yaml.safe_dump(values))
    compress(load_config("compress", path))
    run = tmp_path / "rounded"
    report = json.loads((run / "report.json").read_text())
    assert [one["method"] for one in report["steps"]] == ["prune", "quantize"]
    assert report["steps"][1]["way"] == "data_free" and report["steps"][1]["training"]["step"] == 12
    # Zeros of the first step stayed through its own training.
    pruned = AutoModelForCausalLM.from_pretrained(run / report["steps"][0]["model"])
    weight = pruned.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    # The model that training ended with, rounded, is what the export computes.
    assert report["after"]["bits_per_byte"] == pytest.approx(report["steps"][1]["figures"]["bits_per_byte"], rel=0.05)
