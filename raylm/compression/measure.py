"""Memory and speed of one engine on one model, and how well it predicts text, measured in a process of its own.

``python -m raylm.compression.measure JOB.json`` reads the job, measures, and prints one JSON object. Run by the
compress stage, so that one engine's memory never stands in another's figures.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from raylm.compression.quality import score

Generate = Callable[[list[list[int]], int], list[list[int]]]

BATCH_SIZES = (1, 8)
WARM_UP_TOKENS = 8
# Of the time of an answer, what decoding takes at least.
LEAST_SHARE = 0.05


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Measure ``job``: engine, model, network (of an encoder-decoder), prompts (token ids, of one length), new_tokens,
    threads, outputs (whether they are wanted), scoring (None, or reference and texts as
    :func:`raylm.compression.quality.score` takes them).

    Returns:
        resident_bytes (after load, above the process before it), peak_bytes; by batch tokens_per_second (new ones, with
        the prompt's time), prefill_tokens_per_second (of prompts) and decode_tokens_per_second (new ones after the
        first); outputs, the new tokens of every prompt; scored, where scoring is asked for.
    """
    found = _speed(job)
    # The engine is gone by now, and its memory was measured.
    return found if job.get("scoring") is None else {**found, "scored": score(job | job["scoring"])}


def _speed(job: dict[str, Any]) -> dict[str, Any]:
    make = {"transformers": _transformers, "openvino": _openvino}[job["engine"]]
    generate, resident = (_encoder_decoder if job.get("network") == "encoder_decoder" else make)(job)
    prompts, new_tokens = job["prompts"], job["new_tokens"]
    # Each batch size is warmed up, on other text than what is measured, so that no cache holds an answer already.
    backwards = [ids[::-1] for ids in prompts]
    for batch in BATCH_SIZES:
        generate(_rotated(backwards, 0, batch), min(WARM_UP_TOKENS, new_tokens))
    speeds, written = {}, []
    for batch in BATCH_SIZES:
        chosen = _rotated(prompts, 0, batch)
        whole, written = _timed(generate, chosen, new_tokens)
        first, _ = _timed(generate, chosen, 1)
        speeds[str(batch)] = _speeds(job, batch, whole, first)
    peak, outputs = peak_bytes(), []
    if job["outputs"]:
        most = BATCH_SIZES[-1]
        # Those of the last batch that was timed are the first prompts'.
        outputs = written[: len(prompts)]
        for start in range(most, len(prompts), most):
            outputs += generate(prompts[start : start + most], new_tokens)
    return {
        "resident_bytes": resident,
        "peak_bytes": peak,
        **{name: {batch: found[name] for batch, found in speeds.items()} for name in speeds["1"]},
        "outputs": outputs,
    }


def _timed(generate: Generate, prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    written = generate(prompts, count)
    return time.perf_counter() - began, written


def _speeds(job: dict[str, Any], batch: int, seconds: float, prefill: float) -> dict[str, float]:
    """Tokens a second from the ``seconds`` of answers, and those of answers of one token."""
    new_tokens = job["new_tokens"]
    # Of a tiny model both are noise.
    decoding = max(seconds - prefill, LEAST_SHARE * seconds)
    return {
        "tokens_per_second": batch * new_tokens / seconds,
        "prefill_tokens_per_second": batch * len(job["prompts"][0]) / prefill,
        "decode_tokens_per_second": batch * max(1, new_tokens - 1) / decoding,
    }


def _rotated(prompts: list[list[int]], first: int, count: int) -> list[list[int]]:
    return [prompts[(first + i) % len(prompts)] for i in range(count)]


def peak_bytes() -> int:
    """Most memory that this process has had resident."""
    # VmHWM starts anew with the program; ru_maxrss would still hold the parent's size from before exec.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return psutil.Process(os.getpid()).memory_info().rss


def resident_bytes() -> int:
    """Memory that this process has resident."""
    return psutil.Process(os.getpid()).memory_info().rss


def _transformers(job: dict[str, Any]):
    import torch

    from raylm.models.loading import load_model

    torch.set_num_threads(job["threads"])
    before = resident_bytes()
    model = load_model(job["model"]).eval()
    resident = resident_bytes() - before
    # Both engines generate on past the end of text, so that they do the same work.
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        return output[:, ids.shape[1] :].tolist()

    return generate, resident


def _openvino(job: dict[str, Any]):
    import numpy as np
    import openvino
    import openvino_genai

    from raylm.models.openvino import open_pipeline

    before = resident_bytes()
    pipeline = open_pipeline(job["model"], cache_gigabytes=1, threads=job["threads"], prefix_caching=False)
    resident = resident_bytes() - before
    numbers = iter(range(10**9))

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = count
        settings.ignore_eos, settings.do_sample = True, False
        handles = [
            pipeline.add_request(next(numbers), openvino.Tensor(np.array([ids], dtype=np.int64)), settings)
            for ids in prompts
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return [list(handle.read_all()[0].generated_ids) for handle in handles]

    return generate, resident


def _encoder_decoder(job: dict[str, Any]):
    from raylm.models.encoder_decoders import open_scored
    from raylm.models.heads import SEQUENCE_TO_SEQUENCE
    from raylm.models.loading import load_config

    # Libraries are no part of a model.
    kind = load_config(job["model"]).model_type.replace("-", "_")
    own = f"transformers.models.{kind}.modeling_{kind}"
    importlib.import_module("openvino" if job["engine"] == "openvino" else own)
    before = resident_bytes()
    model = open_scored(job["model"], SEQUENCE_TO_SEQUENCE, job["threads"], engine=job["engine"])
    return model.generate, resident_bytes() - before


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
