"""An encoder fine-tuned to a reader on one part of a SQuAD-format file and measured on the rest.

Paragraphs are shuffled by a seed and the last fifth is held out, so that no context is in both. Prints and writes exact
match and F1 of the held-out questions, by ``raylm finetune`` and ``raylm evaluate``, and after ``raylm compress``.

    python tests/benchmarks/reader_xquad.py FILE.json ENCODER_DIRECTORY --output reader.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from encoder_stages import through_stages

HELD_OUT = 0.2


def split(path: Path, seed: int, directory: Path) -> dict[str, Path]:
    """The two parts as files."""
    content = json.loads(path.read_text(encoding="utf-8"))
    paragraphs = [paragraph for article in content["data"] for paragraph in article["paragraphs"]]
    random.Random(seed).shuffle(paragraphs)
    cut = round(len(paragraphs) * (1 - HELD_OUT))
    files = {}
    for name, part in (("train", paragraphs[:cut]), ("validation", paragraphs[cut:])):
        files[name] = directory / f"{name}.json"
        files[name].write_text(json.dumps({"data": [{"title": name, "paragraphs": part}]}), encoding="utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("reader_xquad.json"))
    parser.add_argument("--directory", type=Path, help="where the runs go; a temporary one by default")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    directory = arguments.directory or Path(tempfile.mkdtemp())
    directory.mkdir(parents=True, exist_ok=True)
    files = split(arguments.file, arguments.seed, directory)
    held_out = {"train": str(files["validation"]), "format": "squad"}
    data = {"train": str(files["train"]), "validation": str(files["validation"]), "format": "squad"}
    training = {"epochs": arguments.epochs, "batch_size": 8, "sequence_length": 256, "learning_rate": 2.0e-4}
    tuned, read, small = through_stages(
        directory, arguments.encoder, data, held_out, "extractive_qa", training, arguments.seed, micro_batch_size=4
    )
    result = {
        "file": arguments.file.name, "seed": arguments.seed, "epochs": arguments.epochs, "steps": tuned["step"],
        "finetune_seconds": tuned["command_seconds"], **read, "compressed": small,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"exact match {read['exact_match']:.1f}, F1 {read['f1']:.1f} on {read['questions']} held-out questions")
    print(f"with 8-bit weights {small['after']['exact_match']:.1f} and {small['after']['f1']:.1f}")


if __name__ == "__main__":
    main()
