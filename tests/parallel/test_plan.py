"""The plan: autos become numbers, and what cannot be is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from raylm.config import load_config
from raylm.config.stages import PretrainConfig
from raylm.errors import UserError
from raylm.models.families import build_model
from raylm.objectives.base import ObjectiveModule
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
    assert sharded.memory_bytes()["optimizer"] == plan.memory_bytes()["optimizer"]
    assert plan.memory_bytes()["weights"] == 4 * plan.parameters
    whole = make_plan(changed(config, "parallel", zero_stage=0), cpus=2, gpus=0)
    assert whole.memory_bytes()["optimizer"] == 8 * plan.parameters
    # A ring of two sends what it adds up once.
    assert whole.traffic_bytes() == {"data": 4 * plan.parameters, "tensor": 0, "pipeline": 0}


def test_footprint_is_what_a_real_pass_keeps(config: PretrainConfig) -> None:
    plan = make_plan(config, cpus=2, gpus=0)
    model = build_model(plan.model_config, 0)
    tokens = torch.zeros((plan.layout.micro_batch_size, 64), dtype=torch.long)
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ObjectiveModule(model, plan.objective)(input_ids=tokens, targets=tokens)
    really = sum(storage.nbytes() for storage in saved.values())
    # Some live a little longer than the graph needs them.
    assert really <= plan.stages[0].footprint.kept <= 1.1 * really
    recomputed = make_plan(changed(config, "parallel", activation_checkpointing=True), cpus=2, gpus=0)
    assert recomputed.memory_bytes()["activations"] < plan.memory_bytes()["activations"] / 2


def test_cuts_share_out_memory_and_add_traffic(config: PretrainConfig) -> None:
    plan = make_plan(config, cpus=2, gpus=0)
    cut = {"tensor": 2, "pipeline": 1, "micro_batch_size": 3}
    tensor = make_plan(changed(config, "parallel", **cut), cpus=2, gpus=0)
    assert tensor.stages[0].parameters < 0.6 * plan.parameters
    assert tensor.traffic_bytes()["tensor"] > 0
    cut = {"tensor": 1, "pipeline": 2, "micro_batch_size": 3}
    pipeline = make_plan(changed(config, "parallel", **cut), cpus=2, gpus=0)
    assert pipeline.bubble == 1 / 5
    assert "bubble          20.0%" in pipeline.describe()
    assert "warning" not in pipeline.describe()
    few = make_plan(changed(config, "parallel", tensor=1, pipeline=2, micro_batch_size=12), cpus=2, gpus=0)
    assert "warning         1 micro-batches for 2 pipeline stages" in few.describe()
    assert [stage.in_flight for stage in pipeline.stages] == [2, 1]
    # Hidden states of three sequences to the second stage, their gradients back, four times.
    assert pipeline.traffic_bytes()["pipeline"] == 2 * 4 * (3 * 64 * 32 * 4)
