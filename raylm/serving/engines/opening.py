"""From a model directory to a loaded backend: which one, with what limits."""

from __future__ import annotations

import json
from pathlib import Path

from raylm.config.serving import ServingSection
from raylm.errors import UserError
from raylm.models.loading import first_line, load_model
from raylm.models.openvino import find_export
from raylm.serving.engines.base import Backend


def choose_engine(source: str, serving: ServingSection, key: str = "serving.engine") -> str:
    """``openvino`` or ``transformers``: what ``serving.engine`` says, where ``auto`` goes by artifact and hardware.

    Raises:
        UserError: OpenVINO is asked for where there is no export, or together with a GPU.
    """
    exported = find_export(source) is not None
    if serving.engine == "auto":
        return "openvino" if exported and not serving.gpus_per_replica else "transformers"
    if serving.engine == "openvino":
        if not exported:
            raise UserError(
                f"{key}: found openvino, allowed: transformers, as {source} has no OpenVINO export "
                "(`raylm compress` makes one)"
            )
        if serving.gpus_per_replica:
            raise UserError(f"{key}: found openvino, allowed: transformers where serving.gpus_per_replica is not 0")
    return serving.engine


def load_backend(source: str, serving: ServingSection, *, threads: int) -> Backend:
    """Load the model; imports what only its own engine needs.

    Args:
        source: Hugging Face directory or hub name.
        serving: limits and the choice of engine.
        threads: threads that the model computes with.
    """
    end_ids = end_token_ids(source)
    if choose_engine(source, serving) == "openvino":
        from raylm.serving.engines.openvino import OpenVinoBackend

        return OpenVinoBackend(
            source,
            end_ids,
            sequences=serving.max_concurrent_requests,
            cache_gigabytes=serving.cache_gigabytes,
            threads=threads,
        )
    import torch

    from raylm.serving.engines.transformers import TransformersBackend

    torch.set_num_threads(threads)
    model = load_model(source).to("cuda" if serving.gpus_per_replica else "cpu")
    return TransformersBackend(model, end_ids, sequences=serving.max_concurrent_requests)


def load_encoder(source: str, serving: ServingSection, *, threads: int) -> Backend:
    """Load a model without a head, to make vectors of texts; arguments as in :func:`load_backend`.

    Raises:
        UserError: it cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils import logging

    from raylm.serving.engines.encoder import EncoderBackend

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    # Checkpoints of encoders carry buffers of old versions, which transformers reports at length.
    logging.set_verbosity_error()
    try:
        model = AutoModel.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, add_pooling_layer=False
        )
    except TypeError:
        # Only BERT's relatives have a pooling layer to leave out.
        model = AutoModel.from_pretrained(source, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"serving.encoder: {source} cannot be loaded: {first_line(error)}") from None
    return EncoderBackend(model.to("cuda" if serving.gpus_per_replica else "cpu"))


def end_token_ids(source: str) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json, else of config.json; may be empty."""
    for values in (_read_json(source, "generation_config.json"), _read_json(source, "config.json")):
        ids = values.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def context_length(source: str) -> int | None:
    """Positions of the model, prompt and answer together; None where it has no limit."""
    values = _read_json(source, "config.json")
    limits = (values.get(key) for key in ("max_position_embeddings", "n_positions", "max_sequence_length"))
    return next((int(limit) for limit in limits if limit), None)


def _read_json(source: str, name: str) -> dict:
    if Path(source).is_dir():
        path = Path(source) / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    from transformers.utils import cached_file

    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
