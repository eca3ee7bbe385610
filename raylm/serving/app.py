"""The Ray Serve application: each replica holds the model, its engine and the HTTP routes.

``raylm serve`` runs it; ``serve deploy cluster/serve.yaml`` finds :func:`build_app` by name.
"""

from __future__ import annotations

import math
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from raylm.config.loading import validate
from raylm.config.stages import ServeConfig
from raylm.errors import UserError
from raylm.models.loading import load_tokenizer, resolve_model
from raylm.serving.engines.client import start_engine
from raylm.serving.engines.opening import context_length
from raylm.serving.retrieval import Collection
from raylm.serving.routes import create_app
from raylm.serving.service import ModelService

# Requests beyond the model's own limits that a replica takes, to refuse them itself and to answer /health.
SPARE_REQUESTS = 64


class ModelReplica:
    """One copy of the model with its HTTP application.

    Args:
        config: values of a :class:`~raylm.config.stages.ServeConfig`.
        threads: threads that the model computes with.
    """

    def __init__(self, config: dict[str, Any], threads: int) -> None:
        settings = ServeConfig.model_validate(config)
        serving = settings.serving
        source = resolve_model(settings.model.path)
        self._passages = serving.passages
        self._collection = Collection.open(serving.collection) if serving.collection else None
        self._service = ModelService(
            name=model_name(settings),
            engine=start_engine(source, serving, threads=threads),
            tokenizer=load_tokenizer(source),
            context_length=context_length(source),
            max_new_tokens=serving.max_new_tokens,
            capacity=serving.max_concurrent_requests + serving.max_queued_requests,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the application of this replica."""
        return create_app(self._service, self._collection, self._passages)

    def check_health(self) -> None:
        """What Ray Serve calls regularly: a replica whose engine has died is replaced."""
        self._service.engine.check()


def model_name(config: ServeConfig) -> str:
    """Name of the model in requests."""
    return config.serving.name or config.run.name


def build_application(config: ServeConfig) -> Application:
    """The Serve application of ``config``; needs a Ray connection to see how large the hosts are."""
    serving = config.serving
    cpus = serving.cpus_per_replica
    if cpus == "auto":
        largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        cpus = max(1.0, largest // serving.replicas)
    deployment = serve.deployment(serve.ingress()(ModelReplica)).options(
        name="model",
        num_replicas=serving.replicas,
        max_ongoing_requests=serving.max_concurrent_requests + serving.max_queued_requests + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": cpus, "num_gpus": serving.gpus_per_replica},
        health_check_period_s=5,
        # A step of a large model may take long, and the replica answers nothing meanwhile.
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return deployment.bind(config.model_dump(mode="json"), max(1, math.floor(cpus)))


def build_app(args: dict[str, Any]) -> Application:
    """Builder for Serve config files: ``args`` are the sections of a ``raylm serve`` file.

    The address to listen on is the config file's own ``http_options``; ``serving.host`` and ``serving.port`` do not
    count here.

    Raises:
        UserError: a section is wrong.
    """
    config = validate(ServeConfig, args, "args")
    if config.model.path is None:
        raise UserError("args: model.path is needed")
    return build_application(config)
