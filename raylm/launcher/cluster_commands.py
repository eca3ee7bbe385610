"""``raylm cluster``: up, check, down. What they do is imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raylm.launcher.options import AddressOption

cluster = typer.Typer(
    name="cluster", help="Start, check and end clusters.", no_args_is_help=True, rich_markup_mode=None
)
FileArgument = Annotated[
    Path, typer.Argument(metavar="CLUSTER", help="File of Ray's cluster launcher.", show_default=False)
]


@cluster.command()
def up(
    file: FileArgument,
    wait: Annotated[float, typer.Option(help="Seconds that the workers may take after the head.", min=1)] = 900,
) -> None:
    """Start a cluster and wait until all of its nodes are there.

    Makes ~/.ray/auth_token where the file sends it and there is none. The same command again brings changes of the file
    to a cluster that is up.

    \b
    Example:
      raylm cluster up cluster/local.yaml
    """
    from raylm.launcher.clusters import up as run

    run(file, wait)


@cluster.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="[CLUSTER]", help="File that the cluster was started from.")
    ] = None,
    address: AddressOption = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder that all nodes should share, such as run.storage.", show_default=False)
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Also time so many workers of each node at once, for raylm plan --measured.", min=0)
    ] = 0,
    threads: Annotated[int, typer.Option(help="Of each of these workers.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Look at every node of a cluster: packages, storage, disk, clock, ports, network, speed, GPUs.

    Asks the cluster of CLUSTER over ssh, or the one at --address by a job. Ends with status 1 where something is
    broken. Takes half a minute, and the cluster should have nothing else to do.

    \b
    Example:
      raylm cluster check cluster/local.yaml --storage /shared
    """
    from raylm.launcher.check import check as run

    raise typer.Exit(run(file, address, storage, workers, threads, as_json=as_json))


@cluster.command()
def down(file: FileArgument) -> None:
    """End a cluster: its head, its workers, and what runs on them."""
    from raylm.launcher.clusters import down as run

    run(file)
