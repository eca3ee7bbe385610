"""The training loop of one rank, and what it asks each step."""
