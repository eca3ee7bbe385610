"""The plan: autos become numbers, and what cannot be is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raylm.config import load_config
from raylm.config.stages import PretrainConfig
from raylm.errors import UserError
from raylm.parallel.plan import apply_layout, make_layout, make_plan


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    (tmp_path / "text.txt").write_text("text")
    values = {
        "run": {"name": "x", "storage": str(tmp_path)},
        "data": {"train": str(tmp_path / "text.txt")},
        "tokenizer": {"type": "bpe", "vocab_size": 300},
        "model": {"family": "gpt2", "config": {"n_embd": 32, "n_layer": 2, "n_head": 2}},
        "training": {"steps": 10, "batch_size": 12, "sequence_length": 64},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config("pretrain", path)


def changed(config: PretrainConfig, section: str, **values) -> PretrainConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_auto_takes_what_the_batch_divides_over(config: PretrainConfig) -> None:
    layout = make_layout(config, cpus=8, gpus=0)
    assert (layout.workers, layout.micro_batch_size, layout.accumulation) == (6, 2, 1)
    assert (layout.use_gpu, layout.precision) == (False, "fp32")
    on_gpu = make_layout(config, cpus=8, gpus=4)
    assert (on_gpu.workers, on_gpu.use_gpu, on_gpu.precision) == (4, True, "bf16")
    resolved = apply_layout(config, layout)
    assert (resolved.resources.workers, resolved.parallel.data, resolved.training.precision) == (6, 6, "fp32")


def test_micro_batches_are_accumulated(config: PretrainConfig) -> None:
    layout = make_layout(changed(config, "parallel", micro_batch_size=3), cpus=2, gpus=0)
    assert (layout.workers, layout.micro_batch_size, layout.accumulation) == (2, 3, 2)


def test_fractions_of_a_cpu_hold_more_workers(config: PretrainConfig) -> None:
    layout = make_layout(changed(config, "resources", cpus_per_worker=0.25), cpus=1, gpus=0)
    assert layout.workers == 4


def test_too_many_workers_are_refused(config: PretrainConfig) -> None:
    with pytest.raises(UserError, match=r"resources\.workers: found 3 .* at most 2, as the cluster has 2 CPUs"):
        make_layout(changed(config, "resources", workers=3), cpus=2, gpus=0)


def test_bf16_needs_master_weights(config: PretrainConfig) -> None:
    half = changed(changed(config, "training", precision="bf16"), "parallel", zero_stage=0)
    with pytest.raises(UserError, match=r"parallel\.zero_stage: found 0"):
        make_layout(half, cpus=1, gpus=0)


def test_plan_counts_parameters(config: PretrainConfig) -> None:
    plan = make_plan(config, cpus=2, gpus=0)
    embeddings = 300 * 32 + 64 * 32
    block = (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 4 * 32
    assert plan.parameters == embeddings + 2 * block + 2 * 32
    assert f"{plan.parameters:,}" in plan.describe()
    sharded = make_plan(changed(config, "parallel", zero_stage=3), cpus=2, gpus=0)
    assert sharded.memory_bytes()["weights"] == plan.memory_bytes()["weights"] / 2
