"""The Ray Serve application: each replica holds the model, its engine and the HTTP routes.

``raylm serve`` runs it; ``serve deploy cluster/serve.yaml`` finds :func:`build_app` by name.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import ipaddress
import math
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client

from raylm.cluster.environment import API_KEYS_VARIABLE
from raylm.config.loading import validate
from raylm.config.serving import ServedModel, ServingSection
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer, resolve_model
from raylm.errors import UserError
from raylm.models.encoder_decoders import source_prefix
from raylm.models.encoders import sentence_pooling
from raylm.models.loading import load_config
from raylm.models.lora import adapter_tokenizer
from raylm.serving.deploy.models import Models
from raylm.serving.deploy.service import ModelService
from raylm.serving.engines.adapted import AdaptedEngine
from raylm.serving.engines.client import Engine, start_engine
from raylm.serving.engines.on_demand import EnginePool
from raylm.serving.engines.opening import choose_engine, context_length
from raylm.serving.http import request_log
from raylm.serving.http.access import check_origins, load_key_hashes
from raylm.serving.http.browsers import allow_origins
from raylm.serving.http.gate import Gate, Limits
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.routes import create_app
from raylm.serving.retrieval.opening import open_library
from raylm.serving.tasks.encoders import EncoderService
from raylm.serving.tasks.sources import SourceService
from raylm.tasks import task_of

# Requests beyond the model's own limits that a replica takes, to refuse them itself and to answer /health.
SPARE_REQUESTS = 64
ROUTERS = {
    "balanced": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "session": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter",
}


class ModelReplica:
    """One copy of the model with its HTTP application.

    Args:
        config: values of a :class:`~raylm.config.stages.ServeConfig`.
        threads: threads that the model computes with.
        key_hashes: SHA-256 of the API keys, hexadecimal, and what to call each in logs; none lets everybody in.
    """

    async def __init__(self, config: dict[str, Any], threads: int, key_hashes: dict[str, str]) -> None:
        settings = ServeConfig.model_validate(config)
        serving = settings.serving
        refuse_strangers(key_hashes)
        self._serving, self._key_hashes = serving, key_hashes
        self._library = open_library(settings, threads)
        self._metrics = ServerMetrics(export=True)
        pool = EnginePool(serving.loaded_models, serving.request_seconds) if serving.loaded_models else None
        self._models = Models(
            [
                service
                for name in model_sources(settings)
                for service in open_services(settings, name, threads, self._metrics, pool)
            ]
        )
        if pool:
            # How long a start may take is not for serving.request_seconds to say.
            for service in self._models.services[: serving.loaded_models]:
                await pool.start(service.name)
        if serving.request_log:
            replica = serve.get_replica_context().replica_tag
            request_log.write_to(settings.run.directory / "logs" / f"requests-{replica}.jsonl")
        # What is here now stays: to look through a million objects again and again would stop the event loop.
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the application of this replica."""
        app = create_app(
            self._models, self._metrics, self._library, self._serving.passages, self._serving.least_relevance
        )
        limits = Limits.of(self._serving)
        app.add_middleware(Gate, limits=limits, key_hashes=self._key_hashes, metrics=self._metrics)
        if self._serving.allowed_origins:
            app.add_middleware(allow_origins, origins=self._serving.allowed_origins)
        return app

    async def check_health(self) -> None:
        """What Ray Serve calls regularly: a replica whose engine has died or hangs is replaced."""
        self._library.check()
        self._library.tend()
        for service in self._models.services:
            # It reads what the engine's processes have taken, among all of the machine's: not in the event loop.
            await asyncio.to_thread(service.engine.check)
        self._metrics.publish(self._models.services)


def model_name(config: ServeConfig) -> str:
    """Name of the model in requests."""
    return config.serving.name or config.run.name


def model_sources(config: ServeConfig) -> dict[str, ServedModel]:
    """The models to serve by their names in requests; the first is that of the file's ``model`` section."""
    assert config.model.path is not None
    serving = config.serving
    main = ServedModel(
        path=config.model.path,
        engine=serving.engine,
        pooling=serving.pooling,
        adapters=serving.adapters,
        trust_code=config.model.trust_code,
    )
    return {model_name(config): main, **serving.models}


def open_services(
    config: ServeConfig,
    name: str,
    threads: int,
    metrics: ServerMetrics | None = None,
    pool: EnginePool | None = None,
) -> list[ModelService]:
    """A model and its adapters, all of which its engine answers; arguments as in :func:`open_service`."""
    model = open_service(config, name, threads, metrics, pool)
    adapters = model_sources(config)[name].adapters
    assert not adapters or isinstance(model.engine, Engine)
    return [
        model,
        *(
            dataclasses.replace(
                model,
                name=adapter,
                engine=AdaptedEngine(model.engine, adapter),
                tokenizer=adapter_tokenizer(path, f"serving.adapters.{adapter}", model.tokenizer),
                parent=name,
            )
            for adapter, path in adapters.items()
        ),
    ]


def open_service(
    config: ServeConfig,
    name: str,
    threads: int,
    metrics: ServerMetrics | None = None,
    pool: EnginePool | None = None,
) -> ModelService:
    """Load one model and start its engine, or leave that to the ``pool``."""
    model = model_sources(config)[name]
    serving = config.serving.model_copy(update={"engine": model.engine, "adapters": model.adapters})
    source = resolve_model(model.path)
    model_config = load_config(source)
    task = task_of(model_config)
    start = functools.partial(start_engine, source, serving, threads=threads, task=task.name, trusted=model.trust_code)
    engine = pool.engine(name, choose_engine(source, serving, continues=task.continues), start) if pool else start()
    common: dict[str, Any] = {
        "name": name,
        "engine": engine,
        "tokenizer": load_tokenizer(source),
        "max_new_tokens": serving.max_new_tokens,
        "capacity": serving.max_concurrent_requests + serving.max_queued_requests,
        "queue_seconds": serving.max_queue_seconds,
        "request_seconds": serving.request_seconds,
        "pooling": choose_pooling(model.pooling, source),
        "metrics": metrics,
        "service": task.service,
        "width": getattr(model_config.get_text_config(), "hidden_size", None),
        "vocabulary": getattr(model_config.get_text_config(), "vocab_size", None),
    }
    if task.continues:
        return ModelService(**common, context_length=context_length(source))
    if task.generates:
        return SourceService(**common, context_length=context_length(source), prefix=source_prefix(model_config) or "")
    assert task.service.settings is not None
    return EncoderService(**common, **task.service.settings(source, model_config, serving))


def choose_pooling(pooling: str, source: str) -> str:
    """``pooling``, where auto is what the directory of a sentence encoder says, else the mean."""
    return sentence_pooling(Path(source)) if pooling == "auto" else pooling


def build_application(config: ServeConfig) -> Application:
    """The Serve application of ``config``; needs a Ray connection to see how large the hosts are."""
    serving = config.serving
    cpus = serving.cpus_per_replica
    if cpus == "auto":
        largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        cpus = max(1.0, largest // (serving.autoscaling.most if serving.autoscaling else serving.replicas))
    deployment = serve.deployment(serve.ingress()(ModelReplica)).options(
        name="model",
        **_scaling(serving),
        request_router_config=RequestRouterConfig(request_router_class=ROUTERS[serving.routing]),
        # A replica refuses what goes beyond its own queue; these wait while replicas are being replaced.
        max_queued_requests=serving.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        max_surge_percent=100 if serving.update_first else 0,
        max_ongoing_requests=serving.max_concurrent_requests + serving.max_queued_requests + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": cpus, "num_gpus": serving.gpus_per_replica},
        health_check_period_s=5,
        # A step of a large model may take long, and the replica answers nothing meanwhile.
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=serving.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    values = config.model_dump(mode="json")
    # A replica's working directory may be another one.
    values["run"]["storage"] = str(config.run.directory.parent)
    key_hashes = load_key_hashes(serving)
    check_origins(serving, key_hashes)
    return deployment.bind(values, max(1, math.floor(cpus)), key_hashes)


def _scaling(serving: ServingSection) -> dict[str, Any]:
    """How many replicas, as Serve takes it."""
    scaling = serving.autoscaling
    if scaling is None:
        return {"num_replicas": serving.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": scaling.least,
            "max_replicas": scaling.most,
            "target_ongoing_requests": scaling.requests_per_replica,
            "upscale_delay_s": scaling.grow_seconds,
            "downscale_delay_s": scaling.shrink_seconds,
            # Look back no longer than the shorter of the two waits.
            "look_back_period_s": max(1.0, min(30.0, scaling.grow_seconds, scaling.shrink_seconds)),
            "metrics_interval_s": 1.0,
        }
    }


def refuse_strangers(key_hashes: dict[str, str]) -> None:
    """Refuse to answer other machines without API keys, whatever file the address came from; call in a replica.

    Raises:
        UserError: Serve's proxies listen on another address than a loopback one, and there are no keys.
    """
    # Serve has no public way to ask for the address.
    host = _get_global_client().http_config.host or "0.0.0.0"
    if not key_hashes and not (host == "localhost" or ipaddress.ip_address(host).is_loopback):
        raise UserError(
            f"http_options.host: found {host}, allowed: a loopback address (127.0.0.1), as there are no API keys "
            f"(serving.api_keys_file or {API_KEYS_VARIABLE})"
        )


def build_app(args: dict[str, Any]) -> Application:
    """Builder for `serve deploy` and `serve run`: ``args`` are the sections of a ``raylm serve`` file.

    The address to listen on is the config file's own ``http_options``; ``serving.host`` and ``serving.port`` do not
    count here.

    Raises:
        UserError: a section is wrong.
    """
    config = validate(ServeConfig, args, "args")
    if config.model.path is None:
        raise UserError("args.model.path: missing; serve needs an existing model")
    if not ray.is_initialized():
        # `serve run` builds first and connects then, to this very instance.
        ray.init(logging_level="WARNING")
    return build_application(config)
