"""Jobs that are there: listed, read, stopped."""

from __future__ import annotations

import datetime
import signal
import sys
import time
from typing import TYPE_CHECKING

from raylm.errors import RunFailure, first_line
from raylm.interrupts import ending
from raylm.launcher.connection import connect
from raylm.launcher.jobs import Job, all_jobs, find_job, read_job
from raylm.launcher.submit import POLL_SECONDS, STOP_SECONDS, follow
from raylm.progress import Activity

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Beyond what a job has to end, for Ray to write down that it did.
SPARE_SECONDS = 30.0
# Of what a run said last, as many characters.
LAST_LINE = 140


def list_jobs(address: str | None) -> None:
    """Print a table of raylm's jobs, the newest first."""
    jobs = all_jobs(connect(address))
    if not jobs:
        print("no jobs; raylm submit STAGE CONFIG starts one")
        return
    rows = [("run", "stage", "status", "started", "time", "job")]
    rows += [(job.run, job.stage, shown_status(job), began(job), lasted(job), job.id) for job in jobs]
    print(table(rows))


def show_logs(run: str, address: str | None, *, following: bool = False) -> None:
    """Print what a run's newest job has said, and with ``following`` what it says until it ends."""
    client = connect(address)
    job = find_job(client, run)
    if following and not job.over:
        follow(client, job)
    else:
        print(client.get_job_logs(job.id), end="")


def stop(run: str, address: str | None) -> None:
    """Stop a run's job, and wait until it has: a training run saves first.

    Raises:
        UserError: there is no such run.
        RunFailure: it did not end in time.
    """
    client = connect(address)
    job = find_job(client, run)
    if job.over:
        print(f"stop: {job.run} has ended already: {shown_status(job)}")
        return
    client.stop_job(job.id)
    end = time.monotonic() + STOP_SECONDS + SPARE_SECONDS
    with Activity(f"stop: waiting for {job.run} to save and end"):
        while not job.over:
            if time.monotonic() > end:
                raise RunFailure(f"{job.run} has not ended within {STOP_SECONDS + SPARE_SECONDS:.0f} s (job {job.id})")
            time.sleep(POLL_SECONDS)
            job = read_job(client, job.id)
    said = last_line(client, job)
    print(f"stop: {job.run} {shown_status(job)}{f'; it said: {said}' if said else ''}")


def status(address: str | None) -> None:
    """Print the cluster's nodes, the latest jobs with what they said last, and what is served."""
    client = connect(address)
    _print_nodes(client)
    newest: dict[str, Job] = {}
    for job in all_jobs(client):
        newest.setdefault(job.run, job)
    rows = [("run", "stage", "status", "time", "last line")]
    for job in newest.values():
        rows.append((job.run, job.stage, shown_status(job), lasted(job), last_line(client, job)[:LAST_LINE]))
    print(table(rows) if newest else "no runs; raylm submit STAGE CONFIG starts one")
    _print_served(client)


def _print_nodes(client: JobSubmissionClient) -> None:
    from ray.util.state import list_nodes

    try:
        nodes = list_nodes(address=client.get_address(), detail=True)
    except Exception as error:  # noqa: BLE001 - Ray raises its own classes and bare ones here; the runs matter more
        print(f"status: the nodes cannot be listed: {first_line(error)}", file=sys.stderr)
        return
    rows = [("node", "state", "CPUs", "GPUs", "memory")]
    for node in nodes:
        total = node.resources_total or {}
        memory = f"{total.get('memory', 0) / 1e9:.0f} GB"
        name = f"{node.node_ip}{' (head)' if node.is_head_node else ''}"
        rows.append((name, node.state.lower(), f"{total.get('CPU', 0):g}", f"{total.get('GPU', 0):g}", memory))
    print(f"{table(rows)}\n")


def _print_served(client: JobSubmissionClient) -> None:
    """The applications of Ray Serve on the cluster, if there are any."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    try:
        applications = ServeSubmissionClient(client.get_address()).get_serve_details()["applications"]
    except Exception as error:  # noqa: BLE001 - as above
        print(f"status: what is served cannot be listed: {first_line(error)}", file=sys.stderr)
        return
    rows = [("served", "status", "route", "replicas")]
    for name, one in applications.items():
        running = sum(
            replica["state"] == "RUNNING" for part in one["deployments"].values() for replica in part["replicas"]
        )
        rows.append((name, one["status"].lower(), one["route_prefix"] or "-", str(running)))
    if applications:
        print(f"\n{table(rows)}")


def last_line(client: JobSubmissionClient, job: Job) -> str:
    """The last that a job said, but for that it was ended; empty where it said nothing."""
    try:
        lines = client.get_job_logs(job.id).splitlines()
    except RuntimeError:
        # It has not begun.
        return ""
    said = (line.strip() for line in reversed(lines))
    return next((line for line in said if line and line != ending(signal.SIGTERM)), "")


def shown_status(job: Job) -> str:
    """Its status in a word or two."""
    return f"failed ({job.exit_code})" if job.status == "FAILED" and job.exit_code else job.status.lower()


def began(job: Job) -> str:
    """When it was submitted, in this machine's time."""
    return "" if job.started is None else f"{datetime.datetime.fromtimestamp(job.started):%Y-%m-%d %H:%M}"


def lasted(job: Job) -> str:
    """How long it has run, h:min:s."""
    if job.started is None:
        return ""
    return str(datetime.timedelta(seconds=int((job.ended or time.time()) - job.started)))


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns; the first is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)
