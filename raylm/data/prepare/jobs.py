"""Work cut into jobs, run on Ray Data: one task a job, each on one CPU, results in the order of the jobs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.errors import RunFailure, UserError
from raylm.progress import ProgressBar

if TYPE_CHECKING:
    import ray.data

Job = dict[str, Any]


def run_jobs(
    title: str,
    function: Callable[..., dict[str, Any]],
    jobs: list[Job],
    *,
    cpus: int | None,
    arguments: dict[str, Any],
    gpus: int = 0,
    weights: list[int] | None = None,
    unit: str = "jobs",
) -> list[dict[str, Any]]:
    """Call ``function(job, **arguments)`` for every job on the Ray that is running.

    Args:
        title: for the progress bar.
        function: of a module, so that workers import it.
        jobs: JSON objects.
        cpus: most tasks at a time; None takes all CPUs that there are.
        arguments: what is the same for all jobs.
        gpus: that a task holds.
        weights: units of work in each job; one each by default.
        unit: what they are.

    Returns:
        the results, JSON objects, in the order of the jobs.

    Raises:
        UserError: a task raised one.
        RunFailure: a task failed; names its error.
    """
    import ray.data

    if not jobs:
        return []
    dataset = _dataset(function, jobs, cpus, gpus, arguments)
    weights = weights or [1] * len(jobs)
    results: dict[int, dict[str, Any]] = {}
    done = 0
    with ProgressBar(title, sum(weights), unit) as bar:
        try:
            for row in dataset.iter_rows():
                number, result = int(row["number"]), json.loads(row["result"])
                if "user error" in result:
                    raise UserError(result["user error"])
                results[number] = result
                done += weights[number]
                bar.update(done)
        except ray.exceptions.RayError as error:
            raise RunFailure(f"{title} failed: {_first_cause(error)}") from error
    return [results[number] for number in range(len(jobs))]


def _dataset(
    function: Callable[..., dict[str, Any]],
    jobs: list[dict[str, Any]],
    cpus: int | None,
    gpus: int,
    arguments: dict[str, Any],
) -> ray.data.Dataset:
    """The results as rows, once they are asked for."""
    import ray.data

    # Our bar stands in for Ray Data's own; what it has to say about its execution goes to its log file only.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"number": number, "job": json.dumps(job)} for number, job in enumerate(jobs)]
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _run_job,
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        num_gpus=gpus,
        compute=ray.data.TaskPoolStrategy(size=cpus and min(cpus, len(rows))),
        fn_kwargs={"function": function, "arguments": arguments},
    )


def _run_job(
    batch: dict[str, np.ndarray], function: Callable[..., dict[str, Any]], arguments: dict[str, Any]
) -> dict[str, list[Any]]:
    """The Ray Data task: a batch of one job to a batch of one result."""
    # Ray counts this task as one CPU.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        result = function(json.loads(batch["job"][0]), **arguments)
    except UserError as error:
        # As a value, so that its text reaches the user without Ray's stack traces around it.
        result = {"user error": str(error)}
    return {"number": [int(batch["number"][0])], "result": [json.dumps(result)]}


def _first_cause(error: Exception) -> str:
    """One line on what went wrong first: Ray keeps the task's own exception only in the text of the chain."""
    own, separator, _ = str(error).partition("\n\nThe above exception was the direct cause")
    lines = own.strip().splitlines() or [type(error).__name__]
    return lines[-1 if separator else 0]
