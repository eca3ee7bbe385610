"""``raylm serve``: checks everything, starts the Serve application, and keeps it up until interrupted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster.environment import API_KEYS_VARIABLE, default_environment
from raylm.config.families import is_counted
from raylm.config.run_directory import RunDirectory
from raylm.config.serving import ServedModel, ServingSection
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer, resolve_model
from raylm.errors import RunFailure, UserError, first_line
from raylm.models.checks import check_vocabulary, check_weights
from raylm.models.heads import NONE
from raylm.models.loading import load_config
from raylm.models.lora import check_adapters
from raylm.models.own_heads import usable_head
from raylm.progress import Activity
from raylm.serving.http.access import check_origins, load_key_hashes
from raylm.tasks import task_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

APPLICATION = "raylm"
# Loading a large model from a slow disk takes minutes; a server that is not up by then will not come up.
START_SECONDS = 600.0
SILENT_SECONDS = 60.0
# How Serve passes a piece of a stream on costs more than anything else that happens to it. These take a third off:
# proxies call replicas by gRPC instead of actor tasks, and a process has one event loop instead of two. For this
# command's own Ray and one replica alone: replicas that come and go under load have been tried with Serve's defaults.
ENVIRONMENT = {
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


def serve(config: ServeConfig) -> None:
    """Serve ``config.model`` until SIGINT or SIGTERM, then stop cleanly.

    Raises:
        UserError: the configuration is wrong; nothing was started.
        RunFailure: the server did not come up, or died.
    """
    with Activity("serve: checking the model and the collection"):
        run = check(config)
    try:
        # Ray puts a handler of its own on SIGTERM when it starts: ours must come after it.
        with (
            _serve_session(config.serving),
            _interrupted_by_sigterm(),
            run.held(resumes=False),
            _application(config, run) as url,
        ):
            _announce(config, url)
            _watch(url)
    except KeyboardInterrupt:
        pass
    if (report := run.report()) is None:
        print("serve: stopped before it answered anything")
        return
    print(
        f"serve: stopped; {report['requests']:,} requests answered, {report['generated_tokens']:,} tokens generated\n"
        f"  report     {run.path / 'report.json'}; as a page: raylm report {run.path}"
    )


@contextlib.contextmanager
def running_server(config: ServeConfig) -> Iterator[str]:
    """Start the server, give its base URL (``http://127.0.0.1:8000``), and stop it at the end of the block.

    Raises:
        UserError: the configuration is wrong; nothing was started.
        RunFailure: the server did not come up.
    """
    run = check(config)
    with _serve_session(config.serving), run.held(resumes=False), _application(config, run) as url:
        yield url


@contextlib.contextmanager
def _serve_session(serving: ServingSection) -> Iterator[None]:
    """Ray with room for Ray Serve; a cluster that stays keeps nothing of it."""
    from raylm.cluster.session import joined, ray_session

    stays = joined() or bool(os.environ.get("RAY_ADDRESS"))
    one = not stays and serving.replicas == 1 and serving.autoscaling is None
    with default_environment(ENVIRONMENT if one else {}), ray_session():
        from ray import serve as ray_serve

        # Serve reports every step of its own life otherwise.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if ray_serve.status().proxies:
            raise UserError("Ray Serve already runs on this cluster; use `serve deploy`, or another cluster")
        try:
            yield
        finally:
            # Where Ray itself ends now, Serve ends with it, and without the error that its shutdown reports.
            if stays:
                ray_serve.shutdown()


@contextlib.contextmanager
def _application(config: ServeConfig, run: RunDirectory) -> Iterator[str]:
    """The running application, from start to report; gives its base URL."""
    from ray import serve as ray_serve

    run.create()
    began = time.monotonic()
    started = None
    url = f"http://{_url_host(config.serving.host)}:{config.serving.port}"
    try:
        with Activity("serve: starting the server and loading the model"):
            _start(config)
            _wait_until_healthy(url)
        started = time.monotonic()
        run.keep()
        yield url
    finally:
        # Others may ask a server that is up a moment before this process knows it, and stop it at once.
        if (last := health(url)) is not None:
            ended = time.monotonic()
            _report(run, url, last, (started or ended) - began, ended - (started or ended))
            run.keep()
        ray_serve.delete(APPLICATION)


def _report(run: RunDirectory, url: str, last: dict[str, Any], start_seconds: float, served_seconds: float) -> None:
    counters = {key: value for key, value in last.items() if key not in ("status", "running", "waiting", "models")}
    times = {"start_seconds": round(start_seconds, 2), "served_seconds": round(served_seconds, 2)}
    run.write_report({"url": url, **times, **counters})


def _announce(config: ServeConfig, url: str) -> None:
    from raylm.serving.deploy.app import model_name

    name = model_name(config)
    print(f"serving {name} at {url} (Ctrl-C stops it)")
    print(f"  in a browser   {url}")
    print(f"  or try         {example_request(config, url, name)}", flush=True)


def check(config: ServeConfig) -> RunDirectory:
    """Everything that can be known to be wrong before anything starts.

    Raises:
        UserError: one line about the first mistake.
    """
    if config.model.path is None:
        raise UserError("model.path: missing; serve needs an existing model")
    run = RunDirectory("serve", config)
    run.check()
    check_model(config)
    if config.serving.collection is not None:
        from raylm.serving.retrieval.prepared import collection_files

        collection_files(config.serving.collection)
    if config.serving.encoder is not None:
        _check_encoder(config.serving.encoder)
    check_access(config.serving)
    _check_address(config.serving.host, config.serving.port)
    return run


def check_access(serving: ServingSection) -> None:
    """Refuse to serve other machines, or every web page, without API keys."""
    key_hashes = load_key_hashes(serving)
    check_origins(serving, key_hashes)
    if not key_hashes and not serving.loopback:
        raise UserError(
            f"serving.host: found {serving.host}, allowed: a loopback address (127.0.0.1), as there are no API keys "
            f"(serving.api_keys_file or {API_KEYS_VARIABLE})"
        )


def check_model(config: ServeConfig) -> None:
    """Refuse a model directory that is missing, incomplete or damaged; reads headers, not weights."""
    from raylm.serving.deploy.app import model_name, model_sources

    main = model_name(config)
    further = {f"serving.models.{name}": model.adapters for name, model in config.serving.models.items()}
    for where, adapters in {"serving": config.serving.adapters, **further}.items():
        if main in adapters:
            raise UserError(f"{where}.adapters: found {main}, which is the name of the model at model.path already")
    for name, model in model_sources(config).items():
        key = f"serving.models.{name}.path" if name in config.serving.models else "model.path"
        _check_model(model, config.serving, key)


def _check_model(model: ServedModel, serving: ServingSection, key: str) -> None:
    from raylm.models.openvino import check_export
    from raylm.serving.engines.opening import choose_engine

    source = resolve_model(model.path, key)
    directory = Path(source)
    if directory.is_dir():
        for name in ("config.json", "generation_config.json"):
            _check_json(directory / name, key)
    model_config, tokenizer = load_config(source, key), load_tokenizer(source, key)
    task = task_of(model_config)
    usable_head(task.head, model_config, source, key, trusted=model.trust_code)
    if task.service.check is not None:
        task.service.check(model_config, tokenizer, serving, model.path)
    if directory.is_dir():
        chosen = serving.model_copy(update={"engine": model.engine, "adapters": model.adapters})
        engine_key = key.removesuffix("path") + "engine" if key != "model.path" else "serving.engine"
        if choose_engine(source, chosen, engine_key, continues=task.continues) == "openvino":
            check_export(source, key, task.head.graphs)
        else:
            check_weights(directory, key)
    check_vocabulary(model_config, tokenizer, source, key)
    if model.adapters:
        _check_adapters(model, serving, model_config, tokenizer, key)


def _check_adapters(
    model: ServedModel, serving: ServingSection, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> None:
    from raylm.serving.engines.opening import choose_engine
    from raylm.serving.engines.vllm import adapter_rank

    adapters_key = "serving.adapters" if key == "model.path" else key.removesuffix("path") + "adapters"
    task = task_of(config)
    if not task.continues or is_counted(config.model_type):
        what = "an n-gram model" if task.continues else task.service.what
        raise UserError(f"{adapters_key}: allowed with a text generator of linear layers, {model.path} is {what}")
    check_adapters(model.adapters, config, tokenizer, adapters_key)
    chosen = serving.model_copy(update={"engine": model.engine, "adapters": model.adapters})
    if choose_engine(resolve_model(model.path, key), chosen) == "vllm":
        adapter_rank(model.adapters, adapters_key)


def _check_encoder(path: str, key: str = "serving.encoder") -> None:
    source = resolve_model(path, key)
    if not Path(source).is_dir():
        raise UserError(f"{key}: {path} does not exist; allowed: the directory of a sentence encoder")
    for name in ("config.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        _check_json(Path(source) / name, key)
    if (task := task_of(load_config(source, key))).head != NONE:
        raise UserError(f"{key}: found {path}, {task.service.what}, allowed: the directory of a sentence encoder")
    check_weights(Path(source), key)
    check_vocabulary(load_config(source, key), load_tokenizer(source, key), source, key)


def health(url: str, timeout: float = 5.0) -> dict[str, Any] | None:
    """What /health says, or None while nobody answers there."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout) as response:
            return json.load(response)
    except (urllib.error.URLError, OSError, ValueError):
        return None


def example_request(config: ServeConfig, url: str, name: str) -> str:
    """A curl line that asks the server something."""
    task = task_of(load_config(config.model.path))
    route, body = task.service.route, task.service.example
    if task.continues and config.serving.collection is not None:
        route, body = "qa", {"question": "What does json.dumps do?"}
    body = {key: name if key == "model" else value for key, value in body.items()}
    return f"curl -s {url}/v1/{route} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _start(config: ServeConfig) -> None:
    from ray import serve as ray_serve

    from raylm.serving.deploy.app import build_application

    serving = config.serving
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options={"host": serving.host, "port": serving.port},
        logging_config=quiet,
    )
    try:
        ray_serve.run(build_application(config), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise RunFailure(f"the server did not come up: {_failure_reason() or first_line(error)}") from None


def _failure_reason() -> str | None:
    """The last line of what a replica failed with: the exception itself."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(APPLICATION)
    deployments = application.deployments.values() if application else ()
    lines = [line for deployment in deployments for line in deployment.message.splitlines() if line.strip()]
    return lines[-1].strip() if lines else None


def _wait_until_healthy(url: str) -> None:
    end = time.monotonic() + START_SECONDS
    while health(url) is None:
        if time.monotonic() > end:
            raise RunFailure(f"{url}/health did not answer within {START_SECONDS:.0f} s; logs in {_log_directory()}")
        time.sleep(0.1)


def _log_directory() -> str:
    import ray

    return f"{ray._private.worker.global_worker.node.get_session_dir_path()}/logs/serve"


def _watch(url: str) -> None:
    """Return never; fail when the server has not answered for a minute."""
    answered = time.monotonic()
    while time.monotonic() - answered < SILENT_SECONDS:
        time.sleep(2.0)
        if health(url, timeout=SILENT_SECONDS):
            answered = time.monotonic()
    raise RunFailure(f"the server at {url} no longer answers; Ray's logs are in {_log_directory()}")


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_address(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the server itself does: a port that only waits for old connections to fade is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"serving.port: found {port}, allowed: a free port; {host}:{port}: {error.strerror}"
            ) from None


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _check_json(path: Path, key: str) -> None:
    if not path.exists():
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{key}: {path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{key}: {path} is damaged: found no JSON object")
