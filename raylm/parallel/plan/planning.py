"""The plan of a training run: who does what, how much memory it takes, and what is refused.

In: a training configuration and what the cluster has. Out: the configuration with every ``auto`` as a number, and a
description for ``raylm plan``. How ``auto`` is decided stands in :mod:`raylm.parallel.plan.search`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raylm.cluster.capacity import Capacity, planned_cluster, this_machine
from raylm.cluster.hardware import CPU, GPUS, Figures, gpu_figures, gpu_kind
from raylm.config.data import BYTE_ALPHABET
from raylm.config.families import is_counted
from raylm.config.layout import bf16_refusal, compiled_refusal, micro_batch_refusal
from raylm.config.stages import TrainConfig
from raylm.data.loading import load_tokenizer
from raylm.data.sources.segments import open_sources
from raylm.errors import UserError
from raylm.models.families.build import (
    build_config,
    check_dropout,
    check_positions,
    parameter_count,
    with_dropout,
)
from raylm.models.loading import load_config
from raylm.models.trained import packed_weights, trained_share
from raylm.parallel.plan.description import describe
from raylm.parallel.plan.layout import Layout
from raylm.parallel.plan.measured import Measured, read_measured
from raylm.parallel.plan.precision import decide, measure, settled, width_of, with_precision
from raylm.parallel.plan.refusals import check_splits
from raylm.tasks import make_objective

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.parallel.plan.memory import ModelMemory, StageMemory
    from raylm.parallel.plan.search import Candidate, Space
    from raylm.tasks.objective import Objective


def apply_layout(config: TrainConfig, layout: Layout) -> TrainConfig:
    """A copy of ``config`` in which the layout's numbers stand in place of ``auto``."""
    names = ("data", "tensor", "pipeline", "zero_stage", "micro_batch_size", "activation_checkpointing")
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={name: getattr(layout, name) for name in names}),
            "training": config.training.model_copy(update={"precision": layout.precision}),
            "resources": config.resources.model_copy(update={"workers": layout.workers}),
        }
    )


def recorded(config: TrainConfig, layout: Layout) -> TrainConfig:
    """What a run's ``config.yaml`` holds: layout and precision in numbers, but for what must follow the cluster."""
    resolved = apply_layout(config, layout)
    update = {}
    if config.resources.elastic is not None:
        update["resources"] = config.resources
        update["parallel"] = resolved.parallel.model_copy(update={"data": config.parallel.data})
    return resolved.model_copy(update=update)


@dataclass(frozen=True)
class Plan:
    """What ``raylm plan`` shows, and what a run is started by.

    Attributes:
        candidates: the layouts that were weighed, the taken one first; at least that one.
        precision_reason: why training computes in what it does; empty where the plan itself decided.
    """

    space: Space
    memory: ModelMemory
    objective: Objective
    candidates: list[Candidate]
    precision_reason: str = ""

    @property
    def config(self) -> TrainConfig:
        """The file's."""
        return self.space.config

    @property
    def model_config(self) -> PretrainedConfig:
        """Of the model."""
        return self.space.model_config

    @property
    def parameters(self) -> int:
        """Of the model, tied weights once."""
        return self.space.parameters

    @property
    def layout(self) -> Layout:
        """The taken one."""
        return self.candidates[0].layout

    @cached_property
    def stages(self) -> list[StageMemory]:
        """Parameters and activations of each pipeline stage."""
        return self.memory.stages(self.layout)

    def memory_bytes(self) -> dict[str, float]:
        """Estimated bytes on the fullest rank, by kind."""
        return self.candidates[0].bytes

    def traffic_bytes(self) -> dict[str, float]:
        """Bytes that the busiest rank sends in a step, by the kind of parallelism."""
        from raylm.parallel.plan.memory import traffic_bytes

        ranks = [traffic_bytes(stage, self.layout) for stage in self.stages]
        return max(ranks, key=lambda kinds: sum(kinds.values()))

    @property
    def bubble(self) -> float:
        """Share of a step in which a pipeline stage waits."""
        return self.candidates[0].bubble

    @property
    def tokens_per_second(self) -> float:
        """Of all workers, estimated; 0 where not even the weights fit."""
        training = self.config.training
        return training.batch_size * training.sequence_length / self.candidates[0].seconds

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation of the data sheet's peak, estimated; None where that is not known."""
        from raylm.parallel.plan.timing import model_flops

        taken, peak = self.candidates[0], self.space.figures.peak_flops
        if peak is None or taken.time is None:
            return None
        plain = self.memory.stages(replace(self.layout, activation_checkpointing=False))
        return model_flops(plain, self.layout) / (peak * self.layout.workers * taken.seconds)

    @property
    def warning(self) -> str:
        """What may go wrong with the layout; empty where nothing is known to."""
        taken = self.candidates[0]
        if taken.reason:
            return f"the estimated memory does not fit: the layout {taken.reason}"
        return self.layout.warning

    def describe(self) -> str:
        """The plan as lines of text."""
        return describe(self)


def plan_training(
    config: TrainConfig,
    capacity: Capacity,
    model: TrainedModel | None = None,
    figures: Figures | None = None,
    measured: Measured | None = None,
) -> Plan:
    """The plan of a run on a cluster of ``capacity``; starts nothing.

    Args:
        model: what :func:`check_model` gave for ``config``, where that is known.
        figures: of a worker's hardware; by default of the slowest GPU (an H100 where none is known), or of a core.
        measured: figures in place of those; by default those of ``resources.measured``.

    Raises:
        UserError: what is refused, with the reason.
    """
    from raylm.parallel.plan.memory import ModelMemory
    from raylm.parallel.plan.search import Space, candidates
    from raylm.parallel.plan.teacher import plan_teacher

    model_config, objective = model or check_model(config)
    resources, training, parallel = config.resources, config.training, config.parallel
    use_gpu, places = capacity.uses_gpus(resources), capacity.places(resources)
    least, bf16 = _least_workers(config, capacity), _computes_in_bf16(config, use_gpu)
    space = Space(
        config=config,
        model_config=model_config,
        objective=objective,
        places=least if isinstance(resources.workers, int) else places,
        per_node=capacity.places_per_node(resources),
        limit=capacity.memory_per_worker(resources),
        use_gpu=use_gpu,
        bf16=bf16,
        parameters=parameter_count(model_config, objective.head),
        figures=_with_measured(figures or _usual_figures(config, capacity), config, measured),
        teacher=plan_teacher(config, objective, bf16=bf16),
        trained=trained_share(config, model_config, objective.head),
        packed=packed_weights(config, model_config, objective.head),
    )
    settled = "auto" not in (parallel.tensor, parallel.pipeline)
    for replicas in space.replicas(parallel.model_parallel) if settled else []:
        share = -(-training.batch_size // replicas)
        refusal = micro_batch_refusal(parallel.micro_batch_size, share)
        if refusal and resources.elastic is None:
            raise UserError(refusal)
    memory = ModelMemory(model_config, objective, training.sequence_length, bf16=space.bf16)
    found = candidates(space, memory)
    if not found:
        raise UserError(
            f"training.batch_size: found {training.batch_size}, allowed: a multiple of data-parallel workers x "
            f"parallel.micro_batch_size, with at most {space.places} workers in all"
        )
    return Plan(space, memory, objective, found)


def _least_workers(config: TrainConfig, capacity: Capacity) -> int:
    """How many workers the file wants at least.

    Raises:
        UserError: the cluster does not hold them.
    """
    resources, parallel = config.resources, config.parallel
    replicas = 1 if parallel.data == "auto" else parallel.data
    least = parallel.model_parallel * replicas if resources.workers == "auto" else resources.workers
    if least > (places := capacity.places(resources)):
        unit = "1 GPU and " if capacity.uses_gpus(resources) else ""
        raise UserError(
            f"resources.workers: found {least} with {unit}{resources.cpus_per_worker:g} CPUs each, allowed: at most "
            f"{places}, as the cluster has or can get {capacity.cpus:g} CPUs and {capacity.gpus:g} GPUs"
        )
    return least


def _usual_figures(config: TrainConfig, capacity: Capacity) -> Figures:
    """Of the GPU that all others wait for, or of a core."""
    if not capacity.uses_gpus(config.resources):
        return CPU
    kinds = [node.kind for node in capacity.nodes if node.gpus and node.kind and GPUS[node.kind].peak]
    slowest = min(kinds, key=lambda kind: GPUS[kind].peak or 0.0, default="H100")
    return gpu_figures(slowest, capacity.places_per_node(config.resources))


def _with_measured(figures: Figures, config: TrainConfig, measured: Measured | None) -> Figures:
    """``figures`` with measured ones in their place, where there are any."""
    if measured is None and config.resources.measured is not None:
        measured = read_measured(Path(config.resources.measured).expanduser(), "resources.measured")
    return figures if measured is None else figures.measured(*measured)


def _computes_in_bf16(config: TrainConfig, use_gpu: bool) -> bool:
    """Whether training computes in bf16.

    Raises:
        UserError: precision, or compilation, does not go with the ZeRO stage.
    """
    training, zero_stage = config.training, config.parallel.zero_stage
    precision = training.precision if training.precision != "auto" else ("bf16" if use_gpu else "fp32")
    if precision == "bf16" and (refusal := bf16_refusal(zero_stage)):
        if training.precision == "bf16":
            raise UserError(refusal)
        precision = "fp32"
    if training.compile and (refusal := compiled_refusal(zero_stage)):
        raise UserError(refusal)
    return precision == "bf16"


def make_plan(
    config: TrainConfig,
    capacity: Capacity | None = None,
    figures: Figures | None = None,
    model: TrainedModel | None = None,
    measured: Measured | None = None,
) -> Plan:
    """The plan for this machine, or for the cluster that ``resources`` describes; starts nothing.

    Where ``training.precision`` is auto, CPUs are taken to be as this one, which is measured.

    Args:
        capacity: of another cluster.
        figures: of its workers' hardware; by default those of this machine's GPU.
        model: what :func:`check_model` gave for ``config``, where that is known.
        measured: figures in place of those; by default those of ``resources.measured``.

    Raises:
        UserError: what is refused, with the reason.
    """
    refuse_counted_plan(config)
    if capacity is None:
        capacity, here = _this_cluster(config)
        figures = figures or here
    model = model or check_model(config)
    width = width_of(model.config)
    precision = settled(config, width, use_gpu=capacity.uses_gpus(config.resources))
    if precision is None:
        tokens = config.training.batch_size * config.training.sequence_length
        precision = decide([measure(width, tokens, max(1, int(config.resources.cpus_per_worker)))])
    plan = plan_training(with_precision(config, precision), capacity, model, figures, measured)
    return replace(plan, precision_reason=precision.reason)


def refuse_counted_plan(config: TrainConfig) -> None:
    """Refuse a family that has no layout.

    Raises:
        UserError: names it.
    """
    if is_counted(config.model.family):
        raise UserError(
            f"model.family: found {config.model.family}, which is counted on one machine in one pass; allowed with "
            "raylm plan: a family that is trained by gradient"
        )


def _this_cluster(config: TrainConfig) -> tuple[Capacity, Figures | None]:
    """This machine, or the cluster that ``resources`` describes, with GPUs like this machine's."""
    import torch

    gpus = torch.cuda.device_count()
    memory = float(torch.cuda.get_device_properties(0).total_memory) if gpus else None
    capacity = planned_cluster(config.resources, this_machine(gpus, memory))
    kind = gpu_kind(torch.cuda.get_device_name(0)) if gpus and capacity.uses_gpus(config.resources) else None
    if kind is None or GPUS[kind].peak is None:
        return capacity, None
    return capacity, gpu_figures(kind, capacity.places_per_node(config.resources))


class TrainedModel(NamedTuple):
    """The configuration of the model that is trained, and its objective."""

    config: PretrainedConfig
    objective: Objective


def check_model(
    config: TrainConfig, loaded: PretrainedConfig | None = None, vocab_size: int | None = None
) -> TrainedModel:
    """What is trained.

    Args:
        loaded: the configuration at ``model.path``, where that is known.
        vocab_size: of a new model, with which neither data nor a tokenizer need be there.

    Raises:
        UserError: the model is not what the file says of it, or cannot be cut so.
    """
    if config.model.path is not None:
        model_config = loaded or load_config(config.model.path)
    else:
        tokenizer = _planned_tokenizer(config) if vocab_size is None else PlannedTokenizer(vocab_size)
        model_config = build_config(
            config.model.family, config.model.config, tokenizer, config.training.sequence_length
        )
    check_positions(model_config, config.training.sequence_length)
    check_dropout(model_config, config.training.dropout)
    objective = make_objective(config.objective, model_config.model_type)
    check_splits(model_config, config.parallel, objective)
    return TrainedModel(with_dropout(model_config, config.training.dropout), objective)


class PlannedTokenizer:
    """Stands for a tokenizer that is not trained yet: its vocabulary size is known, its ids are not needed."""

    bos_token_id = eos_token_id = 0
    pad_token_id = 1

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return self._vocab_size


def _planned_tokenizer(config: TrainConfig):
    if config.tokenizer is not None and config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path, "tokenizer.path")
    for source in config.data.train_sources:
        if (directory := Path(source) / "tokenizer").is_dir():
            return load_tokenizer(directory, "data.train")
    open_sources(config.data, config.data.train_sections, "data.train")
    section = config.new_tokenizer
    # Byte and character tokenizers find their vocabulary in the text; the plan takes the size of the byte one.
    return PlannedTokenizer(section.vocab_size or BYTE_ALPHABET + len(section.special_tokens))
