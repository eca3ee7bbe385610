"""How much two cores of this machine do of what two processes do that share nothing.

``python tests/benchmarks/two_cores.py [ROUNDS] [OUTPUT.json]``; 3 rounds by default. Each process is pinned to a
core and splits text, as `raylm prepare` does. Virtual CPUs that share a core, or a busy host, give less than 2: no
program gains more from its second core than this.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from pathlib import Path

TEXT = "the quick brown fox jumps over the lazy dog " * 2000
REPEATS = 1200


def work(core: int, seconds: multiprocessing.Queue) -> None:
    """Put the seconds of a fixed amount of work on ``core``."""
    os.sched_setaffinity(0, {core})
    began = time.perf_counter()
    for _ in range(REPEATS):
        re.findall(r"\w+", TEXT)
        json.dumps(TEXT.split())
    seconds.put(time.perf_counter() - began)


def slowest(cores: list[int]) -> float:
    """Seconds until a process on each of ``cores`` has done its work."""
    seconds: multiprocessing.Queue = multiprocessing.Queue()
    processes = [multiprocessing.Process(target=work, args=(core, seconds)) for core in cores]
    for process in processes:
        process.start()
    found = [seconds.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return max(found)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    cores = sorted(os.sched_getaffinity(0))[:2]
    pairs = [(slowest(cores[:1]), slowest(cores)) for _ in range(rounds)]
    gains = [2 * one / two for one, two in pairs]
    text = json.dumps({"seconds_one_and_two": pairs, "gains": gains, "median_gain": statistics.median(gains)}, indent=2)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)


if __name__ == "__main__":
    main()
