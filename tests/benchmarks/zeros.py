"""What zeros cost a text generator: magnitude, Wanda and SparseGPT at 50%, and 2:4.

    python tests/benchmarks/zeros.py MODEL TEXT.txt OUT.json [--samples 32] [--length 256]

Importance is measured on the first sequences of TEXT, the loss on as many further ones. OUT has the loss, nats a token,
and the perplexity of each.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from raylm.compression.pruning.scan import mean_loss
from raylm.compression.pruning.zeros import set_zeros
from raylm.config.model import ObjectiveSection
from raylm.data.loading import load_tokenizer
from raylm.models.layers import find_blocks
from raylm.models.loading import load_model
from raylm.tasks import make_objective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    ids = torch.tensor(load_tokenizer(given.model)(given.text.read_text())["input_ids"])
    count = 2 * given.samples
    rows = ids[: count * (given.length + 1)].view(count, given.length + 1)
    batches = [{"input_ids": one[:, :-1], "targets": one[:, 1:].contiguous()} for one in rows.split(4)]
    calibration, held_out = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    found = []
    for criterion, pattern in [("none", ""), *((c, p) for p in ("unstructured", "2:4") for c in CRITERIA)]:
        model = load_model(given.model).eval()
        objective = make_objective(ObjectiveSection(), model.config.model_type)
        if criterion != "none":
            blocks = sum(len(one.modules) for one in find_blocks(model))
            set_zeros(model, criterion, [0.5] * blocks, pattern, objective, calibration)
        loss = mean_loss(model, objective, held_out)
        found.append({"criterion": criterion, "pattern": pattern, "loss": loss, "perplexity": math.exp(loss)})
        print(found[-1], flush=True)
        given.output.write_text(json.dumps(found, indent=2))


CRITERIA = ("weight", "wanda", "sparsegpt")

if __name__ == "__main__":
    main()
