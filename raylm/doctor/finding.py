"""The record that every probe gives, and how sizes are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "broken"]
GB = 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        what: what was looked at, such as ``disk``.
        found: what is there, with units.
        state: ``broken`` where a stage cannot work, ``warning`` where it may not or only slowly.
        remedy: a command or a short sentence; empty where all is well.
    """

    what: str
    found: str
    state: State = "ok"
    remedy: str = ""


def gigabytes(count: float) -> str:
    """Bytes as 10^9 bytes, in two or three digits: ``1.5 GB``, ``0.06 GB``, ``250 GB``."""
    value = count / GB
    return f"{value:.0f} GB" if value >= 10 else f"{value:.1f} GB" if value >= 1 else f"{value:.2f} GB"
