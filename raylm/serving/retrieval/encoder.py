"""Texts to vectors by an encoder such as MiniLM, which runs in an engine process of its own."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raylm.config.serving import ServingSection
from raylm.data.loading import load_tokenizer, resolve_model
from raylm.models.encoders import sentence_length, sentence_pooling
from raylm.serving.engines.base import Pooling
from raylm.serving.engines.client import Engine, start_engine
from raylm.serving.engines.deadline import all_in_time
from raylm.serving.engines.opening import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts in the engine's queue for one caller: a question waits for no more than these.
IN_WORK = 2
# Of each end of a weights file that goes into the fingerprint.
FINGERPRINT_BYTES = 1 << 20


def open_encoder(path: str, serving: ServingSection, threads: int) -> Encoder:
    """Start the encoder of a directory.

    Raises:
        EngineFailure: it could not be loaded.
    """
    source = Path(resolve_model(path, "serving.encoder"))
    tokenizer = load_tokenizer(source, "serving.encoder")
    longest = sentence_length(source, context_length(str(source)))
    serving = serving.model_copy(update={"engine": "auto"})
    engine = start_engine(str(source), serving, threads=threads, task="embedding")
    made_by = fingerprint(source)
    return Encoder(engine, tokenizer, sentence_pooling(source), longest, made_by, serving.request_seconds)


class Encoder:
    """Makes vectors of length 1 whose dot product says how close two texts are in meaning.

    Args:
        engine: reads token ids.
        tokenizer: of the encoder's directory.
        pooling: how hidden states become a vector.
        longest: tokens of a text that are read; the rest of it is left out.
        fingerprint: of the encoder; vectors of different ones cannot be compared.
        seconds: longest time for a text.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        longest: int,
        fingerprint: str,
        seconds: float,
    ) -> None:
        self.engine, self.fingerprint, self._seconds = engine, fingerprint, seconds
        self._tokenizer, self._pooling, self._longest = tokenizer, pooling, longest

    async def vectors(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One vector a text, fp32 [width].

        Raises:
            EngineFailure: the engine has stopped, or took too long for a text.
        """
        turns = asyncio.Semaphore(IN_WORK)

        async def embed(ids: list[int]) -> np.ndarray:
            async with turns:
                (vector,) = await all_in_time([self.engine.embed(ids, self._pooling)], self._seconds)
                return vector

        return await asyncio.gather(*map(embed, await asyncio.to_thread(self._ids, texts)))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), truncation=True, max_length=self._longest, verbose=False)["input_ids"]


def fingerprint(directory: Path) -> str:
    """Tells encoders apart by their configuration, tokenizer, and both ends of their weights, exported or not."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        path = directory / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("openvino/*.bin")]):
        size = path.stat().st_size
        with path.open("rb") as stream:
            digest.update(str(size).encode() + stream.read(FINGERPRINT_BYTES))
            stream.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()
