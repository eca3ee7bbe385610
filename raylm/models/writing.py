"""Writing with an encoder-decoder, a token at a time: in this process (transformers) or with an OpenVINO export.

Token ids of sources go in; each step takes the tokens that were chosen last and gives the logits of the next ones.
Whoever asks chooses: greedily here, with a temperature in the server. Sources that are begun together are written
together, and one that has ended leaves the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raylm.data.padding import pad_right
from raylm.models.encoder_decoders import decoder_inputs, decoder_start
from raylm.models.loading import load_config
from raylm.models.openvino import EXPORT_DECODER, EXPORT_ENCODER
from raylm.models.stops import end_token_ids, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Writing(Protocol):
    """Texts that are written together."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits fp32 [n, vocabulary] after ``tokens`` int64 [n, time] and those before them; of the token that fills
        up, minus infinity."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, by their places among those that there are."""


class Writer(Protocol):
    """A model that writes.

    Attributes:
        name: of the engine.
        start: what every text begins with, and is no part of it.
        end_ids: tokens that end a text.
    """

    name: str
    start: list[int]
    end_ids: frozenset[int]

    def begin(self, sources: Sequence[Sequence[int]]) -> Writing:
        """Read the sources."""


class TransformersWriter:
    """See :class:`Writer`.

    Args:
        model: loaded, on the device that it runs on.
        source: its directory or hub name.
    """

    name = "transformers"

    def __init__(self, model: PreTrainedModel, source: str) -> None:
        self.model = model.eval()
        self.start, self.end_ids, self._never = _conventions(model.config, source)

    def begin(self, sources: Sequence[Sequence[int]]) -> Writing:
        """See :class:`Writer`."""
        import torch

        ids, mask = (torch.from_numpy(part).to(self.model.device) for part in _padded(sources))
        with torch.inference_mode():
            states = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return _TransformersWriting(self.model, states, mask, self._never)

    def search(self, sources: Sequence[Sequence[int]], most: int, beams: int) -> list[list[int]]:
        """The likeliest of ``beams`` texts that are followed at a time, as :func:`write_greedily` returns them."""
        import torch

        ids, mask = (torch.from_numpy(part).to(self.model.device) for part in _padded(sources))
        with torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=mask, num_beams=beams, do_sample=False, max_new_tokens=most,
                eos_token_id=sorted(self.end_ids) or None, pad_token_id=self.model.config.pad_token_id or 0,
            )  # fmt: skip
        # Behind the start token.
        return [until_end(row, self.end_ids) for row in found[:, 1:].tolist()]


class _TransformersWriting:
    def __init__(self, model: PreTrainedModel, states: Any, mask: Any, never: list[int]) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self._model, self._states, self._mask, self._never = model, states, mask, never
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(self, tokens: np.ndarray) -> np.ndarray:
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        with torch.inference_mode():
            output = self._model(
                encoder_outputs=BaseModelOutput(last_hidden_state=self._states),
                attention_mask=self._mask,
                decoder_input_ids=torch.from_numpy(tokens).to(self._model.device),
                past_key_values=self._cache,
                use_cache=True,
            )
        logits = output.logits[:, -1].float().cpu().numpy()
        logits[:, self._never] = -np.inf
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        import torch

        index = torch.tensor(rows, device=self._states.device)
        self._states, self._mask = self._states[index], self._mask[index]
        if self._cache.get_seq_length():
            self._cache.batch_select_indices(index)


class OpenVinoWriter:
    """See :class:`Writer`.

    Args:
        compiled: what :func:`raylm.models.encoder_decoders.compile_graphs` gives.
        source: directory of the model.
    """

    name = "openvino"

    def __init__(self, compiled: Mapping[str, Any], source: str) -> None:
        self._read, self._decoder = compiled[EXPORT_ENCODER].create_infer_request(), compiled[EXPORT_DECODER]
        self.start, self.end_ids, self._never = _conventions(load_config(source), source)

    def begin(self, sources: Sequence[Sequence[int]]) -> Writing:
        """See :class:`Writer`."""
        ids, mask = _padded(sources)
        states = np.array(self._read.infer({"input_ids": ids, "attention_mask": mask})["last_hidden_state"])
        # The keys and values are the request's own.
        return _OpenVinoWriting(self._decoder.create_infer_request(), states, mask, self._never)


class _OpenVinoWriting:
    """Rows that have ended are computed on, and not shown: the graph keeps what it has read of all sources, in the
    order in which they were begun."""

    def __init__(self, request: Any, states: np.ndarray, mask: np.ndarray, never: list[int]) -> None:
        self._request, self._states, self._mask, self._never = request, states, mask, never
        self._rows = np.arange(len(states))

    def step(self, tokens: np.ndarray) -> np.ndarray:
        given = np.zeros((len(self._states), tokens.shape[1]), dtype=np.int64)
        given[self._rows] = tokens
        found = self._request.infer(decoder_inputs(self._states, self._mask, given))["logits"]
        logits = np.array(found[self._rows, -1], dtype=np.float32)
        logits[:, self._never] = -np.inf
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = self._rows[np.array(rows, dtype=np.int64)]


def _padded(sources: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, both int64 [n, longest]; padding is id 0 under mask 0."""
    longest = max(map(len, sources))
    return pad_right(sources, longest), pad_right([np.ones(len(row)) for row in sources], longest)


def _conventions(config: PretrainedConfig, source: str) -> tuple[list[int], frozenset[int], list[int]]:
    """How a model begins and ends a text, and what it never writes.

    Models of many languages name the target's as the first token (``forced_bos_token_id`` in generation_config.json).
    """
    ends = end_token_ids(source)
    forced = read_json(source, "generation_config.json").get("forced_bos_token_id")
    start = [decoder_start(config), *([] if forced is None else [forced])]
    never = [] if config.pad_token_id is None or config.pad_token_id in ends else [config.pad_token_id]
    return start, ends, never


def until_end(tokens: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    """``tokens`` before the first that ends a text."""
    return list(itertools.takewhile(lambda token: token not in end_ids, tokens))


def write_greedily(writer: Writer, sources: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """The likeliest token each time, until a text ends or has ``most`` tokens; without the end token."""
    writing = writer.begin(sources)
    written: list[list[int]] = [[] for _ in sources]
    going, tokens = list(range(len(sources))), np.array([writer.start] * len(sources), dtype=np.int64)
    while going:
        chosen = writing.step(tokens).argmax(axis=-1)
        stay = []
        for place, (row, token) in enumerate(zip(going, chosen.tolist(), strict=True)):
            if token in writer.end_ids:
                continue
            written[row].append(token)
            if len(written[row]) < most:
                stay.append(place)
        if len(stay) < len(going) and stay:
            writing.keep(stay)
        going, tokens = [going[place] for place in stay], chosen[stay].astype(np.int64)[:, None]
    return written
