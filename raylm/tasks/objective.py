"""How a task is trained: samples, the model's inputs, and a loss that is computed from logits alone.

A loss is a sum over counted targets, so that whoever adds losses up over workers and micro-batches divides once, by
the number of targets. It needs only the logits and the targets, so that a pipeline's last stage can compute it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from raylm.config.distillation import DistillationSection
from raylm.config.model import ObjectiveSection
from raylm.data.samples.token_samples import IGNORED, Samples
from raylm.data.sources.documents import Split
from raylm.errors import UserError
from raylm.models.families import find_family
from raylm.models.heads import Head
from raylm.models.own_heads import SETTING
from raylm.tasks.own_loss import OwnLoss
from raylm.tasks.rows import RowReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]
# Of logits, targets and, where labels are smoothed, the share that is spread.
CrossEntropy = Callable[..., torch.Tensor]


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Nats, in fp32, from ``logits`` (batch, time, vocabulary) and ``targets`` (batch, time).

    Args:
        smoothing: share of each target that all choices have in equal parts.
    """
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum",
        label_smoothing=smoothing,
    )  # fmt: skip


class Objective(ABC):
    """One way to train a model; holds settings only, no weights.

    A batch is a dictionary of tensors, of which ``targets`` holds what is to be predicted, :data:`IGNORED` where
    nothing is; the others are what :meth:`inputs` makes the model's arguments of.

    Attributes:
        name: value of ``objective.type``.
        head: which head the model needs.
        forward_options: further arguments of the model's forward pass.
        rows: how it reads rows of its own, each an example; None where it reads the token shards that
            ``raylm prepare`` makes.
        measures: names of what is measured while it trains; :meth:`figures` gives them. Each has a line in
            :mod:`raylm.tasks.measures`.
        predicts_tokens: whether the logits are of the vocabulary and the loss follows from their cross-entropy alone: a
            model can compute it whose parts are on several ranks.
        counts_text: whether each token of a text is a target once, so that the loss can be told per byte.
        smooths_labels: whether :meth:`training_loss` follows ``objective.label_smoothing``.
        weighs_classes: whether it follows ``objective.class_weights``.
        takes_loss: whether it follows ``objective.loss``.
        plain_heads: what ``objective.head`` may be beside a head of the user's own, which its ``head`` may take.
        groups_lengths: whether its samples follow ``training.group_by_length``: each is an example as it stands.
        choices_vary: whether what can be chosen, or how often, differs from sample to sample.
    """

    name: ClassVar[str]
    head: Head
    forward_options: ClassVar[dict[str, Any]] = {}
    rows: ClassVar[RowReader | None] = None
    measures: ClassVar[tuple[str, ...]] = ()
    predicts_tokens: ClassVar[bool] = False
    counts_text: ClassVar[bool] = False
    smooths_labels: ClassVar[bool] = False
    weighs_classes: ClassVar[bool] = False
    takes_loss: ClassVar[bool] = False
    plain_heads: ClassVar[tuple[str, ...]] = ("linear",)
    groups_lengths: ClassVar[bool] = False
    choices_vary: ClassVar[bool] = False

    def __init__(self, section: ObjectiveSection | None = None) -> None:
        self.section = section or ObjectiveSection()
        # What the model learns from a teacher, where it has one.
        self.distillation: DistillationSection | None = None
        # A loss of the user's own, in place of the cross-entropy that training minimises.
        self.own_loss: OwnLoss | None = None

    @abstractmethod
    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """The samples of a split of a prepared ``directory``: shuffled for train, in order for validation.

        Raises:
            UserError: the data, its tokenizer or ``sequence_length`` does not fit the objective.
        """

    def finish_data(self, directory: Path, model: str, sequence_length: int) -> None:
        """Add to the ``directory`` of prepared samples what only the model that training begins with can say.

        Args:
            model: its directory or hub name.
        """
        return

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, place: str) -> None:
        """Refuse a tokenizer that lacks what the objective needs.

        Args:
            place: where the tokenizer comes from, for the message.

        Raises:
            UserError: one line.
        """
        return

    def settings(self, directory: Path | str) -> dict[str, Any]:
        """Keys of the model's configuration that the prepared data in ``directory`` decide."""
        return {}

    def lengths(self, sequence_length: int) -> tuple[int, int]:
        """Tokens of a sample's input and, for a model with a decoder of its own, of its target (else 0)."""
        return sequence_length, 0

    def plain_head(self, config: PretrainedConfig) -> bool:
        """Whether the logits of a text generator are its last hidden states times the output embedding."""
        family = find_family(config.model_type)
        return family is not None and family.plain_head

    def chunks_logits(self, config: PretrainedConfig) -> bool:
        """Whether the loss of a whole model never holds all logits."""
        return False

    def example(self, sequence_length: int) -> Batch:
        """A batch of one sample without content: the memory of a pass is found with it."""
        length, target_length = self.lengths(sequence_length)
        return {
            "input_ids": torch.zeros((1, length), dtype=torch.long),
            "targets": torch.zeros((1, target_length or length), dtype=torch.long),
        }

    def inputs(self, batch: Batch, config: PretrainedConfig) -> Batch:
        """The tensors of ``batch`` that the model's forward pass takes, by its names for them."""
        return {"input_ids": batch["input_ids"]}

    def logits(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """The model's whole forward pass."""
        return model(**self.inputs(batch, model.config), **self.forward_options).logits

    def summed_loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """A batch through the whole model to the sum of its loss over all counted targets, a scalar: what training
        minimises while the model trains, else the plain loss."""
        return self.loss_of(model)(self.logits(model, batch), batch["targets"])

    def loss_of(self, model: PreTrainedModel) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """:meth:`training_loss` of a model that trains, else :meth:`loss`."""
        return self.training_loss if model.training else self.loss

    def referred_loss(self, model: PreTrainedModel, reference: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """The summed loss of a model with a teacher, whose pass has no gradient."""
        from raylm.tasks.distillation import distilled_loss

        return distilled_loss(self, model, reference, batch)

    def taught_loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """The summed loss of a model whose teacher has spoken: what it said is in ``batch``."""
        from raylm.tasks.distillation import taught_loss

        return taught_loss(self, model, batch)

    def choices(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each thing that is predicted as a row: logits [rows, choices] and targets [rows]."""
        return logits.flatten(0, 1), targets.flatten()

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, cross_entropy: CrossEntropy = summed_cross_entropy
    ) -> torch.Tensor:
        """``logits`` (batch, time, vocabulary) and ``targets`` (batch, time) to the summed loss in nats.

        Args:
            cross_entropy: of logits and targets; a rank that has a part of the vocabulary brings its own.
        """
        return cross_entropy(logits, targets)

    def training_loss(
        self, logits: torch.Tensor, targets: torch.Tensor, cross_entropy: CrossEntropy = summed_cross_entropy
    ) -> torch.Tensor:
        """What training minimises: :meth:`loss` with the section's label smoothing, or the user's own loss; its
        arguments, a sum as well."""
        if self.own_loss is not None:
            return self.own_loss.summed(*self.choices(logits, targets))
        if not self.section.label_smoothing:
            return self.loss(logits, targets, cross_entropy)
        return cross_entropy(logits, targets, self.section.label_smoothing)

    def measure(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sums over the rows of ``batch`` in which a target counts, fp64; as many of every batch, by default a sum for
        each measure."""
        return logits.new_zeros(len(self.measures), dtype=torch.float64)

    def figures(self, sums: Sequence[float], rows: float) -> dict[str, float]:
        """The measures, from what :meth:`measure` gave for all batches; by default means over the rows that count."""
        return {name: value / max(1.0, rows) for name, value in zip(self.measures, sums, strict=True)}

    def scored(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of a batch and what :meth:`measure` finds, in evaluation."""
        logits = self.logits(model, batch)
        return self.loss(logits, batch["targets"]), self.measure(logits, batch)

    def tokens(self, batch: Batch) -> torch.Tensor:
        """How many tokens of ``batch`` count as trained on; by default its counted targets."""
        return (batch["targets"] != IGNORED).sum()


class EncoderObjective(Objective):
    """What trains an encoder on whole examples, padded to a common length.

    Attributes:
        targets_each: targets of an example.
    """

    groups_lengths: ClassVar[bool] = True
    targets_each: ClassVar[int] = 1

    def head_settings(self) -> dict[str, Any]:
        """Keys of the model's configuration that say which head of the user's own it has."""
        return {} if self.head.own is None else {SETTING: self.head.own.setting()}

    def example(self, sequence_length: int) -> Batch:
        """See :class:`Objective`."""
        tokens = torch.zeros((1, sequence_length), dtype=torch.long)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "token_type_ids": tokens.clone(),
            "targets": torch.zeros((1, self.targets_each), dtype=torch.long),
        }

    def inputs(self, batch: Batch, config: PretrainedConfig) -> Batch:
        """What an encoder reads of ``batch``; token types where the model knows any."""
        names = ["input_ids", "attention_mask"]
        if getattr(config, "type_vocab_size", 0) > 1:
            names.append("token_type_ids")
        return {name: batch[name] for name in names}

    def tokens(self, batch: Batch) -> torch.Tensor:
        """All input tokens that are no padding, of the rows that count."""
        rows = (batch["targets"] != IGNORED).any(dim=1)
        return (batch["attention_mask"].sum(dim=1) * rows).sum()


class ObjectiveModule(nn.Module):
    """A model (``self.model``) with its objective: calling it with a batch gives the summed loss.

    Args:
        reference: a second model that the loss compares with, on the device where it computes. It is no part of the
            module: neither optimized, nor shared out, nor saved.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, reference: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        # In a tuple, where torch does not look for modules.
        self._reference = () if reference is None else (reference.eval().requires_grad_(False),)
        self.measured: torch.Tensor | None = None

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """A batch to the sum of its loss over all counted targets, a scalar.

        In evaluation what the objective measures is left in ``measured``, its rows behind it.
        """
        if self.training and self._reference:
            return self.objective.referred_loss(self.model, *self._reference, batch)
        if self.training and "teacher_choices" in batch:
            return self.objective.taught_loss(self.model, batch)
        if self.training or not self.objective.measures:
            return self.objective.summed_loss(self.model, batch)
        rows = (batch["targets"] != IGNORED).any(dim=1).sum().double()
        loss, measured = self.objective.scored(self.model, batch)
        self.measured = torch.cat([measured, rows[None]])
        return loss

    def logits(self, batch: Batch) -> torch.Tensor:
        """A batch to the model's logits."""
        return self.objective.logits(self.model, batch)


def input_tokens(batch: Batch) -> torch.Tensor:
    """All input tokens of the rows of ``batch`` in which any target counts: what does not count fills up the batch."""
    rows = (batch["targets"] != IGNORED).any(dim=1).sum()
    return rows * batch["input_ids"].shape[1]


def need_documents(kind: str, name: str, directory: Path | str) -> None:
    """Refuse prepared pairs for an objective that reads running text.

    Raises:
        UserError: one line.
    """
    if kind != "documents":
        raise UserError(f"objective.type: found '{name}', which needs documents; {directory} holds {kind}")
