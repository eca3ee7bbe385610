"""Text to token shards, and token shards to batches. Knows nothing of models."""
