"""Keys from files and the environment, rates, and the refusal to serve strangers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from raylm.cluster.environment import API_KEYS_VARIABLE
from raylm.config.serving import ServingSection
from raylm.config.stages import ServeConfig
from raylm.errors import UserError
from raylm.serving.engines.client import start_engine
from raylm.serving.http.access import hash_key, load_key_hashes
from raylm.serving.http.gate import Allowance, Gate, Limits
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.stage import check

KEY, OTHER = "sixteen-characters-or-more", "another-key-of-some-length"


def test_keys_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY} alice\n\nsha256:{hash_key(OTHER)}  # no name\n")
    monkeypatch.setenv(API_KEYS_VARIABLE, "a-third-key-from-the-environment bob")
    hashes = load_key_hashes(ServingSection(api_keys_file=str(path)))
    assert hashes[hash_key(KEY)] == "alice"
    assert hashes[hash_key(OTHER)] == f"key-{hash_key(OTHER)[:8]}"
    assert hashes[hash_key("a-third-key-from-the-environment")] == "bob"
    assert KEY not in str(hashes)


@pytest.mark.parametrize(("content", "says"), [("my-key", "keys:1"), ("# nothing", "no key"), (None, "cannot be read")])
def test_bad_key_files(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as raised:
        load_key_hashes(ServingSection(api_keys_file=str(path)))
    assert "my-key" not in str(raised.value)


def test_strangers_need_keys(serve_config: Callable[..., ServeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"serving\.host: found 0\.0\.0\.0, allowed: a loopback address"):
        check(serve_config(host="0.0.0.0"))
    monkeypatch.setenv(API_KEYS_VARIABLE, KEY)
    check(serve_config(host="0.0.0.0"))


def test_allowance_comes_back_evenly() -> None:
    allowance = Allowance(per_minute=6)
    assert [allowance.take(100.0) for _ in range(6)] == [0.0] * 6
    assert allowance.take(100.0) == pytest.approx(10)
    assert allowance.take(105.0) == pytest.approx(5)
    assert allowance.take(110.0) == 0.0
    assert allowance.take(110.0) == pytest.approx(10)
    # Rest fills no more than a minute's worth.
    assert [allowance.take(10_000.0) for _ in range(7)][-1] > 0


def behind_the_gate(key_hashes: dict[str, str]) -> TestClient:
    app = FastAPI()
    app.get("/health")(lambda: {"status": "ok"})
    app.get("/v1/models")(lambda: {"data": []})
    limits = Limits.of(ServingSection())
    app.add_middleware(Gate, limits=limits, key_hashes=key_hashes, metrics=ServerMetrics(export=False))
    return TestClient(app)


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:8000", "127.8.9.10:1", "[::1]", "[::1]:8000"]
)
@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_a_keyless_server_answers_to_its_own_names(host: str, path: str) -> None:
    assert behind_the_gate({}).get(path, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:8000", "localhost@evil",
     "192.168.0.7:8000", "[fe80::1]:8000", "0.0.0.0:8000", "", "[::1"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nowhere"])
def test_a_keyless_server_answers_to_no_other_name(host: str, path: str) -> None:
    reply = behind_the_gate({}).get(path, headers={"Host": host})
    assert reply.status_code == 421
    error = reply.json()["error"]
    assert error["code"] == "unknown_host"
    assert f"found {host!r}, allowed: localhost" in error["message"]


def test_engines_do_not_see_the_keys(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEYS_VARIABLE, KEY)
    engine = start_engine(str(tiny_model), ServingSection(engine="transformers"), threads=1)
    try:
        (process,) = [
            child for child in psutil.Process().children() if "raylm.serving.engines.process" in child.cmdline()
        ]
        environment = process.environ()
    finally:
        engine.close()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert KEY not in str(environment)


def test_with_keys_any_name_is_answered() -> None:
    reply = behind_the_gate({hash_key(KEY): "alice"}).get(
        "/v1/models", headers={"Host": "models.example", "Authorization": f"Bearer {KEY}"}
    )
    assert reply.status_code == 200
