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
from raylm.config.data import BYTE_ALPHABET
from raylm.config.families import is_counted
from raylm.config.layout import bf16_refusal, compiled_refusal, micro_batch_refusal
from raylm.config.stages import TrainConfig
from raylm.data.loading import load_tokenizer
from raylm.data.sources.segments import open_sources
from raylm.errors import UserError
from raylm.models.families.build import build_config, check_positions, parameter_count
from raylm.models.loading import load_config
from raylm.parallel.plan.layout import Layout
from raylm.parallel.plan.precision import decide, measure, settled, width_of, with_precision
from raylm.parallel.plan.refusals import check_splits
from raylm.tasks import make_objective

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.parallel.plan.memory import ModelMemory, StageMemory
    from raylm.parallel.plan.search import Candidate, Space
    from raylm.tasks.objective import Objective

# How many of the other layouts ``raylm plan`` shows.
SHOWN = 4


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
    def warning(self) -> str:
        """What may go wrong with the layout; empty where nothing is known to."""
        taken = self.candidates[0]
        if taken.reason:
            return f"the estimated memory does not fit: the layout {taken.reason}"
        return self.layout.warning

    def describe(self) -> str:
        """The plan as lines of text."""
        training, layout, memory = self.config.training, self.layout, self.memory_bytes()
        tokens = training.batch_size * training.sequence_length
        length = next(
            f"{getattr(training, name):g} {name}"
            for name in ("steps", "tokens", "epochs")
            if getattr(training, name) is not None
        )
        limit = self.space.limit
        room = f"; a worker may hold {limit / 1e9:,.1f} GB, its libraries included" if limit is not None else ""
        lines = [
            f"layout          {_name(layout)}, {'GPU' if layout.use_gpu else 'CPU'}, {layout.precision}",
            *([f"precision       {self.precision_reason}"] if self.precision_reason else []),
            f"parameters      {self.parameters:,} (vocabulary {self.model_config.vocab_size:,})",
            f"batch           {training.batch_size} sequences = {layout.data} replicas x {layout.accumulation} "
            f"micro-batches x {layout.micro_batch_size}; {tokens:,} tokens a step",
            f"length          {length}",
            "memory per rank " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in memory.items()),
            f"                {sum(memory.values()) / 1e6:,.1f} MB in all (an estimate, of the fullest rank){room}",
            "sent per rank   "
            + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in self.traffic_bytes().items())
            + " a step",
            f"bubble          {self.bubble:.1%} of a step",
        ]
        if self.warning:
            lines.append(f"warning         {self.warning}")
        return "\n".join([*lines, *self._choice()])

    def _choice(self) -> list[str]:
        """Why this layout, and what speaks against the others; nothing where there was no choice."""
        taken, *others = self.candidates
        if not others:
            return []
        fitting = [other for other in others if other.seconds < float("inf") and "needs" not in other.reason]
        full = [other for other in others if other not in fitting]
        if taken.reason:
            why = "needs the least memory, none fits"
        else:
            why = (
                f"the simplest within a tenth of the least estimated time of a step, of {1 + len(fitting)} layouts "
                f"that fit and {len(full)} that do not"
            )
        lines = [f"chosen          {why}"]
        for other in [*fitting[:SHOWN], *full[:SHOWN]]:
            size = other.layout.micro_batch_size
            lines.append(f"not             {_name(other.layout)}, micro-batches of {size}: {other.reason}")
        return lines


def _name(layout: Layout) -> str:
    recomputed = ", activations recomputed" if layout.activation_checkpointing else ""
    shape = f"{layout.data} data x {layout.tensor} tensor x {layout.pipeline} pipeline"
    return f"{shape}, ZeRO {layout.zero_stage}{recomputed}"


def plan_training(config: TrainConfig, capacity: Capacity, model: TrainedModel | None = None) -> Plan:
    """The plan of a run on a cluster of ``capacity``; starts nothing.

    Args:
        model: what :func:`check_model` gave for ``config``, where that is known.

    Raises:
        UserError: what is refused, with the reason.
    """
    from raylm.parallel.plan.memory import ModelMemory
    from raylm.parallel.plan.search import Space, candidates

    model_config, objective = model or check_model(config)
    resources, training, parallel = config.resources, config.training, config.parallel
    use_gpu, places = capacity.uses_gpus(resources), capacity.places(resources)
    model_parallel = parallel.model_parallel
    least = (
        resources.workers
        if resources.workers != "auto"
        else model_parallel * (1 if parallel.data == "auto" else parallel.data)
    )
    if least > places:
        unit = "1 GPU and " if use_gpu else ""
        raise UserError(
            f"resources.workers: found {least} with {unit}{resources.cpus_per_worker:g} CPUs each, allowed: at most "
            f"{places}, as the cluster has {capacity.cpus:g} CPUs and {capacity.gpus:g} GPUs"
        )
    precision = training.precision if training.precision != "auto" else ("bf16" if use_gpu else "fp32")
    if precision == "bf16" and (refusal := bf16_refusal(parallel.zero_stage)):
        if training.precision == "bf16":
            raise UserError(refusal)
        precision = "fp32"
    if training.compile and (refusal := compiled_refusal(parallel.zero_stage)):
        raise UserError(refusal)
    space = Space(
        config=config,
        model_config=model_config,
        objective=objective,
        places=least if isinstance(resources.workers, int) else places,
        per_node=capacity.places_per_node(resources),
        limit=capacity.memory_per_worker(resources),
        use_gpu=use_gpu,
        bf16=precision == "bf16",
        parameters=parameter_count(model_config, objective.head),
    )
    for replicas in space.replicas(model_parallel) if "auto" not in (parallel.tensor, parallel.pipeline) else []:
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


def make_plan(config: TrainConfig) -> Plan:
    """The plan for this machine, or for the cluster that ``resources`` describes; starts nothing.

    Where ``training.precision`` is auto, CPUs are taken to be as this one, which is measured.

    Raises:
        UserError: what is refused, with the reason.
    """
    import torch

    if is_counted(config.model.family):
        raise UserError(
            f"model.family: found {config.model.family}, which is counted on one machine in one pass; allowed with "
            "raylm plan: a family that is trained by gradient"
        )
    gpus = torch.cuda.device_count()
    memory = float(torch.cuda.get_device_properties(0).total_memory) if gpus else None
    capacity = planned_cluster(config.resources, this_machine(gpus, memory))
    model = check_model(config)
    width = width_of(model.config)
    precision = settled(config, width, use_gpu=capacity.uses_gpus(config.resources))
    if precision is None:
        tokens = config.training.batch_size * config.training.sequence_length
        precision = decide([measure(width, tokens, max(1, int(config.resources.cpus_per_worker)))])
    return replace(plan_training(with_precision(config, precision), capacity, model), precision_reason=precision.reason)


class TrainedModel(NamedTuple):
    """The configuration of the model that is trained, and its objective."""

    config: PretrainedConfig
    objective: Objective


def check_model(config: TrainConfig, loaded: PretrainedConfig | None = None) -> TrainedModel:
    """What is trained.

    Args:
        loaded: the configuration at ``model.path``, where that is known.

    Raises:
        UserError: the model is not what the file says of it, or cannot be cut so.
    """
    if config.model.path is not None:
        model_config = loaded or load_config(config.model.path)
    else:
        tokenizer = _planned_tokenizer(config)
        model_config = build_config(
            config.model.family, config.model.config, tokenizer, config.training.sequence_length
        )
    check_positions(model_config, config.training.sequence_length)
    objective = make_objective(config.objective, model_config.model_type)
    check_splits(model_config, config.parallel, objective)
    return TrainedModel(model_config, objective)


class _PlannedTokenizer:
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
    open_sources(config.data, config.data.train_sources, "data.train")
    section = config.new_tokenizer
    # Byte and character tokenizers find their vocabulary in the text; the plan takes the size of the byte one.
    return _PlannedTokenizer(section.vocab_size or BYTE_ALPHABET + len(section.special_tokens))
