"""Settings that DeepSpeed needs before it is imported or started."""

from __future__ import annotations

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
