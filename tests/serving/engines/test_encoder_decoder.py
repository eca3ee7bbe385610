"""The encoder-decoder engine gives what ``model.generate`` gives, whatever else runs beside a request."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from raylm.compression.exporters.openvino import export_model
from raylm.config.serving import ServingSection
from raylm.data.loading import load_tokenizer
from raylm.models.heads import SEQUENCE_TO_SEQUENCE
from raylm.models.writing import TransformersWriter
from raylm.serving.engines.base import Constraint, EngineFailure, EngineRefusal, Generate, SamplingParameters
from raylm.serving.engines.client import Engine, start_engine
from raylm.serving.engines.encoder_decoder import EncoderDecoderBackend
from tests.pairs import write_model, write_pairs

SOURCES = [[41, 40, 0], [53, 44, 45, 46, 41, 42, 0], [40, 0], [45, 44, 48, 0], [50, 51, 52, 53, 54, 0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose drawn weights are large enough that no two tokens are nearly alike, with its export in fp32."""
    root = tmp_path_factory.mktemp("t5")
    path = write_model(root / "plain", *write_pairs(root, 30), initializer_factor=3.0)
    export_model(str(path), root / "openvino", SEQUENCE_TO_SEQUENCE, None)
    shutil.move(root / "openvino", path / "openvino")
    return path


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    serving = ServingSection(engine=request.param, max_concurrent_requests=3)
    engine = start_engine(str(model), serving, threads=1, task="sequence_to_sequence")
    assert engine.name == request.param
    yield engine
    engine.close()


async def collect(engine: Engine, source: list[int], parameters: SamplingParameters, delay: float = 0.0) -> list[int]:
    await asyncio.sleep(delay)
    stream = engine.submit(source, parameters)
    tokens = [token async for piece in stream for token in piece]
    assert stream.finish_reason == ("length" if len(tokens) == parameters.max_new_tokens else "stop")
    return tokens


def test_greedy_is_model_generate(engine: Engine, model: Path) -> None:
    loaded, pad = AutoModelForSeq2SeqLM.from_pretrained(model).eval(), load_tokenizer(model).pad_token_id
    for source in SOURCES:
        found = asyncio.run(collect(engine, source, SamplingParameters(12, temperature=0)))
        if engine.name == "transformers":
            expected = loaded.generate(
                torch.tensor([source]), do_sample=False, num_beams=1, max_new_tokens=12, bad_words_ids=[[pad]]
            )
            assert found == expected[0, 1:].tolist()
        # Another engine's numbers differ in their last digits: each token is the likeliest, or as good as.
        with torch.inference_mode():
            logits = loaded(input_ids=torch.tensor([source]), labels=torch.tensor([found])).logits[0].clone()
            logits[:, pad] = -1e4
        lost = logits.max(dim=-1).values - logits.gather(1, torch.tensor(found)[:, None])[:, 0]
        assert float(lost.max()) < 0.1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_concurrent_is_single(engine: Engine, temperature: float) -> None:
    """More requests than places, of different lengths, at different times: the same texts, also when drawn by seed."""
    given = [
        (source, SamplingParameters(length, temperature=temperature, top_p=0.9, seed=place))
        for place, (source, length) in enumerate(zip(SOURCES, [20, 3, 11, 1, 16], strict=True))
    ]
    alone = [asyncio.run(collect(engine, source, parameters)) for source, parameters in given]
    if temperature:
        assert alone != [asyncio.run(collect(engine, s, SamplingParameters(p.max_new_tokens, 0))) for s, p in given]

    async def together() -> list[list[int]]:
        jobs = [collect(engine, source, p, 0.01 * place) for place, (source, p) in enumerate(given)]
        return await asyncio.gather(*jobs)

    for _ in range(2):
        assert asyncio.run(together()) == alone


def test_what_it_does_not_do_fails_its_own_request(engine: Engine) -> None:
    async def ask() -> None:
        with pytest.raises(EngineRefusal, match="response_format: a sequence-to-sequence model follows no schema"):
            wanted = Constraint("json", '{"type": "object"}')
            await collect(engine, SOURCES[0], SamplingParameters(4, constraint=wanted))
        with pytest.raises(EngineFailure, match="no probabilities of its source"):
            await engine.score(SOURCES[0])
        assert len(await collect(engine, SOURCES[0], SamplingParameters(4, temperature=0))) == 4

    asyncio.run(ask())


def test_a_dropped_text_leaves_the_others_as_they_are(model: Path) -> None:
    writer = TransformersWriter(AutoModelForSeq2SeqLM.from_pretrained(model), str(model))

    def run(dropped: int | None) -> dict[int, list[int]]:
        backend = EncoderDecoderBackend(writer, sequences=4)
        for number, source in enumerate(SOURCES):
            backend.admit(Generate(number, source, SamplingParameters(10, temperature=0)))
        found: dict[int, list[int]] = {number: [] for number in range(len(SOURCES))}
        left = set(found)
        for step in range(60):
            if step == 3 and dropped is not None:
                backend.drop(dropped)
                left.discard(dropped)
            for event in backend.advance():
                found[event.number] += event.tokens
                left -= {event.number} if event.last else set()
        assert not left and not backend._groups and not backend._samplers and not backend._waiting
        return found

    whole, less = run(None), run(1)
    assert len(less[1]) == 3 < len(whole[1])
    assert {n: row for n, row in less.items() if n != 1} == {n: row for n, row in whole.items() if n != 1}
