"""The ``raylm`` command: one subcommand per stage, no logic.

Exit status: 0 done; 2 the configuration or the input is wrong (one line on stderr); 1 a failure at run time; 130
ended by Ctrl-C, 143 by SIGTERM (128 and the signal's number). Stages are imported inside their commands, so
that ``raylm --help`` needs neither torch nor ray.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import click
import typer

import raylm
from raylm import telemetry
from raylm.errors import RunFailure, UserError
from raylm.interrupts import SIGNALLED, SIGNALS, Interrupts, ended_at_once, ending, interruptible
from raylm.launcher import commands as launcher_commands
from raylm.progress import Activity
from raylm.serving import commands as serving_commands

app = typer.Typer(
    name="raylm",
    help="From raw text to a served, compressed language model on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the command.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set, such as training.steps=100.")
]

# Stage -> module and function that run it; imported only when the stage is called.
STAGE_FUNCTIONS = {
    "prepare": ("raylm.data.prepare.stage", "prepare"),
    "pretrain": ("raylm.training.stage", "pretrain"),
    "finetune": ("raylm.training.stage", "finetune"),
    "tune": ("raylm.compression.search.stage", "tune"),
    "evaluate": ("raylm.evaluation.stage", "evaluate"),
    "compress": ("raylm.compression.stage", "compress"),
    "serve": ("raylm.serving.stage", "serve"),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"raylm {raylm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """From raw text to a served, compressed language model on Ray."""


def run_stage(stage: str, path: Path, overrides: list[str] | None) -> None:
    """Load the configuration of ``stage`` and run it; ``jobs/STAGE.py`` comes here too."""
    from raylm.config import load_config

    config = load_config(stage, path, overrides or [])
    module, name = STAGE_FUNCTIONS[stage]
    with Activity(f"{stage}: importing libraries"), ended_at_once():
        function = getattr(importlib.import_module(module), name)
    function(config)


@app.command()
def prepare(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Clean text, train a tokenizer, write token shards.

    Reads CONFIG, a YAML file, and the text that its data.train names. Writes the directory <run.storage>/<run.name>:
    token shards, documents, the tokenizer, and report.html, the data card. KEY=VALUE sets a key of CONFIG. The same
    command resumes a run that was stopped.

    \b
    Example:
      raylm prepare jobs/recipes/corpora/english.yaml data.train=books.jsonl
    """
    run_stage("prepare", config, overrides)


@app.command()
def pretrain(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train a new model.

    Reads CONFIG, a YAML file, and prepared data or raw text (data.train). Writes the run directory
    <run.storage>/<run.name>: checkpoints/, metrics.jsonl, and model/, a Hugging Face directory. KEY=VALUE sets a key of
    CONFIG. The same command resumes a run that was stopped.

    \b
    Example:
      raylm pretrain jobs/recipes/quickstart/pretrain.yaml training.steps=100
    """
    run_stage("pretrain", config, overrides)


@app.command()
def finetune(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train an existing model further.

    Reads CONFIG, a YAML file, the model at model.path, and data.train: prompt and answer pairs, text, questions in the
    SQuAD format, labelled texts, or tagged words. Writes the run directory <run.storage>/<run.name> with model/, a
    Hugging Face directory. KEY=VALUE sets a key of CONFIG. The same command resumes a run that was stopped.

    \b
    Example:
      raylm finetune jobs/recipes/encoders/reader.yaml model.path=ENCODER data.train=train.json data.validation=dev.json
    """
    run_stage("finetune", config, overrides)


@app.command()
def tune(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Search hyperparameters of fine-tuning.

    Reads what finetune reads, and the section tuning: the keys to search and their ranges. Writes the run directory
    <run.storage>/<run.name>: the table of trials and model/, the model of the best trial. KEY=VALUE sets a key of
    CONFIG.

    \b
    Example:
      raylm tune jobs/recipes/quickstart/tune.yaml tuning.trials=8
    """
    run_stage("tune", config, overrides)


@app.command()
def evaluate(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Measure a model on text, questions, labels, tags or pairs.

    Reads CONFIG, a YAML file, the model at model.path and the validation data. Writes report.json in the directory
    <run.storage>/<run.name>: bits per byte and perplexity of a next-token model, exact match and F1 of a reader,
    accuracy and macro-F1 of a classifier, token accuracy and F1 of spans of a tagger, BLEU, chrF and ROUGE of a model
    that writes. KEY=VALUE sets a key of CONFIG.

    \b
    Example:
      raylm evaluate jobs/recipes/quickstart/evaluate.yaml evaluation.stride=64
    """
    run_stage("evaluate", config, overrides)


@app.command()
def compress(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Make 8-bit weights and compare them with the original.

    Reads CONFIG, a YAML file, the model at model.path and validation data. Writes the directory
    <run.storage>/<run.name>: model/ with an OpenVINO export in model/openvino/, and report.json with size, memory,
    speed and quality before and after. KEY=VALUE sets a key of CONFIG.

    \b
    Example:
      raylm compress jobs/recipes/quickstart/compress.yaml
    """
    run_stage("compress", config, overrides)


@app.command()
def serve(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Serve models over HTTP until Ctrl-C.

    Reads CONFIG, a YAML file, and the model at model.path. Answers on serving.host and serving.port (by default
    http://127.0.0.1:8000): OpenAI's routes, /v1/qa, /v1/classify, /v1/tag, and a page at /. Writes one line for each
    request to <run.storage>/<run.name>/logs/. KEY=VALUE sets a key of CONFIG.

    \b
    Example:
      raylm serve jobs/recipes/quickstart/serve.yaml serving.port=8080
    """
    run_stage("serve", config, overrides)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    cluster: Annotated[
        Path | None,
        typer.Option(help="Cluster file to plan for: Ray's cluster launcher or KubeRay.", show_default=False),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(min=2, help="Vocabulary size: plan without data and tokenizer.", show_default=False),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DOLLARS", help="Price of a node (of type NAME) for an hour.", show_default=False),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="KIND:COUNT", help="GPUs of a node, as H100:8.", show_default=False)
    ] = None,
    network: Annotated[float | None, typer.Option(help="Gbit/s of a node to the others.", show_default=False)] = None,
    measured: Annotated[
        Path | None, typer.Option(help="JSON file of measured figures of the hardware.", show_default=False)
    ] = None,
) -> None:
    """Show what a training run would take; train nothing.

    Reads CONFIG, the YAML file of pretrain. Prints layout, parameters, memory of a worker by kind, traffic, pipeline
    bubble, predicted speed, and what else was considered. With --cluster it does so for each kind of node of a cluster
    that need not be there, with hours and cost. Writes nothing. KEY=VALUE sets a key of CONFIG.

    \b
    Example:
      raylm plan jobs/recipes/encoders/bert.yaml resources.workers=4 parallel.tensor=2
    """
    from raylm.config import load_config
    from raylm.parallel.plan.on_clusters import describe_plan, read_terms

    with ended_at_once():
        terms = read_terms(gpus, network, price or [], measured)
        text = describe_plan(load_config("pretrain", config, overrides or []), cluster, terms, vocabulary)
    print(text)


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
    beside: Annotated[
        Path | None,
        typer.Option(
            help="JSON list of other tools' models, for the plots of compression: name, quality or quality_ratio, "
            "megabytes, p50_milliseconds.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page about a run of any stage, also one that is still going, or compare several on one page."""
    from raylm.reports.report import write_report

    print(write_report(runs, output, beside))


@app.command()
def schema(stage: Annotated[str, typer.Argument(help="prepare, pretrain, finetune, ...")]) -> None:
    """Print the JSON Schema of a stage's YAML file.

    STAGE is prepare, pretrain, finetune, tune, evaluate, compress or serve. Editors complete and check keys with it.
    Every key has its description, type, default and limits.

    \b
    Example:
      raylm schema pretrain > pretrain.schema.json
    """
    from raylm.config import STAGES

    if stage not in STAGES:
        raise UserError(f"stage: found '{stage}', allowed: {', '.join(STAGES)}")
    print(json.dumps(STAGES[stage].model_json_schema(), indent=2))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print, such as quickstart/pretrain.")] = None,
) -> None:
    """List the recipes, or print one: raylm recipes quickstart/pretrain > pretrain.yaml."""
    from raylm.recipes import all_recipes, find_recipe, listing

    if name is None:
        print(listing(all_recipes()))
        print("\nraylm recipes NAME > file.yaml writes one; raylm STAGE file.yaml runs it.")
    else:
        print(find_recipe(name).path.read_text(encoding="utf-8"), end="")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False) -> None:
    """Check this machine: Python, packages, devices, Ray, ports, disk, memory; exit status 1 if something is broken."""
    from raylm.doctor.report import run_doctor

    raise typer.Exit(run_doctor(as_json=as_json))


@app.command()
def quickstart(
    serve: Annotated[bool, typer.Option("--serve", help="Keep the server running at the end.")] = False,
    directory: Annotated[Path, typer.Option(help="Working directory; results go to runs/quickstart in it.")] = Path(),
) -> None:
    """Run the whole pipeline on the documentation of Python's standard library and ask the served model."""
    from raylm.quickstart.pipeline import run_quickstart

    run_quickstart(directory, keep_serving=serve)


serving_commands.add_commands(app)
launcher_commands.add_commands(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and turn its errors into the exit status."""
    telemetry.silence()
    with interruptible() as interrupts:
        try:
            status = app(args=arguments, prog_name="raylm", standalone_mode=False) or 0
            # So Typer returns it.
            return _interrupted(interrupts) if status == SIGNALLED + signal.SIGINT else status
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted(interrupts)
        except Exception as error:  # noqa: BLE001 - libraries turn the interrupt into errors of their own
            if interrupts.received is not None:
                return _interrupted(interrupts)
            return _failed(error)


def _failed(error: Exception) -> int:
    """Say what went wrong, in one line where it is an error that we know; anything else is raised."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return 2
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "raylm"
        message = " ".join(error.format_message().split()).rstrip(".")
        print(f"raylm: error: {message}; see {command} --help", file=sys.stderr)
        return 2
    if isinstance(error, UserError):
        print(f"raylm: error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, RunFailure):
        print(f"raylm: failed: {error}", file=sys.stderr)
        return 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        # Of a disk, not of the code: where nobody nearer knew what was to be written.
        print(f"raylm: failed: {error.strerror}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 1
    raise error


def _interrupted(interrupts: Interrupts) -> int:
    number = interrupts.received or signal.SIGINT
    print(ending(number), file=sys.stderr)
    return SIGNALLED + number


def run_and_exit(arguments: list[str] | None = None) -> NoReturn:
    """The ``raylm`` script: run the command line and end the process with its exit status.

    A thread of Ray's C++ core lives on after ``ray.shutdown()``. Where it wakes while the interpreter takes itself
    apart, it ends the process with status 1 ("the core worker has already been shutdown"), whatever the stage had made.
    A thread of a library whose work was interrupted may never end, which the interpreter would wait for. So what is
    registered for the end runs, output is flushed, and the process ends at once.
    """
    status = main(arguments)
    # From here on there is nothing to wait for.
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(status))
    if "ray" in sys.modules or status > SIGNALLED:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run_and_exit()
