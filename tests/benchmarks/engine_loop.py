"""The engine alone, the yardstick of ``training_cost.py``: under torchrun it trains as raylm's loop does, without Ray.

``engine_loop.py CONFIG.yaml DATA_DIRECTORY PROGRESS_FILE``: rank 0 writes each tenth step to the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from raylm.config import load_config
from raylm.data.loading import load_tokenizer
from raylm.data.samples.opening import open_samples
from raylm.models.families.build import build_config
from raylm.models.weights import DrawnWeights, make_outline
from raylm.parallel.engines.base import EngineSettings
from raylm.parallel.engines.data_parallel import DataParallelEngine
from raylm.parallel.engines.environment import prepare_deepspeed
from raylm.tasks.causal import CausalObjective
from raylm.tasks.objective import ObjectiveModule
from raylm.training.loop.batches import micro_batches, step_batches
from raylm.training.loop.schedules import learning_rate_factor
from raylm.training.optimizers.build import make_optimizer


def main() -> None:
    config, data, progress = load_config("pretrain", sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    prepare_deepspeed(False)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training, section = config.training, config.model
    torch.manual_seed(config.run.seed)
    samples = open_samples(data, "train", training.sequence_length, config.run.seed, False)
    model_config = build_config(
        section.family, section.config, load_tokenizer(data / "tokenizer"), training.sequence_length
    )
    outline = make_outline(model_config)
    micro = config.parallel.micro_batch_size
    device = torch.device("cpu")
    engine = DataParallelEngine(
        ObjectiveModule(outline.model, CausalObjective()),
        lambda named: make_optimizer(training, named, outline.model),
        EngineSettings(
            zero_stage=config.parallel.zero_stage,
            micro_batch_size=micro,
            accumulation=micro_batches(training.batch_size, world_size, micro),
            clipping=training.gradient_clipping,
            bf16=False,
            device=device,
            weights=DrawnWeights(outline, config.run.seed),
        ),
    )
    for step in range(training.steps):
        batches = step_batches(samples, step, training.batch_size, rank, world_size, micro, device)
        engine.set_learning_rate(learning_rate_factor(training, step, training.steps))
        result = engine.train_step(batches)
        if (step + 1) % training.log_every_steps == 0:
            loss = engine.mean_loss(result)
            if rank == 0:
                with progress.open("a") as stream:
                    stream.write(f'{{"step": {step + 1}, "loss": {loss}}}\n')
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
