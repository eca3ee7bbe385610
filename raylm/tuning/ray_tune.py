"""What every search asks of Ray Tune: to be silent, and to go on where it was interrupted."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.run_directory import read_object

if TYPE_CHECKING:
    from ray.tune import Tuner

# Folder of a run with what Ray Tune writes down.
STATE = "ray-tune"


def quiet_ray_tune() -> None:
    """Have Ray Tune say nothing: a trial that fails is a row with its reason, and the table is raylm's."""
    # The setting of Tune's newer output prints its tables whatever ``verbose`` says; the older one keeps silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # A trial that failed has no figures.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def resumed(storage: Path, name: str, trainable: Any) -> Tuner | None:
    """The search of that name as it was interrupted; None where there is none, or its record was cut off."""
    from ray import tune

    if not whole_record(storage / name):
        # Begun anew, it draws the same, and trials that have finished say so themselves.
        shutil.rmtree(storage / name, ignore_errors=True)
        return None
    # Without the searcher's state Ray Tune would draw nothing more.
    if not tune.Tuner.can_restore(storage / name) or not list((storage / name).glob("searcher-state-*.pkl")):
        return None
    return tune.Tuner.restore(str(storage / name), trainable, resume_unfinished=True)


def whole_record(search: Path) -> bool:
    """Whether none of what Ray Tune has written down of a search, and would read, was cut off; reads little of it."""
    states = sorted(search.glob("experiment_state-*.json"))
    pickles = [
        *sorted(search.glob("searcher-state-*.pkl"))[-1:],
        *sorted(search.glob("search_gen_state-*.json"))[-1:],
        *search.glob("tuner.pkl"),
    ]
    return all(read_object(path) is not None for path in states[-1:]) and all(
        path.read_bytes().endswith(pickle.STOP) for path in pickles
    )
