"""fp32 or bf16 on CPUs: the decision, the measurement, and that a run stays with what it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from raylm.cluster.capacity import Capacity, Node
from raylm.config import load_config
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import PretrainConfig
from raylm.errors import UserError
from raylm.parallel.plan.planning import make_plan
from raylm.parallel.plan.precision import LEAST_GAIN, NARROW, LayerTimes, decide, measure, settled, with_precision
from raylm.training.checkpoints.export import is_tolerated, tolerated
from raylm.training.precision import note_precision, run_precision, slower_in_bf16
from raylm.training.stage import pretrain

WIDE = 128


def times(node: str, gain: float) -> LayerTimes:
    return LayerTimes(node, 1024, WIDE, fp32=10.0, bf16=10.0 / gain)


def write_config(directory: Path, train: Path | str, **sections: dict) -> Path:
    values = {
        "run": {"name": "run", "storage": str(directory)},
        "data": {"train": str(train)},
        "model": {"family": "gpt2", "config": {"n_embd": WIDE, "n_layer": 1, "n_head": 2}},
        "training": {"steps": 4, "batch_size": 2, "sequence_length": 32, "log_every_steps": 1},
        "resources": {"workers": 1},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    (tmp_path / "text.txt").write_text("text")
    return load_config(
        "pretrain",
        write_config(tmp_path, tmp_path / "text.txt", tokenizer={"type": "bpe", "vocab_size": 300}),
    )


def test_the_slowest_worker_decides() -> None:
    assert decide([times("a", 2.0)]).name == "bf16"
    assert decide([times("a", LEAST_GAIN - 0.01)]).name == "fp32"
    # One worker without the instructions holds up all others.
    mixed = decide([times("a", 3.0), times("b", 0.01), times("c", 3.0)])
    assert mixed.name == "fp32"
    assert "on b, the least of 3 nodes" in mixed.reason
    assert decide([times("a", 3.0), times("b", 1.5)]).name == "bf16"
    assert len(mixed.record()["layer_milliseconds"]) == 3


def test_what_needs_no_measurement(config: PretrainConfig) -> None:
    def found(width: int = WIDE, *, use_gpu: bool = False, zero_stage: object = 1, precision: str = "auto"):
        changed = config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update={"zero_stage": zero_stage}),
                "training": config.training.model_copy(update={"precision": precision}),
            }
        )
        decided = settled(changed, width, use_gpu=use_gpu)
        return decided and decided.name

    assert found() is None
    assert found(zero_stage="auto") is None
    assert found(zero_stage=0) == "fp32"
    assert found(zero_stage=0, precision="bf16") == "bf16"
    assert found(width=NARROW) == "fp32"
    assert found(use_gpu=True) == "auto"
    assert found(precision="fp32") == "fp32"


def test_a_layer_is_measured() -> None:
    for tokens in (16, 256):
        measured = measure(WIDE, tokens, threads=1)
        assert (measured.width, measured.rows <= tokens) == (WIDE, True)
        assert 0 < measured.fp32 < 60_000
        assert 0 < measured.bf16 < 60_000


def test_the_plan_shows_why(config: PretrainConfig) -> None:
    plan = make_plan(config)
    assert plan.layout.precision in ("fp32", "bf16")
    assert "ms in fp32" in plan.describe()
    assert plan.layout.zero_stage == 1
    replicated = make_plan(config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": 0})}))
    assert (replicated.layout.precision, replicated.layout.zero_stage) == ("fp32", 0)
    assert "parallel.zero_stage is 0" in replicated.describe()


def test_a_run_stays_with_what_it_began_with(config: PretrainConfig) -> None:
    run, here = RunDirectory("pretrain", config), Capacity((Node(2.0),))
    wide = type("Wide", (), {"hidden_size": WIDE})()
    for gain in (3.0, 0.5):
        began = decide([times("a", gain)])
        run.create(with_precision(config, began))
        note_precision(run, began)
        run.check()
        assert run_precision(run, config, wide, here) == began
    # Without the figures, what config.yaml says counts.
    (run.path / "precision.json").unlink()
    assert run_precision(run, config, wide, here).name == "fp32"
    other = config.model_copy(update={"training": config.training.model_copy(update={"precision": "bf16"})})
    with pytest.raises(UserError, match=r"training\.precision \(was 'fp32', now 'bf16'\)"):
        RunDirectory("pretrain", other).check()
    # A raylm that did not measure yet wrote down auto, and computed in fp32.
    run.create(config)
    run.check()
    assert run_precision(run, config, wide, here).name == "fp32"


@pytest.mark.slow
def test_a_real_run_keeps_its_precision_and_figures(ray_instance, prepared: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, prepared)
    config = load_config("pretrain", path, ["training.precision=bf16"])
    pretrain(config)
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    assert (report["step"], report["precision"]["precision"]) == (4, "bf16")
    assert report["logits_difference"] < 0.1
    # auto goes on in bf16, whatever this CPU favours.
    pretrain(load_config("pretrain", path, ["training.steps=6"]))
    report = json.loads((run / "report.json").read_text())
    assert (report["step"], report["precision"]["precision"]) == (6, "bf16")
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["precision"] == "bf16"
    capacity, wide = Capacity((Node(4.0),)), type("Wide", (), {"hidden_size": WIDE})()
    gain = measure(WIDE, 64, threads=1).gain
    warning = slower_in_bf16(config, wide, capacity)
    assert (not warning) or (gain < 2 and "times as long as fp32" in warning)


def test_larger_logits_may_differ_more_in_bf16() -> None:
    """A text generator of 99 million parameters had logits up to 30, and 0.72 between two ways to compute them."""
    logits = torch.zeros(2, 3)
    assert [tolerated(logits, dtype) for dtype in (torch.float32, torch.bfloat16)] == [1e-3, 0.5]
    logits[1, 2] = -30.0
    assert tolerated(logits, torch.bfloat16) == pytest.approx(1.8)
    assert tolerated(logits, torch.float32) == pytest.approx(3e-3)


def test_noise_of_bf16_is_tolerated_by_its_mean_square() -> None:
    """Errors of a tenth of the spread have a largest one that is beyond the bound of a single logit."""
    generator = torch.Generator().manual_seed(0)
    expected = 3 * torch.randn(64, 5000, generator=generator)
    noise = torch.randn(64, 5000, generator=generator)
    noisy = expected + 0.3 * noise
    assert (noisy - expected).abs().max() > tolerated(expected, torch.bfloat16)
    assert is_tolerated(noisy, expected, torch.bfloat16)
    assert not is_tolerated(noisy, expected, torch.float32)
    assert not is_tolerated(expected + noise, expected, torch.bfloat16)
    assert not is_tolerated(expected.where(expected < 9, torch.nan), expected, torch.bfloat16)
