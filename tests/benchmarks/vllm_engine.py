"""raylm's vLLM engine against the vLLM that is installed, and its scores against transformers' fp32 ones.

Run it with the interpreter of an environment that has vLLM (a GPU's, or the CPU build with VLLM_CPU_KVCACHE_SPACE=1);
raylm itself need not be installed there, ray neither. Asserts what the replica relies on: texts that stream and end
with a reason, the same text for the same seed, JSON that follows a schema, a cancelled text, and no embeddings.

    VENV/bin/python tests/benchmarks/vllm_engine.py MODEL_DIRECTORY
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from multiprocessing.connection import Connection
from raylm.serving.engines import vllm
connection = Connection(int(sys.argv[1]))
vllm.run(connection, *connection.recv())
"""
SCHEMA = {"type": "object", "properties": {"answer": {"type": "boolean"}}, "required": ["answer"]}


async def check(engine, tokenizer, model: str) -> dict:
    """Ask everything once."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from raylm.serving.engines.base import Constraint, EngineFailure, SamplingParameters

    async def text(prompt: str, tokens: int = 24, **parameters: object) -> tuple[str | None, str]:
        chosen = SamplingParameters(**{"max_new_tokens": tokens, "temperature": 0.0, **parameters})
        stream = engine.submit(tokenizer(prompt)["input_ids"], chosen)
        ids = [token async for tokens in stream for token in tokens]
        return stream.finish_reason, tokenizer.decode(ids, skip_special_tokens=True)

    found = {"greedy": await text("The capital of France is")}
    answer = await text("Is Paris in France? Answer as JSON: ", constraint=Constraint("json", json.dumps(SCHEMA)))
    assert isinstance(json.loads(answer[1])["answer"], bool), answer
    seeded = [await text("Once upon a time", temperature=0.9, seed=3) for _ in range(2)]
    assert seeded[0] == seeded[1], seeded
    together = await asyncio.gather(*(text(f"Number {number}:") for number in range(8)))
    assert {reason for reason, _ in together} <= {"stop", "length"}, together
    ids = tokenizer("The capital of France is Paris.")["input_ids"]
    stream = engine.submit(ids, SamplingParameters(max_new_tokens=200, temperature=0.0))
    await anext(stream)
    stream.cancel()
    try:
        await engine.embed(ids, "mean")
    except EngineFailure as error:
        found["embeddings"] = str(error)
    assert "embeddings" in found, "vLLM has no embeddings of a generator here"
    scores = await engine.score(ids, 3)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logits = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logits[range(len(ids) - 1), ids[1:]].numpy()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.failed, stats.cancelled) == (0, 0, 1, 1), stats
    return found | {
        "schema": answer,
        "seeded": seeded[0],
        "score_difference": float(np.abs(expected - scores.chosen).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    from raylm.config.serving import ServingSection
    from raylm.models.stops import end_token_ids
    from raylm.serving.engines.base import Ready
    from raylm.serving.engines.client import Engine

    ours, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-c", CHILD, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    serving = ServingSection(max_concurrent_requests=8, gpu_memory_utilization=0.5)
    ours.send((arguments.model, serving, end_token_ids(arguments.model)))
    ready = ours.recv()
    assert isinstance(ready, Ready), ready
    engine = Engine(ours, ready.name, 8, process)
    try:
        found = asyncio.run(check(engine, AutoTokenizer.from_pretrained(arguments.model), arguments.model))
    finally:
        engine.close()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
