"""The commands about clusters and the jobs on them. What they do is imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raylm.launcher.cluster_commands import cluster
from raylm.launcher.options import AddressOption

RunArgument = Annotated[str, typer.Argument(help="Name of the run, or Ray's id of the job.", show_default=False)]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to ``raylm``."""
    for command in (submit, jobs, logs, stop, status):
        app.command()(command)
    app.add_typer(cluster)


def submit(
    stage: Annotated[str, typer.Argument(help="prepare, pretrain, finetune, ...", show_default=False)],
    config: Annotated[Path, typer.Argument(help="YAML file of the stage.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set, such as training.steps=100.")
    ] = None,
    address: AddressOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    retries: Annotated[int, typer.Option(help="Submit again after a failure, at most so often.", min=0, max=100)] = 0,
) -> None:
    """Run a stage as a job on a cluster, and show what it says.

    Checks CONFIG here, uploads it with raylm's own code, and ends with the stage's exit status (143 where the job was
    stopped). Data and results must be on storage that all nodes share. The same command goes on with a run that was
    stopped or failed. Ctrl-C leaves the job running.

    \b
    Example:
      raylm submit pretrain pretrain.yaml run.storage=/shared/runs --address http://head:8265
    """
    from raylm.launcher.submit import submit as run

    raise typer.Exit(run(stage, config, overrides or [], address, detach=detach, retries=retries))


def jobs(address: AddressOption = None) -> None:
    """List the jobs that were submitted to a cluster, the newest first."""
    from raylm.launcher.control import list_jobs

    list_jobs(address)


def logs(
    run: RunArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
) -> None:
    """Print what a run's newest job said."""
    from raylm.launcher.control import show_logs

    show_logs(run, address, following=follow)


def stop(run: RunArgument, address: AddressOption = None) -> None:
    """Stop a run's job and wait for it; a training run saves first."""
    from raylm.launcher.control import stop as end

    end(run, address)


def status(address: AddressOption = None) -> None:
    """Show a cluster's nodes, of each run its newest job and what it said last, and what is served."""
    from raylm.launcher.control import status as show

    show(address)
