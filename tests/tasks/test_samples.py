"""What the masked and span objectives hide: how much, where, that it can be put back, and that nothing but the sample's
number decides it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raylm.config import load_config
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.model import ObjectiveSection
from raylm.data.loading import load_tokenizer
from raylm.data.prepare.stage import prepare_directory
from raylm.data.samples.token_samples import IGNORED, PackedSamples
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError
from raylm.tasks import make_objective
from raylm.tasks.span.objective import corruption, sentinel_ids


@pytest.fixture(scope="module")
def noisy(ray_instance, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents whose tokenizer has a mask token and ten sentinels."""
    root = tmp_path_factory.mktemp("noisy")
    source = root / "documents.txt"
    source.write_text("\n".join(f"{i} apples and {i * i} pears make {i + i * i} fruits in all" for i in range(300)))
    data = DataSection(train=str(source), text_unit="line", validation_fraction=0.1)
    prepare_directory(root / "data", data, TokenizerSection(vocab_size=400, mask_token=True, sentinels=10))
    return root / "data"


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_sample_is_a_function_of_its_number_alone(noisy: Path, family: str) -> None:
    objective = make_objective(ObjectiveSection(), family)
    samples = objective.samples(noisy, "train", 32, 5)
    indices = np.arange(3 * samples.count)
    whole = samples.batch(indices)
    order = np.random.default_rng(0).permutation(indices)
    again = objective.samples(noisy, "train", 32, 5).batch(order)
    for name, values in whole.items():
        assert np.array_equal(values[order], again[name])
    other = objective.samples(noisy, "train", 32, 6).batch(indices)
    assert not np.array_equal(whole["input_ids"], other["input_ids"])
    # The same text again in the next epoch has other gaps.
    validation = objective.samples(noisy, "validation", 32, 5)
    epochs = [validation.batch(np.arange(validation.count) + e * validation.count)["input_ids"] for e in range(2)]
    assert not np.array_equal(*epochs)


def test_masks_follow_the_paper(noisy: Path) -> None:
    tokenizer = load_tokenizer(noisy / "tokenizer")
    samples = make_objective(ObjectiveSection(), "bert").samples(noisy, "train", 102, 1)
    batch = samples.batch(np.arange(400))
    inputs, targets = batch["input_ids"], batch["targets"]
    chosen = targets != IGNORED
    assert (chosen.sum(axis=1) == 15).all()
    assert (inputs[:, 0] == tokenizer.cls_token_id).all()
    assert (inputs[:, -1] == tokenizer.sep_token_id).all()
    assert not chosen[:, [0, -1]].any()
    # Every place is as likely as any other: 400 draws of 0.15 deviate from it by less than 5 standard deviations.
    assert np.abs(chosen[:, 1:-1].mean(axis=0) - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 400)
    masked, kept = inputs[chosen] == tokenizer.mask_token_id, inputs[chosen] == targets[chosen]
    total = chosen.sum()
    assert abs(masked.mean() - 0.8) < 5 * np.sqrt(0.8 * 0.2 / total)
    assert abs(kept.mean() - 0.1) < 5 * np.sqrt(0.1 * 0.9 / total) + 0.1 / 300
    changed = inputs[chosen][~masked & ~kept]
    assert not set(changed.tolist()) & set(tokenizer.all_special_ids)
    assert len(set(changed.tolist())) > 200
    # With the targets put back, it is the text.
    restored = np.where(chosen, targets, inputs)[:, 1:-1]
    text = PackedSamples(TokenShards(noisy, "train"), 100, 1).windows(np.arange(400))
    assert np.array_equal(restored, text)


def test_spans_can_be_put_back(noisy: Path) -> None:
    tokenizer = load_tokenizer(noisy / "tokenizer")
    sentinels = sentinel_ids(tokenizer)
    assert len(sentinels) == 10
    objective = make_objective(ObjectiveSection(), "t5")
    samples = objective.samples(noisy, "validation", 64, 1)
    width, hidden, spans = corruption(64, 0.15, 3.0)
    assert (hidden, spans) == (round(0.15 * width), round(round(0.15 * width) / 3))
    batch = samples.batch(np.arange(samples.count))
    assert batch["input_ids"].shape[1] == width - hidden + spans + 1 <= 64
    assert batch["targets"].shape[1] == hidden + spans + 1 == objective.lengths(64)[1]
    text = PackedSamples(TokenShards(noisy, "validation"), width, 1, shuffle=False).windows(np.arange(samples.count))
    lengths = []
    for row, (inputs, targets) in enumerate(zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True)):
        assert inputs.pop() == targets.pop() == tokenizer.eos_token_id
        gaps: dict[int, list[int]] = {}
        for token in targets:
            if token in sentinels:
                gaps[token] = []
            else:
                gaps[list(gaps)[-1]].append(token)
        assert list(gaps) == sentinels[:spans] == [token for token in inputs if token in sentinels]
        assert all(gaps.values())
        lengths += [len(gap) for gap in gaps.values()]
        filled = [token for piece in inputs for token in gaps.get(piece, [piece])]
        assert filled == text[row].tolist()
    assert np.mean(lengths) == pytest.approx(hidden / spans)
    assert max(lengths) > min(lengths)


@pytest.mark.parametrize("length", [5, 6, 17, 64, 113, 114, 512])
@pytest.mark.parametrize(("fraction", "span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 20.0), (0.01, 3.0)])
def test_an_input_fills_the_length(length: int, fraction: float, span: float) -> None:
    width, hidden, spans = corruption(length, fraction, span)
    assert 1 <= spans <= hidden < width
    assert spans <= width - hidden
    assert width - hidden + spans + 1 <= length


def test_t5_itself_cuts_512_tokens_so() -> None:
    # compute_input_and_target_lengths(512, 0.15, 3) of the authors' code: a window of 568, a target of 114.
    width, hidden, spans = corruption(512, 0.15, 3.0)
    assert (width, hidden + spans + 1) == (568, 114)


def test_what_a_tokenizer_lacks_is_named(noisy: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"masked needs a tokenizer with a mask token.*tokenizer\.mask_token=true"):
        make_objective(ObjectiveSection(), "bert").check_tokenizer(load_tokenizer(tiny_model), 32, "there")
    with pytest.raises(UserError, match=r"span needs 28 sentinel tokens at training\.sequence_length 512.* has 10"):
        make_objective(ObjectiveSection(), "t5").samples(noisy, "train", 512, 0)
    with pytest.raises(UserError, match="found 'masked', allowed for a t5 model: span"):
        make_objective(ObjectiveSection(type="masked"), "t5")


def test_family_and_objective_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text("run: {name: x}\ndata: {train: text}\nmodel: {family: bert}\ntraining: {steps: 1}\n")
    config = load_config("pretrain", path)
    assert config.objective.type == "masked"
    assert config.new_tokenizer.mask_token
    assert load_config("pretrain", path, ["model.family=t5"]).new_tokenizer.sentinels == 100
    with pytest.raises(UserError, match=r"objective\.type: found 'causal', allowed for the family bert: masked"):
        load_config("pretrain", path, ["objective.type=causal"])
    with pytest.raises(UserError, match=r"tokenizer\.mask_token: found false"):
        load_config("pretrain", path, ["tokenizer={mask_token: false}"])
