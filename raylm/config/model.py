"""Sections about the network and its task: ``model`` and ``objective``."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import LARGEST_COUNT, CountFromZero, MayChange, PathText, Section
from raylm.config.families import FAMILIES
from raylm.config.tasks import TRAINED_TASKS

Scheme = Literal["auto", "bio", "bioes", "none"]
# What ``objective.head`` may be beside an import path.
PLAIN_HEADS = ("linear", "crf")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class ModelSection(Section):
    """``model``: a new model of a ``family``, or the one at ``path``."""

    family: str | None = Field(default=None, description=f"Architecture of a new model: {', '.join(FAMILIES)}.")
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of the architecture's Hugging Face configuration; the vocabulary size comes from the tokenizer."""
    path: PathText | None = None
    """Hugging Face directory, run directory or hub name of an existing model."""
    trust_code: bool = False
    """evaluate and serve: import and run the code of a model whose head is of somebody's own (``objective.head``), from
    the PYTHONPATH or from the copy in the model's directory. For models from people whom you trust."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelSection:
        if (self.family is None) == (self.path is None):
            raise ValueError("give either family (a new model) or path (an existing one)")
        if self.family is not None and self.family not in FAMILIES:
            raise ValueError(f"family: found '{self.family}', allowed: {', '.join(FAMILIES)}")
        if self.path is not None and self.config:
            raise ValueError("config: leave it out with path; it is for a new model, and the one at path has its own")
        if "vocab_size" in self.config:
            raise ValueError("config.vocab_size: leave it out; the vocabulary size comes from the tokenizer")
        return self


def _label_names(value: Any) -> Any:
    """Labels such as 0 and 1, which YAML takes for numbers."""
    if not isinstance(value, dict):
        return value
    return {str(key) if type(key) is int else key: weight for key, weight in value.items()}


class ObjectiveSection(Section):
    """``objective``: what the model learns to do, and so its loss."""

    type: Literal["auto", *TRAINED_TASKS] = "auto"  # type: ignore[valid-type]
    """causal: predict each next token. masked: predict tokens that were hidden (BERT). span: write the text
    that was removed (T5). sequence_to_sequence: read a text and write another, as in translation and summarisation
    (encoder-decoders; pairs). extractive_qa: point at the answer in a context (encoders; SQuAD files). classification:
    the class of a text (encoders; rows with a text and a label). tagging: the tag of each word (encoders; rows with
    tokens and tags, or column files). preference: write the better of two answers (DPO; rows with prompt, chosen and
    rejected). auto: the family's own."""
    answer_only: bool = True
    """Pairs and conversations: count the loss on what is answered only."""
    packing: bool = True
    """Conversations: put several into a sequence. None of them sees another."""
    document_boundaries: Literal["ignore", "positions", "attention"] = "ignore"
    """causal, on documents that are packed into one sequence. ignore: a token sees all tokens before it. positions: the
    same, but positions count from each document's beginning. attention: a token sees those of its own document only,
    whose positions count from its beginning."""
    noise_fraction: float = Field(default=0.15, gt=0, lt=1)
    """masked and span: share of the tokens that are hidden."""
    span_length: float = Field(default=3.0, ge=1, le=1e6)
    """span: mean number of tokens in a gap."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that training spreads over all choices (Szegedy et al. 2016, section 7); validation counts
    plain targets."""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0, le=1e6)]] | None = None
    """classification: weights of the labels in the training loss; 1 of those that are not named. balanced: the same
    weight in all for each label. Validation counts every text once."""
    loss: str | None = None
    """classification and tagging: a loss of your own in place of the cross-entropy, as ``module:attribute``. It is a
    function of logits (float32 [n, labels]) and targets (int64 [n]) that returns a loss for each target ([n]), or a
    class whose instances are; training adds them up and divides by the number of targets. Validation counts the
    cross-entropy all the same, so that runs compare."""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``loss`` by name: of the function beside logits and targets, or of the class."""
    imports_from: Annotated[PathText | None, MayChange()] = None
    """Folder that the modules of ``loss`` and ``head`` are imported from, where Python does not find them otherwise
    (PYTHONPATH); by default that of the YAML file."""
    beta: float = Field(default=0.1, gt=0, le=1e3)
    """preference: how far the model may go from what it was; a smaller one lets it go farther."""
    source_prefix: str | None = None
    """sequence_to_sequence: what every source begins with, such as "translate English to German: ". The model keeps it,
    so that evaluate and serve put it before a text themselves. By default nothing, or what the model has kept."""
    target_length: int | None = Field(default=None, ge=4, le=LARGEST_COUNT)
    """sequence_to_sequence: most tokens of a target; by default as many as of a source
    (``training.sequence_length``)."""
    overlap: CountFromZero = 64
    """extractive_qa: tokens that two windows of a long context share."""
    scheme: Scheme = "auto"
    """tagging: how tags say where spans are. bio: B-TYPE begins a span, I-TYPE goes on with it, O is outside (IOB2).
    bioes: E-TYPE ends it, S-TYPE is a span of one word. none: each tag stands for itself, as parts of speech do. auto:
    what the tags look like."""
    head: str = "linear"
    """classification and tagging: what stands on top of the encoder. linear: a linear layer. crf, of tagging alone: a
    linear chain scores neighbouring tags as well, and the best sequence that the scheme allows is taken. Or a head of
    your own, as ``module:attribute``: a class of torch modules or a function that makes one. It is called with the
    model's configuration; the module is called with hidden states ([n, T, width]) and the attention mask (int64
    [n, T]), and returns logits: [n, labels] of texts, [n, T, labels] of tokens."""
    head_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a ``head`` of your own by name, beside the configuration."""

    _named = field_validator("class_weights", mode="before")(_label_names)

    @field_validator("loss")
    @classmethod
    def _loss_path(cls, value: str | None) -> str | None:
        if value is not None and not _IMPORT_PATH.fullmatch(value):
            raise ValueError("allowed: module:attribute, such as mypackage.losses:FocalLoss")
        return value

    @field_validator("head")
    @classmethod
    def _head_path(cls, value: str) -> str:
        if value not in PLAIN_HEADS and not _IMPORT_PATH.fullmatch(value):
            raise ValueError(f"allowed: {', '.join(PLAIN_HEADS)}, module:attribute such as mypackage.heads:MeanPooled")
        return value

    @model_validator(mode="after")
    def _own_head(self) -> ObjectiveSection:
        if not self.head_options:
            return self
        if self.head in PLAIN_HEADS:
            raise ValueError("head_options: allowed with a head of your own, whose arguments they are")
        try:
            # The model's config.json has them.
            json.dumps(self.head_options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"head_options: found {error}, allowed: numbers, texts, lists and mappings") from None
        return self

    @model_validator(mode="after")
    def _own_loss(self) -> ObjectiveSection:
        if self.loss_options and self.loss is None:
            raise ValueError("loss_options: allowed with loss, whose arguments they are")
        if self.loss is not None and self.label_smoothing:
            raise ValueError(
                f"label_smoothing: found {self.label_smoothing:g}, allowed with loss: 0; smooth in the loss"
            )
        if self.loss is not None and self.head == "crf":
            raise ValueError("head: found crf, allowed with loss: linear, as a chain has a loss of its own")
        return self
