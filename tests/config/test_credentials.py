"""Addresses with credentials in a configuration: refused in one line without them, before anything is created."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raylm.config import load_config
from raylm.config.credentials import refuse_credentials
from raylm.errors import UserError

# As AWS's documentation writes an example of each.
ID, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
PRETRAIN = """
run: {name: x, storage: STORAGE}
data: {train: stdlib-docs}
model: {family: llama, config: {hidden_size: 64}}
training: {steps: 10, learning_rate: 1e-3}
"""


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (f"s3://{ID}:{SECRET}@bucket/runs", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (f"s3://{ID}:{SECRET.replace('/', '%2F')}@bucket/runs?region=x", "AWS_ACCESS_KEY_ID"),
        (f"S3A://{ID}@bucket/runs", "AWS_ACCESS_KEY_ID"),
        (f"fsspec+s3://{ID}:{SECRET}@bucket", "AWS_ACCESS_KEY_ID"),
        (f"abfs://:{SECRET}@account.blob.core.windows.net/runs", "AZURE_CLIENT_SECRET"),
        (f"abfs://c@account.dfs.core.windows.net/r?client_id=1&client_secret={SECRET}", "parameter 'client_secret'"),
        (f"https://me:{SECRET}@host:8000/v1", "api_key_environment"),
        (f"https://{SECRET.replace('/', '')}@host/v1", "api_key_environment"),
        (f"https://host/rows.jsonl?X-Amz-Expires=60&X-Amz-Signature={SECRET}", "parameter 'X-Amz-Signature'"),
        (f"https://account.blob.core.windows.net/c/rows.jsonl?sv=2024&sig={SECRET}", "parameter 'sig'"),
        (f"sftp://me:{SECRET}@host/rows.jsonl", "the library that reads it"),
    ],
)
def test_addresses_with_credentials(address: str, says: str) -> None:
    for values, key in (
        ({"run": {"storage": address}}, "run.storage"),
        ({"data": {"train": ["rows.jsonl", address]}}, "data.train"),
        ({"serving": {"models": {"other": {"path": address}}}}, "serving.models.other.path"),
    ):
        with pytest.raises(UserError, match="allowed: an address without it") as caught:
            refuse_credentials(values, "serve.yaml")
        message = str(caught.value)
        assert message.startswith(f"serve.yaml: {key}: found ")
        assert says in message
        assert "\n" not in message
        assert not any(part in message for part in (ID, SECRET, SECRET[:8], "me:"))


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/runs?region=us-east-1&scheme=http&endpoint_override=127.0.0.1%3A9000&allow_bucket_creation=true",
        "gs://anonymous@bucket/runs",
        "abfs://container@account.dfs.core.windows.net/runs?credential_kind=default&client_id=1",
        "hdfs://user@host:8020/runs",
        "sftp://user@host/rows.jsonl",
        "http://127.0.0.1:8000/v1",
        "http://host:8000/people/me@home/rows.jsonl",
        "https://host/rows.jsonl?tokens=5&design=2&me=a@b",
        "s3://bucket/a:b@c/rows.jsonl",
        "[::1]:8000",
        "Answer me: who wrote to me@home.example?",
    ],
)
def test_addresses_without_credentials(address: str) -> None:
    refuse_credentials({"run": {"storage": address}}, "pretrain.yaml")


@pytest.mark.parametrize(
    "override",
    [
        f"run.storage=s3://{ID}:{SECRET}@bucket/runs",
        f"run.storage=s3://{ID}:{SECRET}@bucket/runs: {{",
        f"run.name.storage=s3://{ID}:{SECRET}@bucket/runs",
        f"s3://{ID}:{SECRET}@bucket/runs",
        f"s3://{ID}:{SECRET.replace('K', '=')}@bucket/runs",
    ],
)
def test_overrides_with_credentials(tmp_path: Path, override: str) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text(PRETRAIN.replace("STORAGE", str(tmp_path)))
    with pytest.raises(UserError, match=r"override.*: found a key or password in an address \(s3:") as caught:
        load_config("pretrain", path, [override])
    assert ID not in str(caught.value)
    assert SECRET[:8] not in str(caught.value)


def test_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text(PRETRAIN.replace("STORAGE", f"s3://{ID}:{SECRET}@bucket/runs"))
    result = subprocess.run(
        [sys.executable, "-m", "raylm.cli", "pretrain", str(path)], capture_output=True, text=True, timeout=60,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "run.storage: found a key or password in an address (s3://...)" in result.stderr
    assert ID not in result.stderr + result.stdout
    assert list(tmp_path.iterdir()) == [path]
