"""A training run in words, from its metrics and what the driver saw: ``<run>/summary.txt`` and part of its report page.

Everything comes from metrics.jsonl and the final report, so that it covers all starts of a run that was interrupted;
work that a restart repeated is counted once.
"""

from __future__ import annotations

import statistics
from typing import Any

from raylm.tasks.measures import improves, measured, shown


def summarize(stage: str, name: str, lines: list[dict[str, Any]], final: dict[str, Any]) -> str:
    """The page as text.

    Args:
        lines: of metrics.jsonl, at least one.
        final: the run's final metrics, with ``restarts``.
    """
    found = facts(lines, final)
    found["memory"] = "; ".join(f"rank {rank} {peak / 1e9:.2f} GB" for rank, peak in enumerate(peak_memory(lines)))
    width = max(map(len, found)) + 2
    return f"{stage} {name}\n\n" + "".join(f"{title:<{width}}{text}\n" for title, text in found.items() if text)


def facts(lines: list[dict[str, Any]], final: dict[str, Any] | None) -> dict[str, str]:
    """What a run did, title -> words with units.

    Args:
        lines: of metrics.jsonl, at least one.
        final: None of a run that has not come to its end; what only the end tells is then left out.
    """
    total = max(1e-9, sum(interval_seconds(lines)))
    last = lines[-1]
    found = {
        "length": f"{last['step']:,} steps, {last['tokens']:,} tokens, {last['samples']:,} samples",
        "speed": f"{last['tokens'] / total:,.0f} tokens/s, {clock(total)} of training",
        "waiting": f"{_share(lines, 'data_wait_seconds', total)} of the time for data, "
        f"{_share(lines, 'checkpoint_seconds', total)} for checkpoints",
        "training loss": f"{lines[0]['loss']:.4f} nats at step {lines[0]['step']}, {last['loss']:.4f} at the end",
    }
    if (peak := utilisation(lines)) is not None:
        found["MFU"] = f"{peak:.1%} (median): the share of the hardware's matrix-product peak that training used"
    if (validation := validation_losses(lines)) is not None:
        at_end, best, step = validation
        found["validation loss"] = f"{at_end:.4f} nats at the end, {best:.4f} at best (step {step})"
    found |= _measures(lines)
    norms = [line["gradient_norm"] for line in lines]
    found["gradient norm"] = f"{statistics.median(norms):.3g} (median), {max(norms):.3g} (largest), before clipping"
    if idle := stage_idle(lines):
        found["idle stages"] = ", ".join(f"stage {i} {share:.0%}" for i, share in enumerate(idle)) + " of a step's time"
    if final is not None:
        found["restarts"] = "; ".join(final["restarts"]) or "none"
        found["left out"] = ", ".join(f"batches {a} to {b - 1}" for a, b in final["skipped"]) or "no batch"
        found["end"] = "stopped early" if final["stopped_early"] else "all steps made"
        found["export"] = (
            f"the model of step {final['exported_step']:,}, loaded again: logits differ from the trained model's by "
            f"at most {final['logits_difference']:.1e}"
        )
    return found


def interval_seconds(lines: list[dict[str, Any]]) -> list[float]:
    """Seconds of training that each line covers."""
    counts = [line["tokens"] for line in lines]
    return [
        (now - before) / line["tokens_per_second"]
        for line, now, before in zip(lines, counts, [0, *counts[:-1]], strict=True)
    ]


def utilisation(lines: list[dict[str, Any]]) -> float | None:
    """Median model FLOPs utilisation, 0 to 1; None where it was not logged."""
    found = [line["mfu"] for line in lines if line.get("mfu")]
    return statistics.median(found) if found else None


def validation_losses(lines: list[dict[str, Any]]) -> tuple[float, float, int] | None:
    """Validation loss at the end, the best one and its step; None where nothing was evaluated yet."""
    found = [line for line in lines if "validation_loss" in line]
    if not found:
        return None
    best = min(found, key=lambda line: line["validation_loss"])
    return found[-1]["validation_loss"], best["validation_loss"], best["step"]


def _measures(lines: list[dict[str, Any]]) -> dict[str, str]:
    """What a task's measures were at the end and at best, name -> words."""
    evaluated = [line for line in lines if "validation_loss" in line]
    found = {}
    for metric, measure in measured(evaluated[-1]).items() if evaluated else ():
        best = evaluated[0]
        for line in evaluated:
            if metric in line and improves(metric, line[metric], best.get(metric)):
                best = line
        at_end = shown(metric, evaluated[-1][metric])
        found[measure.name] = f"{at_end} at the end, {shown(metric, best[metric])} at best (step {best['step']})"
    return found


def peak_memory(lines: list[dict[str, Any]]) -> list[int]:
    """The largest logged bytes of each rank, of the number of ranks that the run had at the end."""
    ranks = len(lines[-1].get("memory_bytes") or [])
    logged = [line["memory_bytes"] for line in lines if ranks and len(line.get("memory_bytes") or []) == ranks]
    return [max(found[rank] for found in logged) for rank in range(ranks)]


def stage_idle(lines: list[dict[str, Any]]) -> list[float]:
    """Share of the steps' time in which each stage of the last layout waited for others (median)."""
    stages = len(lines[-1].get("stage_idle") or [])
    logged = [line["stage_idle"] for line in lines if stages and len(line.get("stage_idle") or []) == stages]
    return [statistics.median(found[i] for found in logged) for i in range(stages)]


def clock(seconds: float) -> str:
    """``1:02:03``."""
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"


def _share(lines: list[dict[str, Any]], key: str, total: float) -> str:
    return f"{sum(line.get(key, 0.0) for line in lines) / total:.1%}"
