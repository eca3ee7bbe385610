"""Preference: of two answers, write the one that people prefer (DPO: Rafailov et al. 2023, arXiv:2305.18290).

The loss of a pair is -log sigmoid(beta (d - d_ref)), with d the difference of the log-probabilities of the preferred
and the other answer by the model, and d_ref by the reference, which is the model as it was. What the reference says is
computed once, before training, and kept with the samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raylm.config.data import DataSection
from raylm.config.model import ObjectiveSection
from raylm.data.samples.array_sets import SPLITS
from raylm.data.samples.preferences import KIND, PreferenceInput, PreferenceSamples
from raylm.data.samples.token_samples import IGNORED, Samples
from raylm.data.sources.documents import Split
from raylm.models.heads import CAUSAL, Head
from raylm.tasks.base import GENERATION, Task
from raylm.tasks.chunked import head_log_probabilities
from raylm.tasks.objective import Batch, Objective
from raylm.tasks.rows import RowReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Pairs that the reference reads at a time, and in a job.
BATCH_SIZE, JOB_PAIRS = 8, 256


def _read(data: DataSection, config: PretrainedConfig, section: ObjectiveSection) -> PreferenceInput:
    return PreferenceInput(data)


class PreferenceObjective(Objective):
    """The loss of pairs of answers; one target a pair."""

    name: ClassVar[str] = "preference"
    head: ClassVar[Head] = CAUSAL
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    rows: ClassVar[RowReader | None] = RowReader(KIND, "preferences", _read)
    measures: ClassVar[tuple[str, ...]] = ("preferred", "margin")
    groups_lengths: ClassVar[bool] = True

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`; the directory is one of preferences, which have their length already."""
        path = reference_file(Path(directory), split)
        return PreferenceSamples(directory, split, seed, np.load(path) if path.is_file() else None)

    def finish_data(self, directory: Path, model: str, sequence_length: int) -> None:
        """See :class:`Objective`: ask the reference about all pairs."""
        from raylm.data.prepare.jobs import run_jobs

        for split in SPLITS:
            path = reference_file(directory, split)
            if path.is_file():
                continue
            count = PreferenceSamples(directory, split, 0).count
            firsts = range(0, count, JOB_PAIRS)
            found = run_jobs(
                f"asking the reference, {split}", ask_reference,
                [{"first": first, "stop": min(first + JOB_PAIRS, count)} for first in firsts],
                cpus=None, weights=[min(JOB_PAIRS, count - first) for first in firsts], unit="pairs",
                arguments={"directory": str(directory), "model": model, "split": split},
            )  # fmt: skip
            rows = np.array([row for part in found for row in part["rows"]], dtype=np.float32)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, rows)
            partial.replace(path)

    def example(self, sequence_length: int) -> Batch:
        """See :class:`Objective`."""
        tokens = torch.zeros((1, 2, sequence_length), dtype=torch.long)
        return {
            "input_ids": tokens,
            "labels": tokens.clone(),
            "targets": torch.zeros((1, 1), dtype=torch.long),
            "reference": torch.zeros((1, 2)),
        }

    def inputs(self, batch: Batch, config: PretrainedConfig) -> Batch:
        """See :class:`Objective`; both answers of a pair are rows."""
        return {"input_ids": batch["input_ids"].flatten(0, 1)}

    def tokens(self, batch: Batch) -> torch.Tensor:
        """The tokens of both answers of the pairs that count."""
        counted = (batch["targets"][:, 0] != IGNORED).view(-1, 1, 1)
        return ((batch["labels"] != IGNORED) & counted).sum()

    def log_probabilities(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """Of both answers of each pair, summed over their tokens, fp32 [n, 2]."""
        labels, head = batch["labels"], model.get_output_embeddings()
        counted, places = labels != IGNORED, torch.zeros_like(labels)
        places += torch.arange(labels[..., 0].numel(), device=labels.device).view(*labels.shape[:2], 1)
        if isinstance(head, nn.Linear) and self.plain_head(model.config):
            hidden = model.base_model(**self.inputs(batch, model.config), **self.forward_options).last_hidden_state
            each = head_log_probabilities(head, hidden.view(*labels.shape, -1)[counted], labels[counted])
        else:
            logits = self.logits(model, batch).view(*labels.shape, -1)[counted].float()
            each = logits.log_softmax(dim=-1).gather(1, labels[counted].unsqueeze(1))[:, 0]
        total = each.new_zeros(labels.shape[0] * 2).index_add(0, places[counted], each)
        return total.view(-1, 2)

    def _margins(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """beta (d - d_ref) of each pair, [n]."""
        found = self.log_probabilities(model, batch) - batch["reference"]
        return self.section.beta * (found[:, 0] - found[:, 1])

    def summed_loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """See :class:`Objective`."""
        return self._loss(self._margins(model, batch), batch)

    def _loss(self, margins: torch.Tensor, batch: Batch) -> torch.Tensor:
        return -(functional.logsigmoid(margins) * (batch["targets"][:, 0] != IGNORED)).sum()

    def scored(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Objective`: pairs whose preferred answer has gained on the other, and by how much."""
        margins, counted = self._margins(model, batch), batch["targets"][:, 0] != IGNORED
        gained = torch.stack([(margins > 0).double(), margins.double()]) * counted
        return self._loss(margins, batch), gained.sum(dim=1)


def reference_file(directory: Path, split: Split) -> Path:
    """Where what the reference says to a split is kept."""
    return directory / f"{split}-reference.npy"


def ask_reference(job: dict[str, int], *, directory: str, model: str, split: Split) -> dict[str, Any]:
    """The log-probabilities of both answers of the pairs ``first`` to ``stop`` - 1."""
    from raylm.models.loading import load_model

    objective, reference = PreferenceObjective(), load_model(model).eval()
    # In the order of the rows.
    samples = PreferenceSamples(directory, "validation", 0) if split == "validation" else _unshuffled(directory)
    rows: list[list[float]] = []
    for first in range(job["first"], job["stop"], BATCH_SIZE):
        numbers = np.arange(first, min(first + BATCH_SIZE, job["stop"]))
        batch = {name: torch.from_numpy(values) for name, values in samples.batch(numbers).items()}
        with torch.inference_mode():
            rows += objective.log_probabilities(reference, batch).tolist()
    return {"rows": rows}


def _unshuffled(directory: str) -> PreferenceSamples:
    samples = PreferenceSamples(directory, "train", 0)
    samples.in_order()
    return samples


TASK = Task(name="preference", head=CAUSAL, objective=PreferenceObjective, service=GENERATION)
