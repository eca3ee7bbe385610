"""Placement groups that are left behind are given back, those of before stay."""

from __future__ import annotations

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raylm.cluster.groups import groups_given_back
from tests.cpus import become_free, holders_of_cpus


def test_what_is_left_is_given_back(ray_instance: object) -> None:
    whole = ray.cluster_resources()["CPU"]
    older = placement_group([{"CPU": 1}])
    ray.get(older.ready(), timeout=60)
    with groups_given_back():
        left = placement_group([{"CPU": 1}] * 2)
        ray.get(left.ready(), timeout=60)
        assert become_free(whole - 3, exactly=True), holders_of_cpus()
    assert become_free(whole - 1, exactly=True), holders_of_cpus()
    remove_placement_group(older)
    assert become_free(whole, exactly=True), holders_of_cpus()
