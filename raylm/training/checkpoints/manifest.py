"""What ``checkpoint.json`` of a checkpoint has to hold: its files with sizes and digests, the parameters' shapes, the
loop's state. A manifest that does not hold it is damage like any other: the checkpoint before is taken.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MANIFEST = "checkpoint.json"
# Against damage, not malice: XXH3 takes a twentieth of SHA-256's time. Checkpoints of earlier versions have the latter.
DIGEST = "xxh3"
DIGESTS = {DIGEST: xxhash.xxh3_128, "sha256": hashlib.sha256}
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class FileEntry(_Part):
    """One file of a checkpoint; it has at least one of the digests."""

    bytes: Count
    xxh3: str | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _has_digest(self) -> FileEntry:
        if self.digest is None:
            raise ValueError("no digest")
        return self

    @property
    def digest(self) -> tuple[str, str] | None:
        """Kind and value of the digest to compare with."""
        return next(((kind, value) for kind in DIGESTS if (value := getattr(self, kind)) is not None), None)


class LoopState(_Part):
    """What the training loop goes on with; a checkpoint of an earlier version may lack all but the step."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: Count
    tokens: Count = 0
    metric: str = "validation_loss"
    best: float | None = None
    best_step: Count | None = None
    best_validation_loss: float | None = None
    validation_loss: float | None = None
    without_improvement: Count = 0
    skipped: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []
    anomalies: Count = 0
    recent_losses: list[float] = []


class CheckpointManifest(_Part):
    """The whole of it.

    Attributes:
        files: by name.
        shapes: of the whole parameters, by name.
    """

    files: dict[str, FileEntry] = Field(min_length=1)
    shapes: dict[str, list[Count]] = Field(min_length=1)
    state: LoopState


def parse_manifest(text: bytes | None) -> CheckpointManifest | None:
    """The manifest; None where there is none, or it is cut off or has another shape."""
    try:
        return CheckpointManifest.model_validate_json(text or b"")
    except ValidationError:
        return None


def state_of(manifest: CheckpointManifest) -> dict[str, Any]:
    """The loop's state as it was saved."""
    return manifest.state.model_dump(exclude_unset=True)
