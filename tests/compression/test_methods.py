"""``compression.steps``: what may stand there, and that every method has its module."""

from __future__ import annotations

import importlib

import pytest
from transformers import LlamaConfig

from raylm.compression.methods import Steps
from raylm.config.compression import CompressionSection, StepSection
from raylm.config.loading import validate
from raylm.config.stages import CompressConfig
from raylm.errors import UserError
from raylm.models.heads import CAUSAL, MASKED


def config(**compression: object) -> CompressConfig:
    values = {"run": {"name": "x"}, "data": {"train": "a.txt"}, "model": {"path": "m"}, "compression": compression}
    return validate(CompressConfig, values, "file.yaml")


def test_every_method_has_its_module() -> None:
    for name in StepSection.model_fields:
        method = importlib.import_module(f"raylm.compression.methods.{name}").METHOD
        assert isinstance(method.exports, bool)


def test_the_chain_is_checked() -> None:
    steps = Steps(config(steps=[{"quantize": {"bits": 8}}]))
    llama = LlamaConfig()
    assert steps.check(llama, CAUSAL) is llama
    assert (steps.describe(), [step.folder for step in steps]) == ("8-bit weights", ["01-quantize"])
    with pytest.raises(UserError, match="quantize has no export of a masked language model"):
        steps.check(llama, MASKED)


def test_runs_of_version_0_2_are_read() -> None:
    assert CompressionSection.model_validate({"method": "int8", "prompts": 3}) == CompressionSection(prompts=3)
    assert config().compression == CompressionSection()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], "compression.steps"),
        ([{}], "found none, allowed: one method, of distill, prune, quantize"),
        ([{"prune": {}}], "compression.steps"),
        ([{"quantize": {"bits": 3}}], "bits: found 3, allowed: 8 or 4"),
        ([{"quantize": {}}, {"quantize": {}}], "steps: found quantize 2 times, allowed: once"),
    ],
)
def test_refused(steps: list, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        config(steps=steps)
    assert expected in str(caught.value)
