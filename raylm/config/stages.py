"""One configuration model per stage, each a selection of the sections."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from raylm.config.base import Section
from raylm.config.compression import CompressionSection
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.evaluation import EvaluationSection
from raylm.config.families import FAMILY_TASKS
from raylm.config.model import ModelSection, ObjectiveSection
from raylm.config.run import LocalRunSection, ResourcesSection, RunSection
from raylm.config.serving import ServingSection
from raylm.config.tasks import TASKS
from raylm.config.training import CheckpointSection, ParallelSection, TrainingSection
from raylm.config.tuning import TuningSection


class PrepareConfig(Section):
    """``raylm prepare``: sources to documents, tokenizer and token shards."""

    run: LocalRunSection
    data: DataSection
    tokenizer: TokenizerSection = TokenizerSection()
    resources: ResourcesSection = ResourcesSection()


class TrainConfig(Section):
    """What pretraining and fine-tuning share."""

    run: RunSection
    data: DataSection
    tokenizer: TokenizerSection | None = None
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    parallel: ParallelSection = ParallelSection()
    training: TrainingSection
    checkpoint: CheckpointSection = CheckpointSection()
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _objective(self) -> TrainConfig:
        family, objective = self.model.family, self.objective
        if family is not None:
            allowed = FAMILY_TASKS[family]
            if objective.type == "auto":
                objective.type = allowed[0]
            if objective.type not in allowed:
                raise ValueError(
                    f"objective.type: found '{objective.type}', allowed for the family {family}: {', '.join(allowed)}"
                )
        if self.tokenizer is not None and self.tokenizer.path is None:
            for key, needed in self._tokenizer_needs.items():
                # Both false and 0, of what has to be there.
                if (found := getattr(self.tokenizer, key)) is not None and not found:
                    raise ValueError(
                        f"tokenizer.{key}: found {str(found).lower()}, allowed with objective.type {objective.type}: "
                        f"{'true' if needed is True else '1 or more'}"
                    )
        return self

    @property
    def _tokenizer_needs(self) -> dict[str, Any]:
        needs = TASKS.get(self.objective.type)
        return needs.tokenizer if needs else {}

    @property
    def new_tokenizer(self) -> TokenizerSection:
        """How raw sources are tokenized for a new model: as the file says, with the tokens that its objective needs."""
        values = {} if self.tokenizer is None else self.tokenizer.model_dump()
        if values.get("path") is None:
            missing = {key: needed for key, needed in self._tokenizer_needs.items() if values.get(key) is None}
            values |= missing
        return TokenizerSection(**values)

    @model_validator(mode="after")
    def _layout(self) -> TrainConfig:
        workers, data = self.resources.workers, self.parallel.data
        if self.resources.elastic is not None:
            for name in ("data", "tensor", "pipeline"):
                if (found := getattr(self.parallel, name)) not in ("auto", 1) or (name == "data" and found == 1):
                    raise ValueError(
                        f"parallel.{name}: found {found}, allowed with resources.elastic: "
                        f"{'auto' if name == 'data' else 1}, as the number of data-parallel workers changes"
                    )
        cut = self.parallel.cut
        if isinstance(workers, int) and workers % cut:
            raise ValueError(
                f"resources.workers: found {workers}, allowed: auto or a multiple of parallel.tensor x "
                f"parallel.pipeline ({cut})"
            )
        automatic = "auto" in (self.parallel.tensor, self.parallel.pipeline)
        if isinstance(workers, int) and isinstance(data, int) and automatic and workers % (data * cut):
            raise ValueError(
                f"parallel.data: found {data}, allowed: auto or a divisor of {workers // cut}, as data x tensor x "
                f"pipeline must equal resources.workers ({workers})"
            )
        if isinstance(workers, int) and isinstance(data, int) and not automatic and workers != data * cut:
            raise ValueError(
                f"parallel.data: found {data}, allowed: auto or {workers // cut}, as data x tensor x pipeline must "
                f"equal resources.workers ({workers})"
            )
        if cut > 1 and self.parallel.zero_stage in (2, 3):
            raise ValueError(
                f"parallel.zero_stage: found {self.parallel.zero_stage}, allowed with parallel.tensor or "
                "parallel.pipeline above 1: 0, 1, as gradients stay whole until the last micro-batch"
            )
        if cut > 1 and self.training.optimizer == "muon":
            raise ValueError(
                "training.optimizer: found muon, allowed with parallel.tensor or parallel.pipeline above 1: adamw, "
                "sgd, as muon needs whole matrices"
            )
        if cut > 1 and self.objective.document_boundaries != "ignore":
            raise ValueError(
                f"objective.document_boundaries: found {self.objective.document_boundaries}, allowed with "
                "parallel.tensor or parallel.pipeline above 1: ignore, as pipeline stages do not pass positions on"
            )
        known = workers // cut if isinstance(workers, int) and not automatic else data
        if isinstance(known, int):
            if self.training.batch_size % known:
                raise ValueError(
                    f"training.batch_size: found {self.training.batch_size}, allowed: a multiple of the "
                    f"{known} data-parallel workers"
                )
            micro = self.parallel.micro_batch_size
            if isinstance(micro, int) and (self.training.batch_size // known) % micro:
                raise ValueError(
                    f"parallel.micro_batch_size: found {micro}, allowed: a divisor of each worker's share of the "
                    f"batch ({self.training.batch_size // known})"
                )
        return self


class PretrainConfig(TrainConfig):
    """``raylm pretrain``: token shards to a model."""


class FinetuneConfig(TrainConfig):
    """``raylm finetune``: an existing model and prompt/answer pairs (or text) to a model."""

    @model_validator(mode="after")
    def _existing_model(self) -> FinetuneConfig:
        if self.model.path is None:
            raise ValueError("model.path: missing; finetune trains an existing model further")
        if self.tokenizer is not None:
            raise ValueError("tokenizer: leave it out; the model at model.path has its own")
        return self


class TuneConfig(FinetuneConfig):
    """``raylm tune``: a search over fine-tuning runs."""

    run: LocalRunSection
    tuning: TuningSection


class EvaluateConfig(Section):
    """``raylm evaluate``: a model and text to cross-entropy, perplexity and bits per byte."""

    run: LocalRunSection
    data: DataSection
    model: ModelSection
    evaluation: EvaluationSection = EvaluationSection()
    resources: ResourcesSection = ResourcesSection()


class CompressConfig(Section):
    """``raylm compress``: a model to a smaller one, and the report that compares them."""

    run: LocalRunSection
    data: DataSection
    model: ModelSection
    compression: CompressionSection = CompressionSection()
    evaluation: EvaluationSection = EvaluationSection()


class ServeConfig(Section):
    """``raylm serve``: a model directory to an HTTP server."""

    run: LocalRunSection
    model: ModelSection
    serving: ServingSection = ServingSection()


STAGES: dict[str, type[Section]] = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "compress": CompressConfig,
    "serve": ServeConfig,
}
