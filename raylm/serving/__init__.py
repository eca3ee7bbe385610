"""The Ray Serve application: engines, retrieval, OpenAI-compatible routes."""
