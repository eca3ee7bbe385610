"""The layout of a run: what it takes, what is refused, and how ``auto`` is decided."""
