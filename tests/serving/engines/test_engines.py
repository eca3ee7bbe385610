"""Engines give what ``model.generate`` gives, whatever else runs beside a request, and free what is cancelled."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from raylm.config.serving import ServingSection
from raylm.serving.engines.base import Engine, EngineFailure, SamplingParameters
from raylm.serving.engines.opening import choose_engine, open_engine
from raylm.serving.engines.transformers import TransformersEngine

PROMPTS = [[5, 6, 7], list(range(20, 90)), [200], [40, 41, 42, 43, 44, 45], list(range(100, 130)), [9] * 15]


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def engine(request: pytest.FixtureRequest, exported_model: Path) -> Iterator[Engine]:
    serving = ServingSection(engine=request.param, max_concurrent_requests=4)
    engine = open_engine(str(exported_model), serving, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(exported_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(exported_model)


def reference(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """Greedy output of transformers itself."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=1
    )
    return output[0, len(prompt) :].tolist()


async def collect(engine: Engine, prompt: list[int], parameters: SamplingParameters, delay: float = 0.0) -> list[int]:
    await asyncio.sleep(delay)
    stream = engine.submit(prompt, parameters)
    tokens = [token async for piece in stream for token in piece]
    assert stream.finish_reason == ("length" if len(tokens) == parameters.max_new_tokens else "stop")
    return tokens


async def until_idle(engine: Engine) -> None:
    end = time.monotonic() + 10
    while engine.stats().running + engine.stats().waiting:
        assert time.monotonic() < end, "requests are still in work"
        await asyncio.sleep(0.01)


def greedy(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    return asyncio.run(collect(engine, prompt, SamplingParameters(tokens, temperature=0)))


def test_greedy_is_model_generate(engine: Engine, model: PreTrainedModel) -> None:
    for prompt in PROMPTS:
        tokens = greedy(engine, prompt, 24)
        if engine.name == "transformers":
            assert tokens == reference(model, prompt, 24)
        # 8-bit weights and cache move the logits a little: each token is the likeliest, or as good as.
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        lost = logits.max(dim=-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((lost / logits.std(dim=-1)).max()) < 0.1


def test_concurrent_is_single(engine: Engine) -> None:
    """More requests than places, of different lengths, joining at different times."""
    lengths = [30, 7, 19, 1, 25, 40]
    alone = [greedy(engine, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]

    async def together() -> list[list[int]]:
        return await asyncio.gather(
            *(
                collect(engine, prompt, SamplingParameters(length, temperature=0), delay=0.004 * place)
                for place, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
            )
        )

    for _ in range(3):
        assert asyncio.run(together()) == alone


def test_seeds(engine: Engine) -> None:
    def sampled(seed: int) -> SamplingParameters:
        return SamplingParameters(12, temperature=1.5, top_p=0.95, seed=seed)

    async def together(*seeds: int) -> list[list[int]]:
        return await asyncio.gather(*(collect(engine, PROMPTS[0], sampled(seed)) for seed in seeds))

    ((one,), (two,)) = asyncio.run(together(1)), asyncio.run(together(2))
    assert one != two
    assert asyncio.run(together(1, 2, 1)) == [one, two, one]


def test_small_top_p_and_temperature_are_greedy(engine: Engine) -> None:
    expected = greedy(engine, PROMPTS[3], 10)
    for parameters in (SamplingParameters(10, top_p=1e-6), SamplingParameters(10, temperature=1e-9)):
        assert asyncio.run(collect(engine, PROMPTS[3], parameters)) == expected


def test_cancel_frees_the_place(engine: Engine) -> None:
    async def leave() -> None:
        before = engine.stats().cancelled
        # Twice as many as there are places: the waiting ones are cancelled too. None can end by itself in time.
        streams = [engine.submit([5, 6, 7], SamplingParameters(50_000, temperature=0)) for _ in range(8)]
        await anext(aiter(streams[0]))
        assert engine.stats().running == 4
        assert engine.stats().waiting == 4
        for stream in streams:
            stream.cancel()
            stream.cancel()
        await until_idle(engine)
        assert engine.stats().cancelled == before + 8
        with pytest.raises(EngineFailure, match="cancelled"):
            await anext(aiter(streams[1]))

    asyncio.run(leave())


def test_end_token_stops(engine: Engine, model: PreTrainedModel) -> None:
    """Some prompt of the tiny model ends early; its stream says ``stop`` and ends with the end token."""
    for start in range(4, 280):
        tokens = greedy(engine, [start], 60)
        if len(tokens) < 60:
            assert tokens[-1] == model.config.eos_token_id
            return
    pytest.fail("no prompt ends early; choose another seed for the tiny model")


def test_a_dead_engine_says_so(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    engine = TransformersEngine(model, frozenset(), sequences=2)
    engine.start()

    async def ask() -> None:
        stream = engine.submit([10**6], SamplingParameters(2, temperature=0))  # no such embedding
        with pytest.raises(EngineFailure, match="the engine failed: index out of range"):
            await anext(aiter(stream))
        with pytest.raises(EngineFailure, match="index out of range"):
            engine.submit([5], SamplingParameters(2))

    asyncio.run(ask())
    with pytest.raises(EngineFailure):
        engine.check()
    engine._thread.join()
    assert died[0].exc_type is IndexError


def _families() -> dict[str, PreTrainedModel]:
    torch.manual_seed(1)
    sizes = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **sizes)),
        "bloom": BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, **sizes)),
        "mistral": MistralForCausalLM(
            MistralConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                sliding_window=8,
                **sizes,
            )
        ),
        "mamba": MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, **sizes)),
    }


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mistral", "mamba"])
def test_any_family(family: str) -> None:
    """Learned positions, ALiBi, a sliding window, and no keys and values at all."""
    model = _families()[family].eval()
    model.generation_config.eos_token_id = None
    engine = TransformersEngine(model, frozenset(), sequences=3)
    engine.start()
    prompts = PROMPTS[:4]

    async def together() -> list[list[int]]:
        return await asyncio.gather(
            *(
                collect(engine, prompt, SamplingParameters(16, temperature=0), delay=0.01 * place)
                for place, prompt in enumerate(prompts)
            )
        )

    try:
        assert engine.batches == (family != "mamba")
        assert asyncio.run(together()) == [reference(model, prompt, 16) for prompt in prompts]
    finally:
        engine.close()


def test_auto_goes_by_artifact_and_hardware(exported_model: Path, tiny_model: Path) -> None:
    assert choose_engine(str(exported_model), ServingSection()) == "openvino"
    assert choose_engine(str(tiny_model), ServingSection()) == "transformers"
    assert choose_engine(str(exported_model), ServingSection(gpus_per_replica=1.0)) == "transformers"
    assert choose_engine(str(exported_model), ServingSection(engine="transformers")) == "transformers"
