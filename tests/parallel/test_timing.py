"""The predicted time of a step: its parts follow from the layout and the hardware."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from raylm.cluster.hardware import CPU, GPUS, Figures, gpu_figures, gpu_kind
from raylm.config.model import ObjectiveSection
from raylm.errors import UserError
from raylm.models.families.build import build_empty
from raylm.parallel.plan.layout import Layout
from raylm.parallel.plan.memory import ModelMemory
from raylm.parallel.plan.timing import StepTime, bubble, model_flops, step_time
from raylm.tasks import make_objective
from raylm.training.loop.flops import flops_per_token

LENGTH = 128
SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = LlamaConfig(vocab_size=512, **SHAPE)
GPT2 = GPT2Config(vocab_size=512, n_embd=128, n_layer=4, n_head=4, attn_pdrop=0.0)
# Of Llama's rotary embedding: angles.
ANGLES = 1e-3
PLAIN = Layout(8, 1, 1, 1, 4, 2, False, True, "adamw", True)
H100 = gpu_figures("H100")


def memory_of(config=LLAMA, length: int = LENGTH) -> ModelMemory:
    return ModelMemory(config, make_objective(ObjectiveSection(), config.model_type), length, bf16=True)


def timed(layout: Layout, figures: Figures = H100, per_node: int = 8, chunks: int = 1) -> StepTime:
    return step_time(memory_of().stages(layout), layout, figures, per_node, chunks)


# Kernels as short as these are started more slowly than they run.
INSTANT = replace(H100, launch_seconds=1e-12)


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_the_work_that_is_seen_is_the_formula_of_mfu(config) -> None:
    """A fused kernel computes attention a little more often than the formula says: 7 products, not 6."""
    (stage,) = memory_of(config).stages(replace(PLAIN, micro_batch_size=1))
    tokens, attention = LENGTH, 6 * 4 * 128 * LENGTH
    expected = flops_per_token(build_empty(config), LENGTH) * tokens
    assert stage.work.products == expected - attention * tokens
    assert stage.work.attention == pytest.approx(attention * tokens * 7 / 6, rel=ANGLES)
    assert model_flops([stage], PLAIN) == 2 * 8 * (stage.work.products + stage.work.attention)


def test_recomputation_makes_the_blocks_forward_pass_again() -> None:
    (plain,) = memory_of().stages(PLAIN)
    (again,) = memory_of().stages(replace(PLAIN, activation_checkpointing=True))
    blocks = plain.work.products - 6 * 512 * 128 * 4 * LENGTH
    # But for the last product of a block, whose output nothing needs.
    assert 1.2 * blocks < again.work.products - (plain.work.products - blocks) <= 4 / 3 * blocks
    assert again.work.attention == pytest.approx(plain.work.attention * 9 / 7, rel=ANGLES)
    assert again.work.touched > plain.work.touched


def test_tensor_parallelism_shares_the_products_and_adds_sums() -> None:
    (whole,) = memory_of().stages(PLAIN)
    (part,) = memory_of().stages(replace(PLAIN, tensor=4))
    assert part.work.products == whole.work.products / 4
    assert part.work.attention == pytest.approx(whole.work.attention / 4, rel=ANGLES)
    # In a block, two outputs forward, and backward the inputs of queries, keys, values and both matrices of the gated
    # network; the embedding's output, the head's input, and three numbers a token for the loss.
    hidden = 4 * LENGTH * 128 * 2
    assert part.reduced == pytest.approx(hidden * (4 * 7 + 2), rel=0.01)
    assert part.sums == 4 * 7 + 2 + 2
    time = timed(replace(PLAIN, data=2, tensor=4), INSTANT)
    assert time.tensor == pytest.approx(
        2 * (2 * 3 / 4 * part.reduced / H100.near_bandwidth + part.sums * H100.collective_seconds)
    )


def test_zero_3_waits_for_each_weight() -> None:
    """Four matrices of attention and three of the network are over DeepSpeed's limit in a block of this size."""
    layout = replace(PLAIN, data=2, zero_stage=3, use_gpu=False)
    wide = LlamaConfig(vocab_size=512, **SHAPE | {"hidden_size": 512, "intermediate_size": 1024})
    stages = memory_of(wide).stages(layout)
    assert [stage.sharded for stage in stages] == [4 * 7 + 2]
    at_once = replace(CPU, collective_seconds=1e-12)
    apart = [step_time(stages, layout, figures, 8).data for figures in (CPU, at_once)]
    assert apart[0] - apart[1] == pytest.approx(2 * layout.accumulation * 30 * CPU.collective_seconds)


def test_a_pipeline_waits_less_with_more_chunks() -> None:
    piped = replace(PLAIN, pipeline=4, data=2, micro_batch_size=1, accumulation=8)
    one, four = timed(piped), timed(piped, chunks=4)
    assert one.waiting == 4 * four.waiting
    assert one.waiting == pytest.approx((one.computing + one.tensor) * 3 / 8)
    assert (bubble(piped), bubble(piped, 4)) == (3 / 11, 3 / 35)
    assert timed(PLAIN).waiting == timed(PLAIN).pipeline == 0


def test_traffic_hides_behind_computation_on_gpus_only() -> None:
    slow = replace(INSTANT, far_bandwidth=1e6)
    spread = timed(PLAIN, slow, per_node=4)
    assert spread.data > 10 * timed(PLAIN, slow, per_node=8).data
    # ZeRO 3 sends for each of the micro-batches, and has both of them to hide behind.
    assert timed(replace(PLAIN, zero_stage=3), slow, per_node=4).data > 2 * spread.data
    quick = replace(INSTANT, matrix_flops=1e9)
    exposed = replace(quick, exposed=1.0)
    assert timed(PLAIN, quick).data == pytest.approx(timed(PLAIN, exposed).data * H100.exposed)
    assert timed(PLAIN, CPU).data > 0


def test_few_tokens_wait_for_the_weights_and_short_operators_for_their_start() -> None:
    def tokens_a_second(sequences: int, figures: Figures) -> float:
        return sequences / timed(replace(PLAIN, micro_batch_size=sequences), figures).computing

    assert tokens_a_second(64, INSTANT) > 1.05 * tokens_a_second(1, INSTANT)
    (stage,) = memory_of().stages(PLAIN)
    assert timed(PLAIN).computing == 2 * stage.work.operators * H100.launch_seconds


def test_a_kind_is_found_by_what_others_call_it() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": "A100-80G", "NVIDIA A100-SXM4-40GB": "A100", "NVIDIA-H100-80GB-HBM3": "H100",
        "nvidia-h100-mega-80gb": "H100", "NVIDIA H200": "H200", "nvidia-l4": "L4", "NVIDIA L40S": "L40S",
        "Tesla V100-SXM2-16GB": "V100", "nvidia-b200": "B200", "NVIDIA RTX A1000": None, "AMD Instinct MI300X": None,
    }  # fmt: skip
    assert {name: gpu_kind(name) for name in names} == names
    for kind, gpu in GPUS.items():
        if gpu.peak is not None:
            assert gpu_figures(kind).peak_flops == gpu.peak
    with pytest.raises(UserError, match=r"GPU: found K80, allowed: a GPU with figures for bf16: T4"):
        gpu_figures("K80")


@pytest.mark.parametrize("vocabulary", [64, 300])
def test_a_kind_of_bytes_does_not_follow_from_a_width(vocabulary: int) -> None:
    """A vocabulary as large as a layer is wide, and as many tokens, are not taken for logits and gradients."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    for config in (LlamaConfig(vocab_size=vocabulary, **shape), LlamaConfig(vocab_size=vocabulary, **shape)):
        memory = memory_of(config, length=64)
        (stage,) = memory.stages(replace(PLAIN, micro_batch_size=1, accumulation=1))
        ((*_, last),) = [found.segments for found in memory._segments.values()]
        # The softmax in fp32, its gradient in bf16 and one of them in between; the peak may be before or after.
        assert last.passage.forward["logits"] == (4 + 4 + 2) * 64 * vocabulary
        most = stage.footprint.without_gradients
        assert stage.footprint.kept <= sum(most.values())
        whole = memory._measure_whole(False).footprint.without_gradients
        assert sum(whole.values()) == pytest.approx(sum(most.values()), rel=0.3)
        gradients = stage.footprint.peak["gradients"]
        assert gradients <= 2 * stage.parameters
    assert torch.get_default_dtype() == torch.float32
