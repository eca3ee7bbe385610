"""Runs the probes and prints their findings: a table with remedies, or JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import raylm
from raylm.doctor.devices import probe_cpu, probe_gpus
from raylm.doctor.finding import Finding
from raylm.doctor.network import probe_hostname, probe_ports
from raylm.doctor.packages import probe_packages, probe_python, torch_build
from raylm.doctor.ray_start import probe_ray
from raylm.doctor.system import (
    probe_compiler,
    probe_disk,
    probe_files,
    probe_memory,
    probe_shared_memory,
    probe_text,
)

Probe = Callable[[], list[Finding]]

# In the table's order.
PROBES: dict[str, Probe] = {
    "python": probe_python,
    "packages": probe_packages,
    "cpu": probe_cpu,
    "gpus": lambda: probe_gpus(torch_build()),
    "memory": probe_memory,
    "shared memory": probe_shared_memory,
    "disk": probe_disk,
    "ray": probe_ray,
    "ports": probe_ports,
    "host name": probe_hostname,
    "open files": probe_files,
    "text": probe_text,
    "c++ compiler": probe_compiler,
}
_COLORS = {"ok": "\033[32m", "warning": "\033[33m", "broken": "\033[31m"}


def run_doctor(*, as_json: bool = False) -> int:
    """Run every probe and print what it found; the command's exit status: 0, or 1 where something is broken.

    Two take long, each in processes of its own: the imports and Ray's start. All run at the same time.
    """
    if not as_json and sys.stderr.isatty():
        print("raylm doctor: importing packages and starting Ray, at most half a minute ...", file=sys.stderr)
    findings = examine(PROBES)
    broken = sum(finding.state == "broken" for finding in findings)
    if as_json:
        lines = [vars(finding) for finding in findings]
        print(json.dumps({"raylm": raylm.__version__, "broken": broken, "findings": lines}, indent=2))
    else:
        print(table(findings, shutil.get_terminal_size((110, 24)).columns, color=_colored()))
        print(summary(findings))
    return 1 if broken else 0


def examine(probes: Mapping[str, Probe]) -> list[Finding]:
    """Run ``probes`` at the same time; findings in their order. A probe that fails itself is a warning, not an end."""
    with ThreadPoolExecutor(max_workers=len(probes)) as pool:
        running = {name: pool.submit(probe) for name, probe in probes.items()}
        findings = []
        for name, future in running.items():
            try:
                findings += future.result()
            except Exception as error:  # noqa: BLE001 -- whatever is odd about this machine, the rest is still told
                findings.append(
                    Finding(name, f"cannot be told: {type(error).__name__}: {error}", "warning", "check it by hand")
                )
    return findings


def table(findings: Iterable[Finding], width: int, *, color: bool = False) -> str:
    """The findings as text: state, what, found; the remedy below. Lines fit into ``width``, if that is 60 or more.

    Args:
        width: of the terminal, in columns.
        color: whether states are coloured by ANSI sequences.
    """
    findings = list(findings)
    whats = max((len(finding.what) for finding in findings), default=0)
    indent = " " * (whats + 11)  # state, what and the gaps between
    lines = []
    for finding in findings:
        state = finding.state.ljust(7)
        if color:
            state = f"{_COLORS[finding.state]}{state}\033[0m"
        text = textwrap.wrap(finding.found, max(30, width - len(indent))) or [""]
        lines.append(f"{state}  {finding.what.ljust(whats)}  {text[0]}")
        lines += [indent + rest for rest in text[1:]]
        if finding.remedy:
            mend = textwrap.wrap(f"-> {finding.remedy}", max(30, width - len(indent)), subsequent_indent="   ")
            lines += [indent + rest for rest in mend]
    return "\n".join(lines)


def summary(findings: Iterable[Finding]) -> str:
    """The last line: what is to be done, if anything."""
    findings = list(findings)
    broken = [finding.what for finding in findings if finding.state == "broken"]
    warnings = sum(finding.state == "warning" for finding in findings)
    noted = f"; {warnings} warning{'s' if warnings != 1 else ''}" if warnings else ""
    if broken:
        return f"broken: {', '.join(broken)}{noted}"
    return f"nothing is broken{noted}"


def _colored() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
