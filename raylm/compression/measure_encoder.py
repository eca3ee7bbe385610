"""Memory and latency of one engine on one encoder, measured in a process of its own.

``python -m raylm.compression.measure_encoder JOB.json`` reads the job, measures, and prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from raylm.compression.measure import peak_bytes, resident_bytes

REPEATS = 15
WARM_UP = 3


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Measure ``job``: engine, model, task, length, vocabulary, batch_sizes, threads.

    Returns:
        resident_bytes (after load, above the process before it), peak_bytes, latency_milliseconds by batch (medians).
    """
    from raylm.models.encoders import open_encoder
    from raylm.tasks import find_task

    if job["engine"] == "transformers":
        import torch

        torch.set_num_threads(job["threads"])
    head = find_task(job["task"]).head
    before = resident_bytes()
    encoder = open_encoder(job["model"], head, job["threads"], engine=job["engine"])
    resident = resident_bytes() - before
    random = np.random.default_rng(0)
    latencies = {}
    for size in job["batch_sizes"]:
        shape = (size, job["length"])
        batch = {
            "input_ids": random.integers(0, job["vocabulary"], shape),
            "attention_mask": np.ones(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
        }
        times = []
        for _ in range(WARM_UP + REPEATS):
            began = time.perf_counter()
            encoder.outputs(batch)
            times.append((time.perf_counter() - began) * 1e3)
        latencies[str(size)] = statistics.median(times[WARM_UP:])
    return {"resident_bytes": resident, "peak_bytes": peak_bytes(), "latency_milliseconds": latencies}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
