"""From what is on disk to samples by number: token shards, and rows of a task."""
