"""Texts that a teacher writes, for sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947).

In: beginnings of training samples. Out: a JSONL file in the step's directory, which a training run reads as any text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.compression.material import Material
from raylm.config.distillation import SequencesSection

if TYPE_CHECKING:
    import torch

NAME = "sequences.jsonl"
BATCH_SIZE = 16
# Of the texts, those that training is validated on.
VALIDATION = 0.05


def written_data(work: Path) -> dict[str, Any]:
    """The ``data`` section of a run on the texts."""
    return {"train": str(work / NAME), "format": "jsonl", "validation_fraction": VALIDATION}


def write_texts(section: SequencesSection, teacher: str, material: Material, work: Path) -> None:
    """Have the ``teacher`` go on from beginnings of training text."""
    import torch

    from raylm.data.loading import load_tokenizer, resolve_model
    from raylm.models.loading import load_model

    source = resolve_model(teacher)
    model, tokenizer = load_model(source).eval(), load_tokenizer(source)
    starts = torch.cat([batch["input_ids"] for batch in material.batches(section.prompts, section.prompt_tokens)])
    partial = work / f".{NAME}.partial"
    with partial.open("w", encoding="utf-8") as stream, torch.random.fork_rng(devices=[]):
        torch.manual_seed(material.config.run.seed)
        for prompts in starts.split(BATCH_SIZE):
            for ids in _continued(model, prompts, section):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    partial.replace(work / NAME)


def _continued(model: Any, prompts: torch.Tensor, section: SequencesSection) -> list[list[int]]:
    import torch

    settings: dict[str, Any] = {"do_sample": section.temperature > 0}
    if section.temperature > 0:
        settings |= {"temperature": section.temperature, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        found = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=section.new_tokens,
            pad_token_id=model.config.eos_token_id or 0, **settings,
        )  # fmt: skip
    return found.tolist()
