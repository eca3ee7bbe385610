"""Served models on disk and on Ray Serve: both engines over the same tiny model, and a small collection."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet as parquet
import pytest

from raylm.config.loading import validate
from raylm.config.stages import ServeConfig

API_KEY = "a-key-for-the-tests-0001"
DOCUMENTS = [
    ("json.dumps", "json.dumps(obj)\n\nSerialize obj to a JSON formatted string."),
    ("json.loads", "json.loads(s)\n\nDeserialize a string that holds a JSON document. See json.dumps for the reverse."),
    ("pickle.dumps", "pickle.dumps(obj)\n\nReturn the pickled representation of the object as a bytes object."),
    ("os.path.join", "os.path.join(path, *paths)\n\nJoin one or more path segments intelligently."),
    ("len", "len(obj)\n\nReturn the number of items in a container."),
    ("", "A document without a title says what json.dumps and dumps and json.dumps are: functions."),
]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def exported_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an int8 OpenVINO export beside it, as ``raylm compress`` leaves it."""
    from raylm.compression.exporters.openvino import export_model

    directory = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(tiny_model, directory)
    export_model(str(tiny_model), directory / "openvino")
    return directory


@pytest.fixture(scope="session")
def collection_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents as ``raylm prepare`` leaves them."""
    directory = tmp_path_factory.mktemp("prepared")
    (directory / "documents").mkdir()
    rows = {
        "id": [f"document-{number}" for number in range(len(DOCUMENTS))],
        "title": [title for title, _ in DOCUMENTS],
        "text": [text for _, text in DOCUMENTS],
    }
    parquet.write_table(pyarrow.table(rows), directory / "documents" / "train-00000.parquet")
    return directory


@pytest.fixture
def serve_config(exported_model: Path, tmp_path: Path) -> Callable[..., ServeConfig]:
    """Makes a serve configuration over the exported tiny model; keywords go into ``serving``."""

    def make(model: Path | None = None, **serving: object) -> ServeConfig:
        values = {
            "run": {"name": "served", "storage": str(tmp_path)},
            "model": {"path": str(model or exported_model)},
            "serving": {"port": free_port(), "cpus_per_replica": 1.0, **serving},
        }
        return validate(ServeConfig, values, "test")

    return make


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def server(
    request: pytest.FixtureRequest,
    ray_instance: object,
    exported_model: Path,
    collection_directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    """A running server of two models (``tiny``, and ``other`` on the other engine) that asks for a key.

    Gives ``url``, ``engine`` (of ``tiny``), the ``model`` directory, and ``client`` (openai).
    """
    import openai

    from raylm.serving.http.access import hash_key
    from raylm.serving.stage import running_server

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# of the tests\nsha256:{hash_key(API_KEY)} tester\n")
    other = {"transformers": "openvino", "openvino": "transformers"}[request.param]
    values = {
        "run": {"name": "tiny", "storage": str(tmp_path_factory.mktemp("runs"))},
        "model": {"path": str(exported_model)},
        "serving": {
            "port": free_port(),
            "engine": request.param,
            "models": {"other": {"path": str(exported_model), "engine": other}},
            "api_keys_file": str(keys),
            "max_body_megabytes": 1.0,
            "cpus_per_replica": 1.0,
            "max_concurrent_requests": 8,
            "max_queued_requests": 24,
            "collection": str(collection_directory),
        },
    }
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(running_server(validate(ServeConfig, values, "test")))
        client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=60))
        yield SimpleNamespace(
            url=url,
            engine=request.param,
            model=exported_model,
            client=client,
            run=Path(values["run"]["storage"]) / "tiny",
        )
