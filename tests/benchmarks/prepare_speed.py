"""``raylm prepare`` against the same steps written with ``datasets.map`` and a MinHash library, interleaved.

    python tests/benchmarks/prepare_speed.py [--megabytes 60] [--rounds 3] [--output FILE.json]

Both are whole commands, starting of processes included: clean (Unicode, control characters, length, Gopher's
repetition rules), drop exact and near duplicates, tokenize with the same BPE tokenizer, pack into one stream of tokens.
``raylm`` runs with one worker, all of its processes on one core, and with two on two; the other with ``num_proc=2`` on
two. Cleaning and shingles are the same functions in both, many documents in one call; the other encodes with the
``tokenizers`` library. Megabytes are those of the input.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from edited_corpus import write_corpus
from tokenizers import Tokenizer

from raylm.config.cleaning import CleaningSection, DeduplicationSection
from raylm.data.cleaning.cleaner import Account, Cleaner
from raylm.data.cleaning.signatures import band_keys, shingle_sets, word_hashes
from raylm.data.sources.documents import Document
from raylm.data.words import WordTable, normalized

CLEANING = {"unicode": "NFC", "control_characters": True, "length": {"min_words": 5}, "repetition": True}
DEDUPLICATION = {"threshold": 0.8, "shingle_words": 5, "permutations": 128}


def run(command: list[str], environment: dict[str, str], cores: int = 2) -> tuple[float, str]:
    """Run a command and all of its processes on the first ``cores`` cores; (seconds, its output)."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    began = time.perf_counter()
    done = subprocess.run(
        command,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
    )
    return time.perf_counter() - began, done.stdout


def raylm(arguments: list[str], environment: dict[str, str], cores: int = 2) -> float:
    """Run the command; seconds."""
    return run([sys.executable, "-m", "raylm.cli", *arguments], environment, cores)[0]


@functools.cache
def cleaner() -> Cleaner:
    """One a process."""
    return Cleaner(CleaningSection(**CLEANING), Account())


@functools.cache
def words() -> WordTable:
    """One a process."""
    return WordTable()


@functools.cache
def opened(tokenizer: Path) -> Tokenizer:
    """One a process."""
    return Tokenizer.from_file(str(tokenizer / "tokenizer.json"))


def baseline(corpus: Path, tokenizer: Path, directory: Path) -> None:
    """The same steps with ``datasets``; runs in a process of its own."""
    import datasets

    section = DeduplicationSection(**DEDUPLICATION)

    def clean(batch: dict) -> dict:
        cleaned = cleaner().clean([Document(text=text) for text in batch["text"]])
        return {"text": [found.document.text for found in cleaned if found is not None]}

    def sign(batch: dict) -> dict:
        shingles = shingle_sets([word_hashes(text, words()) for text in batch["text"]], section.shingle_words)
        return {"keys": band_keys(*shingles, section).T}

    def tokenize(batch: dict) -> dict:
        encodings = opened(tokenizer).encode_batch_fast(batch["text"])
        return {"ids": [[*encoding.ids, 0] for encoding in encodings]}

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(directory / "cache"))
    rows = rows.map(clean, batched=True, num_proc=2, remove_columns=rows.column_names)
    signed = rows.map(sign, batched=True, num_proc=2)
    seen: set[str] = set()
    buckets: dict[tuple[int, int], int] = {}
    keep = []
    for number, (text, keys) in enumerate(zip(signed["text"], signed.with_format("numpy")["keys"], strict=True)):
        plain = normalized(text)
        named = [(band, int(key)) for band, key in enumerate(keys)]
        # What shares a band is taken for a duplicate, as is usual where nothing is counted again.
        if plain not in seen and not any(name in buckets for name in named):
            keep.append(number)
        seen.add(plain)
        for name in named:
            buckets.setdefault(name, number)
    packed = rows.select(keep).map(tokenize, batched=True, num_proc=2, remove_columns=["text"])
    with (directory / "tokens.bin").open("wb") as stream:
        for batch in packed.with_format("numpy").iter(1000):
            stream.write(np.concatenate(batch["ids"]).astype(np.uint16).tobytes())
    print(json.dumps({"documents": len(keep)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--text", type=Path, help="file of paragraphs to build the corpus of; the embedded one by default"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--baseline", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.baseline:
        corpus, tokenizer, directory = map(Path, arguments.baseline)
        baseline(corpus, tokenizer, directory)
        return
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    seconds: dict[str, list[float]] = {"raylm, 1 worker": [], "raylm, 2 workers": [], "datasets, num_proc=2": []}
    inner: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        corpus = root / "corpus.jsonl"
        documents = write_corpus(corpus, arguments.megabytes << 20, text=arguments.text)
        size = corpus.stat().st_size / 1e6
        small = root / "small.jsonl"
        write_corpus(small, 4 << 20, seed=1, text=arguments.text)
        config = root / "prepare.yaml"
        data = {"train": str(corpus), "validation_fraction": 0.0, "cleaning": CLEANING, "deduplication": DEDUPLICATION}
        section = {"name": "set", "storage": str(root / "runs")}
        config.write_text(yaml.safe_dump({"run": section, "data": data}))
        raylm(["prepare", str(config), "run.name=tokenizer", f"data.train={small}"], environment)
        tokenizer = root / "runs" / "tokenizer" / "tokenizer"
        for number in range(arguments.rounds):
            for workers in (1, 2):
                run_name = f"set-{number}-{workers}"
                overrides = [f"run.name={run_name}", f"resources.workers={workers}", f"tokenizer={{path: {tokenizer}}}"]
                key = f"raylm, {workers} worker{'s' if workers > 1 else ''}"
                seconds[key].append(raylm(["prepare", str(config), *overrides], environment, cores=workers))
                report = json.loads((root / "runs" / run_name / "report.json").read_text())
                inner.append(report["seconds"])
            directory = root / f"baseline-{number}"
            directory.mkdir()
            command = [sys.executable, __file__, "--baseline", str(corpus), str(tokenizer), str(directory)]
            took, found = run(command, environment)
            seconds["datasets, num_proc=2"].append(took)
            shutil.rmtree(directory)
            print(
                json.dumps({"round": number, "seconds": {name: took[-1] for name, took in seconds.items()}}), flush=True
            )
            for workers in (1, 2):
                shutil.rmtree(root / "runs" / f"set-{number}-{workers}")
    speeds = {name: size / statistics.median(values) for name, values in seconds.items()}
    passes = {
        workers: statistics.median(
            each["parts"] + each["duplicates"] + each["tokens"] for each in inner[workers - 1 :: 2]
        )
        for workers in (1, 2)
    }
    result = {
        "megabytes": size,
        "documents": documents,
        "kept": {"raylm": report["documents"]["train"], "datasets": json.loads(found)["documents"]},
        "seconds": seconds,
        "megabytes_per_second": speeds,
        "over datasets": speeds["raylm, 2 workers"] / speeds["datasets, num_proc=2"],
        "1 to 2 workers, whole command": speeds["raylm, 2 workers"] / speeds["raylm, 1 worker"],
        "1 to 2 workers, the passes": passes[1] / passes[2],
        "inner": inner,
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
