"""Fine-tuning beside a base in 4 bits, to the adapter that stock peft loads; where bitsandbytes is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raylm.cluster.capacity import Capacity, Node
from raylm.config import load_config
from raylm.config.data import DataSection, TokenizerSection
from raylm.data.prepare.stage import prepare_directory
from raylm.errors import UserError
from raylm.models import adapters
from raylm.models.adapters import check_adapter, is_adapter
from raylm.models.heads import CAUSAL
from raylm.models.loading import load_config as load_model_config
from raylm.models.trained import packed_weights
from raylm.parallel.plan.planning import plan_training
from raylm.tasks import make_objective
from raylm.training.loop.batches import to_tensors
from tests.training.loops import run_case, run_loops

QLORA = {"rank": 4, "bits": 4}
FOUR_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def write(directory: Path, name: str, model: Path, train: Path, adapter: dict[str, Any] | None = None) -> Path:
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(train)},
        "model": {"path": str(model)},
        "adapter": adapter,
        "parallel": {"zero_stage": 1},
        "training": {"steps": 4, "batch_size": 4, "sequence_length": 32, "learning_rate": 0.01, "schedule": "constant"},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_without_bitsandbytes_is_one_line(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = load_config("finetune", write(tmp_path, "run", tiny_model, tiny_model, QLORA)).adapter
    assert section is not None
    find = adapters.find_spec
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    line = r"adapter.bits: found 4, which needs bitsandbytes: python -m pip install 'bitsandbytes>="
    with pytest.raises(UserError, match=line) as caught:
        check_adapter(section, load_model_config(tiny_model), CAUSAL)
    assert "\n" not in str(caught.value)


def test_the_plan_counts_4_bits(tiny_model: Path, tmp_path: Path) -> None:
    """Of the plan alone, which needs no bitsandbytes: the weights, and what is unpacked of them at a time."""
    plans = []
    for name, adapter in (("plain", {"rank": 4}), ("packed", QLORA)):
        config = load_config("finetune", write(tmp_path, name, tiny_model, tiny_model, adapter))
        plans.append(plan_training(config, Capacity((Node(1.0),))))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    linear = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    total, count, largest = plans[0].parameters, sum(linear.values()), max(linear.values())
    assert packed_weights(plans[1].config, plans[1].model_config, CAUSAL) == (count / total, largest)
    whole, packed = (plan.memory_bytes()["weights"] for plan in plans)
    assert whole == 4 * total
    assert packed == pytest.approx(4 * (total - count) + count * FOUR_BITS / 8 + 4 * largest)
    assert plans[0].memory_bytes()["optimizer"] == plans[1].memory_bytes()["optimizer"]
    # What is not cut has no stage 3.
    config = load_config("finetune", tmp_path / "packed.yaml", ["parallel.zero_stage=auto"])
    stages = {one.layout.zero_stage for one in plan_training(config, Capacity((Node(2.0),))).candidates}
    assert stages and 3 not in stages


@pytest.fixture(scope="module")
def data(ray_instance: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in the tiny model's tokens."""
    draw = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("text")
    words = ["river", "mountain", "cloud", "stone", "sings", "falls", "over", "under", "the", "a", "quiet", "old"]
    (root / "text.txt").write_text("\n".join(" ".join(draw.choice(words, 30)) for _ in range(80)))
    section = DataSection(train=str(root / "text.txt"), text_unit="line", validation_fraction=0.1)
    prepare_directory(root / "set", section, TokenizerSection(path=str(tiny_model)))
    return root / "set"


@torch.no_grad()
def validation_loss(model: Any, config: Any, directory: Path) -> float:
    """Nats a target over all validation samples, by plain PyTorch."""
    objective = make_objective(config.objective, model.config.model_type)
    samples = objective.samples(directory, "validation", config.training.sequence_length, config.run.seed)
    batch = to_tensors(samples, np.arange(samples.count), torch.device("cpu"))
    logits = model.eval()(input_ids=batch["input_ids"]).logits.float()
    return float(functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100))


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


def stock_base(model: Path) -> Any:
    """The base as transformers loads it in 4 bits."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    for module in base.modules():
        # Else it packs weights anew for AVX-512 and multiplies in bf16, where a processor has that.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


@pytest.mark.slow
def test_the_adapter_loads_in_peft_on_a_base_in_4_bits(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra qlora)")
    from peft import PeftModel

    half = write(tmp_path, "half", tiny_model, data, QLORA)
    whole = write(tmp_path, "whole", tiny_model, data, QLORA)
    stopped, final, once = run_loops(
        run_case(half, "training.steps=2", workers=2, stage="finetune"),
        run_case(half, workers=1, stage="finetune"),
        run_case(whole, workers=2, stage="finetune"),
    )
    # Goes on from adapters alone, on another number of workers.
    assert stopped["step"] == 2 and final["validation_loss"] == pytest.approx(once["validation_loss"], abs=1e-5)
    (newest,) = (tmp_path / "half" / "checkpoints").glob("step-00000004/*.json")
    assert all(is_adapter(name) for name in json.loads(newest.read_text())["shapes"])
    config = load_config("finetune", half)
    before = validation_loss(stock_base(tiny_model), config, data)
    trained = PeftModel.from_pretrained(stock_base(tiny_model), tmp_path / "half" / "adapter")
    after = validation_loss(trained, config, data)
    # The loss that the run reports is that of the adapter beside a base that transformers has put into 4 bits.
    assert after < before - 0.1 and after == pytest.approx(final["validation_loss"], abs=1e-5)
    # The exported model is the original one with the adapter, and so not quite what was trained.
    ids = torch.arange(5, 45).view(2, 20)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    beside = logits_of(PeftModel.from_pretrained(base, tmp_path / "half" / "adapter"), ids)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "model"), ids)
    assert float((beside - merged).abs().max()) < 1e-5 and final["logits_difference"] < 1e-4
    assert float((logits_of(trained, ids) - merged).abs().max()) > 1e-3
