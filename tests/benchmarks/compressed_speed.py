"""Speed and memory of compressed models side by side: ``python compressed_speed.py OUTPUT.json MODEL... [--rounds 5]``.

MODEL is a directory that ``raylm compress`` wrote (``RUN/model``, with ``openvino/`` in it). Each round measures each
model once, in a fresh process, with 16 prompts of 128 random tokens and 64 new tokens, at one request and at eight.
Ratios are medians over the rounds of a model over the first one. Writes raw JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from pathlib import Path

from raylm.compression.measuring import Variant, in_rounds

SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "tokens_per_second")


def main() -> None:
    """Print a row a model, and write all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    words = json.loads((given.models[0] / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)
    prompts = [[draw.randrange(words) for _ in range(128)] for _ in range(16)]
    variants = [Variant(str(model), "openvino", str(model / "openvino"), "") for model in given.models]

    def job(variant: Variant, number: int) -> dict[str, object]:
        return {
            "engine": variant.engine, "model": variant.path, "prompts": prompts, "new_tokens": 64,
            "threads": os.cpu_count(), "outputs": False,
        }  # fmt: skip

    found = in_rounds(variants, "raylm.compression.measure", job, given.rounds)
    for variant, rounds in zip(variants, found, strict=True):
        ratios = {
            f"{name} {batch}": statistics.median(
                one[name][batch] / first[name][batch] for one, first in zip(rounds, found[0], strict=True)
            )
            for name in SPEEDS
            for batch in ("1", "8")
        }
        print(variant.name, {name: round(ratio, 2) for name, ratio in ratios.items()})
    given.output.write_text(json.dumps(dict(zip(map(str, given.models), found, strict=True)), indent=1))


if __name__ == "__main__":
    main()
