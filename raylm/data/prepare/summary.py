"""The last lines of ``prepare``: what the set holds, what was left out of it and why, and where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Beyond this share a person should look at what was left out.
MUCH = 0.25
MOST_REASONS = 3


def describe(directory: Path, report: dict[str, Any]) -> str:
    """The stage's summary for people, some lines of text."""
    lines = []
    for source in report["sources"]:
        version = f" of Python {source['python']}" if "python" in source else ""
        empty = f", {source['empty']:,} empty left out" if source["empty"] else ""
        lines.append(
            f"  source      {source['source']}{version}: {source['documents']:,} {report['kind']}, "
            f"{source['bytes']:,} bytes{empty}, content hash {source['sha256'][:16]}"
        )
    for split in ("train", "validation"):
        lines.append(
            f"  {split:<11} {report['documents'][split]:,} {report['kind']}, {report['tokens'][split]:,} tokens, "
            f"{report['bytes'][split]:,} bytes"
        )
    if "augmentation" in report:
        account = report["augmentation"]
        made = ", ".join(f"{name} {count:,}" for name, count in account["made"].items()) or "nothing"
        failed = f"; {sum(account['failed'].values()):,} requests failed" if account["failed"] else ""
        lines.append(f"  augmented   {account['originals']:,} training {report['kind']}: {made}{failed}")
    unknown = f", {report['unknown_tokens']:,} unknown" if report["unknown_tokens"] else ""
    lines.append(
        f"  tokenizer   {report['vocab_size']:,} entries, {report['bytes_per_token']:.2f} bytes a token{unknown}"
    )
    if report["compressed"]:
        figures = ", ".join(f"{name} {entry['bits_per_byte']:.3f}" for name, entry in report["compressed"].items())
        lines.append(f"  to beat     {figures} bits per byte of the validation text, by compression alone")
    lines.append(f"  files       {directory}; to train on them: data.train={directory}")
    lines.append(f"  data card   {directory / 'report.html'}, for a browser")
    if (left_out := describe_left_out(report)) is not None:
        lines.append(f"  left out    {left_out}")
    return f"prepare: done in {report['seconds']['total']:.1f} s\n" + "\n".join(lines)


def left_out(report: dict[str, Any]) -> dict[str, int]:
    """How many documents or rows were left out, by what left them out, the most first; with the filters' reasons."""
    found = {"empty": sum(source["empty"] for source in report["sources"])}
    for name, reasons in report["cleaning"]["dropped"].items():
        first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{reason} {count:,}" for reason, count in first[:MOST_REASONS]]
        more = [f"{len(first) - MOST_REASONS} more"] if len(first) > MOST_REASONS else []
        found[f"by {name} ({', '.join(named + more)})"] = sum(reasons.values())
    if "duplicates" in report:
        found |= {"the same text": report["duplicates"]["same"], "near duplicates": report["duplicates"]["near"]}
    found |= {f"{kind} (data.errors: skip)": count for kind, count in _skipped(report).items()}
    return dict(sorted(((name, n) for name, n in found.items() if n), key=lambda item: -item[1]))


def describe_left_out(report: dict[str, Any]) -> str | None:
    """What was left out and why, on one line; None where nothing was."""
    found = left_out(report)
    if not found:
        return None
    whys = "; ".join(f"{count:,} {name}" for name, count in found.items())
    return f"{sum(found.values()):,} of {_read(report):,} {report['kind']}: {whys}"


def warning(report: dict[str, Any]) -> str | None:
    """A line on a set of which more than a quarter was left out; None on others."""
    count = sum(left_out(report).values())
    if count <= MUCH * _read(report):
        return None
    return (
        f"warning: more than a quarter of the {report['kind']} were left out ({count:,} of {_read(report):,}); "
        "report.html shows some of them with the reasons"
    )


def _read(report: dict[str, Any]) -> int:
    """Documents read, with the rows that ``data.errors`` left out before they became any."""
    return report["documents_read"] + sum(_skipped(report).values())


def _skipped(report: dict[str, Any]) -> dict[str, int]:
    errors = report["errors"]
    # A set of an older raylm does not say whether they were skipped or replaced.
    return errors["counts"] if errors.get("policy") == "skip" else {}
