"""Heads: what stands on top of a network, and how transformers and OpenVINO call it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raylm.models.openvino import EXPORT_DECODER, EXPORT_ENCODER, EXPORT_MODEL

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.models.own_heads import OwnHead

Network = Literal["decoder", "encoder", "encoder_decoder"]


@dataclass(frozen=True)
class Head:
    """What stands on top of a network.

    Attributes:
        name: of the head.
        network: what it stands on.
        auto_class: the class that builds and loads models with it.
        outputs: names of what the model gives, in transformers and in an OpenVINO export alike.
        what: a model with it, in words.
        class_ending: what the names in the configuration's ``architectures`` end with; None for a head that is not
            told by it.
        exporter: optimum-intel's class that exports models with it; None where raylm exports none.
        graphs: files of an OpenVINO export.
        module: where ``auto_class`` is.
        takes_own: whether a head of the user's own may stand in its place.
        own: that head, where it does.
    """

    name: str
    network: Network
    auto_class: str
    outputs: tuple[str, ...]
    what: str
    class_ending: str | None = None
    exporter: str | None = None
    graphs: tuple[str, ...] = (EXPORT_MODEL,)
    module: str = "transformers"
    takes_own: bool = False
    own: OwnHead | None = None

    def load_class(self) -> Any:
        """The class that builds and loads."""
        found = getattr(importlib.import_module(self.module), self.auto_class)
        if not self.takes_own:
            return found
        from raylm.models.own_models import OwnHeadModels

        return OwnHeadModels(found, self)

    def is_named_in(self, config: PretrainedConfig) -> bool:
        """Whether the configuration is one of a model with this head."""
        ending = self.class_ending
        return ending is not None and any(name.endswith(ending) for name in config.architectures or ())


CAUSAL = Head("causal", "decoder", "AutoModelForCausalLM", ("logits",), "text generator", exporter="OVModelForCausalLM")
MASKED = Head("masked", "encoder", "AutoModelForMaskedLM", ("logits",), "masked language model")
SEQUENCE_TO_SEQUENCE = Head(
    "sequence_to_sequence", "encoder_decoder", "AutoModelForSeq2SeqLM", ("logits",), "sequence-to-sequence model",
    exporter="OVModelForSeq2SeqLM", graphs=(EXPORT_ENCODER, EXPORT_DECODER),
)  # fmt: skip
# No head: the network's own last hidden states.
NONE = Head("none", "encoder", "AutoModel", ("last_hidden_state",), "encoder", exporter="OVModelForFeatureExtraction")
READER = Head(
    "extractive_qa", "encoder", "AutoModelForQuestionAnswering", ("start_logits", "end_logits"), "reader",
    class_ending="ForQuestionAnswering", exporter="OVModelForQuestionAnswering",
)  # fmt: skip
CLASSIFIER = Head(
    "classification", "encoder", "AutoModelForSequenceClassification", ("logits",), "classifier",
    class_ending="ForSequenceClassification", exporter="OVModelForSequenceClassification", takes_own=True,
)  # fmt: skip
TAGGER = Head(
    "tagging", "encoder", "TaggerModels", ("logits",), "tagger", class_ending="ForTokenClassification",
    exporter="OVModelForTokenClassification", module="raylm.models.taggers", takes_own=True,
)  # fmt: skip
