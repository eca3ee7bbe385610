"""A stage as a job: submitted, followed to its end, and submitted again where it failed."""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from raylm.config import STAGES, load_config
from raylm.errors import RunFailure, UserError, first_line
from raylm.launcher.connection import connect
from raylm.launcher.jobs import ATTEMPT, RUN, STAGE, STORAGE, Job, all_jobs, read_job
from raylm.launcher.package import CONFIGURATION, check_paths, own_modules, packaged
from raylm.launcher.shown import Shown
from raylm.progress import Activity

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Ray ends a job that is stopped with SIGKILL after 3 s, unless the job's environment says otherwise; a training run
# saves first, which may take two minutes.
STOP_SECONDS = 180
POLL_SECONDS = 1.0
# Without a look at a job that should be there, before the cluster counts as lost.
LOST_SECONDS = 120.0
WRONG_INPUT = 2


def submit(
    stage: str, path: Path, overrides: list[str], address: str | None, *, detach: bool = False, retries: int = 0
) -> int:
    """Run ``stage`` as a job; returns its exit status, 0 at once with ``detach``.

    The same run's job goes on where the last one stopped, as the stage itself does.

    Args:
        retries: how often a job that failed at run time is submitted again. Wrong input and a stop are final.

    Raises:
        UserError: configuration or address is wrong, or a job of this run is under way; nothing was submitted.
        RunFailure: the cluster went away.
    """
    if stage not in STAGES:
        raise UserError(f"STAGE: found {stage}, allowed: {', '.join(STAGES)}")
    config = load_config(stage, path, overrides)
    check_paths(config)
    client = connect(address)
    for attempt in range(retries + 1):
        job = _send(client, stage, path, overrides, config, attempt)
        print(f"submit: {stage} {job.run} is job {job.id}", file=sys.stderr, flush=True)
        if detach:
            print(f"  follow     raylm logs {job.run} --follow\n  stop       raylm stop {job.run}")
            return 0
        try:
            job = follow(client, job)
        except KeyboardInterrupt:
            print(f"submit: the job goes on; raylm stop {job.run} stops it", file=sys.stderr, flush=True)
            raise
        print(f"submit: {job.run} {ending(job)}", file=sys.stderr, flush=True)
        if job.status != "FAILED" or job.exit_status == WRONG_INPUT or attempt == retries:
            return job.exit_status
        print(f"submit: trying again ({attempt + 1} of {retries})", file=sys.stderr, flush=True)
    raise AssertionError("the loop returns")


def _send(client: JobSubmissionClient, stage: str, path: Path, overrides: list[str], config: Any, attempt: int) -> Job:
    """Submit the job, unless one of the same run is under way.

    Two would wait for each other's lock, or overwrite each other where the storage has none.
    """
    run, storage = config.run.name, config.run.storage
    for job in all_jobs(client):
        if not job.over and (job.run, job.storage) == (run, storage):
            raise UserError(
                f"run.name: found {run}, which is under way as job {job.id}; raylm logs {run} --follow shows it, "
                f"raylm stop {run} stops it"
            )
    command = shlex.join(["python", "-m", "raylm.cli", stage, CONFIGURATION, *overrides])
    with Activity("submit: uploading the job"), packaged(path, own_modules(config, path)) as directory:
        try:
            job_id = client.submit_job(
                entrypoint=command,
                runtime_env={
                    "working_dir": str(directory), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
                },
                metadata={RUN: run, STAGE: stage, STORAGE: storage, ATTEMPT: str(attempt)},
            )  # fmt: skip
        except (RuntimeError, OSError, ValueError) as error:
            raise RunFailure(f"the cluster did not take the job: {first_line(error)}") from None
    return read_job(client, job_id)


def follow(client: JobSubmissionClient, job: Job) -> Job:
    """Print what a job says until it ends; returns it then.

    Raises:
        RunFailure: the cluster does not answer any more; the job may go on.
    """
    with Shown() as output:
        return _follow(client, job, output)


def _follow(client: JobSubmissionClient, job: Job, output: Shown) -> Job:
    shown, lost = 0, 0.0
    while True:
        try:
            shown = asyncio.run(_print_from(client, job.id, shown, output))
            job, lost = read_job(client, job.id), 0.0
            if job.over:
                # What came between the last look and the end.
                output.write(client.get_job_logs(job.id)[shown:])
                return job
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > LOST_SECONDS:
                raise RunFailure(
                    f"the cluster has not answered for {LOST_SECONDS:.0f} s ({first_line(error)}); submit {job.run} "
                    "again to go on from its last checkpoint"
                ) from None
        time.sleep(POLL_SECONDS)


async def _print_from(client: JobSubmissionClient, job_id: str, shown: int, output: Shown) -> int:
    """Print a job's log beyond its first ``shown`` characters until the connection ends; how many are shown then."""
    seen = 0
    async for text in client.tail_job_logs(job_id):
        # The log comes from its beginning each time.
        fresh = text[max(0, shown - seen) :]
        seen += len(text)
        if fresh:
            output.write(fresh)
            shown += len(fresh)
    return shown


def ending(job: Job) -> str:
    """What became of a job, in words."""
    if job.status == "SUCCEEDED":
        return "is done"
    if job.status == "STOPPED":
        return "was stopped; submit it again to go on"
    if job.exit_code is not None:
        return f"ended with status {job.exit_code}"
    return f"failed: {first_line(job.message) or 'no reason was given'}"
