"""Peak memory of ``raylm prepare`` by size of the input: all of its processes together, Ray's own included.

    python tests/benchmarks/prepare_memory.py [--megabytes 10 100 500] [--output FILE.json]

Memory is the proportional set size (PSS), which counts shared pages once, of the command and of every process that it
started, sampled four times a second. The tokenizer is trained on 4 MB at every size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from edited_corpus import write_corpus


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """(PSS of a process and all below it, most of a single one), in bytes."""
    sizes = [0]
    for each in [process, *process.children(recursive=True)]:
        try:
            sizes.append(each.memory_full_info().pss)
        except psutil.Error:
            continue
    return sum(sizes), max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            write_corpus(root / "corpus.jsonl", megabytes << 20, text=arguments.text)
            config = root / "prepare.yaml"
            sections = {
                "run": {"name": "set", "storage": str(root / "runs")},
                "data": {
                    "train": str(root / "corpus.jsonl"),
                    "validation_fraction": 0.01,
                    "cleaning": {"unicode": "NFC", "control_characters": True, "length": {"min_words": 5}},
                    "deduplication": {},
                },
                "tokenizer": {"type": "bpe", "vocab_size": 4096, "sample_bytes": 4 << 20},
                "resources": {"workers": arguments.workers},
            }
            config.write_text(yaml.safe_dump(sections))
            began = time.perf_counter()
            command = [sys.executable, "-m", "raylm.cli", "prepare", str(config)]
            process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            total = single = 0
            while process.poll() is None:
                together, largest = memory_of(process)
                total, single = max(total, together), max(single, largest)
                time.sleep(0.25)
            if process.returncode:
                raise SystemExit(f"raylm prepare ended with status {process.returncode}")
            report = json.loads((root / "runs" / "set" / "report.json").read_text())
            results.append(
                {
                    "megabytes": megabytes,
                    "peak_megabytes": total / 1e6,
                    "largest_process_megabytes": single / 1e6,
                    "seconds": time.perf_counter() - began,
                    "stages": report["seconds"],
                    "documents": report["documents"],
                    "duplicates": report["duplicates"],
                }
            )
            print(json.dumps(results[-1]), flush=True)
    ratio = results[-1]["peak_megabytes"] / results[0]["peak_megabytes"]
    print(json.dumps({"largest over smallest input": ratio}))
    if arguments.output:
        arguments.output.write_text(json.dumps({"results": results, "ratio": ratio}, indent=2))


if __name__ == "__main__":
    main()
