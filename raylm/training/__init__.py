"""The training loop on Ray Train workers: optimizers, checkpoints, metrics, export."""
