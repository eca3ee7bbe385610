"""Section about the HTTP server: ``serving``."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, field_validator

from raylm.config.base import Section


class ServingSection(Section):
    """``serving``: address, engine, limits, and the collection that questions are answered from."""

    host: str = "127.0.0.1"
    """Address to listen on; only this machine's own, as there is no authentication yet."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on; one in use is refused."""
    name: str | None = None
    """Name of the model in requests; by default the run's name."""
    engine: Literal["auto", "openvino", "transformers"] = "auto"
    """auto takes OpenVINO GenAI on a CPU where the model directory has an openvino/ export, else transformers."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model."""
    cpus_per_replica: float | Literal["auto"] = "auto"
    """CPUs that a replica reserves and computes with; auto shares the largest host's CPUs among the replicas."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """GPUs that a replica reserves; with 0 the model runs on the CPU."""
    max_concurrent_requests: int = Field(default=64, ge=1)
    """Texts that a replica generates together."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Texts that wait at a replica for their turn; further ones get status 503."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens that a request may ask for, and what it gets if it does not say."""
    cache_gigabytes: int = Field(default=1, ge=1)
    """OpenVINO: memory of the key-value cache."""
    collection: str | None = None
    """Directory made by ``raylm prepare`` whose documents /v1/qa searches."""
    passages: int = Field(default=3, ge=1, le=20)
    """Passages that a question's answer is generated from."""

    @field_validator("cpus_per_replica")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value <= 0:
            raise ValueError("allowed: a number above 0, or auto")
        return value

    @field_validator("host")
    @classmethod
    def _loopback(cls, value: str) -> str:
        if value == "localhost":
            return "127.0.0.1"
        try:
            loopback = ipaddress.ip_address(value).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError("allowed: a loopback address (127.0.0.1), as the server has no authentication yet")
        return value
