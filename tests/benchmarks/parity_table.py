"""Losses and gradient norms of every family under every layout against one plain PyTorch process, over 20 steps.

    python tests/benchmarks/parity_table.py [--output parity.json] [--families llama t5] [--layouts tp2 pp2]

Prints a markdown table: for each layout the largest difference of any step, over the ZeRO stages and over AdamW with
clipping and SGD without. The JSON has every case. Needs no GPU; up to eight processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))

from families import FAMILIES, STEPS, plain_loop
from layouts import LAYOUTS, case, largest_difference, run_cases

TOLERANCE = 1e-5
TABLE = ("dp2", "tp2", "pp2", "dp2 x tp2", "dp2 x pp2", "pp2 x tp2", "2 x 2 x 2")
OPTIMIZERS = {"adamw": "AdamW with clipping", "sgd": "SGD without clipping"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--layouts", nargs="+", default=TABLE)
    arguments = parser.parse_args()
    places = []
    for layout in sorted(arguments.layouts, key=lambda name: LAYOUTS[name][0] * LAYOUTS[name][1] * LAYOUTS[name][2]):
        only_data = LAYOUTS[layout][1:] == (1, 1)
        for family in arguments.families:
            places += [(family, layout, zero, name) for zero in range(4 if only_data else 2) for name in OPTIMIZERS]
    with tempfile.TemporaryDirectory() as directory:
        results = run_cases([case(*place) for place in places], Path(directory), timeout=3600)
    expected = {(f, name): plain_loop(f, name) for f in arguments.families for name in OPTIMIZERS}
    rows = []
    for (family, layout, zero, name), found in zip(places, results, strict=True):
        plain = expected[family, name]
        differences = {key: largest_difference(found[key], plain[key]) for key in ("loss", "gradient_norm")}
        rows.append({"family": family, "layout": layout, "zero": zero, "optimizer": OPTIMIZERS[name], **differences})
    if arguments.output:
        arguments.output.write_text(json.dumps({"steps": STEPS, "tolerance": TOLERANCE, "cases": rows}, indent=1))
    print("| family | " + " | ".join(arguments.layouts) + " |")
    print("| --- |" + " --- |" * len(arguments.layouts))
    for family in arguments.families:
        cells = []
        for layout in arguments.layouts:
            these = [row for row in rows if row["family"] == family and row["layout"] == layout]
            worst = [max(row[key] for row in these) for key in ("loss", "gradient_norm")]
            cells.append(" / ".join(f"{difference:.0e}" for difference in worst))
        print(f"| {family} | " + " | ".join(cells) + " |")
    worst = max(max(row["loss"], row["gradient_norm"]) for row in rows)
    print(f"\n{len(rows)} cases; largest difference {worst:.1e} (allowed {TOLERANCE:.0e})")
    if not worst < TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
