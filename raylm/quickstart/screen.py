"""The quickstart's last screen: its figures, the page to open, and three next steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raylm.quickstart.stages import duration

NEXT_STEPS = """\
Next:
  1. Your own text
       raylm recipes quickstart/prepare > prepare.yaml
       raylm prepare prepare.yaml run.name=mine data.text_unit=paragraph \\
           data.train=FILE.txt
  2. Your own model: change model.config in the file
       raylm recipes quickstart/pretrain > pretrain.yaml
       raylm pretrain pretrain.yaml run.name=my-model
  3. Your programs and your cluster
       any OpenAI client, with the base URL {url}/v1
       RAY_ADDRESS=HOST:6379 raylm pretrain pretrain.yaml run.name=large
`raylm recipes` lists more recipes, `raylm doctor` checks a machine."""


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
        lines.append("The page: `raylm quickstart --serve` starts the server again and keeps it;")
        lines.append(f"then open {url}/ in a browser.")
    return "\n".join([*lines, "", NEXT_STEPS.format(url=url)])
