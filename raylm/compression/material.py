"""The data of a ``compress`` run as training samples: for calibration, and for the training that follows a step.

In: the ``data`` section. Out: batches of the objective that the model's task has, and the configuration of a training
run on the same data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster.session import ray_session
from raylm.config.distillation import DistillationSection
from raylm.config.model import ModelSection
from raylm.config.run import TrainingRunSection
from raylm.config.stages import CompressConfig, FinetuneConfig
from raylm.config.training import TrainingSection
from raylm.errors import UserError

if TYPE_CHECKING:
    from raylm.data.sources.documents import Split
    from raylm.tasks.base import Task
    from raylm.tasks.objective import Batch, Objective
    from raylm.training.inputs import Checked

# Training with fewer sequences a batch says less of each; memory is bounded by the sequences' length.
BATCH_SIZE = 8


@dataclass
class Material:
    """The run's data.

    Attributes:
        config: the file.
        task: of the model.
        source: directory of the model that the run began with, with whose tokenizer everything is read.
    """

    config: CompressConfig
    task: Task
    source: str
    _checked: Checked | None = field(default=None, repr=False)
    _section: TrainingSection = field(default_factory=lambda: TrainingSection(steps=1), repr=False)
    _directory: Path | None = None

    def check(self, sections: list[TrainingSection]) -> None:
        """Read all of the data and refuse what cannot be trained on; write nothing.

        Args:
            sections: the training of the steps.

        Raises:
            UserError: one line.
        """
        from raylm.training.inputs import validate

        if self.task.objective is None:
            raise UserError(
                f"compression.steps: found a step that reads training samples, allowed for a {self.task.head.what}: "
                "quantize to 8 bits alone, as it has no objective to train by"
            )
        self._section = sections[0] if sections else self._section
        for section in sections or [self._section]:
            self._checked = validate(self.training(self.source, section, self.config.run.directory))

    def prepare(self) -> None:
        """Have the samples on disk, where they are not; needs :meth:`check` before."""
        from raylm.training.inputs import ensure_data

        assert self._checked is not None
        config = self.training(self.source, self._section, self.config.run.directory)
        with ray_session():
            self._directory, _ = ensure_data(config, self.config.run.directory, self._checked)

    def use(self, directory: Path) -> None:
        """Take a set that is prepared already."""
        self._directory = directory

    @property
    def directory(self) -> Path:
        """Where the samples are."""
        assert self._directory is not None
        return self._directory

    @property
    def objective(self) -> Objective:
        """Of the model's task."""
        from raylm.models.loading import load_config
        from raylm.tasks import make_objective

        return make_objective(self._objective, load_config(self.source).model_type)

    @property
    def _objective(self) -> Any:
        section = self.config.objective
        return section if section.type != "auto" else section.model_copy(update={"type": self.task.name})

    def batches(self, count: int, sequence_length: int, split: Split = "train") -> list[Batch]:
        """``count`` samples, or all where there are fewer, in batches on the CPU.

        Raises:
            UserError: the data does not fit ``sequence_length``.
        """
        import numpy as np
        import torch

        from raylm.training.loop.batches import to_tensors

        samples = self.objective.samples(self.directory, split, sequence_length, self.config.run.seed)
        numbers = np.arange(min(count, samples.count))
        return [
            to_tensors(samples, numbers[first : first + BATCH_SIZE], torch.device("cpu"))
            for first in range(0, len(numbers), BATCH_SIZE)
        ]

    def used_tokens(self) -> list[int]:
        """Numbers of the tokens that the training text uses, in order; of the original's tokenizer.

        Raises:
            UserError: there is no such text.
        """
        import numpy as np

        from raylm.data.loading import load_tokenizer
        from raylm.data.samples.evaluation_texts import evaluation_texts

        evaluation = self.task.evaluation
        if evaluation is None or self.task.objective is None or self.task.objective.rows is None:
            tokenizer = load_tokenizer(self.source)
            texts = evaluation_texts(self.config.data, "train")
            parts = [np.unique(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
        else:
            section = self.config.evaluation.model_copy(update={"split": "train"})
            # All of it, not the part that forms are compared on.
            whole = self.config.compression.model_copy(update={"text_tokens": None})
            given = self.config.model_copy(update={"evaluation": section, "compression": whole})
            opened = evaluation.open(given, self.source)
            # What is to be written is in the vocabulary as well.
            sides = ("input_ids", "targets") if self.task.generates else ("input_ids",)
            parts = [np.unique(batch[side]) for batch in opened.batches for side in sides]
            parts = [numbers[numbers >= 0] for numbers in parts]
        if not parts:
            raise UserError(f"data: {', '.join(self.config.data.train_sources)} has no text in the train split")
        return np.unique(np.concatenate(parts)).tolist()

    def training(
        self,
        model: str | Path,
        section: TrainingSection,
        directory: Path,
        keys: dict[str, dict[str, Any]] | None = None,
        distillation: DistillationSection | None = None,
        data: dict[str, Any] | None = None,
    ) -> FinetuneConfig:
        """The configuration of a training run in ``directory``.

        Args:
            keys: of further sections, or of those that are here.
            data: the section, instead of the run's.

        Raises:
            UserError: keys do not fit together.
        """
        from raylm.config.loading import validate

        run = self.config.run
        sections = {
            "run": TrainingRunSection(name=directory.name, storage=str(directory.parent), seed=run.seed),
            "data": self.config.data, "model": ModelSection(path=str(model)), "objective": self._objective,
            "parallel": self.config.parallel, "training": section, "checkpoint": self.config.checkpoint,
            "resources": self.config.resources, "distillation": distillation,
        }  # fmt: skip
        values = {name: found.model_dump(mode="json") for name, found in sections.items() if found is not None}
        if data is not None:
            values["data"] = data
        elif (prepared := self._prepared) is not None:
            values["data"] |= {"train": str(prepared), "validation": None}
        for name, more in (keys or {}).items():
            values[name] = values.get(name, {}) | more
        return validate(FinetuneConfig, values, "compression.steps")

    @property
    def _prepared(self) -> Path | None:
        """The set that is there by now; rows of examples are read by each run itself."""
        rows = self.task.objective is not None and self.task.objective.rows is not None
        return None if rows else self._directory
