"""What libraries tell their makers of their use: nothing, unless the user has turned it on.

Some ask nobody: nncf and OpenVINO's converter send events from a process of their own, which writes an id into the home
directory, and which hangs where there is no network.
"""

from __future__ import annotations

import os
import sys

# DO_NOT_TRACK is https://consoledonottrack.com; the others are the libraries' own.
VARIABLES = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def silence() -> None:
    """Turn it off in this process and in those that it starts; variables that are set already stay."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    # It has no variable. Whoever imports it does without where it is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
