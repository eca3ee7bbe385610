"""Models on pairs of texts: the loss of each target, and what a model writes itself, whatever computes it.

In: batches of sources and targets. Out: of each pair a record with the fields ``losses`` (nats of each target) and
``written`` (token ids, -1 behind the end). Encoder-decoders, in this process or as an OpenVINO export, and next-token
models, whose source is a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from raylm.data.loading import resolve_model
from raylm.data.padding import pad_right
from raylm.models.encoder_decoders import (
    Arrays,
    EncoderDecoder,
    OpenVinoEncoderDecoder,
    TransformersEncoderDecoder,
    nats_of_targets,
)
from raylm.models.heads import Head
from raylm.models.loading import load_config, load_model
from raylm.models.stops import end_token_ids
from raylm.models.writing import OpenVinoWriter, TransformersWriter, Writer, until_end, write_greedily

NOTHING = -1


class PairModel(Protocol):
    """What is scored on pairs.

    Attributes:
        name: of the engine.
    """

    name: str

    def outputs(self, batch: Arrays) -> np.ndarray:
        """Records [n] of ``losses`` fp32 [targets] and ``written`` int64 [longest].

        Args:
            batch: ``input_ids`` and ``attention_mask`` int64 [n, T], padded on the right; ``targets`` and
                ``decoder_input_ids`` int64 [n, targets], a target below 0 where there is none; ``limits``, how many
                texts a search follows (1: the likeliest token each time) and most tokens of a text.
        """


class EncoderDecoderPairs:
    """An encoder-decoder on pairs.

    Args:
        form: gives the losses.
        writer: of the same model.
    """

    def __init__(self, form: EncoderDecoder, writer: Writer) -> None:
        self.name, self._form, self._writer = form.name, form, writer

    def outputs(self, batch: Arrays) -> np.ndarray:
        """See :class:`PairModel`."""
        beams, most = batch["limits"].tolist()
        sources = _rows(batch["input_ids"], batch["attention_mask"])
        if beams > 1:
            assert isinstance(self._writer, TransformersWriter)
            written = self._writer.search(sources, most, beams)
        else:
            written = write_greedily(self._writer, sources, most)
        return _records(self._form.outputs(batch), written)


class CausalPairs:
    """A next-token model on pairs, in fp32 in this process.

    Args:
        path: of its directory.

    Raises:
        UserError: there is no model, or it is damaged.
    """

    name = "transformers"

    def __init__(self, path: str) -> None:
        self._model = load_model(path).eval()
        self._ends = end_token_ids(path)

    def outputs(self, batch: Arrays) -> np.ndarray:
        """See :class:`PairModel`."""
        prompts = _rows(batch["input_ids"], batch["attention_mask"])
        return _records(self._losses(prompts, batch["targets"]), self._written(prompts, *batch["limits"].tolist()))

    def _losses(self, prompts: list[list[int]], targets: np.ndarray) -> np.ndarray:
        import torch

        # Causal attention never looks at what fills up on the right.
        whole = [prompt + row[row >= 0].tolist() for prompt, row in zip(prompts, targets, strict=True)]
        ids = torch.from_numpy(pad_right(whole, max(map(len, whole))))
        with torch.inference_mode():
            logits = self._model(input_ids=ids, use_cache=False).logits
        losses = np.zeros(targets.shape, dtype=np.float32)
        for place, (prompt, row) in enumerate(zip(prompts, targets, strict=True)):
            count = int((row >= 0).sum())
            found = logits[place : place + 1, len(prompt) - 1 : len(prompt) - 1 + count]
            losses[place, :count] = nats_of_targets(found, row[None, :count])[0]
        return losses

    def _written(self, prompts: list[list[int]], beams: int, most: int) -> list[list[int]]:
        import torch

        longest = max(map(len, prompts))
        ids = torch.from_numpy(pad_right([row[::-1] for row in prompts], longest)[:, ::-1].copy())
        mask = torch.from_numpy(pad_right([[1] * len(row) for row in prompts], longest)[:, ::-1].copy())
        with torch.inference_mode():
            found = self._model.generate(
                ids, attention_mask=mask, num_beams=beams, do_sample=False, max_new_tokens=most,
                eos_token_id=sorted(self._ends) or None, pad_token_id=self._model.config.pad_token_id or 0,
            )  # fmt: skip
        return [until_end(row, self._ends) for row in found[:, longest:].tolist()]


def open_pair_model(path: str, head: Head, threads: int, *, engine: str = "transformers") -> PairModel:
    """The model at ``path`` for pairs.

    Args:
        head: of the task, which is not asked: a next-token model can be scored on pairs as well.
        engine: openvino for the export of an encoder-decoder.

    Raises:
        UserError: it cannot be loaded.
    """
    source = resolve_model(path)
    if engine == "openvino":
        exported = OpenVinoEncoderDecoder(source, threads)
        return EncoderDecoderPairs(exported, OpenVinoWriter(exported.compiled, source))
    import torch

    torch.set_num_threads(threads)
    if not load_config(source).is_encoder_decoder:
        return CausalPairs(source)
    form = TransformersEncoderDecoder(source)
    return EncoderDecoderPairs(form, TransformersWriter(form.model, source))


def _rows(ids: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    return [row[: int(kept.sum())].tolist() for row, kept in zip(ids, mask, strict=True)]


def _records(losses: np.ndarray, written: Sequence[Sequence[int]]) -> np.ndarray:
    longest = max(1, *map(len, written))
    kind = np.dtype([("losses", np.float32, (losses.shape[1],)), ("written", np.int64, (longest,))])
    found = np.empty(len(losses), dtype=kind)
    found["losses"], found["written"] = losses, pad_right(written, longest, NOTHING)
    return found
