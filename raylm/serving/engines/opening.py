"""From a model directory to a loaded backend: which one, with what limits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from raylm.config.serving import ServingSection
from raylm.data.loading import load_tokenizer
from raylm.errors import UserError
from raylm.models.encoders import encoder_positions, open_encoder
from raylm.models.heads import SEQUENCE_TO_SEQUENCE, Head
from raylm.models.loading import load_config, load_model
from raylm.models.lora import adapter_ends, check_lora, load_lora
from raylm.models.openvino import find_export
from raylm.models.stops import end_token_ids, read_json
from raylm.serving.engines.base import Backend

if TYPE_CHECKING:
    from raylm.models.writing import Writer


def choose_engine(source: str, serving: ServingSection, key: str = "serving.engine", *, continues: bool = True) -> str:
    """``openvino``, ``transformers`` or ``vllm``: what ``serving.engine`` says, where ``auto`` goes by artifact and
    hardware.

    Args:
        continues: the model continues a text; vLLM is for no other here.

    Raises:
        UserError: OpenVINO is asked for where there is no export, or together with a GPU; vLLM without a GPU, where it
            is not installed, or for another model than one of next tokens.
    """
    if serving.adapters and serving.engine == "openvino":
        raise UserError(f"{key}: found openvino, allowed with adapters: auto, transformers, vllm")
    exported, on_gpu = find_export(source) is not None, bool(serving.gpus_per_replica)
    if serving.engine == "auto":
        if on_gpu:
            return "vllm" if continues and _has_vllm() else "transformers"
        return "openvino" if exported and not serving.adapters else "transformers"
    if serving.engine == "openvino":
        if not exported:
            raise UserError(
                f"{key}: found openvino, allowed: transformers, as {source} has no OpenVINO export "
                "(`raylm compress` makes one)"
            )
        if on_gpu:
            raise UserError(f"{key}: found openvino, allowed: transformers where serving.gpus_per_replica is not 0")
    if serving.engine == "vllm":
        if not continues:
            raise UserError(
                f"{key}: found vllm, allowed: auto, openvino, transformers, as {source} is no next-token model"
            )
        if not on_gpu:
            raise UserError(f"{key}: found vllm, allowed: auto, openvino, transformers where gpus_per_replica is 0")
        if not _has_vllm():
            raise UserError(f"{key}: found vllm, which is not installed: pip install 'raylm[gpu]'")
    return serving.engine


def _has_vllm() -> bool:
    return find_spec("vllm") is not None


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
    adapters = {name: load_lora(path, f"serving.adapters.{name}") for name, path in serving.adapters.items()}
    for name, layers in adapters.items():
        check_lora(layers, model, serving.adapters[name], f"serving.adapters.{name}")
    return TransformersBackend(
        model,
        end_ids,
        sequences=serving.max_concurrent_requests,
        tokenizer=load_tokenizer(source),
        adapters=adapters,
        ends={name: adapter_ends(path, f"serving.adapters.{name}") for name, path in serving.adapters.items()},
    )


def load_encoder_decoder(source: str, serving: ServingSection, *, threads: int) -> Backend:
    """Load an encoder-decoder; arguments as in :func:`load_backend`.

    Raises:
        UserError: it cannot be loaded.
    """
    import torch

    from raylm.models.encoder_decoders import compile_graphs
    from raylm.models.writing import OpenVinoWriter, TransformersWriter
    from raylm.serving.engines.encoder_decoder import EncoderDecoderBackend

    if choose_engine(source, serving, continues=False) == "openvino":
        writer: Writer = OpenVinoWriter(compile_graphs(source, threads), source)
    else:
        torch.set_num_threads(threads)
        model = load_model(source, head=SEQUENCE_TO_SEQUENCE).to("cuda" if serving.gpus_per_replica else "cpu")
        writer = TransformersWriter(model, source)
    return EncoderDecoderBackend(writer, sequences=serving.max_concurrent_requests)


def load_encoder(source: str, serving: ServingSection, head: Head, *, threads: int) -> Backend:
    """Load an encoder; arguments as in :func:`load_backend`.

    Args:
        head: of the model.

    Raises:
        UserError: it cannot be loaded.
    """
    from raylm.serving.engines.encoder import EncoderBackend

    config = load_config(source)
    device = "cuda" if serving.gpus_per_replica else "cpu"
    encoder = open_encoder(source, head, threads, engine=serving.engine, device=device)
    return EncoderBackend(encoder, config.pad_token_id or 0, encoder_positions(config))


def context_length(source: str) -> int | None:
    """Positions of the model, prompt and answer together; None where it has no limit."""
    values = read_json(source, "config.json")
    limits = (values.get(key) for key in ("max_position_embeddings", "n_positions", "max_sequence_length"))
    return next((int(limit) for limit in limits if limit), None)
