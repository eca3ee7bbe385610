"""A population without Ray: ``population_process.py CONFIG [OVERRIDE...]`` makes all turns, one after the other.

The configuration's task has rows, which need no Ray to be prepared. A member's failure is its row, as in a search.
"""

from __future__ import annotations

import sys
from pathlib import Path

from raylm.cluster.capacity import Capacity, Node
from raylm.config import load_config
from raylm.config.run_directory import RunDirectory
from raylm.parallel.engines.environment import prepare_deepspeed


def main(path: Path, overrides: list[str]) -> None:
    prepare_deepspeed(use_gpu=False)
    from raylm.parallel.plan.precision import Precision, with_precision
    from raylm.training.inputs import validate
    from raylm.tuning.population import state
    from raylm.tuning.population.evolution import Evolution
    from raylm.tuning.population.turn import run_turn
    from raylm.tuning.search import Planner
    from raylm.tuning.searcher import make_candidates
    from raylm.tuning.stage import _job

    config = load_config("tune", path, overrides)
    run = RunDirectory("tune", config)
    planned = with_precision(config, Precision("fp32", "these are tests"))
    planner = Planner(planned, Capacity((Node(2.0),)))
    candidates = make_candidates(config.tuning, config.run.seed, ["validation_loss"], [True])
    points = [candidates.ask() for _ in range(candidates.count)]
    first, _ = planner.resolve_alike(points)
    run.create(planned)
    base, mirror = _job(config, run, validate(config), first, use_gpu=False)
    population = state.read(run.path) or state.begun(points)
    evolution = Evolution(run.path, planned, population, lambda: mirror.check_owner(base.attempt))
    while (order := evolution.next_order(())) is not None:
        evolution.record(order, run_turn(order, base, planner, None))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
