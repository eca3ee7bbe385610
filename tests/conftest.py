"""Shared by all tests: one Ray instance a session, and a tiny model with its tokenizer on disk."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylm.cluster.local_access import local_access
from tests.cpus import become_free, free_cpus, holders_of_cpus

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Ray notes within a second or two that a process has ended.
GIVING_BACK_SECONDS = 30
# Begun first, so that no process is left alone with them at the end.
LONGEST = ("test_faults", "test_storage", "test_cluster_jobs", "test_search", "test_pipeline")


TESTS = Path(__file__).parent
# Files directly in tests/ whose topic is not their name.
TOPICS = {"test_readmes": "docs"}


def topic_of(path: Path, known: set[str]) -> str:
    """The marker of a test file: its folder in tests/, or for a file directly in it its own name, else cli.

    Raises:
        pytest.UsageError: a folder whose name is no marker of pyproject.toml.
    """
    folder, *rest = path.relative_to(TESTS).parts
    if not rest:
        name = TOPICS.get(path.stem, path.stem.removeprefix("test_"))
        return name if name in known else "cli"
    if folder not in known:
        raise pytest.UsageError(f"tests/{folder}: add the marker '{folder}' to pyproject.toml, tool.pytest.ini_options")
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with its topic, before -m chooses; put the files whose tests take longest first."""
    known = {line.partition(":")[0] for line in config.getini("markers")}
    for item in items:
        item.add_marker(topic_of(item.path, known))
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def start_ray() -> None:
    """A local Ray with 4 logical CPUs; stages called in the test's process join it."""
    import ray

    for attempt in range(3):
        try:
            ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False, dashboard_port=0)
        except Exception:  # Ray raises its bare class where a busy machine starts a process of it too late
            ray.shutdown()
            if attempt == 2:
                raise
        else:
            return


@pytest.fixture(scope="session")
def ray_instance():
    """The session's Ray (:func:`start_ray`)."""
    import ray

    with local_access():
        start_ray()
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def cpus_are_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start the session's Ray anew, with a warning that names what is left, where a file of tests leaves CPUs taken.

    The next file would wait for them until its time limit.
    """
    before = free_cpus()
    yield
    if (ray := sys.modules.get("ray")) is None or not ray.is_initialized():
        return
    expected = ray.cluster_resources()["CPU"] if before is None else before
    if not become_free(expected, GIVING_BACK_SECONDS):
        warnings.warn(f"after {request.path.name} these still held CPUs of Ray: {holders_of_cpus()}", stacklevel=1)
        ray.shutdown()
        start_ray()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URI of a folder of a bucket, on an S3 server of its own (moto)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
        time.sleep(0.1)
    secrets = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in secrets.items():
            patch.setenv(name, value)
        # Restores these alone: the session's Ray, which may start meanwhile, leaves variables of its own.
        yield (
            f"s3://raylm/runs?scheme=http&endpoint_override=127.0.0.1%3A{port}&region=us-east-1"
            "&allow_bucket_creation=true"
        )
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of :func:`make_tiny_model`."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def make_tiny_model(directory: Path) -> Path:
    """A random Llama of about 100,000 parameters with a byte-level BPE tokenizer, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 5] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[0], pad_token=special[1]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}"
        "<|endoftext|>{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
