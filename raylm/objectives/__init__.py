"""From a batch to a loss. Knows neither Ray nor parallelism."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from raylm.config.model import ENCODER_OBJECTIVES, ENCODERS, FAMILY_OBJECTIVES, ObjectiveSection
from raylm.errors import UserError

if TYPE_CHECKING:
    from raylm.objectives.base import Objective

# objective.type -> where it is written. Another objective is a file, a line here, and its families in config.model.
OBJECTIVES = {
    "causal": ("raylm.objectives.causal", "CausalObjective"),
    "masked": ("raylm.objectives.masked", "MaskedObjective"),
    "span": ("raylm.objectives.span", "SpanObjective"),
    "extractive_qa": ("raylm.objectives.extractive_qa", "ExtractiveQaObjective"),
    "classification": ("raylm.objectives.classification", "ClassificationObjective"),
}


def make_objective(section: ObjectiveSection, model_type: str) -> Objective:
    """The objective of ``section`` for a model of transformers' ``model_type``; auto is the family's own.

    Raises:
        UserError: a model of that type cannot be trained so.
    """
    encoder = model_type in ENCODERS
    allowed = FAMILY_OBJECTIVES.get(model_type, ("masked",) if encoder else ("causal",))
    allowed += ENCODER_OBJECTIVES if encoder else ()
    name = allowed[0] if section.type == "auto" else section.type
    if name not in allowed:
        raise UserError(f"objective.type: found '{name}', allowed for a {model_type} model: {', '.join(allowed)}")
    if name != "causal" and section.document_boundaries != "ignore":
        raise UserError(
            f"objective.document_boundaries: found {section.document_boundaries}, allowed with objective.type {name}: "
            "ignore"
        )
    module, class_name = OBJECTIVES[name]
    return getattr(importlib.import_module(module), class_name)(section)
