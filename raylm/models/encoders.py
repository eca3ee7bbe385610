"""Encoders: models that read a whole text and generate none, in fp32 in this process or as an OpenVINO export.

A batch of token ids goes in, an array comes out: of a reader the scores of each token as an answer's first and last, of
a classifier the logits of its labels, of a tagger those of each token, of any other encoder the last hidden states.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from raylm.config.families import ENCODERS
from raylm.data.loading import resolve_model
from raylm.errors import UserError, first_line
from raylm.models.checks import check_weights
from raylm.models.heads import NONE, Head
from raylm.models.loading import load_config, load_model
from raylm.models.openvino import EXPORT_MODEL, check_export, engine_properties, find_export

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Encoder(Protocol):
    """What reads batches, whatever computes it.

    Attributes:
        name: of the engine.
    """

    name: str

    def outputs(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """A batch to scores, fp32.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 [n, T].

        Returns:
            [n, T, 2] of a reader, [n, labels] of a classifier, [n, T, labels] of a tagger, hidden states [n, T, width]
            of another encoder.
        """


def encoder_positions(config: Any) -> int | None:
    """Most tokens of a text, or None where the model has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    traits = ENCODERS.get(config.model_type)
    if positions and traits is not None and traits.counts_behind_padding:
        return positions - (config.pad_token_id or 0) - 1
    return positions


def label_names(config: PretrainedConfig) -> list[str]:
    """The labels of a classifier or tagger, in the order of its logits."""
    return [config.id2label[number] for number in range(config.num_labels)]


def scores_are_probabilities(config: PretrainedConfig) -> bool:
    """Whether the score of a classifier with one label is its logit through the sigmoid: so if sentence-transformers'
    part of the configuration names no other function."""
    named = getattr(config, "sbert_ce_default_activation_function", None)
    section = getattr(config, "sentence_transformers", None)
    if isinstance(section, dict):
        named = section.get("activation_fn") or named
    return not (isinstance(named, str) and named.endswith("Identity"))


def sentence_pooling(directory: Path) -> Literal["first", "mean"]:
    """What the directory of a sentence encoder says; the mean where it says nothing."""
    return "first" if _settings(directory / "1_Pooling" / "config.json").get("pooling_mode_cls_token") else "mean"


def sentence_length(directory: Path, positions: int | None) -> int:
    """Most tokens of a text: what a sentence encoder was trained for, and no more than its ``positions``."""
    trained = _settings(directory / "sentence_bert_config.json").get("max_seq_length") or 512
    return min(int(trained), positions or 512)


def _settings(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values if isinstance(values, dict) else {}


class TransformersEncoder:
    """An encoder in fp32 in this process.

    Args:
        path: what :func:`raylm.data.loading.resolve_model` takes.
        head: what it has on top.
        device: where it runs.

    Raises:
        UserError: there is no model, it is damaged, or it is one of another kind.
    """

    name = "transformers"

    def __init__(self, path: str, head: Head, key: str = "model.path", device: str = "cpu") -> None:
        _check_trained(path, head, key)
        model = _load_body(path, key) if head == NONE else load_model(path, key=key, head=head)
        self._model = model.eval().to(device)
        self._outputs = head.outputs
        self._names = ["input_ids", "attention_mask"]
        if getattr(model.config, "type_vocab_size", 0) > 1:
            self._names.append("token_type_ids")

    def outputs(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See :class:`Encoder`."""
        import torch

        with torch.inference_mode():
            device = self._model.device
            output = self._model(**{name: torch.from_numpy(batch[name]).to(device) for name in self._names})
            found = [output[name] for name in self._outputs]
            joined = torch.stack(found, dim=-1) if len(found) > 1 else found[0]
            return joined.float().cpu().numpy()


class OpenVinoEncoder:
    """An encoder's OpenVINO export on the CPU.

    Args:
        directory: model directory with ``openvino/`` inside.
        head: what it has on top.
        threads: threads to compute with.

    Raises:
        UserError: there is no export, it is damaged, or it is one of another kind of model.
    """

    name = "openvino"

    def __init__(self, directory: str | Path, head: Head, threads: int, key: str = "model.path") -> None:
        export = check_export(directory, key)
        import openvino

        compiled = openvino.Core().compile_model(export / EXPORT_MODEL, "CPU", engine_properties(export, threads))
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        given = {name for port in compiled.outputs for name in port.get_names()}
        self._outputs = head.outputs
        if missing := [name for name in self._outputs if name not in given]:
            raise UserError(f"{key}: {export} gives no {', '.join(missing)}: it is not the export of a {head.what}")
        self._request = compiled.create_infer_request()

    def outputs(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See :class:`Encoder`."""
        result = self._request.infer({name: batch[name] for name in batch if name in self._inputs})
        found = [np.array(result[name]) for name in self._outputs]
        return np.stack(found, axis=-1) if len(found) > 1 else found[0]


def open_encoder(
    path: str, head: Head, threads: int, *, engine: str = "auto", key: str = "model.path", device: str = "cpu"
) -> Encoder:
    """An encoder on the engine of that name; ``auto`` takes the OpenVINO export where there is one, on a CPU.

    Raises:
        UserError: it cannot be loaded.
    """
    source = resolve_model(path, key)
    if engine == "openvino" or (engine == "auto" and device == "cpu" and find_export(source) is not None):
        return OpenVinoEncoder(source, head, threads, key)
    import torch

    torch.set_num_threads(threads)
    return TransformersEncoder(path, head, key, device)


def _check_trained(path: str, head: Head, key: str) -> None:
    """Refuse a model without the head: transformers would put a random one on it."""
    config = load_config(path, key)
    if head.class_ending is not None and not head.is_named_in(config):
        found = ", ".join(config.architectures or ()) or config.model_type
        raise UserError(
            f"{key}: found {path}, a {found}, allowed: a {head.what} (finetune with objective.type={head.name} makes "
            "one)"
        )


def _load_body(path: str, key: str) -> Any:
    """An encoder without a head."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils import logging

    check_weights(resolve_model(path, key), key)
    logging.disable_progress_bar()
    # Checkpoints of encoders carry buffers of old versions, which transformers reports at length.
    logging.set_verbosity_error()
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
    try:
        try:
            return AutoModel.from_pretrained(resolve_model(path, key), add_pooling_layer=False, **options)
        except TypeError:
            # Only BERT's relatives have a pooling layer to leave out.
            return AutoModel.from_pretrained(resolve_model(path, key), **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key}: {path} cannot be loaded: {first_line(error)}") from None
