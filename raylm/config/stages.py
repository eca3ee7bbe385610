"""One configuration model per stage, each a selection of the sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import model_validator

from raylm.config.adapter import AdapterSection, FreezingSection
from raylm.config.base import MayChange, Section
from raylm.config.compression import CompressionSection
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.distillation import DistillationSection
from raylm.config.evaluation import EvaluationSection
from raylm.config.families import FAMILIES, is_counted
from raylm.config.layout import layout_refusal
from raylm.config.model import ModelSection, ObjectiveSection
from raylm.config.population import population_refusal
from raylm.config.quantization import RoundingSection
from raylm.config.run import LocalRunSection, ResourcesSection, TrainingRunSection, TuneRunSection
from raylm.config.serving import ServingSection
from raylm.config.tasks import TASKS
from raylm.config.training import CheckpointSection, ParallelSection, TrainingSection
from raylm.config.tuning import OBJECTIVES, TuningSection

DORA_READS = "it reads whole weights, of which ZeRO 3 leaves a worker parts"
FOUR_BITS = "4-bit weights stay whole on each worker"


class PrepareConfig(Section):
    """``raylm prepare``: sources to documents, tokenizer and token shards."""

    run: LocalRunSection
    data: DataSection
    tokenizer: TokenizerSection = TokenizerSection()
    resources: Annotated[ResourcesSection, MayChange()] = ResourcesSection()


class TrainConfig(Section):
    """What pretraining and fine-tuning share."""

    run: TrainingRunSection
    data: DataSection
    tokenizer: TokenizerSection | None = None
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    parallel: Annotated[ParallelSection, MayChange()] = ParallelSection()
    training: TrainingSection
    distillation: DistillationSection | None = None
    rounding: RoundingSection | None = None
    adapter: AdapterSection | None = None
    freezing: FreezingSection | None = None
    checkpoint: Annotated[CheckpointSection, MayChange()] = CheckpointSection()
    resources: Annotated[ResourcesSection, MayChange()] = ResourcesSection()

    @model_validator(mode="before")
    @classmethod
    def _one_pass(cls, values: Any) -> Any:
        """A counted model takes one pass over the data, so the file need not say how long to train."""
        if not isinstance(values, dict):
            return values
        model, training = values.get("model"), values.get("training", {})
        counted = isinstance(model, dict) and isinstance(model.get("family"), str) and is_counted(model["family"])
        if counted and isinstance(training, dict) and not {"steps", "tokens", "epochs"} & set(training):
            return {**values, "training": {**training, "epochs": 1}}
        return values

    @model_validator(mode="after")
    def _counted(self) -> TrainConfig:
        family = self.model.family
        if family is None or not is_counted(family):
            return self
        plain = TrainingSection(epochs=1)
        for key in TrainingSection.model_fields:
            if key != "sequence_length" and getattr(self.training, key) != getattr(plain, key):
                found = getattr(self.training, key)
                raise ValueError(
                    f"training.{key}: found {found}, allowed for the family {family}: leave it out, as "
                    "its models are counted in one pass over the data"
                )
        if self.objective.label_smoothing:
            found = self.objective.label_smoothing
            raise ValueError(f"objective.label_smoothing: found {found:g}, allowed for the family {family}: 0")
        return self

    @model_validator(mode="after")
    def _objective(self) -> TrainConfig:
        family, objective = self.model.family, self.objective
        if family is not None:
            allowed = FAMILIES[family].tasks
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
        if self.training is not None and self.training.keep_zeros and self.model.path is None:
            raise ValueError("training.keep_zeros: found true, allowed with model.path, whose zeros they are")
        if self.adapter is not None:
            self._fits_adapter()
        if self.distillation is not None and self.distillation.teacher is None:
            raise ValueError("distillation.teacher: missing; allowed: the path of a model with the same tokenizer")
        for key in ("adapter", "distillation"):
            if self.objective.head != "linear" and getattr(self, key) is not None:
                raise ValueError(f"objective.head: found {self.objective.head}, allowed with {key}: linear")
        if self.model.trust_code:
            raise ValueError("model.trust_code: found true, allowed: false; a stage that trains names objective.head")
        if self.training is not None and (refusal := layout_refusal(self)):
            raise ValueError(refusal)
        return self

    def _fits_adapter(self) -> None:
        """Refuse what changes the weights that an adapter leaves as they are."""
        if self.model.path is None:
            raise ValueError("adapter: allowed with model.path, beside whose weights it is trained")
        if self.freezing is not None:
            raise ValueError("freezing: allowed without adapter, which leaves all weights but its own as they are")
        if self.adapter.type == "dora" and self.parallel.zero_stage == 3:
            raise ValueError("parallel.zero_stage: found 3, allowed with adapter.type dora: 0, 1, 2; " + DORA_READS)
        if self.adapter.bits is not None:
            self._fits_four_bits()
        if self.rounding is not None:
            raise ValueError("adapter: allowed without rounding, which is of the weights that stay as they are")
        if self.training is not None and self.training.keep_zeros:
            raise ValueError("training.keep_zeros: found true, allowed without adapter, which leaves all weights alone")

    def _fits_four_bits(self) -> None:
        """Refuse what does not go with a model whose weights are in 4 bits."""
        if self.adapter.type == "dora":
            raise ValueError("adapter.bits: found 4, allowed with adapter.type lora; dora reads whole weights")
        if self.parallel.zero_stage == 3:
            raise ValueError(f"parallel.zero_stage: found 3, allowed with adapter.bits 4: 0, 1, 2; {FOUR_BITS}")
        if self.objective.type == "preference":
            raise ValueError(
                "adapter.bits: found 4, allowed with objective.type preference: leave it out, as answers are compared "
                "with what the model says in all its bits"
            )
        if self.training is not None and self.training.compile:
            raise ValueError("training.compile: found true, allowed with adapter.bits 4: false")


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
    """``raylm tune``: a search over fine-tuning runs, over ways to compress a model, or over both together."""

    run: TuneRunSection
    training: TrainingSection | None = None  # type: ignore[assignment]
    compression: CompressionSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    tuning: TuningSection

    @model_validator(mode="after")
    def _searched(self) -> TuneConfig:
        tuning = self.tuning
        if self.compression is None:
            if self.training is None:
                raise ValueError("training: missing; tune searches training, or with a section compression that")
            if tuning.searcher == "nsga2":
                raise ValueError("tuning.searcher: found nsga2, allowed without compression: random, grid, tpe")
            if not isinstance(tuning.metric, str) or not tuning.metric.startswith("validation_"):
                raise ValueError(
                    f"tuning.metric: found {tuning.metric}, allowed without compression: validation_loss, or another "
                    "figure of validation"
                )
            if self.resources.elastic is not None:
                raise ValueError("resources.elastic: leave it out, trials keep their number of workers")
            if tuning.scheduler == "pbt":
                self._of_population()
        else:
            self._of_compression()
        for key in tuning.space:
            section = key.partition(".")[0]
            if section in ("training", "compression") and getattr(self, section) is None:
                raise ValueError(f"tuning.space: found '{key}', allowed with a section {section} only")
        return self

    def _of_population(self) -> None:
        """Check what population based training asks of the file."""
        tuning, members = self.tuning, max(self.tuning.trials, len(self.tuning.start))
        members = min(members, tuning.budget.trials or members)
        assert self.training is not None
        if refusal := population_refusal(tuning.space, self.training, tuning.perturbation_evaluations, members):
            raise ValueError(refusal)

    def _of_compression(self) -> None:
        """Complete and check what a search over ways to compress is told."""
        tuning = self.tuning
        if tuning.metric == "validation_loss":
            tuning.metric = list(OBJECTIVES)
        if isinstance(tuning.metric, str):
            raise ValueError(
                f"tuning.metric: found {tuning.metric}, allowed with compression: a list of {', '.join(OBJECTIVES)}"
            )
        if tuning.direction == "max":
            raise ValueError("tuning.direction: found max, allowed with compression: auto, min")
        if tuning.scheduler == "pbt":
            raise ValueError("tuning.scheduler: found pbt, allowed without compression, which changes shapes")
        if tuning.test is not None:
            raise ValueError("tuning.test: allowed without compression, which measures on the data of its own")
        if tuning.budget.tokens is not None:
            raise ValueError("tuning.budget.tokens: allowed without compression, of which only some trials train")


class EvaluateConfig(Section):
    """``raylm evaluate``: a model and text to cross-entropy, perplexity and bits per byte."""

    run: LocalRunSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    evaluation: EvaluationSection = EvaluationSection()
    resources: Annotated[ResourcesSection, MayChange()] = ResourcesSection()


class CompressConfig(Section):
    """``raylm compress``: a model to a smaller one, and the report that compares them."""

    run: LocalRunSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    compression: CompressionSection = CompressionSection()
    evaluation: EvaluationSection = EvaluationSection()
    parallel: Annotated[ParallelSection, MayChange()] = ParallelSection()
    checkpoint: Annotated[CheckpointSection, MayChange()] = CheckpointSection()
    resources: Annotated[ResourcesSection, MayChange()] = ResourcesSection()


class ServeConfig(Section):
    """``raylm serve``: a model directory to an HTTP server."""

    run: LocalRunSection
    model: ModelSection
    serving: Annotated[ServingSection, MayChange()] = ServingSection()


STAGES: dict[str, type[Section]] = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "compress": CompressConfig,
    "serve": ServeConfig,
}
