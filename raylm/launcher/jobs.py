"""The jobs of a cluster that run raylm's stages, by the names of their runs."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylm.errors import UserError
from raylm.interrupts import SIGNALLED

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Keys of a job's metadata, which are Ray's for anybody to set.
RUN, STAGE, STORAGE, ATTEMPT = "raylm_run", "raylm_stage", "raylm_storage", "raylm_attempt"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """One job of a stage.

    Attributes:
        id: Ray's submission id.
        run, stage, storage: what was submitted.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: of the stage's command; None while it runs, where it was stopped, and where it never began.
        started, ended: seconds since 1970.
        message: what Ray says of the status.
    """

    id: str
    run: str
    stage: str
    storage: str
    status: str
    exit_code: int | None
    started: float | None
    ended: float | None
    message: str

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ENDED

    @property
    def exit_status(self) -> int:
        """What the stage's command would have given here: 0 done, 2 wrong input, 1 a failure, 143 stopped."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return SIGNALLED + signal.SIGTERM
        return self.exit_code or 1


def to_job(details: Any) -> Job | None:
    """Of what Ray says about a job; None where it is none of raylm's."""
    metadata = details.metadata or {}
    if details.submission_id is None or not {RUN, STAGE} <= set(metadata):
        return None
    started, ended = (None if at is None else at / 1000 for at in (details.start_time, details.end_time))
    status = getattr(details.status, "value", str(details.status))
    return Job(
        details.submission_id, metadata[RUN], metadata[STAGE], metadata.get(STORAGE, ""), status,
        details.driver_exit_code, started, ended, details.message or "",
    )  # fmt: skip


def all_jobs(client: JobSubmissionClient) -> list[Job]:
    """All of raylm's jobs, the newest first."""
    found = [job for details in client.list_jobs() if (job := to_job(details)) is not None]
    return sorted(found, key=lambda job: job.started or 0.0, reverse=True)


def find_job(client: JobSubmissionClient, name: str) -> Job:
    """The newest job of a run, or the job of that id.

    Raises:
        UserError: there is none; names those that there are.
    """
    jobs = all_jobs(client)
    for job in jobs:
        if name in (job.run, job.id):
            return job
    known = ", ".join(sorted({job.run for job in jobs})) or "none yet; raylm submit starts one"
    raise UserError(f"RUN: found {name}, allowed: a run that was submitted to this cluster: {known}")


def read_job(client: JobSubmissionClient, job_id: str) -> Job:
    """The job as it is now."""
    job = to_job(client.get_job_info(job_id))
    assert job is not None, job_id
    return job
