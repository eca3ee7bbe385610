"""The plan: autos become numbers, and what cannot be is refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, GPT2Config, PretrainedConfig, RobertaConfig, T5Config

from raylm.cluster.capacity import PROCESS_BYTES, Capacity, Node
from raylm.config import load_config
from raylm.config.distillation import DistillationSection
from raylm.config.model import ObjectiveSection
from raylm.config.stages import PretrainConfig
from raylm.config.training import ParallelSection
from raylm.errors import UserError
from raylm.models.families.build import build_model, parameter_count
from raylm.parallel.plan.layout import Layout
from raylm.parallel.plan.memory import ModelMemory
from raylm.parallel.plan.planning import Plan, apply_layout, make_plan, plan_training, recorded
from raylm.parallel.plan.refusals import check_splits
from raylm.tasks import find_task, make_objective
from raylm.tasks.objective import ObjectiveModule


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


def changed(config: PretrainConfig, section: str, /, **values) -> PretrainConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def capacity(cpus: float, gpus: float = 0.0, memory: float | None = None) -> Capacity:
    """One node."""
    return Capacity((Node(cpus, gpus, memory, memory),))


def planned(config: PretrainConfig, cpus: float, gpus: float = 0.0, memory: float | None = None) -> Plan:
    return plan_training(config, capacity(cpus, gpus, memory))


def test_auto_takes_what_the_batch_divides_over(config: PretrainConfig) -> None:
    layout = planned(config, 8).layout
    assert (layout.workers, layout.micro_batch_size, layout.accumulation) == (6, 2, 1)
    assert (layout.use_gpu, layout.precision, layout.activation_checkpointing) == (False, "fp32", False)
    on_gpu = planned(config, 8, 4).layout
    assert (on_gpu.workers, on_gpu.use_gpu, on_gpu.precision) == (4, True, "bf16")
    resolved = apply_layout(config, layout)
    assert (resolved.resources.workers, resolved.parallel.data, resolved.training.precision) == (6, 6, "fp32")
    assert resolved.parallel.activation_checkpointing is False
    # What is written down can be started again, on a cluster of another kind too.
    written = recorded(config, layout)
    assert (written.parallel, written.training) == (resolved.parallel, resolved.training)
    assert type(config).model_validate(written.model_dump()) == written


def test_micro_batches_are_accumulated(config: PretrainConfig) -> None:
    layout = planned(changed(config, "parallel", micro_batch_size=3), 2).layout
    assert (layout.workers, layout.micro_batch_size, layout.accumulation) == (2, 3, 2)
    with pytest.raises(UserError, match=r"parallel\.micro_batch_size: found 4, allowed: a divisor of .* batch \(6\)"):
        planned(changed(config, "parallel", micro_batch_size=4), 2)


def test_the_search_keeps_to_the_rules_of_the_file(config: PretrainConfig) -> None:
    """What a file may not say with tensor and pipeline in numbers is not found for auto either."""
    searched = changed(config, "parallel", tensor="auto", pipeline="auto", zero_stage=2)
    assert {(c.layout.tensor, c.layout.pipeline) for c in planned(searched, 4).candidates} == {(1, 1)}
    searched = changed(config, "parallel", tensor="auto", pipeline="auto", micro_batch_size=4)
    assert all(c.layout.data * c.layout.accumulation * 4 == 12 for c in planned(searched, 4).candidates)
    with pytest.raises(UserError, match=r"training\.batch_size: found 12, allowed: a multiple"):
        planned(changed(searched, "parallel", micro_batch_size=5), 4)
    both = changed(changed(config, "parallel", zero_stage=3), "training", compile=True)
    with pytest.raises(UserError, match=r"training\.compile: found true, allowed with parallel\.zero_stage 0, 1 and 2"):
        planned(both, 2)


def test_fractions_of_a_cpu_hold_more_workers(config: PretrainConfig) -> None:
    assert planned(changed(config, "resources", cpus_per_worker=0.25), 1).layout.workers == 4


def test_too_many_workers_are_refused(config: PretrainConfig) -> None:
    with pytest.raises(UserError, match=r"found 3 .* at most 2, as the cluster has or can get 2 CPUs"):
        planned(changed(config, "resources", workers=3), 2)
    with pytest.raises(
        UserError, match=r"found 4 with 1 GPU and 1 CPUs each, allowed: at most 2, .* 8 CPUs and 2 GPUs"
    ):
        planned(changed(config, "resources", workers=4, gpus_per_worker=1), 8, 2)


def test_bf16_needs_master_weights(config: PretrainConfig) -> None:
    half = changed(changed(config, "training", precision="bf16"), "parallel", zero_stage=0)
    with pytest.raises(UserError, match=r"parallel\.zero_stage: found 0"):
        planned(half, 1)


def test_auto_takes_the_simplest_layout_that_fits(config: PretrainConfig) -> None:
    values = {"n_embd": 256, "n_layer": 4, "n_head": 2}
    big = changed(config, "model", config=values)
    free = {"tensor": "auto", "pipeline": "auto", "zero_stage": "auto", "micro_batch_size": "auto"}
    free = changed(changed(big, "parallel", **free), "training", batch_size=64)
    at_ease = planned(free, 4)
    assert at_ease.layout == Layout(4, 1, 1, 0, 16, 1, False, False, "adamw")
    needed = sum(at_ease.memory_bytes().values())

    def within(share: float, **values: object) -> Plan:
        # Four workers on the node, each with its libraries.
        memory = 4 * (share * needed + PROCESS_BYTES[False])
        return planned(changed(free, "parallel", **values) if values else free, 4, memory=memory)

    tight = within(0.6)
    assert sum(tight.memory_bytes().values()) <= 0.6 * needed
    assert tight.layout != at_ease.layout
    assert not tight.warning
    # With ZeRO 0 and one replica as given, only smaller micro-batches and recomputation are left to it.
    least = within(0.75, tensor=1, pipeline=1, zero_stage=0)
    assert (least.layout.data, least.layout.zero_stage) == (4, 0)
    assert least.layout.micro_batch_size < 16 or least.layout.activation_checkpointing
    nothing = within(0.01)
    assert "the estimated memory does not fit" in nothing.warning
    assert "none fits" in nothing.describe()
    described = tight.describe()
    assert "chosen          the simplest within a tenth of the least estimated time" in described
    # What speaks against each of the others is said.
    assert all(other.reason for other in tight.candidates[1:])
    assert all("needs" in other.reason for other in nothing.candidates)


def test_what_cannot_be_cut_is_refused() -> None:
    def refused(config: PretrainedConfig, objective: str, **parallel: int) -> str:
        with pytest.raises(UserError) as caught:
            check_splits(config, ParallelSection(**parallel), find_task(objective).objective())
        return str(caught.value)

    assert refused(RobertaConfig(), "masked", pipeline=2).startswith(
        "parallel.pipeline: found 2, allowed for roberta: 1; tensor and pipeline parallelism are for bert, gpt2, "
        "llama, t5"
    )
    assert refused(BertConfig(), "extractive_qa", tensor=2).startswith("parallel.tensor: found 2, allowed with obj")
    assert "a divisor of the model's d_ff (9)" in refused(T5Config(num_heads=8, d_ff=9), "span", tensor=2)
    assert "at most the model's 4 blocks" in refused(T5Config(num_layers=2), "span", pipeline=5)
    masked = find_task("masked").objective()
    check_splits(RobertaConfig(), ParallelSection(tensor="auto", pipeline="auto"), masked)


def test_auto_follows_what_a_model_allows(config: PretrainConfig) -> None:
    free = changed(config, "parallel", tensor="auto", pipeline="auto")
    shapes = {(candidate.layout.tensor, candidate.layout.pipeline) for candidate in planned(free, 4).candidates}
    # Two heads, two blocks.
    assert shapes == {(1, 1), (2, 1), (1, 2), (2, 2)}
    muon = planned(changed(free, "training", optimizer="muon"), 4)
    assert {(candidate.layout.tensor, candidate.layout.pipeline) for candidate in muon.candidates} == {(1, 1)}
    # Tensor parallelism stays within a node.
    nodes = Capacity((Node(1.0), Node(1.0)))
    assert {candidate.layout.tensor for candidate in plan_training(free, nodes).candidates} == {1}


def test_seven_billion_parameters_on_gpus(config: PretrainConfig) -> None:
    gpus = 64
    shape = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }  # fmt: skip
    big = changed(config, "model", family="llama", config=shape)
    big = changed(big, "training", batch_size=512, sequence_length=4096)
    big = changed(big, "parallel", tensor="auto", pipeline="auto", zero_stage="auto")
    big = changed(big, "resources", workers=gpus, gpus_per_worker=1, workers_per_node=8, memory_per_worker_gb=80.0)
    plan = make_plan(big)
    assert plan.layout.workers == gpus
    assert plan.layout.precision == "bf16"
    assert sum(plan.memory_bytes().values()) < 80e9
    assert not plan.warning
    assert plan.layout.tensor <= 8
    # Too small a GPU for whole weights and gradients needs a cut.
    small = make_plan(
        changed(big, "resources", workers=gpus, gpus_per_worker=1, workers_per_node=8, memory_per_worker_gb=24.0)
    )
    assert sum(small.memory_bytes().values()) < 24e9
    assert small.layout.tensor * small.layout.pipeline > 1 or small.layout.zero_stage >= 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_steps_put_together_make_the_whole_model(config: PretrainConfig, family: str) -> None:
    shapes = {
        "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 2},
        "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
        "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2},
    }
    values = config.model_dump() | {"model": {"family": family, "config": shapes[family]}}
    values |= {"objective": {}, "tokenizer": {"type": "bpe", "vocab_size": 400}}
    plan = planned(type(config).model_validate(values), 1)
    whole = plan.memory._measure_whole(False)
    (composed,) = plan.memory.stages(replace(plan.layout, micro_batch_size=1))
    assert composed.parameters == whole.parameters == plan.parameters
    assert composed.footprint.kept == pytest.approx(whole.footprint.kept, rel=0.08)
    sums = [sum(stage.footprint.without_gradients.values()) for stage in (composed, whole)]
    # The engine of cut models adds BERT's bias to the logits in a step of its own.
    assert 0.97 * sums[1] <= sums[0] <= 1.2 * sums[1]


def test_plan_counts_parameters(config: PretrainConfig) -> None:
    plan = planned(config, 2)
    embeddings = 300 * 32 + 64 * 32
    block = (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 4 * 32
    assert plan.parameters == embeddings + 2 * block + 2 * 32
    assert f"{plan.parameters:,}" in plan.describe()
    sharded = planned(changed(config, "parallel", zero_stage=3), 2)
    assert sharded.memory_bytes()["optimizer"] == plan.memory_bytes()["optimizer"]
    assert plan.memory_bytes()["weights"] == 4 * plan.parameters
    whole = planned(changed(config, "parallel", zero_stage=0), 2)
    assert whole.memory_bytes()["optimizer"] == 8 * plan.parameters
    # A ring of two sends what it adds up once.
    assert whole.traffic_bytes() == {"data": 4 * plan.parameters, "tensor": 0, "pipeline": 0}


@pytest.mark.parametrize("objective", ["extractive_qa", "classification", "tagging"])
def test_encoders_with_another_head_are_measured(objective: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for config in (BertConfig(vocab_size=99, **shape), RobertaConfig(vocab_size=99, **shape)):
        made = make_objective(ObjectiveSection(type=objective), config.model_type)
        memory = ModelMemory(config, made, 16, bf16=False)
        (stage,) = memory.stages(Layout(1, 1, 1, 0, 4, 1, False, False, "adamw"))
        (recomputed,) = memory.stages(Layout(1, 1, 1, 0, 4, 1, True, False, "adamw"))
        assert stage.footprint.kept > recomputed.footprint.kept > 0


def test_footprint_is_what_a_real_pass_keeps(config: PretrainConfig) -> None:
    plan = planned(config, 2)
    model = build_model(plan.model_config, 0)
    tokens = torch.zeros((plan.layout.micro_batch_size, 64), dtype=torch.long)
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # The head's gradient is one already.
        if storage.data_ptr() not in known and tensor.shape != model.get_output_embeddings().weight.shape:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ObjectiveModule(model, plan.objective)(input_ids=tokens, targets=tokens)
    really = sum(storage.nbytes() for storage in saved.values())
    # Some live a little longer than the graph needs them.
    assert really <= plan.stages[0].footprint.kept <= 1.15 * really
    recomputed = planned(changed(config, "parallel", activation_checkpointing=True), 2)
    assert recomputed.memory_bytes()["activations"] < 0.7 * plan.memory_bytes()["activations"]


def test_cuts_share_out_memory_and_add_traffic(config: PretrainConfig) -> None:
    plan = planned(config, 2)
    cut = {"tensor": 2, "pipeline": 1, "micro_batch_size": 3}
    tensor = planned(changed(config, "parallel", **cut), 2)
    assert tensor.stages[0].parameters < 0.6 * plan.parameters
    assert tensor.traffic_bytes()["tensor"] > 0
    cut = {"tensor": 1, "pipeline": 2, "micro_batch_size": 3}
    pipeline = planned(changed(config, "parallel", **cut), 2)
    assert pipeline.bubble == 1 / 5
    assert "bubble          20.0%" in pipeline.describe()
    assert "warning" not in pipeline.describe()
    few = planned(changed(config, "parallel", tensor=1, pipeline=2, micro_batch_size=12), 2)
    assert "warning         1 micro-batches for 2 pipeline stages" in few.describe()
    assert [stage.in_flight for stage in pipeline.stages] == [2, 1]
    # Hidden states of three sequences to the second stage, their gradients back, four times.
    assert pipeline.traffic_bytes()["pipeline"] == 2 * 4 * (3 * 64 * 32 * 4)


def test_a_teacher_takes_memory_and_time_on_each_worker(config: PretrainConfig, tmp_path: Path) -> None:
    teacher = GPT2Config(vocab_size=300, n_embd=64, n_layer=4, n_head=4)
    teacher.save_pretrained(tmp_path / "teacher")
    given = config.model_copy(update={"distillation": DistillationSection(teacher=str(tmp_path / "teacher"))})
    alone, beside = planned(config, 2), planned(given, 2)
    assert "teacher" not in alone.memory_bytes()
    layout, count = beside.layout, parameter_count(teacher, beside.objective.head)
    logits = layout.micro_batch_size * 64 * 300
    assert beside.memory_bytes()["teacher"] == 4 * (count + 2 * logits)
    assert beside.candidates[0].seconds > 1.5 * alone.candidates[0].seconds
    assert "teacher" in beside.describe()
