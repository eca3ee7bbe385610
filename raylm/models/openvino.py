"""OpenVINO exports of causal models: finding one, checking that it is whole, and opening its batching pipeline.

An export lives in the ``openvino/`` folder of a Hugging Face model directory. Token ids go in and come out: the
pipeline is opened without a tokenizer of its own. Needs the extra ``cpu``, which is imported only inside functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raylm.errors import UserError, first_line

if TYPE_CHECKING:
    from openvino_genai import ContinuousBatchingPipeline

EXPORT_FOLDER = "openvino"
EXPORT_MODEL = "openvino_model.xml"
# OpenVINO's own tokenizer beside the model; answers that follow a schema need it.
EXPORT_TOKENIZER, EXPORT_DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
# Tokens of one step. Prompts are cut into steps of this size, so that a long one does not hold up the other requests,
# and of many that came together the first need not wait for the last. With half of it the weights are read too often.
TOKENS_PER_STEP = 256


def find_export(directory: str | Path) -> Path | None:
    """The folder of the OpenVINO export in a model ``directory`` (or that folder itself); None where there is none."""
    directory = Path(directory)
    for candidate in (directory / EXPORT_FOLDER, directory):
        if (candidate / EXPORT_MODEL).is_file():
            return candidate
    return None


def has_tokenizer(directory: str | Path) -> bool:
    """Whether the export in ``directory`` has a tokenizer of its own."""
    export = find_export(directory)
    return export is not None and all((export / name).is_file() for name in (EXPORT_TOKENIZER, EXPORT_DETOKENIZER))


def check_export(directory: str | Path, key: str = "model.path") -> Path:
    """The export's folder, after its graph was read against its weights; loads no weights into memory.

    Raises:
        UserError: there is no export, its files do not fit together, or OpenVINO is not installed.
    """
    export = find_export(directory)
    if export is None:
        raise UserError(f"{key}: {directory} has no OpenVINO export ({EXPORT_FOLDER}/{EXPORT_MODEL})")
    try:
        import openvino
        import openvino_genai  # noqa: F401  imported to see that it is there
    except ImportError as error:
        raise UserError(f"{key}: {export} needs OpenVINO: pip install 'raylm[cpu]' ({error})") from None
    weights = (export / EXPORT_MODEL).with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"{key}: {weights} is missing")
    try:
        openvino.Core().read_model(export / EXPORT_MODEL)
    except RuntimeError as error:
        # OpenVINO's text starts with its own source lines; the last line says what is wrong.
        reason = [line for line in str(error).splitlines() if line.strip()][-1]
        raise UserError(f"{key}: {export / EXPORT_MODEL} is damaged: {reason}") from None
    return export


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
    # Left to itself the plugin computes in bf16 where the CPU can, which turns near ties the other way from one
    # batch to the next. fp32 activations were as fast on AVX-512 with int8 weights, and give the same text anywhere.
    properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        return openvino_genai.ContinuousBatchingPipeline(export, scheduler, "CPU", properties)
    except RuntimeError as error:
        raise UserError(f"model.path: {export} cannot be opened: {first_line(error)}") from None
