"""How sure a mean over text is: bootstrap intervals over its parts (Efron 1979)."""

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
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    ratios = np.asarray(sums)[drawn].sum(axis=1) / np.asarray(counts)[drawn].sum(axis=1)
    low, high = np.percentile(ratios, PERCENTILES)
    return float(low), float(high)
