"""A model directory behind OpenAI-compatible HTTP routes on Ray Serve: engines, routes, retrieval, ``serve``."""
