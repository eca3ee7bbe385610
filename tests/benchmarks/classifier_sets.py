"""An encoder fine-tuned to a classifier on two public sets, compressed to 8-bit weights and asked over HTTP.

Sentence polarity (Pang and Lee 2005, two classes; a tenth is held out by a seed) and question classification (Li and
Roth 2002, six classes; the set's own 500 test questions), as NLTK's archives have them. Prints and writes accuracy and
macro-F1 by ``raylm evaluate``, after ``raylm compress``, and the accuracy of ``/v1/classify`` over all held-out texts.

    python tests/benchmarks/classifier_sets.py ENCODER OUT.json --polarity sentence_polarity.zip --questions qc.zip
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

from encoder_stages import through_stages
from serving_load import HttpArm, free_port, serve_command

HELD_OUT = 0.1
TEXTS_A_REQUEST = 32
Rows = list[tuple[str, str]]


def polarity(path: Path, seed: int) -> tuple[Rows, Rows]:
    """Sentences to learn from and held-out ones, each with its label."""
    with zipfile.ZipFile(path) as archive:
        texts = {name: archive.read(f"sentence_polarity/rt-polarity.{name}") for name in ("pos", "neg")}
    rows = [
        (line, name) for name, text in texts.items() for line in text.decode("latin-1").splitlines() if line.strip()
    ]
    random.Random(seed).shuffle(rows)
    cut = round(len(rows) * (1 - HELD_OUT))
    return rows[:cut], rows[cut:]


def questions(path: Path) -> tuple[Rows, Rows]:
    """The set's own two parts, with their coarse labels."""
    with zipfile.ZipFile(path) as archive:
        parts = [archive.read(f"qc/{name}.txt").decode("latin-1").splitlines() for name in ("train", "test")]
    pairs = [[line.split(" ", 1) for line in part] for part in parts]
    train, test = ([(text, label.split(":")[0]) for label, text in part] for part in pairs)
    return train, test


def write(path: Path, rows: Rows) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def served_accuracy(model: str, directory: Path, rows: Rows) -> tuple[float, float]:
    """The share of the ``rows`` that /v1/classify labels rightly, and texts a second of one client."""
    port, right = free_port(), 0
    server = HttpArm(
        "raylm", serve_command(model, 2, port, directory), port, "/health", "model", chat=False, pausable=False
    )
    try:
        began = time.perf_counter()
        for place in range(0, len(rows), TEXTS_A_REQUEST):
            part = rows[place : place + TEXTS_A_REQUEST]
            body = json.dumps({"input": [text for text, _ in part]}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/classify", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                answers = json.load(response)["data"]
            right += sum(answer["label"] == label for answer, (_, label) in zip(answers, part, strict=True))
        seconds = time.perf_counter() - began
    finally:
        server.stop()
    return right / len(rows), len(rows) / seconds


def measure(encoder: Path, train: Rows, test: Rows, epochs: float, seed: int, directory: Path) -> dict:
    """One set through every stage."""
    directory.mkdir(parents=True)
    files = {"train": write(directory / "train.csv", train), "validation": write(directory / "test.csv", test)}
    fields = {"fields": {"text": "text", "label": "label"}}
    training = {"epochs": epochs, "batch_size": 32, "sequence_length": 64, "learning_rate": 1.0e-4}
    tuned, found, small = through_stages(
        directory, encoder, files | fields, {"train": files["validation"]} | fields, "classification", training, seed
    )
    accuracy, texts = served_accuracy(str(directory / "compress"), directory / "serve", test)
    return {
        "train": len(train), "test": len(test), "epochs": epochs, "steps": tuned["step"],
        "finetune_seconds": tuned["command_seconds"], "evaluated": found, "compressed": small,
        "served_accuracy": accuracy, "served_texts_per_second": texts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--polarity", type=Path, help="NLTK's sentence_polarity.zip")
    parser.add_argument("--questions", type=Path, help="NLTK's qc.zip")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sets = {}
    if arguments.polarity:
        sets["polarity"] = polarity(arguments.polarity, arguments.seed)
    if arguments.questions:
        sets["questions"] = questions(arguments.questions)
    if not sets:
        parser.error("one of --polarity and --questions is needed")
    result = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, (train, test) in sets.items():
            result[name] = measure(
                arguments.encoder, train, test, arguments.epochs, arguments.seed, Path(directory) / name
            )
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
            print(f"{name}: {json.dumps(result[name])}", flush=True)


if __name__ == "__main__":
    main()
