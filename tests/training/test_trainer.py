"""Ray Train's private names that raylm's trainer relies on; fails where an update of Ray changes them."""

from __future__ import annotations

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR

from raylm.training.ray_train.trainer import UNUSED, LeanTrainer


def test_helpers_that_no_run_uses_are_left_out(ray_instance, tmp_path) -> None:
    def kinds(trainer: type[TorchTrainer]) -> list[type]:
        made = trainer(
            print,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="none", storage_path=str(tmp_path)),
        )
        return [type(callback) for callback in made._create_default_callbacks()]

    of_ray = kinds(TorchTrainer)
    assert set(UNUSED) <= set(of_ray)
    assert kinds(LeanTrainer) == [kind for kind in of_ray if kind not in UNUSED]


def test_name_of_the_switch_of_the_watcher() -> None:
    # raylm/cluster/session.py sets it, without importing Ray Train.
    assert ENABLE_PREEMPTION_WATCHER_ENV_VAR == "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
