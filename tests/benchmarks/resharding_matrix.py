"""Checkpoints from every layout to every other, twice in a row, against the run that was never interrupted.

    python tests/benchmarks/resharding_matrix.py [--output resharding.json] [--family llama-tied]

A run trains 7 steps in one layout, goes on from its checkpoint in a second one for 6 steps, and from that one's in a
third. Prints a markdown table of the largest difference of any loss, and checks that each sample was seen once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))

from families import BATCH, FAMILIES, STEPS, plain_loop
from layout_process import start
from layouts import case, largest_difference, run_cases

TOLERANCE = 1e-5
# label -> (layout, ZeRO stage)
PLACES = {
    "dp4": ("dp4", 1),
    "tp2 x dp2": ("dp2 x tp2", 1),
    "pp2 x dp2": ("dp2 x pp2", 1),
    "2 x 2 x 2": ("2 x 2 x 2", 1),
    "dp2 ZeRO 3": ("dp2", 3),
}
FIRST, SECOND = 7, 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="llama-tied")
    arguments = parser.parse_args()
    names = list(PLACES)
    # The third layout of a way is the one after the second, so that every layout is a third as well.
    ways = [(a, b, names[(names.index(b) + 1) % len(names)]) for a in names for b in names]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)

        def run(given: dict, label: str) -> dict:
            """Run the cases, those of one number of processes together."""
            keys = sorted(given, key=lambda key: start(given[key]))
            results = run_cases([given[key] for key in keys], root, timeout=3600)
            print(f"{label}: {len(keys)} runs", file=sys.stderr, flush=True)
            return dict(zip(keys, results, strict=True))

        def at(name: str, **rest) -> dict:
            return case(arguments.family, *PLACES[name], "adamw", **rest)

        first = run({a: at(a, steps=[0, FIRST], save=str(root / a)) for a in names}, "first")
        second = run(
            {w: at(w[1], steps=[FIRST, SECOND], load=str(root / w[0]), save=str(root / "-".join(w))) for w in ways},
            "second",
        )
        third = run({w: at(w[2], steps=[SECOND, STEPS], load=str(root / "-".join(w))) for w in ways}, "third")
    expected = plain_loop(arguments.family, "adamw")["loss"]
    rows = []
    for way in ways:
        parts = [first[way[0]], second[way], third[way]]
        samples = [sample for part in parts for step in part["samples"] for sample in step]
        if samples != list(range(STEPS * BATCH)):
            raise SystemExit(f"{' -> '.join(way)}: samples were not each seen once")
        difference = largest_difference([loss for part in parts for loss in part["loss"]], expected)
        rows.append({"way": way, "loss_difference": difference})
    if arguments.output:
        arguments.output.write_text(json.dumps({"family": arguments.family, "ways": rows}, indent=1))
    print("| saved at \\ gone on at | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for a in names:
        cells = [f"{row['loss_difference']:.0e}" for row in rows if row["way"][0] == a]
        print(f"| {a} | " + " | ".join(cells) + " |")
    worst = max(row["loss_difference"] for row in rows)
    print(f"\n{len(rows)} ways over three layouts; largest difference {worst:.1e} (allowed {TOLERANCE:.0e})")
    if not worst < TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
