"""OpenVINO exports of causal models: finding one, checking that it is whole, and opening its batching pipeline.

An export lives in the ``openvino/`` folder of a Hugging Face model directory. Token ids go in and come out: the
pipeline is opened without a tokenizer of its own. Needs the extra ``cpu``, which is imported only inside functions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.errors import UserError, first_line

if TYPE_CHECKING:
    from openvino_genai import ContinuousBatchingPipeline

EXPORT_FOLDER = "openvino"
EXPORT_MODEL = "openvino_model.xml"
# Of an encoder-decoder.
EXPORT_ENCODER, EXPORT_DECODER = "openvino_encoder_model.xml", "openvino_decoder_model.xml"
# OpenVINO's own tokenizer beside the model; answers that follow a schema need it.
EXPORT_TOKENIZER, EXPORT_DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
# Tokens of one step. Prompts are cut into steps of this size, so that a long one does not hold up the other requests,
# and of many that came together the first need not wait for the last. With half of it the weights are read too often.
TOKENS_PER_STEP = 256


# How an export wants to be run, beside its model.
SETTINGS = "raylm.json"
# Inputs of a matrix product that share a scale when they are rounded to 8 bits, so that the product with 8 or 4 bit
# weights is one of integers; 0 leaves them in fp32. OpenVINO does so by default on some CPUs and not on others.
ACTIVATION_GROUP = 32
CACHE_TYPES = {8: "u8", 16: "f16", 32: "f32"}


def find_export(directory: str | Path) -> Path | None:
    """The folder of the OpenVINO export in a model ``directory`` (or that folder itself); None where there is none."""
    directory = Path(directory)
    for candidate in (directory / EXPORT_FOLDER, directory):
        if any((candidate / name).is_file() for name in (EXPORT_MODEL, EXPORT_DECODER)):
            return candidate
    return None


def has_tokenizer(directory: str | Path) -> bool:
    """Whether the export in ``directory`` has a tokenizer of its own."""
    export = find_export(directory)
    return export is not None and all((export / name).is_file() for name in (EXPORT_TOKENIZER, EXPORT_DETOKENIZER))


def check_export(directory: str | Path, key: str = "model.path", graphs: Sequence[str] = (EXPORT_MODEL,)) -> Path:
    """The export's folder, after its graphs were read against their weights; loads no weights into memory.

    Args:
        graphs: files that it has to have.

    Raises:
        UserError: there is no export, its files do not fit together, or OpenVINO is not installed.
    """
    export = find_export(directory)
    if export is None:
        raise UserError(f"{key}: {directory} has no OpenVINO export ({EXPORT_FOLDER}/{graphs[0]})")
    try:
        import openvino
        import openvino_genai  # noqa: F401  imported to see that it is there
    except ImportError as error:
        raise UserError(f"{key}: {export} needs OpenVINO: pip install 'raylm[cpu]' ({error})") from None
    for graph in (export / name for name in graphs):
        for file in (graph, graph.with_suffix(".bin")):
            if not file.is_file():
                raise UserError(f"{key}: {file} is missing")
        try:
            openvino.Core().read_model(graph)
        except RuntimeError as error:
            # OpenVINO's text starts with its own source lines; the last line says what is wrong.
            reason = [line for line in str(error).splitlines() if line.strip()][-1]
            raise UserError(f"{key}: {graph} is damaged: {reason}") from None
    return export


def engine_properties(export: Path, threads: int, *, cached: bool = False) -> dict[str, object]:
    """What OpenVINO is told of how to run an ``export``, wherever that happens: in serving, scoring and measuring.

    Args:
        export: the folder.
        threads: threads to compute with.
        cached: whether keys and values are kept in a cache.
    """
    settings = read_settings(export)
    # Left to itself the plugin computes in bf16 where the CPU can, which turns near ties the other way from one
    # batch to the next. fp32 activations were as fast on AVX-512 with int8 weights, and give the same text anywhere.
    found: dict[str, object] = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": settings.get("activation_group", ACTIVATION_GROUP),
    }
    if cached and "cache_bits" in settings:
        found["KV_CACHE_PRECISION"] = CACHE_TYPES[settings["cache_bits"]]
    return found


def how_it_runs(compiled: Any) -> dict[str, str]:
    """What a compiled graph says of how it computes, and what the CPU has for that."""
    names = {
        "precision": "INFERENCE_PRECISION_HINT",
        "activation_group": "DYNAMIC_QUANTIZATION_GROUP_SIZE",
        "cache": "KV_CACHE_PRECISION",
    }
    found = {}
    for key, name in names.items():
        with contextlib.suppress(RuntimeError):
            value = compiled.get_property(name)
            found[key] = value.get_type_name() if hasattr(value, "get_type_name") else str(value)
    return found | cpu_kind()


def cpu_kind() -> dict[str, str]:
    """The CPU by name, and its widest instructions for products of integers; where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    known = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
    kind = next((flag for flag in known if flag in flags), "")
    return {"cpu": values.get("model name", ""), "instructions": kind}


def read_settings(export: Path) -> dict[str, int]:
    """How an export wants to be run; nothing in one of an older raylm."""
    try:
        found = json.loads((export / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: found[name] for name in ("activation_group", "cache_bits") if isinstance(found.get(name), int)}


def write_settings(export: Path, settings: dict[str, int]) -> None:
    """Note how an export wants to be run."""
    (export / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")


def open_pipeline(
    directory: str | Path, cache_gigabytes: int, threads: int, *, sequences: int = 64, prefix_caching: bool = True
) -> ContinuousBatchingPipeline:
    """Open the OpenVINO export in ``directory`` for continuous batching on the CPU.

    Requests are token ids (``openvino.Tensor``, int64, [1, tokens]) and per-request ``GenerationConfig``. End tokens
    come from the export's generation_config.json.

    Args:
        directory: model directory with ``openvino/`` inside, or that folder.
        cache_gigabytes: upper limit of the key-value cache; it grows as needed.
        threads: threads of a step.
        sequences: sequences decoded together.
        prefix_caching: reuse the keys and values of a prompt's start that an earlier request had.

    Raises:
        UserError: no export there, damaged, or OpenVINO not installed.
    """
    export = check_export(directory)
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = cache_gigabytes
    scheduler.max_num_seqs = sequences
    scheduler.max_num_batched_tokens = TOKENS_PER_STEP
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = prefix_caching
    properties = engine_properties(export, threads, cached=True)
    try:
        return openvino_genai.ContinuousBatchingPipeline(export, scheduler, "CPU", properties)
    except RuntimeError as error:
        raise UserError(f"model.path: {export} cannot be opened: {first_line(error)}") from None
