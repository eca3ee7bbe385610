"""``training.compile``: torch.compile for the blocks of an engine, and whether it can work here."""

from __future__ import annotations

import os
import shutil

from torch import nn

from raylm.config.layout import compiled_refusal
from raylm.errors import UserError


def check_compilation(zero_stage: int) -> None:
    """Refuse to compile where it cannot work on this machine, or under this ZeRO stage.

    TorchInductor writes C++; on a GPU, Triton needs a compiler as well.

    Raises:
        UserError: one line.
    """
    if refusal := compiled_refusal(zero_stage):
        raise UserError(refusal)
    wanted = os.environ.get("CXX", "g++")
    if shutil.which(wanted) is None:
        raise UserError(
            f"training.compile: found true, which needs a C++ compiler on every node: there is no '{wanted}' on the "
            "PATH (install g++, set CXX, or leave training.compile out)"
        )


def compile_blocks(module: nn.Module) -> None:
    """Compile the forward and backward pass of each block in ``module`` when it is first called.

    Blocks of one kind share what is compiled ("regional compilation" in PyTorch's documentation), which takes a
    fraction of the time that the whole model would.
    """
    import torch._dynamo
    from transformers.modeling_layers import GradientCheckpointingLayer

    # It may have been imported while nothing was to be compiled (raylm.parallel.engines.environment).
    torch._dynamo.config.disable = False
    for block in module.modules():
        # transformers' blocks of every family are of this class.
        if isinstance(block, GradientCheckpointingLayer):
            block.compile()
