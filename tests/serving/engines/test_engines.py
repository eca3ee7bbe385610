"""Engines give what ``model.generate`` gives, whatever else runs beside a request, and free what is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
import uvloop
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
from raylm.errors import UserError
from raylm.serving.engines.base import Backend, Close, Constraint, EngineFailure, EngineRefusal, SamplingParameters
from raylm.serving.engines.client import Engine, start_engine
from raylm.serving.engines.opening import choose_engine
from raylm.serving.engines.process import Decoding
from raylm.serving.engines.transformers import TransformersBackend

PROMPTS = [[5, 6, 7], list(range(20, 90)), [200], [40, 41, 42, 43, 44, 45], list(range(100, 130)), [9] * 15]


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def engine(request: pytest.FixtureRequest, exported_model: Path) -> Iterator[Engine]:
    serving = ServingSection(engine=request.param, max_concurrent_requests=4)
    engine = start_engine(str(exported_model), serving, threads=1)
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
    end = time.monotonic() + 60
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


def test_whole_texts_under_serves_loop(engine: Engine) -> None:
    """Serve runs replicas on uvloop, whose timers may come before their time."""

    async def one_after_another() -> list[list[int]]:
        return [await collect(engine, PROMPTS[0], SamplingParameters(24, temperature=0)) for _ in range(20)]

    loop = uvloop.new_event_loop()
    try:
        texts = loop.run_until_complete(one_after_another())
    finally:
        loop.close()
    assert texts == [texts[0]] * 20


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


def test_scores_are_the_models_own(engine: Engine, model: PreTrainedModel) -> None:
    ids = list(range(30, 90)) * 5  # longer than what OpenVINO reads at once
    ids = ids[:256] if engine.name == "transformers" else ids
    scores = asyncio.run(engine.score(ids, top=3))
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    tolerance = 1e-4 if engine.name == "transformers" else 0.05
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (torch.tensor(scores.chosen) - expected).abs().max() < tolerance
    assert (torch.tensor(scores.top) - logprobs.topk(3).values).abs().max() < tolerance
    assert scores.top_ids.shape == (len(ids), 3)
    if engine.name == "transformers":
        assert scores.top_ids[:, 0].tolist() == logprobs.argmax(dim=-1).tolist()


def test_embeddings_are_the_last_hidden_states(engine: Engine, model: PreTrainedModel) -> None:
    ids = list(range(30, 90))
    with torch.inference_mode():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    for pooling, expected in (("mean", hidden.mean(dim=0)), ("first", hidden[0]), ("last", hidden[-1])):
        vector = torch.tensor(asyncio.run(engine.embed(ids, pooling)))
        assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
        assert float(vector @ expected / expected.norm()) > (0.99999 if engine.name == "transformers" else 0.999)


def test_penalties(engine: Engine) -> None:
    """With a large penalty no token comes twice; the prompt's tokens are free."""
    plain = greedy(engine, [5, 6, 7], 40)
    assert len(set(plain)) < len(plain)
    for penalties in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        # The random model's logits lie within one of each other.
        tokens = asyncio.run(collect(engine, [5, 6, 7], SamplingParameters(40, temperature=0, **penalties)))
        assert tokens != plain
        # OpenVINO's pipeline raises logits below 0, which only an untrained model's likely tokens have.
        if engine.name == "transformers":
            assert len(set(tokens)) == len(tokens)


def test_groups_of_tokens_hold_all_of_them(engine: Engine) -> None:
    """Many readers get their tokens in groups; none is lost, and the last ones come with the end."""

    async def together() -> list[tuple[int, int]]:
        async def follow() -> tuple[int, int]:
            stream = engine.submit([5, 6, 7], SamplingParameters(120, temperature=0))
            pieces = [piece async for piece in stream]
            return len(pieces), sum(map(len, pieces))

        return await asyncio.gather(*(follow() for _ in range(4)))

    for pieces, tokens in asyncio.run(together()):
        assert tokens == 120
        assert pieces < 120


def test_no_stream_ends_early_on_the_servers_event_loop(engine: Engine) -> None:
    """Ray Serve runs uvloop, whose timers come up to a millisecond early."""

    async def follow() -> tuple[int, str | None]:
        stream = engine.submit([5, 6, 7], SamplingParameters(30, temperature=0))
        return sum([len(piece) async for piece in stream]), stream.finish_reason

    async def together() -> None:
        for clients in (1, 2, 3, 4) * 10:
            assert await asyncio.gather(*(follow() for _ in range(clients))) == [(30, "length")] * clients

    uvloop.run(together())


def test_a_killed_engine_says_so(exported_model: Path) -> None:
    engine = start_engine(str(exported_model), ServingSection(engine="openvino"), threads=1)

    async def ask() -> None:
        stream = engine.submit([5, 6, 7], SamplingParameters(50_000, temperature=0))
        await anext(aiter(stream))
        engine._process.kill()
        with pytest.raises(EngineFailure, match=r"status -9|stopped"):
            async for _ in stream:
                pass

    asyncio.run(ask())
    with pytest.raises(EngineFailure):
        engine.check()
    engine.close()


def test_a_model_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineFailure, match=r"config.json|model"):
        start_engine(str(tmp_path), ServingSection(), threads=1)


@contextlib.contextmanager
def in_a_thread(backend: Backend) -> Iterator[Engine]:
    """The loop of the engine's process over a backend made here."""
    ours, theirs = Pipe()
    thread = threading.Thread(target=Decoding(backend, theirs).run)
    thread.start()
    engine = Engine(ours, backend.name, backend.sequences)
    yield engine
    with contextlib.suppress(OSError):
        engine._send(Close())
    thread.join(10)
    theirs.close()
    engine.close()


def families() -> dict[str, PreTrainedModel]:
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
    model = families()[family].eval()
    model.generation_config.eos_token_id = None
    backend = TransformersBackend(model, frozenset(), sequences=3)
    prompts = PROMPTS[:4]

    async def together(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(
            *(
                collect(engine, prompt, SamplingParameters(16, temperature=0), delay=0.01 * place)
                for place, prompt in enumerate(prompts)
            )
        )

    assert backend.batches == (family != "mamba")
    with in_a_thread(backend) as engine:
        assert asyncio.run(together(engine)) == [reference(model, prompt, 16) for prompt in prompts]


def test_auto_goes_by_artifact_and_hardware(exported_model: Path, tiny_model: Path) -> None:
    assert choose_engine(str(exported_model), ServingSection()) == "openvino"
    assert choose_engine(str(tiny_model), ServingSection()) == "transformers"
    assert choose_engine(str(exported_model), ServingSection(gpus_per_replica=1.0)) == "transformers"
    assert choose_engine(str(exported_model), ServingSection(engine="transformers")) == "transformers"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_for_gpus_and_has_to_be_there(
    exported_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, on_gpu = str(exported_model), ServingSection(engine="vllm", gpus_per_replica=1.0)
    with pytest.raises(UserError, match=r"serving\.engine: found vllm, allowed: .* where gpus_per_replica is 0"):
        choose_engine(model, ServingSection(engine="vllm"))
    with pytest.raises(UserError, match=r"which is not installed: pip install 'raylm\[gpu\]'"):
        choose_engine(model, on_gpu)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_engine(model, on_gpu) == "vllm"
    assert choose_engine(model, ServingSection(gpus_per_replica=1.0)) == "vllm"
    assert choose_engine(model, ServingSection()) == "openvino"
    # Encoders stay where they are.
    assert choose_engine(model, ServingSection(gpus_per_replica=1.0), continues=False) == "transformers"
    with pytest.raises(UserError, match="is no next-token model"):
        choose_engine(model, on_gpu, continues=False)


def test_a_schema_that_fails_in_the_engine_is_refused_there(engine: Engine) -> None:
    """What the check before the engine would let through."""
    expected = greedy(engine, PROMPTS[0], 24)
    with pytest.raises(EngineRefusal, match="nonsense"):
        asyncio.run(
            collect(engine, PROMPTS[1], SamplingParameters(8, constraint=Constraint("json", '{"type": "nonsense"}')))
        )
    assert greedy(engine, PROMPTS[0], 24) == expected
