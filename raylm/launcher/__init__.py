"""Stages as jobs on a cluster: submitted, followed, listed and stopped. Knows nothing of how stages work."""
