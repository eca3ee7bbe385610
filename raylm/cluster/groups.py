"""Placement groups that a library of Ray leaves behind.

Where the process of a Ray Tune trial that runs workers of its own is killed, it cannot give their placement group back.
Ray Train has a cleaner for it, which asks whatever Ray instance on the machine is the newest. A group that stays keeps
its CPUs until the job ends: what comes next in the same job waits for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def groups_given_back() -> Iterator[None]:
    """Remove at the end of the block the placement groups that this job has made in it and that are still there.

    Needs the dashboard, which knows whose a group is; without one nothing is removed. Nor is where the block is
    interrupted: the job's groups end with it, and Ctrl-C has stopped the dashboard, whose answer would be waited for.
    """
    before = _own_groups()
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if not interrupted:
            _give_back(_own_groups() - before)


def _give_back(names: set[str]) -> None:
    if names:
        import ray
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        for name in names:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _own_groups() -> set[str]:
    """The ids of this job's placement groups."""
    import ray
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    context = ray.get_runtime_context()
    chosen = [("creator_job_id", "=", context.get_job_id()), ("state", "!=", "REMOVED")]
    try:
        # Without its address, the newest Ray instance on the machine is asked.
        found = list_placement_groups(context.gcs_address, filters=chosen, limit=10_000)
    except (RayStateApiException, OSError):
        return set()
    return {group.placement_group_id for group in found}
