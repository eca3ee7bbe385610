"""Placement groups that are left behind are given back, those of before stay."""

from __future__ import annotations

import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raylm.cluster.groups import groups_given_back


def free() -> float:
    return ray.available_resources().get("CPU", 0.0)


def wait_for(cpus: float) -> None:
    deadline = time.monotonic() + 30
    while free() != cpus:
        assert time.monotonic() < deadline, free()
        time.sleep(0.1)


def test_what_is_left_is_given_back(ray_instance: object) -> None:
    whole = ray.cluster_resources()["CPU"]
    older = placement_group([{"CPU": 1}])
    ray.get(older.ready(), timeout=60)
    with groups_given_back():
        left = placement_group([{"CPU": 1}] * 2)
        ray.get(left.ready(), timeout=60)
        wait_for(whole - 3)
    wait_for(whole - 1)
    remove_placement_group(older)
    wait_for(whole)
