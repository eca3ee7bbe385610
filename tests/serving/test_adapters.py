"""Adapters of one model under several names: together in one batch, each as the model that it is merged into."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from raylm.config.serving import ServingSection
from raylm.errors import UserError
from raylm.models.lora import adapter_tokenizer, load_lora
from raylm.serving.engines.base import EngineFailure, Generate, SamplingParameters
from raylm.serving.engines.client import Engine, start_engine
from raylm.serving.engines.transformers import TransformersBackend
from raylm.serving.engines.vllm import adapter_rank
from raylm.serving.stage import check_model

PROMPTS = [[5, 6, 7], list(range(20, 60)), [200, 3], [40, 41, 42, 43, 44, 45]]
TOKENS = 16
KINDS: dict[str, dict[str, Any]] = {
    "french": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    "poet": {
        "r": 8, "lora_alpha": 12, "use_rslora": True, "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3},
    },
}  # fmt: skip


def write_adapter(base: PreTrainedModel, directory: Path, seed: int, **settings: Any) -> Path:
    """An adapter with weights that change much, as stock peft writes it."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.25)
    model.save_pretrained(directory)
    model.unload()
    return directory


@pytest.fixture(scope="module")
def adapters(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two of different layers, ranks and scales; the one named as a run that has it."""
    root = tmp_path_factory.mktemp("adapters")
    base = AutoModelForCausalLM.from_pretrained(exported_model)
    write_adapter(base, root / "french" / "adapter", 1, **KINDS["french"])
    write_adapter(base, root / "poet", 2, **KINDS["poet"])
    return {name: str(root / name) for name in KINDS}


@pytest.fixture(scope="module")
def expected(exported_model: Path, adapters: dict[str, str]) -> dict[str | None, list[list[int]]]:
    """What the model says, and the merged ones, to each prompt."""
    found: dict[str | None, list[list[int]]] = {}
    for name in (None, *KINDS):
        model = AutoModelForCausalLM.from_pretrained(exported_model, dtype=torch.float32)
        if name is not None:
            path = Path(adapters[name])
            path = path / "adapter" if (path / "adapter").is_dir() else path
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        found[name] = [greedy(model, prompt) for prompt in PROMPTS]
    assert len({json.dumps(texts) for texts in found.values()}) == len(found)
    return found


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=1
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def engine(exported_model: Path, adapters: dict[str, str]) -> Iterator[Engine]:
    engine = start_engine(str(exported_model), ServingSection(adapters=adapters, max_concurrent_requests=6), threads=1)
    yield engine
    engine.close()


async def collect(engine: Engine, prompt: list[int], adapter: str | None) -> list[int]:
    stream = engine.submit(prompt, SamplingParameters(TOKENS, temperature=0), adapter)
    return [token async for piece in stream for token in piece]


def test_all_at_once_each_says_what_its_merged_model_says(
    engine: Engine, expected: dict[str | None, list[list[int]]]
) -> None:
    asked = [(name, place) for place in range(len(PROMPTS)) for name in (*KINDS, None)] * 2

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(collect(engine, PROMPTS[place], name) for name, place in asked))

    # The export that lies beside the model knows no adapters.
    assert engine.name == "transformers"
    assert asyncio.run(together()) == [expected[name][place] for name, place in asked]
    # The same prompt again, under the other names: nothing of what one left behind is another's.
    assert asyncio.run(together()) == [expected[name][place] for name, place in asked]
    each = [engine.own_stats(name) for name in (None, *KINDS)]
    assert [stats.finished for stats in each] == [16, 16, 16]
    assert engine.stats().generated_tokens == sum(stats.generated_tokens for stats in each)
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def test_scores_and_vectors_are_the_merged_models(
    engine: Engine, exported_model: Path, adapters: dict[str, str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported_model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapters["poet"]).merge_and_unload()
    ids = PROMPTS[1]
    with torch.inference_mode():
        output = merged(torch.tensor([ids]), output_hidden_states=True)
    wanted = output.logits[0].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]

    async def ask() -> tuple[Any, Any, Any]:
        return (
            await engine.score(ids, 1, "poet"),
            await engine.score(ids),
            await engine.embed(ids, "last", "poet"),
        )

    scores, plain, vector = asyncio.run(ask())
    assert torch.tensor(scores.chosen).allclose(wanted, atol=1e-4)
    assert not torch.tensor(plain.chosen).allclose(wanted, atol=1e-1)
    last = output.hidden_states[-1][0, -1]
    assert torch.tensor(vector).allclose(last / last.norm(), atol=1e-4)


def test_an_adapter_that_the_engine_does_not_have_fails_alone(engine: Engine) -> None:
    with pytest.raises(EngineFailure, match="no adapter other"):
        asyncio.run(collect(engine, PROMPTS[0], "other"))
    assert len(asyncio.run(collect(engine, PROMPTS[0], None))) == TOKENS


def test_the_models_weights_are_there_once(exported_model: Path, adapters: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported_model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    layers = {name: load_lora(path, "serving.adapters") for name, path in adapters.items()}
    backend = TransformersBackend(model, frozenset(), sequences=4, adapters=layers)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert backend.batches
    for number, name in enumerate((*KINDS, None)):
        backend.admit(Generate(number, PROMPTS[0], SamplingParameters(3, temperature=0), name))
    # One batch: each step brings every request a token.
    assert [len(backend.advance()) for _ in range(3)] == [3, 3, 3]


def test_an_adapters_own_template_and_end_tokens(
    serve_config: Callable[..., Any], exported_model: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "poet"
    shutil.copytree(adapters["poet"], path)
    tokenizer = AutoTokenizer.from_pretrained(exported_model)
    tokenizer.chat_template = "{{ messages[0].content }}<turn>"
    plain = asyncio.run(_one(exported_model, str(path)))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(plain[3])
    tokenizer.save_pretrained(path)
    check_model(serve_config(adapters={"poet": str(path)}))
    assert adapter_tokenizer(path, "key", AutoTokenizer.from_pretrained(exported_model)).chat_template.endswith(
        "<turn>"
    )
    assert asyncio.run(_one(exported_model, str(path))) == plain[: plain.index(plain[3]) + 1]
    numbers = json.loads((path / "tokenizer.json").read_text())
    vocabulary = numbers["model"]["vocab"]
    one, other = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (path / "tokenizer.json").write_text(json.dumps(numbers))
    with pytest.raises(UserError, match=r"serving.adapters.poet: .* has a tokenizer with the number"):
        check_model(serve_config(adapters={"poet": str(path)}))


async def _one(model: Path, adapter: str) -> list[int]:
    """What one adapter says first, on an engine of its own."""
    engine = start_engine(str(model), ServingSection(adapters={"poet": adapter}), threads=1)
    try:
        return await collect(engine, PROMPTS[0], "poet")
    finally:
        engine.close()


def test_gpt2s_layers_have_their_weights_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    base = GPT2LMHeadModel(config).eval()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    layers = load_lora(write_adapter(base, tmp_path / "one", 3, **settings), "key")
    backend = TransformersBackend(base, frozenset(), sequences=4, adapters={"one": layers})
    for number, name in enumerate(("one", None)):
        backend.admit(Generate(number, PROMPTS[0], SamplingParameters(TOKENS, temperature=0), name))
    texts: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(TOKENS):
        for event in backend.advance():
            texts[event.number] += event.tokens
    plain = greedy(base, PROMPTS[0])
    merged = PeftModel.from_pretrained(base, tmp_path / "one").merge_and_unload()
    assert texts == {0: greedy(merged, PROMPTS[0]), 1: plain} and texts[0] != texts[1]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("missing", "serving.adapters.one: .*one does not exist; allowed: an adapter's directory"),
        ("empty", "serving.adapters.one: .*one holds no adapter"),
        ("weights", "serving.adapters.one: .* has no adapter_model.safetensors"),
        ("damaged", "serving.adapters.one: .*adapter_model.safetensors is damaged"),
        ("dora", "serving.adapters.one: .*found use_dora True, allowed: LoRA of linear layers alone; serve the run's"),
        ("shape", "serving.adapters.one: .*found model.layers.0.*q_proj of 8 inputs and .* allowed: "),
        ("module", "serving.adapters.one: .*found the layer model.layers.0.nowhere, which the model does not have"),
        ("half", "serving.adapters.one: .*found no .*lora_A.weight, allowed: lora_A and lora_B of linear layers"),
        ("kind", "serving.adapters.one: .*found peft_type LOHA, allowed: LORA"),
        ("head", "serving.adapters.one: .*found modules_to_save"),
    ],
)
def test_a_bad_adapter_is_one_line(
    serve_config: Callable[..., Any], exported_model: Path, tmp_path: Path, damage: str, line: str
) -> None:
    path, settings = tmp_path / "one", tmp_path / "one" / "adapter_config.json"
    file = tmp_path / "one" / "adapter_model.safetensors"
    if damage != "missing":
        base = AutoModelForCausalLM.from_pretrained(exported_model)
        write_adapter(base, path, 1, **KINDS["french"], use_dora=damage == "dora")
    if damage == "empty":
        settings.unlink()
    elif damage == "weights":
        file.unlink()
    elif damage == "damaged":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage in ("kind", "head"):
        values = json.loads(settings.read_text())
        values |= {"peft_type": "LOHA"} if damage == "kind" else {"modules_to_save": ["lm_head"]}
        settings.write_text(json.dumps(values))
    elif damage in ("shape", "module", "half"):
        tensors = load_file(file)
        first = next(name for name in sorted(tensors) if "q_proj.lora_A" in name)
        second = first.replace("lora_A", "lora_B")
        if damage == "shape":
            tensors[first] = tensors[first][:, :8].contiguous()
        elif damage == "half":
            del tensors[first]
        else:
            for old, end in ((first, "A"), (second, "B")):
                tensors[f"base_model.model.model.layers.0.nowhere.lora_{end}.weight"] = tensors.pop(old)
        save_file(tensors, file)
    with pytest.raises(UserError, match=line) as caught:
        check_model(serve_config(adapters={"one": str(path)}))
    assert "\n" not in str(caught.value)


def test_what_does_not_go_together_is_refused(
    serve_config: Callable[..., Any], adapters: dict[str, str], exported_model: Path
) -> None:
    check_model(serve_config(adapters=adapters))
    with pytest.raises(UserError, match=r"serving.engine: found openvino, allowed with adapters: auto, transformers"):
        check_model(serve_config(adapters=adapters, engine="openvino"))
    with pytest.raises(UserError, match=r"serving.adapters: found served, which is the name of the model"):
        check_model(serve_config(adapters={"served": adapters["poet"]}))
    with pytest.raises(UserError, match="adapters: found poet, which is another model's name already"):
        serve_config(adapters=adapters, models={"poet": {"path": str(exported_model)}})
    assert adapter_rank({"french": adapters["french"]}, "key") == 8
    with pytest.raises(UserError, match=r"key.poet: found rank_pattern, allowed with engine: transformers"):
        adapter_rank(adapters, "key")
    with pytest.raises(UserError, match="loaded_models: found 1, allowed without adapters"):
        serve_config(adapters=adapters, loaded_models=1)


def engine_processes() -> set[int]:
    return {
        process.pid for process in psutil.Process().children(recursive=True)
        if "raylm.serving.engines.process" in process.cmdline()
    }  # fmt: skip


@pytest.mark.slow
def test_a_server_answers_under_all_names(
    ray_instance: Any,
    serve_config: Callable[..., Any],
    exported_model: Path,
    adapters: dict[str, str],
    expected: dict[str | None, list[list[int]]],
) -> None:
    from raylm.serving.stage import running_server

    further = {"again": {"path": str(exported_model), "engine": "openvino"}}

    def ask(url: str, model: str | None, prompt: list[int]) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0}
        body |= {} if model is None else {"model": model}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    before = engine_processes()
    with running_server(serve_config(name="base", adapters=adapters, models=further)) as url:
        with urllib.request.urlopen(f"{url}/v1/models") as response:
            listed = {model["id"]: model["parent"] for model in json.load(response)["data"]}
        assert listed == {"base": None, "french": "base", "poet": "base", "again": None}
        # One process, and so one copy of the weights, for a model and its adapters.
        assert len(engine_processes() - before) == 2
        tokenizer = AutoTokenizer.from_pretrained(exported_model)
        asked = [(name, place) for place in range(len(PROMPTS)) for name in ("french", "poet", "base", None)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda one: ask(url, one[0], PROMPTS[one[1]]), asked))
        for (name, place), answer in zip(asked, answers, strict=True):
            ids = expected[name if name in KINDS else None][place]
            assert answer["model"] == (name or "base")
            assert answer["choices"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        with urllib.request.urlopen(f"{url}/health") as response:
            health = json.load(response)
        assert {name: load["requests"] for name, load in health["models"].items()} == {
            "base": 16, "french": 8, "poet": 8, "again": 0
        }  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(url, "german", PROMPTS[0])
        assert caught.value.code == 404 and "'german' does not exist" in json.load(caught.value)["error"]["message"]
