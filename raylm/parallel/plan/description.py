"""What ``raylm plan`` prints of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylm.parallel.plan.layout import Layout
    from raylm.parallel.plan.planning import Plan

# How many of the other layouts are shown.
SHOWN = 4


def describe(plan: Plan) -> str:
    """The plan as lines of text."""
    training, layout, memory = plan.config.training, plan.layout, plan.memory_bytes()
    tokens = training.batch_size * training.sequence_length
    length = next(
        f"{getattr(training, name):g} {name}"
        for name in ("steps", "tokens", "epochs")
        if getattr(training, name) is not None
    )
    limit = plan.space.limit
    room = f"; a worker may hold {limit / 1e9:,.1f} GB, its libraries included" if limit is not None else ""
    lines = [
        f"layout          {_name(layout)}, {'GPU' if layout.use_gpu else 'CPU'}, {layout.precision}",
        *([f"precision       {plan.precision_reason}"] if plan.precision_reason else []),
        f"parameters      {plan.parameters:,} (vocabulary {plan.model_config.vocab_size:,})",
        f"batch           {training.batch_size} sequences = {layout.data} replicas x {layout.accumulation} "
        f"micro-batches x {layout.micro_batch_size}; {tokens:,} tokens a step",
        f"length          {length}",
        "memory per rank " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in memory.items()),
        f"                {sum(memory.values()) / 1e6:,.1f} MB in all (an estimate, of the fullest rank){room}",
        "sent per rank   "
        + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in plan.traffic_bytes().items())
        + " a step",
        f"bubble          {plan.bubble:.1%} of a step",
        *_speed(plan),
    ]
    if plan.warning:
        lines.append(f"warning         {plan.warning}")
    return "\n".join([*lines, *_choice(plan)])


def _speed(plan: Plan) -> list[str]:
    """Time of a step and tokens in a second; nothing where not even the weights fit."""
    time, figures = plan.candidates[0].time, plan.space.figures
    if time is None:
        return []
    parts = {
        "computing": time.computing, "sums of tensor parallelism": time.tensor, "waiting for stages": time.waiting,
        "sums of replicas": time.data, "sending to stages": time.pipeline, "optimizer": time.updating,
    }  # fmt: skip
    shares = ", ".join(
        f"{name} {part / time.seconds:.0%}" for name, part in parts.items() if part >= 0.005 * time.seconds
    )
    used = "" if plan.utilisation is None else f"; {plan.utilisation:.0%} of the peak (MFU)"
    return [
        f"step            {digits(time.seconds)} s, predicted for {figures.kind} ({figures.source}): {shares}",
        f"speed           {plan.tokens_per_second:,.0f} tokens/s, predicted; "
        f"{plan.tokens_per_second / plan.layout.workers:,.0f} a worker{used}",
    ]


def _choice(plan: Plan) -> list[str]:
    """Why this layout, and what speaks against the others; nothing where there was no choice."""
    taken, *others = plan.candidates
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


def digits(value: float) -> str:
    """A number with three digits, or those of an integer."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
