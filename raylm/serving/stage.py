"""``raylm serve``: checks everything, starts the Serve application, and keeps it up until interrupted."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylm.config.run_directory import RunDirectory
from raylm.config.stages import ServeConfig
from raylm.errors import RunFailure, UserError
from raylm.models.loading import first_line, load_tokenizer, resolve_model

APPLICATION = "raylm"
# Loading a large model from a slow disk takes minutes; a server that is not up by then will not come up.
START_SECONDS = 600.0


def serve(config: ServeConfig) -> None:
    """Serve ``config.model`` until SIGINT or SIGTERM, then stop cleanly.

    Raises:
        UserError: the configuration is wrong; nothing was started.
        RunFailure: the server did not come up, or died.
    """
    from raylm.serving.app import model_name

    interrupted = threading.Event()
    with _signals(interrupted), running_server(config) as url:
        name = model_name(config)
        print(f"serving {name} at {url} (Ctrl-C stops it); try:")
        print(f"  {example_request(url, name)}", flush=True)
        misses = 0
        while not interrupted.wait(timeout=2.0):
            misses = 0 if health(url, timeout=60) else misses + 1
            if misses >= 30:
                raise RunFailure(f"the server at {url} no longer answers; Ray's logs are in {_log_directory()}")
        print("stopping", flush=True)
    directory = config.run.directory
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    print(f"served {report['requests']} texts, {report['generated_tokens']} tokens; report in {directory}/report.json")


@contextlib.contextmanager
def running_server(config: ServeConfig) -> Iterator[str]:
    """Start the server, give its base URL (``http://127.0.0.1:8000``), and stop it at the end of the block.

    Raises:
        UserError: the configuration is wrong; nothing was started.
        RunFailure: the server did not come up.
    """
    run = check(config)
    from raylm.cluster import ray_session

    run.create()
    # Written as root's handlers would have it: Serve reports every step of its own life otherwise.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    began = time.monotonic()
    with ray_session():
        from ray import serve as ray_serve

        url = f"http://{_url_host(config.serving.host)}:{config.serving.port}"
        try:
            _start(config)
            _wait_until_healthy(url)
            started = time.monotonic()
            yield url
            last = health(url) or {}
        finally:
            ray_serve.shutdown()
        run.write_report(
            {
                "url": url,
                "start_seconds": round(started - began, 2),
                "served_seconds": round(time.monotonic() - started, 2),
                **{key: value for key, value in last.items() if key not in ("status", "running", "waiting")},
            }
        )


def check(config: ServeConfig) -> RunDirectory:
    """Everything that can be known to be wrong before anything starts.

    Raises:
        UserError: one line about the first mistake.
    """
    if config.model.path is None:
        raise UserError("model.path: missing; serve needs an existing model")
    run = RunDirectory("serve", config)
    run.check()
    _check_address(config.serving.host, config.serving.port)
    check_model(config)
    if config.serving.collection is not None:
        from raylm.serving.retrieval import collection_files

        collection_files(config.serving.collection)
    return run


def check_model(config: ServeConfig) -> None:
    """Refuse a model directory that is missing, incomplete or damaged; reads headers, not weights."""
    from raylm.models.openvino import check_export
    from raylm.serving.engines.opening import choose_engine

    key, path = "model.path", config.model.path
    source = resolve_model(path, key)
    directory = Path(source)
    if directory.is_dir():
        for name in ("config.json", "generation_config.json"):
            _check_json(directory / name, key)
        if choose_engine(source, config.serving) == "openvino":
            check_export(source, key)
        else:
            _check_weights(directory, key)
    load_tokenizer(source, key)


def health(url: str, timeout: float = 5.0) -> dict[str, Any] | None:
    """What /health says, or None while nobody answers there."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout) as response:
            return json.load(response)
    except (urllib.error.URLError, OSError, ValueError):
        return None


def example_request(url: str, name: str) -> str:
    """A curl line that asks the server something."""
    body = json.dumps({"model": name, "prompt": "The", "max_tokens": 32})
    return f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"


def _start(config: ServeConfig) -> None:
    from ray import serve as ray_serve

    from raylm.serving.app import build_application

    if ray_serve.status().proxies:
        raise RunFailure("Ray Serve already runs on this cluster; use `serve deploy`, or another cluster")
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


@contextlib.contextmanager
def _signals(event: threading.Event) -> Iterator[None]:
    """Set ``event`` at SIGINT and SIGTERM instead of ending the process."""
    previous = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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


def _check_weights(directory: Path, key: str) -> None:
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    _check_json(index, key)
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    for name in sorted(names):
        path = directory / name
        if not path.is_file():
            raise UserError(f"{key}: {path} is missing")
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise UserError(f"{key}: {path} is damaged: {first_line(error)}") from None
