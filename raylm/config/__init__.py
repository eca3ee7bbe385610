"""YAML sections as pydantic models: the only place where defaults live."""

from raylm.config.loading import load_config
from raylm.config.stages import STAGES

__all__ = ["STAGES", "load_config"]
