"""Search spaces as Ray Tune knows them, and the search algorithms of Ray Tune that draw from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raylm.config.tuning import Distribution, TuningSection

if TYPE_CHECKING:
    from ray.tune.search import SearchAlgorithm


def param_space(tuning: TuningSection) -> dict[str, Any]:
    """``tuning.space`` in Ray Tune's distributions."""
    return {key: _domain(distribution, tuning.searcher == "grid") for key, distribution in tuning.space.items()}


def _domain(distribution: Distribution, every: bool) -> Any:
    from ray import tune

    if distribution.grid is not None:
        return tune.grid_search(distribution.grid)
    if distribution.choice is not None:
        return tune.grid_search(distribution.choice) if every else tune.choice(distribution.choice)
    if distribution.integer is not None:
        low, high = distribution.integer
        # Ray Tune's upper bound is outside.
        return tune.grid_search(list(range(low, high + 1))) if every else tune.randint(low, high + 1)
    if distribution.uniform is not None:
        return tune.uniform(*distribution.uniform)
    return tune.loguniform(*distribution.log_uniform)


def rounds(tuning: TuningSection) -> int:
    """How often each point of the grid is tried, Ray Tune's ``num_samples``: once where nothing is drawn."""
    if tuning.searcher == "grid" or all(distribution.grid is not None for distribution in tuning.space.values()):
        return 1
    return tuning.trials


def _variants(seed: int, at_a_time: int) -> SearchAlgorithm:
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(max_concurrent=at_a_time, random_state=seed)


# By ``tuning.searcher``: the run's seed and the trials at a time -> Ray Tune's algorithm, which keeps to the latter
# itself, as Ray Tune limits its own choice of algorithm only.
SEARCHERS: dict[str, Callable[[int, int], SearchAlgorithm]] = {"random": _variants, "grid": _variants}


def draw_candidates(tuning: TuningSection, seed: int) -> list[dict[str, Any]]:
    """The candidates that Ray Tune will draw, in its order; a pure function of ``seed``.

    For what is to be known before a trial starts: how many there are, and that each is allowed.
    """
    import numpy as np
    from ray.tune.search.variant_generator import generate_variants

    # One generator for all rounds, as Ray Tune's algorithm has it.
    generator, spec = np.random.default_rng(seed), {"config": param_space(tuning)}
    return [
        variant["config"]
        for _ in range(rounds(tuning))
        for _, variant in generate_variants(spec, random_state=generator)
    ]
