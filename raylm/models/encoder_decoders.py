"""Encoder-decoders, in fp32 in this process or as an OpenVINO export: the loss of targets, and greedy answers.

Token ids go in and come out. Both forms are called alike, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raylm.models.encoders import Encoder, open_encoder
from raylm.models.heads import SEQUENCE_TO_SEQUENCE, Head
from raylm.models.loading import load_config, load_model
from raylm.models.openvino import EXPORT_DECODER, EXPORT_ENCODER, check_export, engine_properties

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Arrays = dict[str, np.ndarray]
# In a configuration: the model is for pairs of texts.
PAIRS = "sequence_to_sequence"


class EncoderDecoder(Protocol):
    """What reads one text and writes another, whatever computes it.

    Attributes:
        name: of the engine.
    """

    name: str

    def outputs(self, batch: Arrays) -> np.ndarray:
        """The loss of each target, nats, fp32 [n, targets].

        Args:
            batch: ``input_ids`` and ``attention_mask`` [n, T], ``decoder_input_ids`` and ``targets`` [n, targets],
                int64; a target below 0 has the loss 0.
        """

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The ``count`` likeliest tokens after another, for texts of one length; no token ends an answer."""


class TransformersEncoderDecoder:
    """An encoder-decoder in fp32 in this process.

    Args:
        path: of its directory.

    Attributes:
        model: as it is loaded.

    Raises:
        UserError: there is no model, or it is damaged.
    """

    name = "transformers"

    def __init__(self, path: str, key: str = "model.path") -> None:
        self.model = load_model(path, key=key, head=SEQUENCE_TO_SEQUENCE).eval()
        self.model.generation_config.eos_token_id = None

    def outputs(self, batch: Arrays) -> np.ndarray:
        """See :class:`EncoderDecoder`."""
        import torch

        given = {name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask", "decoder_input_ids")}
        with torch.inference_mode():
            return nats_of_targets(self.model(**given, use_cache=False).logits, batch["targets"])

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """See :class:`EncoderDecoder`."""
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            written = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                min_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        # After the token that the decoder begins with.
        return written[:, 1:].tolist()


class OpenVinoEncoderDecoder:
    """An encoder-decoder's OpenVINO export on the CPU.

    Args:
        directory: model directory with ``openvino/`` inside.
        threads: threads to compute with.

    Attributes:
        compiled: the graphs by their names.

    Raises:
        UserError: there is no export, it is damaged, or it is one of another kind of model.
    """

    name = "openvino"

    def __init__(self, directory: str | Path, threads: int, key: str = "model.path") -> None:
        self.compiled = compile_graphs(directory, threads, key)
        self._graphs = Graphs(self.compiled)
        self._start = decoder_start(load_config(str(directory), key))

    def outputs(self, batch: Arrays) -> np.ndarray:
        """See :class:`EncoderDecoder`."""
        return self._graphs.losses(batch)

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """See :class:`EncoderDecoder`."""
        ids = np.array(prompts, dtype=np.int64)
        mask, last = np.ones_like(ids), np.full((len(ids), 1), self._start, dtype=np.int64)
        read, written = self._graphs.read(ids, mask), []
        for _ in range(count):
            last = self._graphs.write(read, mask, last)[:, -1:].argmax(axis=-1)
            written.append(last)
        return np.concatenate(written, axis=1).tolist()


def compile_graphs(directory: str | Path, threads: int, key: str = "model.path") -> dict[str, Any]:
    """The two graphs of the export in a model ``directory``, by their names, for the CPU.

    Raises:
        UserError: there is no export, it is damaged, or it is one of another kind of model.
    """
    export = check_export(directory, key, SEQUENCE_TO_SEQUENCE.graphs)
    import openvino

    core, properties = openvino.Core(), engine_properties(export, threads)
    return {name: core.compile_model(export / name, "CPU", properties) for name in SEQUENCE_TO_SEQUENCE.graphs}


class Graphs:
    """The two compiled graphs of an export.

    Args:
        compiled: by their names.
    """

    def __init__(self, compiled: Mapping[str, Any]) -> None:
        self._encoder, self._decoder = (
            compiled[name].create_infer_request() for name in (EXPORT_ENCODER, EXPORT_DECODER)
        )

    def read(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Hidden states of the encoder, fp32 [n, T, width]; what was written before is forgotten."""
        self._decoder.reset_state()
        found = self._encoder.infer({"input_ids": input_ids, "attention_mask": mask})
        return np.array(found["last_hidden_state"])

    def write(self, read: np.ndarray, mask: np.ndarray, input_ids: np.ndarray) -> np.ndarray:
        """Logits, fp32 [n, time, vocabulary], after ``input_ids`` [n, time] and those before them."""
        return np.array(self._decoder.infer(decoder_inputs(read, mask, input_ids))["logits"])

    def losses(self, batch: Arrays) -> np.ndarray:
        """Nats of each target, fp32 [n, targets]; see :meth:`EncoderDecoder.outputs`."""
        import torch

        read = self.read(batch["input_ids"], batch["attention_mask"])
        logits = self.write(read, batch["attention_mask"], batch["decoder_input_ids"])
        return nats_of_targets(torch.from_numpy(logits), batch["targets"])


def decoder_inputs(read: np.ndarray, mask: np.ndarray, input_ids: np.ndarray) -> Arrays:
    """What the decoder's graph takes.

    Args:
        read: the encoder's hidden states, fp32 [n, T, width].
        mask: of the text, int64 [n, T].
        input_ids: of the decoder, int64 [n, time].
    """
    return {
        "input_ids": input_ids,
        "encoder_hidden_states": read,
        "encoder_attention_mask": mask,
        "beam_idx": np.arange(len(input_ids), dtype=np.int32),
    }


def decoder_start(config: PretrainedConfig) -> int:
    """The token that a decoder begins with."""
    start = config.decoder_start_token_id
    return config.pad_token_id if start is None else start


def pairs_note(prefix: str) -> dict[str, Any]:
    """Keys of a configuration that say that its model reads and writes pairs of texts.

    They stand where T5's own configurations say what its tasks begin with.

    Args:
        prefix: what every source begins with.
    """
    return {"task_specific_params": {PAIRS: {"prefix": prefix}}}


def source_prefix(config: PretrainedConfig) -> str | None:
    """What every source begins with, of a model for pairs; None of a configuration that does not say so."""
    noted = getattr(config, "task_specific_params", None)
    noted = noted.get(PAIRS) if isinstance(noted, dict) else None
    return str(noted.get("prefix") or "") if isinstance(noted, dict) else None


def nats_of_targets(logits: torch.Tensor, targets: np.ndarray) -> np.ndarray:
    """Nats of each target [n, time] by logits [n, time, vocabulary]."""
    import torch
    from torch.nn import functional

    found = functional.cross_entropy(logits.transpose(1, 2).float(), torch.from_numpy(targets), reduction="none")
    return found.numpy()


def open_scored(path: str, head: Head, threads: int, *, engine: str = "transformers") -> Encoder | EncoderDecoder:
    """A model whose outputs a task's examples are scored by.

    Raises:
        UserError: it cannot be loaded.
    """
    if head.network == "encoder":
        return open_encoder(path, head, threads, engine=engine)
    if engine == "openvino":
        return OpenVinoEncoderDecoder(path, threads)
    import torch

    torch.set_num_threads(threads)
    return TransformersEncoderDecoder(path)
