"""Engines turn token ids into streams of token ids: OpenVINO GenAI on CPUs, transformers for everything else."""
