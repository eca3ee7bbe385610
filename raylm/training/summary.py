"""One page about a finished run, ``<run>/summary.txt``: from its metrics and what the driver saw.

Everything comes from metrics.jsonl and the final report, so that it covers all starts of a run that was interrupted;
work that a restart repeated is counted once.
"""

from __future__ import annotations

import statistics
from typing import Any


def summarize(stage: str, name: str, lines: list[dict[str, Any]], final: dict[str, Any]) -> str:
    """The page as text.

    Args:
        lines: of metrics.jsonl, at least one.
        final: the run's final metrics, with ``restarts``.
    """
    seconds = interval_seconds(lines)
    total = max(1e-9, sum(seconds))
    rows = [
        ("length", f"{final['step']:,} steps, {final['tokens']:,} tokens, {lines[-1]['samples']:,} samples"),
        (
            "speed",
            f"{final['tokens'] / total:,.0f} tokens/s, MFU {statistics.median(line['mfu'] for line in lines):.1%} "
            f"(median), {_clock(total)} of training",
        ),
        ("waits", f"data {_share(lines, 'data_wait_seconds', total)}, checkpoints "
                  f"{_share(lines, 'checkpoint_seconds', total)} of the time"),
        ("loss", f"{lines[0]['loss']:.4f} at step {lines[0]['step']}, {lines[-1]['loss']:.4f} at the end"),
        ("validation", _validation(lines)),
        ("gradient", f"norm {statistics.median(line['gradient_norm'] for line in lines):.3g} (median), "
                     f"{max(line['gradient_norm'] for line in lines):.3g} (largest)"),
        ("memory", _memory(lines)),
        *([("idle", _idle(lines))] if "stage_idle" in lines[-1] else []),
        ("restarts", "; ".join(final["restarts"]) or "none"),
        ("left out", ", ".join(f"batches {a} to {b - 1}" for a, b in final["skipped"]) or "no batch"),
        ("end", "stopped early" if final["stopped_early"] else "all steps made"),
        ("export", f"step {final['exported_step']}; reloaded logits differ by {final['logits_difference']:.1e}"),
    ]  # fmt: skip
    return f"{stage} {name}\n\n" + "".join(f"{title:<12}{text}\n" for title, text in rows)


def interval_seconds(lines: list[dict[str, Any]]) -> list[float]:
    """Seconds of training that each line covers."""
    counts = [line["tokens"] for line in lines]
    return [
        (now - before) / line["tokens_per_second"]
        for line, now, before in zip(lines, counts, [0, *counts[:-1]], strict=True)
    ]


def _share(lines: list[dict[str, Any]], key: str, total: float) -> str:
    return f"{sum(line[key] for line in lines) / total:.1%}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"


def _validation(lines: list[dict[str, Any]]) -> str:
    found = [line for line in lines if "validation_loss" in line]
    best = min(found, key=lambda line: line["validation_loss"])
    return f"{found[-1]['validation_loss']:.4f} at the end, {best['validation_loss']:.4f} at best (step {best['step']})"


def _idle(lines: list[dict[str, Any]]) -> str:
    """Share of the steps' time in which each stage of the last layout waited for others (median)."""
    stages = len(lines[-1]["stage_idle"])
    logged = [line["stage_idle"] for line in lines if len(line.get("stage_idle", [])) == stages]
    return ", ".join(f"stage {i} {statistics.median(found[i] for found in logged):.0%}" for i in range(stages))


def _memory(lines: list[dict[str, Any]]) -> str:
    """The largest logged figure of each rank, of the size that the run had at the end."""
    ranks = len(lines[-1].get("memory_bytes") or [])
    logged = [line["memory_bytes"] for line in lines if len(line.get("memory_bytes") or []) == ranks]
    if not ranks:
        return "not logged"
    return ", ".join(f"rank {rank} {max(found[rank] for found in logged) / 1e9:.2f} GB" for rank in range(ranks))
