"""Ray Train's trainer without the helpers that a run of ours has no use for, each a process of its own."""

from __future__ import annotations

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback

# The first serves shards of Ray Data, which we do not read. The second frees the workers' resources where the
# controller dies alone: Fitting does so itself, and where the driver dies, Ray ends all that the driver began.
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(TorchTrainer):
    """Starts no actor that only waits; each would import all of Ray Train first, about three CPU-seconds."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, UNUSED)]
