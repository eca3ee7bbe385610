"""Runs whose storage is an S3-compatible server: a real one, moto's, over HTTP."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from raylm.config import load_config
from raylm.errors import UserError
from raylm.training.checkpoints.storage import Storage
from raylm.training.stage import pretrain


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty folder of either kind."""
    if request.param == "local":
        return Storage(tmp_path / "folder")
    return Storage(request.getfixturevalue("bucket")) / "folder"


def test_files_and_folders(storage: Storage, tmp_path: Path) -> None:
    assert storage.names() == []
    assert storage.read("missing") is None
    assert storage.size("missing") is None
    storage.write("a/one", "text")
    storage.write("a/one", "other")
    storage.write("a/two", "x")
    assert storage.names() == ["a"]
    assert storage.names("a") == ["one", "two"]
    assert (storage / "a").read("one") == b"other"
    assert storage.size("a/one") == 5
    assert storage.size("a") is None
    with storage.open("a/one") as stream:
        stream.seek(2)
        assert stream.read(2) == b"he"

    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(bytes(1000))
    storage.upload(source, "b")
    assert storage.download("b", tmp_path / "copy")
    assert (tmp_path / "copy" / "deep" / "file").read_bytes() == bytes(1000)
    assert not storage.download("missing", tmp_path / "nothing")
    storage.remove("a")
    storage.remove("a")
    assert storage.names() == ["b"]


def test_storage_that_cannot_be_reached_is_refused(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run = make_run("refused")
    for storage in ("s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1%3A9&connect_timeout=1", "nothing://x"):
        with pytest.raises(UserError, match=r"^run\.storage: .* cannot be used"):
            pretrain(load_config("pretrain", run.config, [f"run.storage={storage}"]))


@pytest.mark.slow
def test_run_goes_on_from_the_bucket_on_another_host(make_run: Callable, bucket: str, tmp_path: Path) -> None:
    # Workers settle about once a second to stop: a fast machine makes many steps in between.
    steps = {"steps": 400}
    undisturbed = make_run("undisturbed", training=steps)
    pretrain(load_config("pretrain", undisturbed.config))

    run = make_run("remote", bucket, training=steps, resources={"workers": 2, "heartbeat_seconds": 5.0})
    run.environment["HOME"] = str(tmp_path / "first")
    driver = run.start()
    config = load_config("pretrain", run.config)
    mirror = config.run.directory.relative_to(Path("~").expanduser())
    run.metrics = tmp_path / "first" / mirror / "metrics.jsonl"
    run.wait_for_step(30, driver)
    run.workers(driver)[-1].send_signal(signal.SIGSTOP)
    run.wait_for_restart(driver)
    run.wait_for_step(50, driver)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 143, errors[-2000:]
    assert "no sign of life for 5 s (hung or frozen)" in errors
    *_, saved, last = errors.splitlines()
    assert "which was saved; the same command goes on" in saved, errors[-2000:]
    assert last == "raylm: ended by SIGTERM"

    shutil.rmtree(tmp_path / "first")
    run.environment["HOME"] = str(tmp_path / "second")
    run.metrics = tmp_path / "second" / mirror / "metrics.jsonl"
    driver = run.start()
    _, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors[-2000:]
    assert run.losses() == undisturbed.losses()

    storage = Storage(config.run.uri)
    assert {"config.yaml", "metrics.jsonl", "report.json", "model", "checkpoints", "tensorboard"} <= set(
        storage.names()
    )
    assert storage.read("metrics.jsonl") == run.metrics.read_bytes()
    assert storage.download("model", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
