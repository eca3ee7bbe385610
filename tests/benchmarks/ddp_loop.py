"""A plain PyTorch DDP loop, the yardstick of ``ddp_throughput.py``: started by torchrun, prints tokens per second.

``ddp_loop.py STEPS BATCH_SIZE SEQUENCE_LENGTH VOCABULARY LAYERS WIDTH HEADS``: GPT-2, AdamW, fp32, gloo.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

WARM_UP = 5


def main() -> None:
    steps, batch_size, length, vocabulary, layers, width, heads = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_layer=layers, n_embd=width, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = DistributedDataParallel(GPT2LMHeadModel(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    share = batch_size // dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            dist.barrier()
            began = time.perf_counter()
        ids = torch.randint(0, vocabulary, (share, length + 1), generator=generator)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps({"tokens_per_second": steps * batch_size * length / (time.perf_counter() - began)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
