"""Files of measured figures: what ``raylm cluster check --json`` prints, or its figures alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raylm.config.loading import read_configuration
from raylm.errors import UserError

# Figures, and the file that they are from.
Measured = tuple[dict[str, Any], str]


def read_measured(path: Path, key: str = "") -> Measured:
    """The figures in a file.

    Args:
        key: of the configuration that names it.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    origin = f"{key}: {path}" if key else str(path)
    if key and not path.is_file():
        raise UserError(f"{origin}: not found, allowed: a JSON file of measured figures")
    try:
        values = json.loads(read_configuration(path))
    except ValueError:
        raise UserError(f"{origin}: not JSON, allowed: a JSON object of measured figures") from None
    if not isinstance(values, dict):
        raise UserError(f"{origin}: found no object, allowed: a JSON object of measured figures")
    return (values["figures"] if isinstance(values.get("figures"), dict) else values), origin
