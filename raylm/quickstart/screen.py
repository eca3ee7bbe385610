"""The quickstart's last screen: its figures, the page to open, and three next steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raylm.quickstart.stages import duration

NEXT_STEPS = """\
Next:
  1. Your own text:  raylm recipes quickstart/prepare > prepare.yaml
                     raylm prepare prepare.yaml run.name=mine data.train=FILE.txt
  2. Your own model: raylm recipes quickstart/pretrain > pretrain.yaml   (then change its model.config)
                     raylm pretrain pretrain.yaml run.name=my-model data.train=./runs/quickstart/mine
  3. Your programs:  any OpenAI client with the base URL {url}/v1
     and a cluster:  RAY_ADDRESS=HOST:6379 raylm pretrain pretrain.yaml run.name=large resources.workers=8
`raylm recipes` lists more recipes."""


def last_screen(
    results: Mapping[str, str],
    url: str,
    seconds: float,
    peak: int,
    directory: Path,
    *,
    serving: bool,
) -> str:
    """The text.

    Args:
        results: of the stages, by name.
        seconds: that everything took.
        peak: of memory, in bytes.
        directory: that holds ``runs/quickstart``.
        serving: whether the server goes on.
    """
    width = max(map(len, [*results, "results"]))
    lines = ["", f"Done in {duration(seconds)}, with at most {peak / 1e9:.1f} GB of memory."]
    lines += [f"  {name.ljust(width)}  {result}" for name, result in results.items()]
    lines += [f"  {'results'.ljust(width)}  {directory / 'runs' / 'quickstart'}", ""]
    if serving:
        lines.append(f"Open {url}/ in a browser. Ctrl-C stops the server.")
    else:
        lines.append(f"Open {url}/ in a browser after `raylm quickstart --serve`, which starts the server again.")
    return "\n".join([*lines, "", NEXT_STEPS.format(url=url)])
