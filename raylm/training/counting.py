"""The trainer of counted models: one pass over the tokens in this process, without Ray and without steps."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.families import FAMILIES, is_counted
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import TrainConfig
from raylm.data.loading import load_tokenizer
from raylm.data.tokens.shards import TokenShards
from raylm.errors import RunFailure, UserError
from raylm.evaluation.perplexity import TextStream, TransformersScorer, score_stream
from raylm.models.families import find_family
from raylm.models.families.build import build_config
from raylm.models.loading import load_model
from raylm.progress import Activity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A reloaded model gives the same numbers.
TOLERANCE = 1e-6
# Tokens of the validation text that are scored in one piece, several pieces at once.
WINDOW, TOGETHER = 256, 8


def refuse_counted(model_type: str | None, key: str, found: str, what: str) -> None:
    """Refuse a counted model, where one trained by gradient is needed.

    Raises:
        UserError: names ``key``, what was ``found``, and ``what`` cannot be done with it.
    """
    if is_counted(model_type):
        allowed = ", ".join(name for name, traits in FAMILIES.items() if not traits.counted)
        raise UserError(
            f"{key}: found {found}, whose family {model_type} is counted from data in one pass, which {what}; "
            f"allowed: a model of {allowed} or another family that is trained by gradient"
        )


def count_model(config: TrainConfig, run: RunDirectory, data: Path, tokenizer_directory: Path) -> dict[str, Any]:
    """Count a new model from the prepared shards in ``data``, and write it to ``<run>/model``.

    Returns:
        The figures of the run's report, with the names that training by gradient gives them.

    Raises:
        UserError: the shards are not of documents, or fewer than the model needs.
    """
    family, tokenizer = config.model.family, load_tokenizer(tokenizer_directory)
    assert family is not None
    record = find_family(family)
    assert record is not None
    assert record.own is not None
    assert record.own.count is not None
    tokens = read_documents(data, "train")
    began = time.monotonic()
    with Activity(f"pretrain: counting {len(tokens):,} tokens"):
        settings = build_config(family, config.model.config, tokenizer, config.training.sequence_length)
        model = record.own.count(settings, tokens)
    seconds = time.monotonic() - began
    with Activity("pretrain: writing the model and measuring it"):
        _write(model, tokenizer_directory, run.path / "model")
        loss = _loss(model, data)
        difference = _difference(model, run.path / "model", tokens[: WINDOW + 1])
    return {
        "finished": True,
        "step": 1,
        "exported_step": 1,
        "tokens": len(tokens) - 1,
        "seconds": seconds,
        "entries": sum(values.numel() for values in model.parameters()),
        "validation_loss": loss,
        "best_validation_loss": loss,
        "logits_difference": difference,
        "stopped_early": False,
        "skipped": [],
        "restarts": [],
    }


def summarize_counting(name: str, final: dict[str, Any]) -> str:
    """The run in words: ``summary.txt``."""
    found = {
        "length": f"{final['tokens']:,} tokens, counted once",
        "speed": f"{final['tokens'] / max(1e-9, final['seconds']):,.0f} tokens/s, {final['seconds']:.1f} s",
        "model": f"{final['entries']:,} numbers in its tables",
        "validation loss": f"{final['validation_loss']:.4f} nats",
        "export": f"loaded again; its logits differ by at most {final['logits_difference']:.1e}",
    }
    width = max(map(len, found)) + 2
    return f"pretrain {name}\n\n" + "".join(f"{title:<{width}}{text}\n" for title, text in found.items())


def read_documents(data: Path, split: str) -> np.ndarray:
    """A split's documents as one stream, int64 [n], with an end of text before each and after the last.

    Raises:
        UserError: the split holds pairs.
    """
    shards = TokenShards(data, split)
    if shards.kind != "documents":
        raise UserError(f"data.train: {data} holds {shards.kind}, allowed with a counted model: documents")
    tokens = shards.read(0, shards.token_count).astype(np.int64)
    return tokens if tokens[-1] == shards.eos_id else np.append(tokens, shards.eos_id)


def _write(model: PreTrainedModel, tokenizer_directory: Path, output: Path) -> None:
    """Write the model's directory; it appears whole."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    load_tokenizer(tokenizer_directory).save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def _loss(model: PreTrainedModel, data: Path) -> float:
    """Nats a token of the validation text, each with all the context that the model reads."""
    shards = TokenShards(data, "validation")
    stream = TextStream(read_documents(data, "validation"), shards.byte_count, shards.document_count)
    stride = WINDOW - (model.config.order - 1)
    nats = score_stream(stream, TransformersScorer(model), WINDOW, stride, TOGETHER)
    return nats / (len(stream.tokens) - 1)


def _difference(model: PreTrainedModel, written: Path, tokens: np.ndarray) -> float:
    """The largest difference between the model's logits and those of what was written.

    Raises:
        RunFailure: they are not the same.
    """
    import torch

    ids = torch.from_numpy(tokens[None])
    with torch.inference_mode():
        difference = (model(input_ids=ids).logits - load_model(written).eval()(input_ids=ids).logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise RunFailure(f"{written}: the reloaded model's logits differ from the counted one's by {difference}")
    return difference
