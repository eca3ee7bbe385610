"""Settings that DeepSpeed needs before it is imported or started."""

from __future__ import annotations

import datetime
import importlib
import logging
import os


def prepare_deepspeed(use_gpu: bool) -> None:
    """Choose DeepSpeed's accelerator and keep it from compiling C++ that training does not use.

    On a CPU, DeepSpeed's communication backend builds a shared-memory collective for inference at start-up, which
    takes a minute; declaring it incompatible makes DeepSpeed go on with gloo alone.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed.ops

    if not use_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    _import_uncompiled("deepspeed.runtime.zero.muon.original_muon")


def _import_uncompiled(module: str) -> None:
    """Import a module that compiles functions when it is imported, which would load all of TorchInductor.

    DeepSpeed asks it whether an optimizer is its own Muon; nothing of it runs here, and each start is seconds shorter.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module(module)
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def limit_collectives(seconds: float) -> None:
    """Set the time-out of the collectives of all process groups; those that DeepSpeed makes have the default's."""
    from torch.distributed import distributed_c10d as groups

    for group in list(groups._world.pg_map):
        if not groups._rank_not_in_group(group):
            groups._set_pg_timeout(datetime.timedelta(seconds=seconds), group)
