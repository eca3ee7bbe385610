"""What every configuration section shares: no unknown keys, no silent conversion of types."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the YAML file. Unknown keys are errors, and ``"3"`` is not ``3``."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=())
