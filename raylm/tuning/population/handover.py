"""A member's checkpoints become another's newest one: weights, moments and place in the data.

Files of a checkpoint are written once, under names that no other start has: the two members share them on disk, where
the file system has links.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from raylm.errors import RunFailure
from raylm.training.checkpoints.manifest import MANIFEST
from raylm.training.checkpoints.store import LATEST, checkpoint_name

FOLDER = "checkpoints"


def hand_over(donor: Path, member: Path, step: int) -> None:
    """Replace the checkpoints in the directory ``member`` by that of the ``step`` in ``donor``; may be repeated.

    Raises:
        RunFailure: the donor has none of that step.
        OSError: the disk is full or cannot be written.
    """
    name = checkpoint_name(step)
    source, partial = donor / FOLDER / name, member / f".{FOLDER}.partial"
    if not (source / MANIFEST).is_file():
        raise RunFailure(f"{source} is not there, for {member.name} to go on from")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(source, partial / name, copy_function=_linked)
    (partial / LATEST).write_text(f"{name}\n")
    shutil.rmtree(member / FOLDER, ignore_errors=True)
    partial.rename(member / FOLDER)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
