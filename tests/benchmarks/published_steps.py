"""Predicted against published step times: ``python published_steps.py PUBLISHED.csv OUTPUT.json [--fit]``.

The CSV has the columns source, hardware, model, parameters, gpus, layout, global_batch_sequences, sequence,
micro_batch, accumulation, recompute, tokens_per_s_per_gpu, tflops_per_gpu and step_seconds. Each row's model is built
without weights, cut as its layout says, and timed by :func:`raylm.parallel.plan.timing.step_time` with the GPU's data
sheet and the network of NVIDIA's DGX system of its kind. What raylm's own engines do not do is described to it: an
interleaved schedule, ZeRO 3 with tensor parallelism, recomputation of half of the operators (``selective``), attention
that is not fused (Megatron-LM before FlashAttention). Where no micro-batch is given, the fastest of 1 to 16 is taken.

Counted are rows in bf16 or fp16 on A100 and H100; V100 is written beside them, FP8 left out. ``--fit`` fits the
constants of raylm/cluster/hardware.py to the counted rows of even number, which needs scipy. Writes raw JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from raylm.cluster.hardware import GPUS, Figures, gpu_figures
from raylm.config.model import ObjectiveSection
from raylm.models.families.build import build_config
from raylm.parallel.plan.layout import Layout
from raylm.parallel.plan.memory import ModelMemory, StageMemory
from raylm.parallel.plan.planning import PlannedTokenizer
from raylm.parallel.plan.timing import step_time
from raylm.tasks import make_objective

# Width, layers, heads of MPT; heads of Megatron's GPT by width; widths, layers, heads and vocabulary of Llama.
MPT = {
    "125m": (768, 12, 12), "1b": (2048, 24, 16), "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40),
    "70b": (8192, 80, 64),
}  # fmt: skip
MPT_VOCABULARY, MEGATRON_VOCABULARY = 50368, 51200
MEGATRON_HEADS = {1536: 16, 2304: 24, 3072: 32, 4096: 32, 6144: 64, 8192: 64, 10240: 80, 12288: 96, 20480: 128}
LLAMA = {
    "Llama2 7B": (4096, 11008, 32, 32, 32, 32000), "Llama3.1 8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama3.1 70B": (8192, 28672, 80, 64, 8, 128256),
}  # fmt: skip
# Bytes/s of a node: eight times 200 Gbit/s in DGX A100, 400 in DGX H100, 100 in what OneFlow measured.
NETWORKS = {"A100": 200e9, "H100": 400e9, "V100": 12.5e9}
# V100 has no bf16: its peak in fp16 and its NVLink, by its data sheet.
V100_PEAK, V100_MEMORY, V100_LINK = 125e12, 0.9e12, 150e9
RECOMPUTED = {"full": 1.0, "selective": 0.5}
TARGET, BOUNDS = (0.8, 1.25), (0.6, 1.6)


@dataclass(frozen=True)
class Case:
    """A layout of a row: what its stages compute and send, and how many chunks of the model each has."""

    layout: Layout
    stages: list[StageMemory]
    chunks: int


@dataclass(frozen=True)
class Row:
    """A published step: its number among the counted ones, seconds, and the layouts that it may mean."""

    number: int
    kind: str
    row: dict[str, str]
    published: float
    cases: list[Case]


def memory_of(row: dict[str, str]) -> ModelMemory:
    """The row's model."""
    name, length = row["model"], int(row["sequence"])
    if name in LLAMA:
        width, inner, layers, heads, key_value, vocabulary = LLAMA[name]
        family, attention = "llama", "sdpa"
        values = {
            "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_value,
        }  # fmt: skip
    else:
        if name in MPT:
            (width, layers, heads), vocabulary, attention = MPT[name], MPT_VOCABULARY, "sdpa"
        else:
            width, layers = megatron_shape(name)
            heads, vocabulary, attention = MEGATRON_HEADS[width], MEGATRON_VOCABULARY, "eager"
        family, values = "gpt2", {"n_embd": width, "n_layer": layers, "n_head": heads}
    config = build_config(family, values, PlannedTokenizer(vocabulary), length)
    config._attn_implementation = attention
    return ModelMemory(config, make_objective(ObjectiveSection(), family), length, bf16=True)


def megatron_shape(name: str) -> tuple[int, int]:
    """Width and layers in a name like "GPT 1.7B h2304 l24"; GPT-3's where there are none."""
    found = re.search(r"h(\d+) l(\d+)", name)
    return (int(found[1]), int(found[2])) if found else (12288, 96)


def published_seconds(row: dict[str, str], sequences: int) -> float:
    """Seconds of a step of so many sequences, from tokens, seconds or FLOPs, whichever is the most exact."""
    gpus, length = int(row["gpus"]), int(row["sequence"])
    if row["tokens_per_s_per_gpu"] and row["source"].startswith(("llm-foundry", "torchtitan")):
        return sequences * length / gpus / float(row["tokens_per_s_per_gpu"])
    if row["step_seconds"]:
        return float(row["step_seconds"])
    # Narayanan et al. 2021, equation 3, which counts recomputation.
    width, layers = megatron_shape(row["model"])
    terms = 1 + length / (6 * width) + MEGATRON_VOCABULARY / (16 * layers * width)
    return 96 * sequences * length * layers * width**2 * terms / gpus / float(row["tflops_per_gpu"]) / 1e12


def blended(plain: StageMemory, again: StageMemory, share: float) -> StageMemory:
    """A stage of which a share of the forward pass is made again."""

    def between(one: float, other: float) -> float:
        return one + share * (other - one)

    names = ("products", "attention", "touched", "operators")
    work = replace(plain.work, **{n: between(getattr(plain.work, n), getattr(again.work, n)) for n in names})
    return replace(
        plain, work=work, reduced=int(between(plain.reduced, again.reduced)), sums=int(between(plain.sums, again.sums))
    )


def cases_of(row: dict[str, str]) -> list[Case]:
    """The layouts that a row may mean."""

    def number(name: str) -> int:
        found = re.search(rf"{name}(\d+)", row["layout"])
        return int(found[1]) if found else 1

    memory, tensor, pipeline = memory_of(row), number("tp"), number("pp")
    replicas = int(row["gpus"]) // (tensor * pipeline)
    zero_stage = 3 if re.search("FSDP|ZeRO|HSDP", row["layout"]) else 1
    share, found = RECOMPUTED.get(row["recompute"], 0.0), []
    for micro in [int(row["micro_batch"])] if row["micro_batch"] else [1, 2, 4, 8, 16]:
        sequences = int(row["global_batch_sequences"] or replicas * micro)
        if sequences % (replicas * micro):
            continue
        accumulation = sequences // (replicas * micro)
        layout = Layout(replicas, tensor, pipeline, zero_stage, micro, accumulation, share == 1, True, "adamw", True)
        plain, again = (memory.stages(replace(layout, activation_checkpointing=on)) for on in (False, True))
        stages = [blended(one, other, share) for one, other in zip(plain, again, strict=True)]
        found.append(Case(layout, stages, number("interleave")))
    return found


def read_rows(path: Path) -> list[Row]:
    """The rows that can be predicted."""
    rows, count = [], 0
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if "FP8" in row["hardware"]:
                continue
            cases = cases_of(row)
            sequences = cases[0].layout.data * cases[0].layout.micro_batch_size * cases[0].layout.accumulation
            kind = "A100-40G" if "A100-40" in row["hardware"] else "A100-80G"
            kind = next((name for name in ("H100", "V100") if name in row["hardware"]), kind)
            rows.append(Row(count, kind, row, published_seconds(row, sequences), cases))
            count += kind != "V100"
    return rows


def figures_of(kind: str) -> Figures:
    """Of a node of eight."""
    if kind != "V100":
        return gpu_figures(kind, 8, NETWORKS[kind[:4]])
    model, sheet = gpu_figures("A100", 8, NETWORKS[kind]), GPUS["A100"]
    assert sheet.peak is not None
    assert sheet.link is not None
    return replace(
        model,
        kind=kind,
        matrix_flops=model.matrix_flops / sheet.peak * V100_PEAK,
        attention_flops=model.attention_flops / sheet.peak * V100_PEAK,
        memory_bandwidth=V100_MEMORY,
        near_bandwidth=model.near_bandwidth / sheet.link * V100_LINK,
        peak_flops=V100_PEAK,
    )


def predicted(row: Row, figures: Figures) -> tuple[float, Case]:
    """Seconds of the fastest of the layouts, and that one."""
    times = [(step_time(c.stages, c.layout, figures, 8, c.chunks).seconds, c) for c in row.cases]
    return min(times, key=lambda time: time[0])


def summary(ratios: list[float]) -> dict[str, float]:
    """How many ratios are within the target, and the extremes."""
    within = sum(TARGET[0] <= ratio <= TARGET[1] for ratio in ratios)
    return {"rows": len(ratios), "within": within, "least": min(ratios), "most": max(ratios)}


def fit(rows: list[Row]) -> dict[str, float]:
    """The constants with the least mean square of the logarithm of predicted over published."""
    from scipy.optimize import minimize

    names = ("matrix_share", "attention_share", "memory_share", "link_share", "exposed")
    # No more than a data sheet has; and half of the traffic at least hides, which the rows tell little of.
    limits = ((0.3, 1), (0.05, 1), (0.3, 1), (0.3, 1), (0, 0.5))

    def with_shares(figures: Figures, shares: list[float]) -> Figures:
        gpu = GPUS[figures.kind]
        assert gpu.peak is not None
        assert gpu.memory is not None
        assert gpu.link is not None
        return replace(
            figures,
            matrix_flops=shares[0] * gpu.peak,
            attention_flops=shares[1] * gpu.peak,
            memory_bandwidth=shares[2] * gpu.memory,
            near_bandwidth=shares[3] * gpu.link,
            far_bandwidth=shares[3] * NETWORKS[figures.kind[:4]] / 8,
            exposed=shares[4],
        )

    def loss(shares: list[float]) -> float:
        if any(not low <= share <= high for share, (low, high) in zip(shares, limits, strict=True)):
            return math.inf
        errors = [math.log(predicted(r, with_shares(figures_of(r.kind), shares))[0] / r.published) for r in rows]
        return sum(error**2 for error in errors) / len(errors)

    starts = ([0.65, 0.15, 0.7, 0.8, 0.3], [0.62, 0.2, 0.6, 0.78, 0.2])
    best = min((minimize(loss, start, method="Nelder-Mead") for start in starts), key=lambda found: found.fun)
    return dict(zip(names, map(float, best.x), strict=True)) | {"root_mean_square": math.sqrt(best.fun)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("published", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fit", action="store_true")
    values = parser.parse_args()
    rows, results = read_rows(values.published), []
    for row in rows:
        seconds, case = predicted(row, figures_of(row.kind))
        half = "not counted" if row.kind == "V100" else "odd" if row.number % 2 else "even (fitted)"
        ratio, layout = seconds / row.published, case.layout
        parts = vars(step_time(case.stages, layout, figures_of(row.kind), 8, case.chunks))
        results.append(
            {name: row.row[name] for name in ("source", "hardware", "model", "gpus", "layout")}
            | {"half": half, "published": row.published, "predicted": seconds, "ratio": ratio, "seconds": parts}
            | {"micro_batch": layout.micro_batch_size, "accumulation": layout.accumulation}
        )
        print(f"{row.row['hardware']:20} {row.row['model']:22} {row.row['layout'][:22]:22} {half:14} {ratio:.2f}")
    by: Callable[[str], list[float]] = lambda half: [r["ratio"] for r in results if r["half"].startswith(half)]  # noqa: E731
    report = {"rows": results, "fitted half": summary(by("even")), "other half": summary(by("odd"))}
    report["counted"] = summary(by("even") + by("odd")) | {"bounds": BOUNDS, "target": TARGET}
    if by("not"):
        report["V100"] = summary(by("not"))
    if values.fit:
        report["fit"] = fit([row for row in rows if row.kind != "V100" and row.number % 2 == 0])
    values.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=2))


if __name__ == "__main__":
    main()
