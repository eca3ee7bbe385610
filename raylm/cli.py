"""The ``raylm`` command: one subcommand per stage, no logic.

Exit status: 0 done; 2 the configuration or the input is wrong (one line on stderr); 1 a failure at run time. Stages
are imported inside their commands, so that ``raylm --help`` needs neither torch nor ray.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import click
import typer

from raylm.errors import RunFailure, UserError
from raylm.progress import Activity

app = typer.Typer(
    name="raylm",
    help="From raw text to a served, compressed language model on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the stage.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides: training.steps=100")
]

# A shell's exit status of what SIGINT ended.
INTERRUPTED = 130

# Stage -> module and function that run it; imported only when the stage is called.
STAGE_FUNCTIONS = {
    "prepare": ("raylm.data.prepare", "prepare"),
    "pretrain": ("raylm.training.stage", "pretrain"),
    "finetune": ("raylm.training.stage", "finetune"),
    "tune": ("raylm.tuning.stage", "tune"),
    "evaluate": ("raylm.evaluation.stage", "evaluate"),
    "compress": ("raylm.compression.stage", "compress"),
    "serve": ("raylm.serving.stage", "serve"),
}


def run_stage(stage: str, path: Path, overrides: list[str] | None) -> None:
    """Load the configuration of ``stage`` and run it; ``jobs/STAGE.py`` comes here too."""
    from raylm.config import load_config

    config = load_config(stage, path, overrides or [])
    module, name = STAGE_FUNCTIONS[stage]
    with Activity(f"{stage}: importing libraries"):
        function = getattr(importlib.import_module(module), name)
    function(config)


@app.command()
def prepare(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Read text, train a tokenizer, write token shards."""
    run_stage("prepare", config, overrides)


@app.command()
def pretrain(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train a new model on Ray Train workers."""
    run_stage("pretrain", config, overrides)


@app.command()
def finetune(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Go on training an existing model on pairs or text."""
    run_stage("finetune", config, overrides)


@app.command()
def tune(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Search fine-tuning hyperparameters with Ray Tune."""
    run_stage("tune", config, overrides)


@app.command()
def evaluate(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Measure cross-entropy, perplexity and bits per byte."""
    run_stage("evaluate", config, overrides)


@app.command()
def compress(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Quantize a model and compare it with the original."""
    run_stage("compress", config, overrides)


@app.command()
def serve(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Serve a model over HTTP until interrupted."""
    run_stage("serve", config, overrides)


@app.command()
def plan(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Show layout, parameters, memory and tokens of a training file; train nothing."""
    from raylm.config import load_config
    from raylm.parallel.plan import make_plan

    print(make_plan(load_config("pretrain", config, overrides or [])).describe())


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Model or run directory.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    max_new_tokens: int = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: int = 0,
) -> None:
    """Try a model without a server."""
    from raylm.evaluation.generation import generate_text

    print(generate_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write. Default: report.html in the run's directory; of several runs, in the current one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page about a run of any stage, also one that is still going, or compare several on one page."""
    from raylm.reports.report import write_report

    print(write_report(runs, output))


@app.command()
def schema(stage: Annotated[str, typer.Argument(help="prepare, pretrain, finetune, ...")]) -> None:
    """Print the JSON Schema of a stage's YAML, for editors."""
    from raylm.config import STAGES

    if stage not in STAGES:
        raise UserError(f"stage: found '{stage}', allowed: {', '.join(STAGES)}")
    print(json.dumps(STAGES[stage].model_json_schema(), indent=2))


@app.command()
def quickstart(
    serve: Annotated[bool, typer.Option("--serve", help="Keep the server running at the end.")] = False,
    directory: Annotated[Path, typer.Option(help="Working directory; results go to runs/quickstart in it.")] = Path(),
) -> None:
    """Run the whole pipeline on the embedded corpus and ask the served model two questions."""
    from raylm.quickstart.pipeline import run_quickstart

    run_quickstart(directory, keep_serving=serve)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and turn its errors into the exit status."""
    try:
        status = app(args=arguments, standalone_mode=False) or 0
        if status == INTERRUPTED:  # so Typer returns it
            raise KeyboardInterrupt
        return status
    except UserError as error:
        print(f"raylm: error: {error}", file=sys.stderr)
        return 2
    except RunFailure as error:
        print(f"raylm: failed: {error}", file=sys.stderr)
        return 1
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("raylm: interrupted", file=sys.stderr)
        return INTERRUPTED


def run_and_exit(arguments: list[str] | None = None) -> NoReturn:
    """The ``raylm`` script: run the command line and end the process with its exit status.

    A thread of Ray's C++ core lives on after ``ray.shutdown()``. Where it wakes while the interpreter takes itself
    apart, it ends the process with status 1 ("the core worker has already been shutdown"), whatever the stage had made.
    So what is registered for the end runs, output is flushed, and the process ends at once.
    """
    status = main(arguments)
    if "ray" in sys.modules:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run_and_exit()
