"""What a teacher says, kept by sample number: the loss by it, its files, a run that learns as beside the teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForCausalLM

from raylm.config import load_config
from raylm.config.stages import FinetuneConfig
from raylm.data.loading import load_tokenizer
from raylm.data.prepare.stage import prepare
from raylm.errors import UserError
from raylm.tasks.distillation import ROWS, CoarseDivergence, SoftenedDivergence
from raylm.training import teacher_rows
from raylm.training.reports.metrics import read_metrics
from raylm.training.stage import finetune
from raylm.training.teacher import check_tokenizers
from raylm.training.teacher_rows import FOLDER, TaughtSamples, score_shard, shard
from tests.conftest import make_tiny_model


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("known", [3, 11])
def test_the_coarse_divergence_and_its_gradient(temperature: float, known: int) -> None:
    """Written out, others as one; with all choices known it is the whole divergence."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS + 7, 11)
    student = torch.randn(shape, generator=generator, requires_grad=True)
    teacher = torch.randn(shape, generator=generator)
    likely = (teacher / temperature).log_softmax(dim=-1).topk(known)
    found = CoarseDivergence.apply(student, likely.indices, likely.values, temperature)
    (gradient,) = torch.autograd.grad(found, student)
    if known == 11:
        expected = SoftenedDivergence.apply(student, teacher, temperature)
    else:
        mine = (student / temperature).softmax(dim=-1).gather(1, likely.indices)
        both = [torch.cat([one, 1 - one.sum(dim=1, keepdim=True)], dim=1) for one in (mine, likely.values.exp())]
        expected = temperature**2 * functional.kl_div(both[0].log(), both[1], reduction="sum")
    (wanted,) = torch.autograd.grad(expected, student)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(gradient, wanted, atol=1e-4)


def write(directory: Path, name: str, **distillation: object) -> Path:
    """The tiny model taught by another one, on prepared text."""
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(directory / "data")},
        "model": {"path": str(directory / "student")},
        "distillation": {"teacher": str(directory / "teacher"), "temperature": 2.0, "targets": 0.5} | distillation,
        "training": {
            "steps": 6, "batch_size": 4, "sequence_length": 32, "learning_rate": 1e-3, "warmup_steps": 0,
            "log_every_steps": 1, "precision": "fp32", "log_samples": True,
        },
        "resources": {"workers": 2},
    }  # fmt: skip
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_instance: object) -> Path:
    """A student, a teacher that is sure of itself, and a prepared set."""
    directory = tmp_path_factory.mktemp("taught")
    make_tiny_model(directory / "student")
    teacher = AutoModelForCausalLM.from_pretrained(make_tiny_model(directory / "teacher"))
    with torch.no_grad():
        teacher.lm_head.weight.mul_(30)
    teacher.save_pretrained(directory / "teacher")
    (directory / "text.txt").write_text("\n".join(f"the quick fox {i} and the lazy dog {i * i}" for i in range(200)))
    values = {
        "run": {"name": "data", "storage": str(directory)},
        "data": {"train": str(directory / "text.txt"), "text_unit": "line", "validation_fraction": 0.1},
        "tokenizer": {"path": str(directory / "student")},
    }
    (directory / "prepare.yaml").write_text(yaml.safe_dump(values))
    prepare(load_config("prepare", directory / "prepare.yaml"))
    return directory


@pytest.mark.slow
def test_a_sample_has_what_the_teacher_says_to_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_rows, "SHARD", 10)
    monkeypatch.setattr(teacher_rows, "BATCH_SIZE", 4)
    config = load_config("finetune", write(made, "plain", top_k=5))
    assert isinstance(config, FinetuneConfig)
    folder = tmp_path / FOLDER
    folder.mkdir()
    for first, stop in ((0, 10), (10, 17)):
        given = {"config": config, "model_type": "llama", "folder": str(folder), "data": str(made / "data")}
        score_shard({"first": first, "stop": stop}, **given)
    objective = teacher_rows._objective(config, "llama")
    plain = objective.samples(made / "data", "train", 32, config.run.seed)
    samples = TaughtSamples(plain, tmp_path)
    numbers = np.array([16, 3, 9, 10])
    batch = samples.batch(numbers)
    assert samples.count == plain.count
    assert (batch["input_ids"] == plain.batch(numbers)["input_ids"]).all()
    teacher = AutoModelForCausalLM.from_pretrained(made / "teacher").eval()
    with torch.no_grad():
        logits = teacher(input_ids=torch.from_numpy(batch["input_ids"])).logits
    expected = (logits / 2.0).log_softmax(dim=-1).topk(5)
    assert (batch["teacher_choices"] == expected.indices.numpy()).mean() > 0.99
    assert np.allclose(batch["teacher_log_probabilities"], expected.values.numpy(), atol=0.02)


@pytest.mark.slow
def test_a_run_learns_as_beside_its_teacher(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All choices are kept, so that what differs is their rounding to 16 bits; and the teacher is not asked again."""
    losses = {}
    for name, keys in (("beside", {}), ("kept", {"top_k": 320})):
        finetune(load_config("finetune", write(made, name, **keys)))
        losses[name] = [line["loss"] for line in read_metrics(made / name / "metrics.jsonl")]
    assert losses["kept"] == pytest.approx(losses["beside"], rel=2e-3)
    assert losses["kept"][-1] < losses["kept"][0]
    files = sorted((made / "kept" / FOLDER).iterdir())
    assert files == [shard(made / "kept" / FOLDER, 0)]
    with np.load(files[0]) as arrays:
        # The tokenizer has fewer than were asked for.
        assert arrays["choices"].shape == (24, 32, 292)
    assert not (made / "beside" / FOLDER).exists()
    # Few choices are another, coarser loss, and most of it with a teacher that is sure of itself.
    finetune(load_config("finetune", write(made, "few", top_k=8)))
    few = [line["loss"] for line in read_metrics(made / "few" / "metrics.jsonl")]
    assert all(0 < one <= other + 1e-3 for one, other in zip(few, losses["beside"], strict=True))
    assert json.loads((made / "few" / "report.json").read_text())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"top_k": 8, "hidden": 1.0}, "top_k: found 8, allowed with logits above 0 and without hidden and attention"),
        ({"top_k": 8, "logits": 0.0}, "top_k: found 8, allowed with logits above 0"),
        ({"top_k": 0}, r"distillation\.top_k: found 0, allowed: "),
    ],
)
def test_refused_in_the_file(tmp_path: Path, keys: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_config("finetune", write(tmp_path, "refused", **keys))


def test_a_teacher_is_compared_with_the_tokenizer_of_a_new_model(tiny_model: Path, tmp_path: Path) -> None:
    """Which lies in a directory without a model."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.save_pretrained(tmp_path / "same")
    check_tokenizers(tiny_model, tmp_path / "same", "distillation.teacher")
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"^distillation\.teacher: found .*whose tokenizer is another than that of"):
        check_tokenizers(tiny_model, tmp_path / "other", "distillation.teacher")
