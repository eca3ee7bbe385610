"""From a batch to a loss. Knows neither Ray nor parallelism."""
