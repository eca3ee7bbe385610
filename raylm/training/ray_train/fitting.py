"""``TorchTrainer.fit()`` beside the driver, which watches it meanwhile.

The thread waits in Ray for Ray Train's controller, an actor. A thread that still waits there while ``ray.shutdown()``
runs may end the whole process with status 1 ("The core worker has already been shutdown"), so it must be over by then:
where the controller takes longer than the driver needs it, the driver ends the controller and with it the wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, SchedulingState
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.placement_group import remove_placement_group

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

END_SECONDS = 10.0


class TellBoard(ControllerCallback, WorkerGroupCallback):
    """Tells the board where Ray Train's controller is and what its workers take; runs in the controller.

    Args:
        board: handle of the run's board.
    """

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        """Hand over the controller's own handle."""
        self._board.controller_is.remote(ray.get_runtime_context().current_actor)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Hand over which workers have failed, and that they wait for their places."""
        if isinstance(error := getattr(current_state, "training_failed_error", None), WorkerGroupError):
            self._board.failed.remote(dead_ranks(error))
        if isinstance(current_state, SchedulingState | ReschedulingState):
            self._board.placed.remote(False)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Hand over the placement group of the workers."""
        self._board.placed.remote(True)
        taken = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._board.placement_group_is.remote(taken)


def dead_ranks(error: WorkerGroupError) -> dict[int, str]:
    """The ranks whose processes died or answer no more, with Ray's words; one that raised an error is none of them."""
    kinds = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
    failures = error.worker_failures.items()
    return {rank: " ".join(str(one).split()) for rank, one in failures if isinstance(one, kinds)}


class Fitting:
    """Runs ``trainer.fit()`` in a thread within the block; at the block's end nothing of it is left.

    Args:
        trainer: with :class:`TellBoard` among its callbacks.
        board: handle of the run's board.

    Attributes:
        error: what ``fit`` failed with, if it ended by itself.
    """

    def __init__(self, trainer: TorchTrainer, board: Any) -> None:
        self.error: Exception | None = None
        self._trainer, self._board, self._ending = trainer, board, False
        # Not Thread.join(): up to Python 3.12, one that Ctrl-C interrupts takes a running thread for ended.
        self._ended = threading.Event()

    def __enter__(self) -> Fitting:
        threading.Thread(target=self._fit, name="raylm-fit", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        deadline = time.monotonic() + END_SECONDS
        # The board may be gone with the node, and the controller not yet there. One that has ended by itself is let go
        # of too: the board's handle would keep its process.
        with contextlib.suppress(ray.exceptions.RayError):
            while (left := deadline - time.monotonic()) > 0:
                controller, placement_group = ray.get(self._board.ray_train.remote(), timeout=left)
                if controller is not None:
                    ray.kill(controller)
                # Ray Train's own cleaner would do it later, if it finds this cluster among those on the machine.
                if placement_group is not None:
                    remove_placement_group(placement_group)
                if self._ended.wait(0.2):
                    return

    def running(self) -> bool:
        """Whether ``fit`` has not ended."""
        return not self._ended.is_set()

    def wait(self, seconds: float) -> None:
        """Wait for the end of ``fit``, up to ``seconds``."""
        self._ended.wait(seconds)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # noqa: BLE001 - carried over to the driver's thread
            if not self._ending:
                self.error = error
        finally:
            self._ended.set()
