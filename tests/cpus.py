"""CPUs of the Ray that the tests are in: how many are free, and who holds the others."""

from __future__ import annotations

import sys
import time


def free_cpus() -> float | None:
    """CPUs that nothing holds in the Ray that this process is in, or None where it is in none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    return ray.available_resources().get("CPU", 0.0)


def become_free(cpus: float | None = None, seconds: float = 30.0, *, exactly: bool = False) -> bool:
    """Wait until ``cpus`` (by default all) are free, or more if not ``exactly``; False after ``seconds`` without."""
    import ray

    wanted = ray.cluster_resources()["CPU"] if cpus is None else cpus
    deadline = time.monotonic() + seconds
    while (free := free_cpus() or 0.0) < wanted or (exactly and free != wanted):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def holders_of_cpus() -> str:
    """The living actors and the placement groups, in words."""
    import ray
    from ray.util import state

    # Without its address, the newest Ray instance on the machine is asked.
    address = ray.get_runtime_context().gcs_address
    actors = state.list_actors(address, filters=[("state", "!=", "DEAD")], detail=True)
    groups = state.list_placement_groups(address, filters=[("state", "!=", "REMOVED")], detail=True)
    found = [f"{a.class_name} ({a.state}, {a.required_resources})" for a in actors]
    return "; ".join(found + [f"placement group {g.name or g.placement_group_id} ({g.state})" for g in groups])
