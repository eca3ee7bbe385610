"""Section about the HTTP server: ``serving``."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import LONGEST_SECONDS, MOST_WORKERS, Count, PathText, Seconds, Section, Workers
from raylm.config.reading import ReadingSection

Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]


class ServedModel(Section):
    """One of ``serving.models``: a further model of the same application."""

    path: PathText
    """Run directory, Hugging Face directory or hub name."""
    engine: Literal["auto", "openvino", "transformers", "vllm"] = "auto"
    """Engine of this model, as ``serving.engine``."""
    adapters: dict[str, PathText] = Field(default_factory=dict)
    """LoRA adapters of this model, as ``serving.adapters``."""
    pooling: Literal["auto", "mean", "first", "last"] = "auto"
    """Pooling of this model, as ``serving.pooling``."""
    trust_code: bool = False
    """Run the code of this model's own head, as ``model.trust_code``."""


class ReplicaScaling(Section):
    """``serving.autoscaling``: replicas come and go with the requests that are in work and waiting."""

    least: Workers = 1
    """Fewest replicas."""
    most: Workers
    """Most replicas."""
    requests_per_replica: float = Field(default=16, gt=0, le=1e6)
    """Running and waiting requests per replica, on average. If there are more, another replica starts."""
    grow_seconds: float = Field(default=30, ge=0, le=LONGEST_SECONDS)
    """Seconds with too many requests before a replica is added."""
    shrink_seconds: float = Field(default=300, ge=0, le=LONGEST_SECONDS)
    """Seconds with too few requests before a replica is removed."""

    @model_validator(mode="after")
    def _in_order(self) -> ReplicaScaling:
        if self.most < self.least:
            raise ValueError(f"most: found {self.most}, allowed: at least {self.least} (least)")
        return self


class CollectionQuota(Section):
    """``serving.collection_quota``: what the collections of one API key may hold together, and the common ones."""

    collections: Count = 100
    """Most collections."""
    documents: Count = 100_000
    """Most documents in all of them."""
    megabytes: float = Field(default=256.0, gt=0, le=1e9)
    """Most megabytes of titles and texts (UTF-8) in all of them."""


class ServingSection(Section):
    """``serving``: address, engine, limits, and the collection that questions are answered from."""

    host: str = "127.0.0.1"
    """Address to listen on. Addresses that other machines reach (not loopback) need API keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on; it must be free."""
    name: str | None = None
    """Name of the model in requests; by default the run's name."""
    models: dict[str, ServedModel] = Field(default_factory=dict)
    """Further models of the same application, by their names in requests."""
    adapters: dict[str, PathText] = Field(default_factory=dict)
    """LoRA adapters of the model at ``model.path``, by their names in requests: directories that raylm or peft wrote,
    or runs. All share the model's weights, and are answered together."""
    loaded_models: Count | None = None
    """Models that a replica holds at a time. If a request names another one, it replaces the one unused for longest. By
    default a replica holds all."""
    engine: Literal["auto", "openvino", "transformers", "vllm"] = "auto"
    """auto takes vLLM on a GPU where it is installed, OpenVINO on a CPU where the model directory has an openvino/
    export, else transformers."""
    replicas: Workers = 1
    """Number of replicas (copies of the models); autoscaling replaces it."""
    autoscaling: ReplicaScaling | None = None
    """Let the number of replicas follow the load."""
    routing: Literal["balanced", "session"] = "balanced"
    """session: requests with the same X-Session-Id header go to the same replica, which has their text in its cache."""
    drain_seconds: float = Field(default=30, ge=0, le=LONGEST_SECONDS)
    """Seconds that a stopping replica has for its running requests."""
    update_first: bool = False
    """In an update, start new replicas before the old ones stop; needs room for both. If false, requests wait."""
    cpus_per_replica: float | Literal["auto"] = "auto"
    """CPUs that a replica reserves and computes with; auto shares the largest host's CPUs among the replicas."""
    gpus_per_replica: float = Field(default=0, ge=0, le=MOST_WORKERS)
    """GPUs that a replica reserves; with 0 the model runs on the CPU."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """vLLM: share of a GPU's memory that a model takes; several models on one GPU share it out."""
    max_concurrent_requests: Count = 64
    """Texts that a replica generates together."""
    max_queued_requests: Count = 256
    """Texts that may wait at a replica; further ones get status 503."""
    max_queue_seconds: Seconds = 5.0
    """Longest wait. A text that is expected to wait longer gets status 503 and the header Retry-After."""
    max_new_tokens: Count | None = None
    """Most tokens that a request may ask for, and of a text whose request does not say. By default what the prompt
    leaves of the model's context; 256 for a model without a limit."""
    pooling: Literal["auto", "mean", "first", "last"] = "auto"
    """How the last hidden states become an embedding; auto: as a sentence encoder's directory says, else the mean."""
    api_keys_file: PathText | None = None
    """File with an API key, or its hash as sha256:HEX, on each line; a name may follow. The environment variable
    RAYLM_API_KEYS has more keys."""
    allowed_origins: list[Origin] = Field(default_factory=list)
    """Web pages that may ask from a browser (CORS), by origin such as https://chat.example.org. With API keys, * allows
    all. None by default."""
    token_ids: bool = False
    """Let sentence encoders take token ids in /v1/embeddings. Ids of another tokenizer, as some clients send them, give
    wrong vectors."""
    requests_per_minute: Count | None = None
    """Requests per minute and API key that a replica takes; further ones get status 429. No limit by default."""
    max_body_megabytes: float = Field(default=4.0, gt=0, le=1e6)
    """Largest body of a request, in megabytes; larger ones get status 413."""
    request_seconds: Seconds = 600.0
    """Longest time for a text, in seconds; then the request ends with status 504."""
    request_log: bool = True
    """Write one line of JSON for each request to logs/ in the run directory: ids, names of keys, counts and times, no
    texts."""
    cache_gigabytes: int = Field(default=1, ge=1, le=10**6)
    """OpenVINO: memory of the key-value cache, in gigabytes."""
    collection: PathText | None = None
    """Directory made by ``raylm prepare`` whose documents /v1/qa searches."""
    collections: PathText | None = None
    """Directory of the collections that clients upload, shared by all replicas; by default in the run's directory."""
    collection_quota: CollectionQuota = CollectionQuota()
    """Most that each API key may store in collections."""
    encoder: PathText | None = None
    """Directory of a sentence encoder such as all-MiniLM-L6-v2. With it, passages are ranked by meaning and by words;
    without it, by words only (BM25)."""
    dense_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the encoder's vectors in the rank; the words (BM25) have the rest."""
    least_relevance: float = Field(default=0.35, ge=0, le=1)
    """Least relevance (0 to 1) of the best passage. Below it, a question is not answered; 0 answers all."""
    reading: ReadingSection = ReadingSection()
    """How extractive readers among the models look for answers."""
    passages: int = Field(default=3, ge=1, le=20)
    """Passages that an answer is generated from, if the request does not say."""

    @field_validator("cpus_per_replica")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value <= MOST_WORKERS:
            raise ValueError(f"allowed: a number above 0 and at most {MOST_WORKERS}, or auto")
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

    @model_validator(mode="after")
    def _adapters_fit(self) -> ServingSection:
        taken = set(self.models)
        for key, adapters in [
            ("adapters", self.adapters),
            *((f"models.{name}.adapters", model.adapters) for name, model in self.models.items()),
        ]:
            if adapters and self.loaded_models is not None:
                raise ValueError(f"loaded_models: found {self.loaded_models}, allowed without {key}")
            if double := sorted(taken & set(adapters)):
                raise ValueError(f"{key}: found {double[0]}, which is another model's name already")
            taken |= set(adapters)
        return self

    @property
    def loopback(self) -> bool:
        """Whether nobody outside this machine can connect."""
        return ipaddress.ip_address(self.host).is_loopback
