"""Ray Tune over training."""
