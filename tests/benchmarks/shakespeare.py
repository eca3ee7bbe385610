"""Wall time to the plain recipe's validation loss on Shakespeare's characters, with jobs/recipes/shakespeare.

``python tests/benchmarks/shakespeare.py TEXT.txt [ROUNDS] [OUTPUT.json]``: the first 90% of the text train, the rest
validates. Runs the two recipes in turn; wall time is that of the training loop, evaluations left out, start-up (the
same for both) not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes" / "shakespeare"


def run(recipe: str, directory: Path, number: int) -> dict[str, float]:
    name = f"{recipe}{number}"
    subprocess.run(
        [sys.executable, "-m", "raylm.cli", "pretrain", str(RECIPES / f"{recipe}.yaml"), f"run.name={name}",
         f"run.storage={directory}", f"data.train={directory}/train.txt",
         f"data.validation={directory}/validation.txt"],
        check=True, timeout=900,
    )  # fmt: skip
    lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    seconds, tokens = 0.0, 0
    for line in lines:
        seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
        tokens = line["tokens"]
    return {"validation_loss": lines[-1]["validation_loss"], "seconds": seconds, "steps": lines[-1]["step"]}


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    result: dict = {"plain": [], "fast": []}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        cut = int(len(text) * 0.9)
        (directory / "train.txt").write_text(text[:cut], encoding="utf-8")
        (directory / "validation.txt").write_text(text[cut:], encoding="utf-8")
        for number in range(rounds):
            for recipe, found in result.items():
                found.append(run(recipe, directory, number))
    medians = {r: statistics.median(x["seconds"] for x in found) for r, found in result.items()}
    result["ratio_of_seconds"] = medians["fast"] / medians["plain"]
    print(json.dumps(result, indent=2))
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
