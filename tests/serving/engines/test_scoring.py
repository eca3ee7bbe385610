"""Scores of whole texts, and requests that fail: each alone, and in little memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import torch

from raylm.serving.engines import process
from raylm.serving.engines import transformers as transformers_engine
from raylm.serving.engines.base import EngineFailure, SamplingParameters
from raylm.serving.engines.client import Engine
from raylm.serving.engines.transformers import TransformersBackend
from tests.serving.engines.test_engines import PROMPTS, collect, families, in_a_thread, reference


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mistral", "mamba"])
def test_texts_that_are_scored_in_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, and hidden states, of a text that is read seven tokens at a time, where the family can be."""
    model = families()[family].eval()
    backend = TransformersBackend(model, frozenset(), sequences=3)
    ids = [*range(30, 70), 9, 9, 9]
    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    logprobs = output.logits[0].log_softmax(dim=-1)
    monkeypatch.setattr(transformers_engine, "LOGITS_PER_PART", 7 * 320)
    monkeypatch.setattr(process, "LOGITS_AT_ONCE", 3 * 320)
    scores = process.score(backend.read(ids), ids, 500)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (torch.tensor(scores.chosen) - expected).abs().max() < 1e-5
    # More than the vocabulary are all of it.
    assert scores.top_ids.shape == (len(ids), 320)
    assert (torch.tensor(scores.top) - logprobs.sort(descending=True).values).abs().max() < 1e-5
    hidden = torch.tensor(backend.read(ids).hidden())
    assert (hidden - output.hidden_states[-1][0]).abs().max() < 1e-5


MEMORY_OF_SCORING = """
import resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from raylm.serving.engines.process import score
from raylm.serving.engines.transformers import TransformersBackend

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

vocabulary, tokens = 50_000, 1024
config = LlamaConfig(
    vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
backend = TransformersBackend(LlamaForCausalLM(config), frozenset(), sequences=1)
ids = torch.randint(0, vocabulary, (tokens,)).tolist()
score(backend.read(ids[:16]), ids[:16], 5)
before = peak()
score(backend.read(ids), ids, 5)
print((peak() - before) / (4 * vocabulary * tokens))
"""


def test_scoring_takes_less_than_its_logits() -> None:
    """Peak memory over that of the logits, in fp32, of the whole text; it was 4 when all were kept and copied."""
    command = [sys.executable, "-c", MEMORY_OF_SCORING]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert ratio < 0.9


async def outcomes(engine: Engine, prompts: list[list[int]], **parameters: float) -> list[list[int] | str]:
    """What each of the prompts, sent together, brought: ids or the reason why not."""
    chosen = SamplingParameters(12, **parameters)
    found = await asyncio.gather(*(collect(engine, ids, chosen) for ids in prompts), return_exceptions=True)
    assert all(isinstance(outcome, list | EngineFailure) for outcome in found)
    return [outcome if isinstance(outcome, list) else str(outcome) for outcome in found]


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_a_prompt_that_cannot_be_read_fails_alone(family: str) -> None:
    """Here of an id beyond the embedding, which the service refuses before; memory that does not suffice is alike."""
    model = families()[family].eval()
    model.generation_config.eos_token_id = None
    good = PROMPTS[:3]
    with in_a_thread(TransformersBackend(model, frozenset(), sequences=4)) as engine:
        for _ in range(2):
            first, bad, *others = asyncio.run(outcomes(engine, [good[0], [5, 6, 400], *good[1:]], temperature=0.0))
            assert "the prompt cannot be read: index out of range" in bad
            assert [first, *others] == [reference(model, prompt, 12) for prompt in good]
        assert engine.stats().failed == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_without_finite_logits_fails_alone(temperature: float) -> None:
    model = families()["mistral"].eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[300] = torch.nan
    with in_a_thread(TransformersBackend(model, frozenset(), sequences=4)) as engine:
        first, bad, last = asyncio.run(outcomes(engine, [[5, 6], [7, 300], [8, 9]], temperature=temperature))
        assert bad == "the model's output is not finite here"
        assert len(first) == len(last) == 12
