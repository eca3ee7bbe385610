"""The board: a Ray actor through which the driver and the ranks of a run know of each other.

In: rank 0's metrics, every rank's signs of life, memory and failures, the driver's wish to stop. Out: progress for the
driver's bar, the ranks that fell silent, and which rank failed first and with what.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raylm.training.ray_train.places import Loss, Place, describe_losses, gone_nodes

# fatal: the same would happen again, so nothing is retried. collective: follows from another rank's failure.
FailureKind = Literal["fatal", "own", "collective"]


@dataclass(frozen=True)
class Failure:
    """What one rank failed with.

    Attributes:
        text: the exception in one line.
        log: file that holds its traceback.
        step: optimizer steps that the rank had made.
    """

    rank: int
    kind: FailureKind
    text: str
    log: str
    step: int


def first_own(failures: Sequence[Failure]) -> Failure | None:
    """The failure that explains the others: the first that is no consequence of another rank's, else the first."""
    own = [failure for failure in failures if failure.kind != "collective"]
    return next(iter(own or failures), None)


@dataclass
class Beat:
    """A rank's sign of life.

    Attributes:
        memory_bytes: resident memory of the process, or the GPU's allocated peak.
        at: the board's own clock.
    """

    step: int
    memory_bytes: int
    at: float


@dataclass
class BeatReply:
    """What the board tells a rank in return for a beat.

    Attributes:
        silent: ranks without a sign of life for too long -> the step of their last one.
        stop: why the driver wants to stop, or None.
        asked: how many times a checkpoint was asked for.
        memory_bytes: of all ranks, by rank.
    """

    silent: dict[int, int] = field(default_factory=dict)
    stop: str | None = None
    asked: int = 0
    memory_bytes: list[int] = field(default_factory=list)


class Board:
    """The actor's class; one method call is one transaction."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._generation = ""
        self._starts = 0
        self._beats: dict[int, Beat] = {}
        self._failures: list[Failure] = []
        self._restarts: list[str] = []
        self._events: list[dict[str, Any]] = []
        self._stop: str | None = None
        self._asked = self._saved = 0
        self._controller: Any = None
        self._placement_group: Any = None
        self._places: list[Place] = []
        self._losses: list[Loss] = []
        self._dead: list[Loss] = []
        self._unplaced_since: float | None = None

    def controller_is(self, handle: Any) -> None:
        """Remember the handle of Ray Train's controller."""
        self._controller = handle

    def placement_group_is(self, placement_group: Any) -> None:
        """Remember what the workers that run now take of the cluster."""
        self._placement_group = placement_group

    def ray_train(self) -> tuple[Any, Any]:
        """Ray Train's controller and the workers' placement group; None for what has not started yet."""
        return self._controller, self._placement_group

    def update(self, metrics: dict[str, Any]) -> None:
        """Take over rank 0's ``metrics``."""
        self._latest |= metrics

    def note(self, kind: str, step: int, text: str) -> None:
        """Add an event (:mod:`raylm.training.reports.events`)."""
        self._events.append({"time": time.time(), "kind": kind, "step": step, "text": text})

    def events(self, first: int) -> list[dict[str, Any]]:
        """The events from the ``first``-th (counted from 0) on."""
        return self._events[first:]

    def latest(self) -> dict[str, Any]:
        """Everything known so far.

        With ``restarts``: why the workers were started again, each time; ``losses``: how many ranks have failed; and
        ``unplaced_seconds``: for how long the workers, which ran before, have had no places; None where they have.
        """
        since = self._unplaced_since
        unplaced = None if since is None or not self._starts else time.monotonic() - since
        return {
            **self._latest, "restarts": self._restarts, "losses": len(self._losses), "unplaced_seconds": unplaced
        }  # fmt: skip

    def losses(self, first: int) -> list[Loss]:
        """The ranks that failed, from the ``first``-th (counted from 0) on."""
        return self._losses[first:]

    def lost(self) -> str:
        """The ranks whose processes or nodes are gone since the last start, in words; empty where none are."""
        losses, gone = self._gone()
        return describe_losses(losses, gone) if losses else ""

    def _gone(self) -> tuple[list[Loss], set[str]]:
        """The ranks that are gone, and the nodes.

        A node that answers no more counts as lost only after a while: its ranks are missed by the others before, whose
        failures are all that Ray Train hears of.
        """
        gone = gone_nodes(self._places)
        dead = {loss.rank for loss in self._dead}
        text = "its node was lost"
        places = enumerate(self._places)
        return self._dead + [
            Loss(self._generation, rank, one, text) for rank, one in places if one.node in gone and rank not in dead
        ], gone

    def failed(self, dead: dict[int, str]) -> None:
        """Ray Train's word that the workers have failed.

        Args:
            dead: ranks whose processes have died -> what Ray says of it.
        """
        places = dict(enumerate(self._places))
        self._dead = [Loss(self._generation, rank, places.get(rank), text) for rank, text in sorted(dead.items())]
        own = [one for one in self._failures if one.kind != "collective" and one.rank not in dead]
        self._losses += self._dead
        self._losses += [Loss(self._generation, one.rank, places.get(one.rank), one.text) for one in own]

    def placed(self, there: bool) -> None:
        """Ray Train's word whether the workers have their places in the cluster."""
        if there:
            self._unplaced_since = None
        elif self._unplaced_since is None:
            self._unplaced_since = time.monotonic()

    def begin(self, generation: str, places: Sequence[Place]) -> str | None:
        """Rank 0 of a new start of workers, by rank; returns the failure that forbids to go on, or None."""
        # All are alive now: one that freezes before its first beat is missed as well.
        now = time.monotonic()
        losses, gone = self._gone()
        lost = describe_losses(losses, gone) if losses else ""
        self._losses += [loss for loss in losses if loss not in self._dead]
        self._dead = []
        self._generation, self._beats = generation, {rank: Beat(0, 0, now) for rank in range(len(places))}
        self._places = list(places)
        self._starts += 1
        first = self.first_failure()
        if first is not None and first.kind == "fatal":
            return first.text
        if self._starts > 1:
            step = first.step if first else self._latest.get("step", 0)
            # A rank that died without a word comes before those that lost it in a collective.
            if lost and (first is None or first.kind == "collective"):
                self._restarts.append(f"step {step}, {lost}")
            else:
                self._restarts.append(f"step {step}, rank {first.rank}: {first.text}" if first else "a worker died")
            self.note("restart", step, f"workers started again after {self._restarts[-1]}")
        self._failures = []
        return None

    def beat(self, generation: str, rank: int, step: int, memory_bytes: int, patience: float) -> BeatReply:
        """Note that ``rank`` is alive; those that said nothing for ``patience`` seconds are silent."""
        if generation != self._generation:
            return BeatReply(stop=self._stop)
        now = time.monotonic()
        self._beats[rank] = Beat(step, memory_bytes, now)
        return BeatReply(
            silent={r: b.step for r, b in self._beats.items() if now - b.at > patience},
            stop=self._stop,
            asked=self._asked,
            memory_bytes=[self._beats[r].memory_bytes for r in sorted(self._beats)],
        )

    def leave(self, generation: str, rank: int) -> None:
        """``rank`` is done and will beat no more."""
        if generation == self._generation:
            self._beats.pop(rank, None)

    def fail(self, failure: Failure) -> None:
        """Note a failure; the order of calls is the order of failures."""
        self._failures.append(failure)

    def first_failure(self) -> Failure | None:
        """The failure that explains the others: the first that is no consequence of another rank's, else the first."""
        return first_own(self._failures)

    def ask_to_save(self) -> int:
        """Ask for a checkpoint; returns the number of the request."""
        self._asked += 1
        return self._asked

    def saved(self, request: int | None = None) -> int:
        """Note that all requests up to ``request`` are fulfilled; returns how many are."""
        self._saved = max(self._saved, request or 0)
        return self._saved

    def stop(self, reason: str) -> None:
        """Ask all ranks to save a checkpoint and end."""
        self._stop = reason
