"""A head of the user's own: what it may be, what is refused before anything is made, runs against plain torch, and the
models that come of them, whose code runs only where the file allows it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, BertConfig, BertModel

from raylm.compression.stage import open_source
from raylm.config import load_config
from raylm.config.loading import validate as validated
from raylm.config.model import ModelSection, ObjectiveSection
from raylm.config.serving import ServingSection
from raylm.config.stages import EvaluateConfig, ServeConfig
from raylm.data.samples.labelled import LabelledSamples
from raylm.errors import UserError
from raylm.evaluation.stage import evaluate
from raylm.launcher.package import own_modules, packaged
from raylm.models.encoders import open_encoder
from raylm.models.heads import CLASSIFIER, TAGGER
from raylm.models.own_heads import OwnHead, usable_head
from raylm.models.own_models import check_own_head
from raylm.models.weights import DrawnWeights, make_outline
from raylm.serving.engines.base import EngineFailure
from raylm.serving.engines.client import start_engine
from raylm.serving.stage import check_model
from raylm.tasks import make_objective
from raylm.training.inputs import labels_of, validate
from raylm.training.reports.metrics import read_metrics
from raylm.training.teacher import check_teacher
from raylm.tuning.checking import check_space
from tests.tagging import tagged_rows, write_columns
from tests.training.classifiers import LABELS, write_run, write_with_module
from tests.training.loops import ROOT, run_case, run_loops

HEADS = """
import torch
from torch import nn


class MeanPooled(nn.Module):
    def __init__(self, config, hidden=16):
        super().__init__()
        self.query = nn.Parameter(torch.randn(config.hidden_size) / config.hidden_size)
        self.first = nn.Linear(config.hidden_size, hidden)
        self.second = nn.Linear(hidden, config.num_labels)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, hidden, mask):
        shares = (hidden @ self.query).masked_fill(mask == 0, -1e4).softmax(dim=1)
        pooled = (shares[:, :, None] * hidden).sum(dim=1)
        return self.second(torch.tanh(self.first(pooled))) * self.scale


class Words(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.inner = nn.LSTM(config.hidden_size, 8, batch_first=True)
        self.outer = nn.Linear(8, config.num_labels)

    def forward(self, hidden, mask):
        return self.outer(self.inner(hidden * mask[:, :, None])[0])


class OfAll(nn.Linear):
    def __init__(self, config):
        super().__init__(config.hidden_size, config.num_labels)

    def forward(self, hidden, mask):
        return super().forward(hidden.mean(dim=1))


class OfFirst(OfAll):
    def forward(self, hidden, mask):
        return super().forward(hidden[:, :1], mask)


class Detached(OfFirst):
    def forward(self, hidden, mask):
        return super().forward(hidden, mask).detach()


class Unused(OfFirst):
    def __init__(self, config):
        super().__init__(config)
        self.more = nn.Linear(2, 2)


class Fixed(OfFirst):
    def __init__(self, config):
        super().__init__(config)
        self.bias.requires_grad_(False)


class Counting(OfFirst):
    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.num_labels)


class Pair(OfFirst):
    def forward(self, hidden, mask):
        return super().forward(hidden, mask), mask


class Exact(OfFirst):
    def forward(self, hidden, mask):
        return super().forward((hidden * mask[:, :, None].float()).float(), mask)


def infinite(config):
    found = OfFirst(config)
    nn.init.constant_(found.weight, float("inf"))
    return found


def failing(config):
    raise RuntimeError(f"no head of {config.num_labels} labels")


def listed(config):
    return [OfFirst(config)]


SCALE = 3
"""
PLAIN = {"steps": 12, "evaluate_every_steps": None, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.02,
         "gradient_clipping": 0.0, "weight_decay": 0.0}  # fmt: skip


def module_of(directory: Path) -> str:
    """Name of the module of heads, of which each directory has its own."""
    return f"heads_{directory.name}"


def write_all(directory: Path) -> None:
    """An encoder, texts, and a module of heads."""
    write_with_module(directory, module_of(directory), HEADS)


def loaded_module(path: Path) -> ModuleType:
    """The module in a file, by itself."""
    spec = importlib.util.spec_from_file_location(f"apart_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own_head")
    write_all(directory)
    (directory / "broken_heads.py").write_text("def head(:\n")
    return directory


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": "mean"}, r"objective.head: found 'mean', allowed: linear, crf, module:attribute such as"),
        ({"head": "nowhere_to_be_found:x"}, r"objective.head: cannot import nowhere_to_be_found from \S+ or the PYT"),
        ({"head": "broken_heads:head"}, r"objective.head: cannot import broken_heads .*SyntaxError"),
        ({"head": "MODULE:MaxPooled"}, r"objective.head: found '\S+', allowed: what \S+\.py has; it has no 'MaxPool"),
        ({"head": "MODULE:SCALE"}, r"objective.head: found '\S+:SCALE' of type int, allowed: a class of modules"),
        ({"head": "MODULE:failing"}, r"failing with the model's configuration: RuntimeError: no head of 3 labels"),
        ({"head": "MODULE:listed"}, r"objective.head: \S+:listed made a list, allowed: a module"),
        ({"head": "MODULE:Words"}, r"hidden states \[3, 5, 32\] .* the shape \[3, 5, 3\], allowed: logits, \[3, 3\]"),
        ({"head": "MODULE:MeanPooled", "type": "tagging"}, r"returned the shape \[3, 3\], allowed: logits, \[3, 5, 3"),
        ({"head": "MODULE:Pair"}, r"returned a tuple, allowed: a tensor of logits"),
        ({"head": "MODULE:infinite"}, r"returned logits that are not finite"),
        ({"head": "MODULE:Detached"}, r"has no backward pass: RuntimeError"),
        ({"head": "MODULE:OfAll"}, r"gives other logits with other hidden states at the padding"),
        ({"head": "MODULE:Unused"}, r"leaves its parameter more.weight without a gradient"),
        ({"head": "MODULE:Fixed"}, r"has the parameter bias that is not trained"),
        ({"head": "MODULE:Counting"}, r"has the buffer norm.num_batches_tracked, allowed: parameters"),
        ({"head": "MODULE:MeanPooled", "head_options": {"hiden": 1}}, r"head_options \{'hiden': 1\}: TypeError"),
        ({"head_options": {"hidden": 1}}, r"objective.head_options: allowed with a head of your own"),
        ({"head": "MODULE:MeanPooled", "type": "extractive_qa"}, r"with objective.type extractive_qa: linear$"),
        ({"head": "crf"}, r"objective.head: found crf, allowed with objective.type classification: linear, module:att"),
        ({"head": "MODULE:OfFirst", "adapter": {"type": "lora"}}, r"objective.head: found \S+, allowed with adapter"),
        ({"head": "MODULE:OfFirst", "distillation": {"teacher": "x"}}, r"allowed with distillation: linear"),
        ({"head": "MODULE:OfFirst", "model": {"trust_code": True}}, r"model.trust_code: found true, allowed: false"),
        ({"head": "MODULE:OfFirst", "parallel": {"tensor": 2}}, r"parallel.tensor: found 2, allowed with objective.ty"),
    ],
)  # fmt: skip
def test_what_is_no_head_is_refused_in_one_line(folder: Path, sections: dict, message: str) -> None:
    objective = {key: sections[key] for key in ("head", "head_options", "type") if key in sections}
    if "head" in objective:
        objective["head"] = objective["head"].replace("MODULE", module_of(folder))
    others = {key: value for key, value in sections.items() if key not in objective}
    if objective.get("type") == "tagging":
        write_columns(folder / "words.conll", [(["the", "old", "river"], ["O", "A", "B"])] * 4)
        others["data"] = dict.fromkeys(("train", "validation"), str(folder / "words.conll"))
    path = write_run(folder, "refused", objective=objective, **others)
    with pytest.raises(UserError, match=message):
        validate(load_config("finetune", path))
    assert not (folder / "refused").exists()


def test_a_head_that_computes_in_fp32_is_refused_for_bf16(folder: Path) -> None:
    path = write_run(folder, "refused", objective={"head": f"{module_of(folder)}:Exact"})
    validate(load_config("finetune", path))
    with pytest.raises(UserError, match=r"in bf16: RuntimeError"):
        validate(load_config("finetune", path, ["training.precision=bf16", "parallel.zero_stage=1"]))


def test_the_head_of_the_readme_is_one(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8").partition("### A head of your own")[2]
    (tmp_path / "readme_heads.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    own = OwnHead("readme_heads:MeanPooled", {"hidden": 64}, str(tmp_path))
    check_own_head(replace(CLASSIFIER, own=own), BertConfig(hidden_size=32), 3, bf16=True)


def test_a_new_head_is_what_its_constructor_draws(folder: Path) -> None:
    section = ObjectiveSection(type="classification", head=f"{module_of(folder)}:MeanPooled", imports_from=str(folder))
    head = make_objective(section, "bert").head
    config = AutoConfig.from_pretrained(folder / "encoder", num_labels=3)
    outline = make_outline(config, head)
    drawn = DrawnWeights(outline, 5)
    torch.manual_seed(5)
    plain = loaded_module(folder / f"{module_of(folder)}.py").MeanPooled(config)
    for name, parameter in plain.named_parameters():
        assert torch.equal(drawn.open(f"own_head.{name}"), parameter)
    assert float(outline.model.own_head.scale) == 2
    # As where transformers has to load the whole encoder.
    torch.manual_seed(5)
    whole = head.load_class().from_pretrained(folder / "encoder", config=config)
    assert torch.equal(whole.own_head.query, plain.query) and float(whole.own_head.scale) == 2
    # A pooling layer would have no gradient.
    assert not any("pooler" in name for name, _ in outline.model.named_parameters())


def test_the_code_that_goes_along_is_the_file_or_the_package(tmp_path: Path) -> None:
    package = tmp_path / "boxed_heads"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("from boxed_heads.parts import width\n")
    (package / "parts.py").write_text("def width(config):\n    return config.hidden_size\n")
    output = tmp_path / "model"
    output.mkdir()
    own = OwnHead("boxed_heads.inner:width", folder=str(tmp_path))
    assert own.load()(BertConfig()) == 768
    own.copy_code(output)
    copied = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.py"))
    assert copied == ["boxed_heads/__init__.py", "boxed_heads/inner/__init__.py", "boxed_heads/parts.py"]
    # What was imported from elsewhere stays there.
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(package, tmp_path / "elsewhere" / "boxed_heads")
    OwnHead("boxed_heads.inner:width", folder=str(tmp_path / "elsewhere")).copy_code(other)
    assert not list(other.iterdir())


def test_every_head_of_a_search_is_tried_and_its_code_goes_along(folder: Path) -> None:
    path, module = write_run(folder, "search"), module_of(folder)
    for heads, refused in ((["linear", f"{module}:MeanPooled"], False), ([f"{module}:OfAll"], True)):
        space = {"objective.head": {"grid": heads}}
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "tuning": {"space": space}}))
        config = load_config("tune", path)
        checked = validate(config)
        labels = labels_of(config, checked.data)
        if refused:
            with pytest.raises(UserError, match=r"objective.head: \S+:OfAll on example .* at the padding"):
                check_space(config, checked.model.objective, labels)
        else:
            assert [point["objective.head"] for point in check_space(config, checked.model.objective, labels)] == heads
        with packaged(path, own_modules(config, path)) as directory:
            assert (directory / f"{module}.py").read_text() == HEADS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``one``, ``cut`` and ``third`` of the same training, and ``words`` and ``further`` of a tagger's."""
    directory = tmp_path_factory.mktemp("trained_head")
    write_all(directory)
    module = module_of(directory)
    head = {"head": f"{module}:MeanPooled", "head_options": {"hidden": 8}}
    path = write_run(directory, "one", training=PLAIN, objective=head)
    columns = {name: write_columns(directory / f"{name}.conll", tagged_rows(40, seed)) for seed, name in
               enumerate(("words", "further"))}  # fmt: skip
    tagger = write_run(
        directory, "words", training=PLAIN, objective={"type": "tagging", "head": f"{module}:Words"},
        data={"train": str(columns["words"]), "validation": str(columns["further"])},
    )  # fmt: skip
    found = run_loops(
        run_case(path, stage="finetune"),
        run_case(path, "run.name=cut", "parallel.zero_stage=2", "parallel.micro_batch_size=2", workers=2,
                 stage="finetune"),
        run_case(path, "run.name=third", "parallel.zero_stage=3", workers=2, stage="finetune"),
        run_case(tagger, stage="finetune"),
        run_case(tagger, "run.name=further", "parallel.zero_stage=3", workers=2, stage="finetune"),
    )  # fmt: skip
    assert all(one["logits_difference"] <= 1e-5 for one in found)
    return directory


def plain_logits(folder: Path, run: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a run's model by torch alone."""
    model = folder / run / "model"
    values = json.loads((model / "config.json").read_text())
    config = BertConfig.from_pretrained(model)
    module, _, name = values["own_head"]["path"].partition(":")
    head = getattr(loaded_module(model / f"{module}.py"), name)(config, **values["own_head"]["options"])
    network, weights = BertModel(config, add_pooling_layer=False), load_file(model / "model.safetensors")
    network.load_state_dict({key.removeprefix("bert."): value for key, value in weights.items() if "bert." in key})
    head.load_state_dict({key.removeprefix("own_head."): value for key, value in weights.items() if "own_" in key})
    return head.eval()(network.eval()(**batch).last_hidden_state, batch["attention_mask"])


@pytest.mark.slow
def test_a_run_with_a_head_of_ones_own_is_a_plain_loop(trained: Path) -> None:
    lines = {
        name: read_metrics(trained / name / "metrics.jsonl") for name in ("one", "cut", "third", "words", "further")
    }
    losses = {name: [line["loss"] for line in found] for name, found in lines.items()}
    assert losses["cut"] == pytest.approx(losses["one"], abs=2e-6)
    assert losses["third"] == pytest.approx(losses["one"], abs=2e-6)
    assert losses["further"] == pytest.approx(losses["words"], abs=2e-6)
    assert losses["one"][-1] < losses["one"][0] and losses["words"][-1] < losses["words"][0]
    # The loss of one more step, from the exported weights by torch alone.
    samples = LabelledSamples(trained / "one" / "data", "train", 0)
    batch = {name: torch.from_numpy(v) for name, v in samples.batch(np.arange(12 * 16, 13 * 16)).items()}
    targets = batch.pop("targets")[:, 0]
    expected = functional.cross_entropy(plain_logits(trained, "one", batch), targets).item()
    run_loops(run_case(trained / "one.yaml", "training.steps=13", stage="finetune"))
    assert read_metrics(trained / "one" / "metrics.jsonl")[-1]["loss"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "head", "shape"), [("one", CLASSIFIER, [3]), ("words", TAGGER, [9, 5])])
def test_the_exported_model_is_loaded_where_its_code_may_run(trained: Path, run: str, head, shape: list[int]) -> None:
    model, key = str(trained / run / "model"), "model.path"
    assert (Path(model) / f"{module_of(trained)}.py").read_text() == HEADS
    config = AutoConfig.from_pretrained(model)
    assert config.architectures == [f"BertOwnHead{head.class_ending}"]
    with pytest.raises(
        UserError, match=r"model.path: found \S+, whose head is code of its own \(\S+\), allowed with mo"
    ):
        usable_head(head, config, model, key, trusted=False)
    # Nor does anything else load it without a word.
    with pytest.raises(UserError, match=r"a model has the head \S+, code of its own, which is not imported here"):
        open_encoder(model, head, 1)
    ids = np.array([[2, 5, 6, 7, 8, 9, 10, 11, 3]])
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    usable = usable_head(head, config, model, key, trusted=True)
    found = open_encoder(model, usable, 1).outputs(batch)
    assert list(found.shape[1:]) == shape
    expected = plain_logits(trained, run, {name: torch.from_numpy(values) for name, values in batch.items()})
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)
    engine = start_engine(model, ServingSection(), threads=1, task=head.name, trusted=True)
    try:
        served = asyncio.run(_encoded(engine, ids[0].tolist()))
        np.testing.assert_allclose(np.squeeze(served), found[0], atol=1e-5)
    finally:
        engine.close()
    with pytest.raises(EngineFailure, match=r"allowed with model.trust_code: true"):
        start_engine(model, ServingSection(), threads=1, task=head.name)


async def _encoded(engine, ids: list[int]) -> np.ndarray:
    return await engine.encode(ids)


@pytest.mark.slow
def test_stages_refuse_a_model_with_such_a_head(trained: Path, tmp_path: Path) -> None:
    model = trained / "one" / "model"
    values = {"run": {"name": "x", "storage": str(tmp_path)}, "model": {"path": str(trained / "one")}}
    data = {"data": {"train": str(trained / "dev.csv")}}
    with pytest.raises(UserError, match=r"model.path: found \S+, whose head .* allowed with model.trust_code: true"):
        evaluate(validated(EvaluateConfig, values | data, "test"))
    with pytest.raises(UserError, match=r"whose head is code of its own \(\S+\), allowed to compress: a head of trans"):
        open_source(ModelSection(path=str(model), trust_code=True))
    with pytest.raises(UserError, match=r"model.path: found .* allowed with model.trust_code: true"):
        check_model(validated(ServeConfig, values, "test"))
    served = values | {"model": {"path": str(trained / "one"), "trust_code": True}}
    check_model(validated(ServeConfig, served, "test"))
    further = served | {"serving": {"models": {"second": {"path": str(trained / "words")}}}}
    with pytest.raises(
        UserError, match=r"serving.models.second.path: .* allowed with serving.models.second.trust_code"
    ):
        check_model(validated(ServeConfig, further, "test"))
    with pytest.raises(
        UserError, match=r"serving.engine: found openvino, allowed: transformers, as \S+ has no OpenVINO"
    ):
        check_model(validated(ServeConfig, served | {"serving": {"engine": "openvino"}}, "test"))
    assert not (tmp_path / "x").exists()
    # As the teacher of a model with a linear head.
    taught = write_run(trained, "taught", distillation={"teacher": str(model)})
    section = load_config("finetune", taught).distillation
    with pytest.raises(UserError, match=r"distillation.teacher: found \S+, whose head .* allowed to teach"):
        check_teacher(section, AutoConfig.from_pretrained(trained / "encoder"), CLASSIFIER)


@pytest.mark.slow
def test_such_a_model_is_trained_further_with_the_same_head(trained: Path) -> None:
    head = f"{module_of(trained)}:MeanPooled"
    path = write_run(trained, "more", training=PLAIN, model={"path": str(trained / "one")})
    for objective, message in (
        ([], rf"objective.head: found linear, allowed: {head}, as the model at model.path has it"),
        ([f"objective.head={head}"], r"objective.head_options: found \{\}, allowed: \{'hidden': 8\}, as the model"),
    ):
        with pytest.raises(UserError, match=message):
            validate(load_config("finetune", path, objective))
    # With the code in the model's directory, and its labels.
    given = [f"objective.head={head}", "objective.head_options.hidden=8", "training.steps=1",
             f"objective.imports_from={trained / 'one' / 'model'}"]  # fmt: skip
    checked = validate(load_config("finetune", path, given))
    assert checked.data is not None and list(checked.data.labels) == LABELS
    run_loops(run_case(path, *given, stage="finetune"))
    first = read_metrics(trained / "more" / "metrics.jsonl")[0]["loss"]
    assert first < read_metrics(trained / "one" / "metrics.jsonl")[0]["loss"]
    assert (trained / "more" / "model" / f"{module_of(trained)}.py").read_text() == HEADS


@pytest.mark.slow
def test_code_or_weights_that_are_not_the_models_are_refused(trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "one" / "model", model)
    config = AutoConfig.from_pretrained(model)
    usable = usable_head(CLASSIFIER, config, str(model), "model.path", trusted=True)
    module = model / f"{module_of(trained)}.py"
    module.write_text(HEADS.replace("tanh", "sin"))
    # This process has imported the other one.
    assert module_of(trained) in sys.modules
    with pytest.raises(UserError, match=r"model.trust_code: found the module \S+, allowed: one like \S+model/heads_"):
        usable_head(CLASSIFIER, config, str(model), "model.path", trusted=True)
    module.write_text(HEADS)
    weights = load_file(model / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "query" not in name}, model / "model.safetensors")
    with pytest.raises(UserError, match=r"the weights in \S+ lack own_head.query of its head"):
        open_encoder(str(model), usable, 1)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"own_head": {"path": 3}}))
    with pytest.raises(UserError, match=r"is damaged: its config.json has no own_head with path and options"):
        usable_head(CLASSIFIER, AutoConfig.from_pretrained(model), str(model), "model.path", trusted=True)
