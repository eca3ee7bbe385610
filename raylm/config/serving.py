"""Section about the HTTP server: ``serving``."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import Section
from raylm.config.reading import ReadingSection


class ServedModel(Section):
    """One of ``serving.models``: a further model of the same application."""

    path: str
    """What ``model.path`` takes."""
    engine: Literal["auto", "openvino", "transformers", "vllm"] = "auto"
    """As ``serving.engine``."""
    pooling: Literal["auto", "mean", "first", "last"] = "auto"
    """As ``serving.pooling``."""


class ReplicaScaling(Section):
    """``serving.autoscaling``: replicas come and go with the requests that are in work and waiting."""

    least: int = Field(default=1, ge=1)
    """Fewest replicas."""
    most: int = Field(ge=1)
    """Most replicas."""
    requests_per_replica: float = Field(default=16, gt=0)
    """Requests in work and waiting that each replica is to have on average; more start another one."""
    grow_seconds: float = Field(default=30, ge=0)
    """Seconds that there must be too many requests before a replica is added."""
    shrink_seconds: float = Field(default=300, ge=0)
    """Seconds that there must be too few before one is taken away."""

    @model_validator(mode="after")
    def _in_order(self) -> ReplicaScaling:
        if self.most < self.least:
            raise ValueError(f"most: found {self.most}, allowed: at least {self.least} (least)")
        return self


class ServingSection(Section):
    """``serving``: address, engine, limits, and the collection that questions are answered from."""

    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own (a loopback address) needs API keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on; one in use is refused."""
    name: str | None = None
    """Name of the model in requests; by default the run's name."""
    models: dict[str, ServedModel] = Field(default_factory=dict)
    """Further models of the same application, by their names in requests."""
    loaded_models: int | None = Field(default=None, ge=1)
    """Models that a replica holds at a time, from the first one on; another is loaded when it is asked for, in place of
    the one unused for longest. By default a replica holds all."""
    engine: Literal["auto", "openvino", "transformers", "vllm"] = "auto"
    """auto takes vLLM on a GPU where it is installed, OpenVINO on a CPU where the model directory has an openvino/
    export, else transformers."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model; left out where there is autoscaling."""
    autoscaling: ReplicaScaling | None = None
    """Let the number of replicas follow the load."""
    routing: Literal["balanced", "session"] = "balanced"
    """session: requests with the same X-Session-Id header go to the same replica, which has their text in its cache."""
    drain_seconds: float = Field(default=30, ge=0)
    """Seconds that a replica that is to stop has for the requests that it has in work."""
    update_first: bool = False
    """An update starts new replicas before it stops old ones; needs room for both. Else requests wait meanwhile."""
    cpus_per_replica: float | Literal["auto"] = "auto"
    """CPUs that a replica reserves and computes with; auto shares the largest host's CPUs among the replicas."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """GPUs that a replica reserves; with 0 the model runs on the CPU."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """vLLM: share of a GPU's memory that a model takes; several models on one GPU share it out."""
    max_concurrent_requests: int = Field(default=64, ge=1)
    """Texts that a replica generates together."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Texts that wait at a replica for their turn; further ones get status 503."""
    max_queue_seconds: float = Field(default=15.0, gt=0)
    """A text that would wait longer for its turn, as the last ones went, gets status 503 and when to come back."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens that a request may ask for, and what it gets if it does not say."""
    pooling: Literal["auto", "mean", "first", "last"] = "auto"
    """How the last hidden states become an embedding; auto: as a sentence encoder's directory says, else the mean."""
    api_keys_file: str | None = None
    """File with one API key a line, or its hash as sha256:HEX, then perhaps a name. More come from RAYLM_API_KEYS."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests that a replica takes in a minute with one API key; further ones get status 429."""
    max_body_megabytes: float = Field(default=4.0, gt=0)
    """Longest body of a request; longer ones get status 413."""
    request_seconds: float = Field(default=600.0, gt=0)
    """Seconds after which a text that is still in work is ended with status 504."""
    request_log: bool = True
    """Write a line of JSON a request to logs/ in the run's directory: ids, keys' names, counts and times, no texts."""
    cache_gigabytes: int = Field(default=1, ge=1)
    """OpenVINO: memory of the key-value cache."""
    collection: str | None = None
    """Directory made by ``raylm prepare`` whose documents /v1/qa searches."""
    collections: str | None = None
    """Directory of the collections that clients upload, shared by all replicas; by default in the run's directory."""
    encoder: str | None = None
    """Directory of a sentence encoder such as all-MiniLM-L6-v2: passages are ranked by meaning too, not words alone."""
    dense_weight: float = Field(default=0.5, ge=0, le=1)
    """With an encoder: share of its vectors in the rank, beside that of the words (BM25)."""
    least_relevance: float = Field(default=0.35, ge=0, le=1)
    """A question without a passage of this relevance (0 to 1) is not answered; 0 answers all."""
    reading: ReadingSection = ReadingSection()
    """Of extractive readers among the models: how they look for answers."""
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
    def _address(cls, value: str) -> str:
        value = "127.0.0.1" if value == "localhost" else value
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise ValueError("allowed: an IP address such as 127.0.0.1 or 0.0.0.0, or localhost") from None
        return value

    @property
    def loopback(self) -> bool:
        """Whether nobody outside this machine can connect."""
        return ipaddress.ip_address(self.host).is_loopback
