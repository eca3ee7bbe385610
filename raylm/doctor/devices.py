"""What computes here: the CPU with the instructions that matter, and NVIDIA's GPUs with their driver."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from raylm.doctor.finding import Finding

PROBE_SECONDS = 10.0
# Flag of the kernel -> how people write it.
_INSTRUCTIONS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "AVX512-BF16", "amx_tile": "AMX",
    "asimd": "NEON", "sve": "SVE", "i8mm": "I8MM", "bf16": "BF16",
}  # fmt: skip
_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def probe_cpu() -> list[Finding]:
    """Model, CPUs and instructions of the CPU."""
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    if platform.system() == "Darwin":
        return [judge_cpu(_sysctl("machdep.cpu.brand_string"), _darwin_flags(), count, usable, platform.machine())]
    try:
        model, flags = read_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        model, flags = "", set()
    return [judge_cpu(model or platform.processor(), flags, count, usable, platform.machine())]


def read_cpuinfo(text: str) -> tuple[str, set[str]]:
    """Model and flags of the first CPU in Linux's ``/proc/cpuinfo``; either may be empty."""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (model[1].strip() if model else ""), set(flags[1].split()) if flags else set()


def judge_cpu(model: str, flags: set[str], count: int, usable: int, machine: str) -> Finding:
    """One line on the CPU.

    Args:
        flags: the kernel's names of instruction sets; empty where they are not known.
        count, usable: CPUs of the machine, and those that this process may run on.
    """
    names = [title for flag, title in _INSTRUCTIONS.items() if flag in flags]
    bf16 = "bf16 in hardware" if flags & set(_BF16) else "no bf16 in hardware"
    known = f"{', '.join(names) or 'no vector instructions'}; {bf16}" if flags else "instructions not known"
    cpus = f"{usable} of {count} CPUs" if usable < count else f"{count} CPU{'s' if count != 1 else ''}"
    found = f"{model or machine}, {cpus}; {known}"
    if machine in ("x86_64", "AMD64") and flags and "avx2" not in flags:
        return Finding("cpu", found, "warning", "training and serving are several times slower without AVX2")
    if usable < 2:
        return Finding("cpu", found, "warning", "the quickstart wants two CPUs; with one it takes twice as long")
    return Finding("cpu", found)


def probe_gpus(build: str) -> list[Finding]:
    """NVIDIA's GPUs, by the driver's own tool.

    Args:
        build: torch's, as :func:`raylm.doctor.packages.torch_build` has it.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [judge_gpus(None, build)]
    try:
        query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        result = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [judge_gpus(f"nvidia-smi failed: {error}", build, failed=True)]
    said = result.stdout.strip() or result.stderr.strip()
    return [judge_gpus(said, build, failed=result.returncode != 0)]


def judge_gpus(said: str | None, build: str, *, failed: bool = False) -> Finding:
    """One line on the GPUs.

    Args:
        said: lines ``name, memory, driver`` of ``nvidia-smi``, or its error where it ``failed``; None without it.
    """
    if said is None:
        if build.startswith("CUDA"):
            return Finding("gpus", "none; torch is a CUDA build, which runs on the CPU too")
        return Finding("gpus", "none; training and serving run on the CPU")
    if failed or not said:
        first = said.splitlines()[0] if said else "nvidia-smi lists no GPU"
        mend = "the driver does not answer: `nvidia-smi` shows its message; in a container, start it with --gpus all"
        return Finding("gpus", first[:120], "warning", mend)
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.count(",") >= 2]
    names = [f"{row[0]} ({row[1]})" for row in rows]
    counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    found = f"{', '.join(counted)}, driver {rows[0][2]}" if rows else said.splitlines()[0][:120]
    if build == "CPU build":
        mend = "torch is a CPU build and does not see them; install a CUDA build of torch"
        return Finding("gpus", found, "warning", mend)
    return Finding("gpus", found)


def _sysctl(name: str) -> str:
    try:
        result = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()


def _darwin_flags() -> set[str]:
    names = {
        "hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.arm.FEAT_I8MM": "i8mm",
        "hw.optional.neon": "asimd", "hw.optional.avx2_0": "avx2",
    }  # fmt: skip
    return {flag for name, flag in names.items() if _sysctl(name) == "1"}
