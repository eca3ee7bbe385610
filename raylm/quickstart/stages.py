"""What the quickstart runs: each stage with its purpose, its usual time, and its result in a few words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylm.pages import size

SERVE = "serve"


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: of the stage, of its recipe and of its command.
        purpose: what it does, in a few words.
        seconds: what it takes on two CPUs; only the shares matter once a stage is through.
        result: a few words from its ``report.json``.
    """

    name: str
    purpose: str
    seconds: float
    result: Callable[[Mapping[str, Any]], str]


def _prepared(report: Mapping[str, Any]) -> str:
    tokens = sum(report["tokens"].values())
    return f"{size(sum(report['bytes'].values()))}, {tokens:,} tokens"


def _pretrained(report: Mapping[str, Any]) -> str:
    return f"{report['bits_per_byte']:.2f} bits per byte"


def _finetuned(report: Mapping[str, Any]) -> str:
    return f"loss {report['validation_loss']:.2f} on answers"


def _tuned(report: Mapping[str, Any]) -> str:
    return f"loss {report['best']['validation_loss']:.2f}, best of {len(report['trials'])}"


def _evaluated(report: Mapping[str, Any]) -> str:
    return f"{report['bits_per_byte']:.2f} bits per byte"


def _compressed(report: Mapping[str, Any]) -> str:
    before, after = report["before"], report["after"]
    faster = after["tokens_per_second"]["1"] / before["tokens_per_second"]["1"]
    return f"{before['weight_bytes'] / 1e6:.1f} to {after['weight_bytes'] / 1e6:.1f} MB, {faster:.1f}x speed"


def _served(report: Mapping[str, Any]) -> str:
    return report["url"]


# Seconds: two virtual CPUs (Xeon with AMX).
STAGES = (
    Stage("prepare", "docs to tokens", 15, _prepared),
    Stage("pretrain", "train a small Llama", 110, _pretrained),
    Stage("finetune", "teach it to answer", 285, _finetuned),
    Stage("tune", "try learning rates", 70, _tuned),
    Stage("evaluate", "held-out text", 20, _evaluated),
    Stage("compress", "weights to 8 bits", 55, _compressed),
    Stage(SERVE, "start the server", 25, _served),
)

# Weight of the usual times against what this machine has shown, in seconds.
_PRIOR_SECONDS = 30.0
# After the last step of a progress bar: checks, export, the end of Ray.
_TAIL_SECONDS = 8.0


def seconds_left(
    stages: Sequence[Stage], taken: Mapping[str, float], running: float = 0.0, own: float | None = None
) -> float:
    """Seconds until all ``stages`` are through.

    Args:
        stages: those not finished yet, the running one first.
        taken: seconds of the finished ones that did work, by name; their pace is taken for the others'.
        running: seconds that the first of ``stages`` has run.
        own: seconds that its own progress bar gives it, where there is one.
    """
    usual = sum(stage.seconds for stage in STAGES if stage.name in taken)
    pace = (sum(taken.values()) + _PRIOR_SECONDS) / (usual + _PRIOR_SECONDS)
    if not stages:
        return 0.0
    first = stages[0].seconds * pace - running
    first = own + _TAIL_SECONDS if own is not None else max(first, _TAIL_SECONDS)
    return first + pace * sum(stage.seconds for stage in stages[1:])


def duration(seconds: float) -> str:
    """Such as ``45 s``, ``6 min 10 s``."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def clock(seconds: float) -> str:
    """Such as ``0:45``, ``6:10``."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def about(seconds: float) -> str:
    """An estimate as it deserves: in tens of seconds below two minutes, else in minutes."""
    if seconds < 110:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    return f"about {round(seconds / 60)} min"
