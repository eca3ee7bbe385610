"""The plan of a training run: who does what, how much memory it takes, and what is refused.

In: a training configuration and what the cluster has. Out: the configuration with every ``auto`` as a number, and a
description for ``raylm plan``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from raylm.config.data import BYTE_ALPHABET
from raylm.config.stages import TrainConfig
from raylm.data.sources import open_sources
from raylm.errors import UserError
from raylm.models.families import build_config, check_positions, parameter_count
from raylm.models.loading import load_config, load_tokenizer
from raylm.objectives import make_objective
from raylm.parallel.cut import Cut
from raylm.parallel.refusals import check_cuts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.objectives.base import Objective
    from raylm.parallel.memory import StageMemory

# Tokens of one micro-batch beyond which a bigger one gains nothing on a CPU but takes memory.
AUTO_MICRO_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Layout:
    """How a run is cut.

    Attributes:
        workers: processes: data x tensor x pipeline.
        micro_batch_size: sequences that a worker takes at once.
        accumulation: micro-batches of a step on each worker.
        use_gpu: whether each worker holds a GPU.
        precision: fp32 or bf16.
        tensor: tensor-parallel ranks.
        pipeline: stages.
    """

    workers: int
    micro_batch_size: int
    accumulation: int
    use_gpu: bool
    precision: str
    tensor: int = 1
    pipeline: int = 1

    @property
    def data(self) -> int:
        """Replicas that share a batch."""
        return self.workers // (self.tensor * self.pipeline)


def make_layout(config: TrainConfig, cpus: float, gpus: float) -> Layout:
    """Turn every ``auto`` into a number for a cluster of ``cpus`` and ``gpus``.

    Raises:
        UserError: more is asked for than the cluster has, or the batch does not divide.
    """
    resources, training, parallel = config.resources, config.training, config.parallel
    per_worker_gpus = resources.gpus_per_worker
    use_gpu = gpus >= 1 if per_worker_gpus == "auto" else per_worker_gpus == 1
    available = int(gpus) if use_gpu else int(cpus / resources.cpus_per_worker + 1e-9)
    if use_gpu:
        available = min(available, int(cpus / resources.cpus_per_worker + 1e-9))
    cut = parallel.cut
    wanted = resources.workers // cut if resources.workers != "auto" else parallel.data
    if resources.elastic is not None:
        # What a worker group of another size than the layout's leaves of a batch is filled up (training.batches).
        replicas = max(resources.elastic[0], min(resources.elastic[1], available))
    elif wanted == "auto":
        # The largest number of replicas that the batch divides over.
        replicas = next((n for n in range(max(1, available // cut), 0, -1) if training.batch_size % n == 0), 1)
    else:
        replicas = int(wanted)
    workers = replicas * cut
    if workers > available:
        unit = "1 GPU and " if use_gpu else ""
        raise UserError(
            f"resources.workers: found {workers} with {unit}{resources.cpus_per_worker:g} CPUs each, allowed: at most "
            f"{available}, as the cluster has {cpus:g} CPUs and {gpus:g} GPUs"
        )
    if training.batch_size % replicas and resources.elastic is None:
        raise UserError(
            f"training.batch_size: found {training.batch_size}, allowed: a multiple of the {replicas} data-parallel "
            f"workers"
        )
    share = -(-training.batch_size // replicas)
    micro = parallel.micro_batch_size
    if micro == "auto":
        limit = max(1, AUTO_MICRO_BATCH_TOKENS // training.sequence_length)
        if parallel.pipeline > 1:
            # Stages stand idle for (stages - 1) / (micro-batches + stages - 1) of a step.
            limit = min(limit, max(1, share // (4 * parallel.pipeline)))
        micro = next(n for n in range(min(share, limit), 0, -1) if share % n == 0)
    if share % int(micro) and resources.elastic is None:
        raise UserError(
            f"parallel.micro_batch_size: found {micro}, allowed: a divisor of each worker's share ({share})"
        )
    precision = training.precision if training.precision != "auto" else ("bf16" if use_gpu else "fp32")
    if precision == "bf16" and parallel.zero_stage == 0:
        if training.precision == "bf16":
            raise UserError(
                "parallel.zero_stage: found 0, allowed with training.precision bf16: 1, 2, 3, as ZeRO keeps the fp32 "
                "master weights"
            )
        precision = "fp32"
    accumulation = -(-share // int(micro))
    return Layout(workers, int(micro), accumulation, use_gpu, precision, parallel.tensor, parallel.pipeline)


def apply_layout(config: TrainConfig, layout: Layout) -> TrainConfig:
    """A copy of ``config`` in which the layout's numbers stand in place of ``auto``."""
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(
                update={"data": layout.data, "micro_batch_size": layout.micro_batch_size}
            ),
            "training": config.training.model_copy(update={"precision": layout.precision}),
            "resources": config.resources.model_copy(update={"workers": layout.workers}),
        }
    )


@dataclass(frozen=True)
class Plan:
    """What ``raylm plan`` shows."""

    config: TrainConfig
    layout: Layout
    parameters: int
    model_config: PretrainedConfig
    objective: Objective

    @cached_property
    def stages(self) -> list[StageMemory]:
        """Parameters and activations of each pipeline stage; takes seconds, as the model's code is run for it."""
        from raylm.parallel.memory import stage_memories

        length = self.config.training.sequence_length
        return stage_memories(self.model_config, self.objective, length, self._cut())

    def _cut(self) -> Cut:
        parallel, layout = self.config.parallel, self.layout
        return Cut(
            data=layout.data,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            zero_stage=parallel.zero_stage,
            micro_batch_size=layout.micro_batch_size,
            accumulation=layout.accumulation,
            activation_checkpointing=bool(parallel.activation_checkpointing),
            bf16=layout.precision == "bf16",
            optimizer=self.config.training.optimizer,
        )

    def memory_bytes(self) -> dict[str, float]:
        """Estimated bytes on the fullest rank, by kind."""
        from raylm.parallel.memory import rank_bytes

        ranks = [rank_bytes(stage, self._cut(), use_gpu=self.layout.use_gpu) for stage in self.stages]
        return max(ranks, key=lambda kinds: sum(kinds.values()))

    def traffic_bytes(self) -> dict[str, float]:
        """Bytes that the busiest rank sends in a step, by the kind of parallelism."""
        from raylm.parallel.memory import traffic_bytes

        ranks = [traffic_bytes(stage, self._cut()) for stage in self.stages]
        return max(ranks, key=lambda kinds: sum(kinds.values()))

    @property
    def bubble(self) -> float:
        """Share of a step in which a pipeline stage waits: (p - 1) / (m + p - 1) (Huang et al. 2019, GPipe)."""
        waits = self.layout.pipeline - 1
        return waits / (self.layout.accumulation + waits)

    def describe(self) -> str:
        """The plan as lines of text."""
        training, layout, memory = self.config.training, self.layout, self.memory_bytes()
        tokens = training.batch_size * training.sequence_length
        length = next(
            f"{getattr(training, name):g} {name}"
            for name in ("steps", "tokens", "epochs")
            if getattr(training, name) is not None
        )
        lines = [
            f"layout          {layout.data} data x {layout.tensor} tensor x {layout.pipeline} pipeline, "
            f"ZeRO {self.config.parallel.zero_stage}, {'GPU' if layout.use_gpu else 'CPU'}, {layout.precision}",
            f"parameters      {self.parameters:,} (vocabulary {self.model_config.vocab_size:,})",
            f"batch           {training.batch_size} sequences = {layout.data} replicas x {layout.accumulation} "
            f"micro-batches x {layout.micro_batch_size}; {tokens:,} tokens a step",
            f"length          {length}",
            "memory per rank " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in memory.items()),
            f"                {sum(memory.values()) / 1e6:,.1f} MB in all (an estimate, of the fullest rank)",
            "sent per rank   "
            + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in self.traffic_bytes().items())
            + " a step",
            f"bubble          {self.bubble:.1%} of a step",
        ]
        if layout.accumulation < layout.pipeline:
            lines.append(
                f"warning         {layout.accumulation} micro-batches for {layout.pipeline} pipeline stages: some are "
                "never at work together; a smaller parallel.micro_batch_size, or a larger training.batch_size, helps"
            )
        return "\n".join(lines)


def make_plan(config: TrainConfig, cpus: float | None = None, gpus: float | None = None) -> Plan:
    """The plan for this machine, or for a cluster of ``cpus`` and ``gpus``; starts nothing.

    Raises:
        UserError: what is refused, with the reason.
    """
    import torch

    layout = make_layout(
        config,
        cpus if cpus is not None else float(os.cpu_count() or 1),
        gpus if gpus is not None else float(torch.cuda.device_count()),
    )
    if config.model.path is not None:
        model_config = load_config(config.model.path)
    else:
        tokenizer = _planned_tokenizer(config)
        model_config = build_config(
            config.model.family, config.model.config, tokenizer, config.training.sequence_length
        )
    check_positions(model_config, config.training.sequence_length)
    objective = make_objective(config.objective, model_config.model_type)
    check_cuts(model_config, config.parallel)
    return Plan(
        config,
        layout,
        parameter_count(model_config, objective.head),
        model_config,
        objective,
    )


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
