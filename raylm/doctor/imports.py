"""Whether the packages that everything rests on can be imported; one line on what is broken and the remedy.

    python -m raylm.doctor.imports [NAME ...]     # or by path: python raylm/doctor/imports.py

Prints nothing and ends with status 0 if all is well, else one line and status 1. Uses the standard library only, and
nothing of raylm: the installer calls it by path before anything else is known to work.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "openvino")
# The first import after an installation reads some 2 GB from disk.
TIME_LIMIT = 300.0

# Imports what its arguments name, and writes a line before and after each. What a package prints goes to stderr.
_CHILD = """
import importlib, json, os, sys, time
out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
for name in sys.argv[1:]:
    print(json.dumps(["begin", name]), file=out, flush=True)
    began = time.monotonic()
    try:
        importlib.import_module(name)
        error = ""
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
    print(json.dumps(["end", name, time.monotonic() - began, error]), file=out, flush=True)
out.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Import:
    """One package's import.

    Attributes:
        name: of the module.
        seconds: what it took beside the modules that were imported before it.
        error: the exception in one line, or how the process ended; empty where the import worked.
        timed_out: whether the time limit came first.
    """

    name: str
    seconds: float = 0.0
    error: str = ""
    timed_out: bool = False


def check_imports(names: Iterable[str] = PACKAGES, time_limit: float = TIME_LIMIT) -> list[Import]:
    """Import ``names`` one after the other in a process of their own; a package that ends it is passed over.

    Args:
        time_limit: seconds for all of them together.
    """
    left, results = list(names), []
    deadline = time.monotonic() + time_limit
    while left:
        done, how = _import_in_child(left, max(0.1, deadline - time.monotonic()))
        results += done
        left = left[len(done) :]
        if how == "time":
            results += [Import(name, error=f"not imported within {time_limit:.0f} s", timed_out=True) for name in left]
            break
        if left:  # the process ended in the middle of this one
            results.append(Import(left.pop(0), error=how))
    return results


def _import_in_child(names: list[str], seconds: float) -> tuple[list[Import], str]:
    """What was imported, and how the process ended: ``time`` for the time limit, else a description."""
    # `-P` (Python 3.11): a file torch.py in the working directory is not the package.
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD, *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    expired = threading.Event()

    def end() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        lines = [json.loads(line) for line in process.stdout or () if line.startswith("[")]
        status = process.wait()
    finally:
        timer.cancel()
    done = [
        Import(line[1], round(line[2], 2), " ".join(str(line[3]).split())[:300]) for line in lines if line[0] == "end"
    ]
    if expired.is_set() and len(done) < len(names):
        return done, "time"
    return done, _ending(status)


def _ending(status: int) -> str:
    if status >= 0:
        return f"the importing process ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"the importing process was ended by {name}"


def remedy(name: str, error: str) -> str:
    """A command or a short sentence that mends ``error``, as :class:`Import` has it."""
    lower = error.lower()
    reinstall = f"python -m pip install --force-reinstall --no-cache-dir {name}"
    if "not imported within" in error:
        return "the disk or the machine is slow; try again"
    if "sigill" in lower:
        return f"this CPU lacks instructions that the build of {name} uses; take a machine with AVX2"
    if "sigkill" in lower:
        return "the system ended the process, most likely for memory; give this machine or container 4 GB or more"
    if "cannot open shared object file" in lower or "image not found" in lower:
        library = error.split("cannot open shared object file")[0].split()[-1].rstrip(":")
        if library.startswith(("libcud", "libcu", "libnv", "libnccl")):
            return (
                "torch is a CUDA build without its CUDA libraries; install it with its dependencies "
                "(python -m pip install --force-reinstall torch), or a CPU build of torch"
            )
        return f"install the system's package that has {library} (Debian: apt-get install libgomp1 libstdc++6)"
    if "glibc" in lower:
        return "the system's C or C++ library is too old for this build; take a newer release of the system"
    missing = _missing_module(error)
    if missing == name.partition(".")[0]:
        return f"python -m pip install {name}"
    if missing:
        return f"python -m pip install {missing}, which {name} needs"
    return reinstall


def _missing_module(error: str) -> str:
    """First part of the module's name that is missing; empty where the error is another."""
    if not error.startswith("ModuleNotFoundError") or "'" not in error:
        return ""
    return error.split("'")[1].partition(".")[0]


def describe(results: Iterable[Import]) -> str:
    """One line on what is broken and the remedy of the first; empty where all is well."""
    broken = [result for result in results if result.error]
    if not broken:
        return ""
    first = broken[0]
    others = f" (broken too: {', '.join(result.name for result in broken[1:])})" if broken[1:] else ""
    return f"import {first.name} failed: {first.error}{others}. Remedy: {remedy(first.name, first.error)}"


def main(arguments: list[str]) -> int:
    """Status of the command."""
    line = describe(check_imports(arguments or PACKAGES))
    if line:
        print(f"raylm: {line}", file=sys.stderr)
    return 1 if line else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
