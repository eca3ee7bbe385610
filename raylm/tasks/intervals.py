"""How sure a mean is: bootstrap intervals over texts, or parts of a text (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
# Both ends of the interval that holds 95% of the resampled means.
PERCENTILES = (2.5, 97.5)


def ratio_interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95% interval of sum(sums) / sum(counts), from parts that are drawn with replacement.

    Args:
        sums, counts: of each part of the text, [parts].
    """
    draw, given, weights = np.random.default_rng(0), np.asarray(sums), np.asarray(counts)
    ratios = np.empty(RESAMPLES)
    # One after the other: all of them together would take a gigabyte for 100,000 texts.
    for number in range(RESAMPLES):
        drawn = draw.integers(0, len(given), len(given))
        ratios[number] = given[drawn].sum() / weights[drawn].sum()
    low, high = np.percentile(ratios, PERCENTILES)
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> list[float]:
    """Ends of the 95% interval of the mean of ``values``, one of each text, [texts]."""
    return list(ratio_interval(values, np.ones(len(values))))
