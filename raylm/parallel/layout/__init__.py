"""Which rank holds which part of which parameter, and the layers and steps cut for it."""
