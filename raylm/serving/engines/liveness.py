"""Whether an engine that owes an answer is at work, or hangs.

A process that dies is noticed at once: its pipe ends. One that is stopped, or that waits for what never comes, keeps
its pipe. So it is asked for a sign of life now and then, which it gives between two steps. A step may honestly take
minutes, but then it computes: what neither answers nor computes hangs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil

# A process that gives no sign and takes no CPU hangs after this long: CUDA waits for a GPU with a CPU, and what waits
# for a disk takes some too.
STILL_SECONDS = 30.0
# Share of one CPU, below which a process counts as still: threads that only look at a clock take some.
LEAST_SHARE = 0.01
# Between two looks at a process no more than this counts: the looker itself may have been stopped.
LOOK_SECONDS = 10.0
# Looks that follow each other faster than this are one: reading what processes took costs a few milliseconds.
LEAST_LOOK_SECONDS = 0.5


class Pulse:
    """Tells an engine at work from one that hangs; :meth:`look` is to be called every few seconds.

    Args:
        ask: asks the process for a sign of life.
        cpu_seconds: CPU time that the process has taken so far.
        longest_step: seconds after which even a process that computes counts as hanging.
        still: seconds after which one that does not compute does.
        clock: seconds.
    """

    def __init__(
        self,
        ask: Callable[[], None],
        cpu_seconds: Callable[[], float],
        longest_step: float,
        *,
        still: float = STILL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._cpu_seconds, self._clock = ask, cpu_seconds, clock
        self.longest_step, self.still = longest_step, still
        # Whether a sign was asked for that has not come yet; since then, seconds, and those of them without computing.
        self._waits = False
        self._passed = self._stood = 0.0
        self._looked = self._taken = 0.0

    def beat(self) -> None:
        """Note a sign of life; called on another thread than :meth:`look`."""
        self._waits = False

    def look(self) -> str | None:
        """Why the process hangs; None where it does not, as far as can be told."""
        now = self._clock()
        if not self._waits:
            self._looked, self._taken = now, self._cpu_seconds()
            self._passed = self._stood = 0.0
            # Before it asks: the sign may come at once.
            self._waits = True
            self._ask()
            return None
        passed = min(now - self._looked, LOOK_SECONDS)
        if passed < LEAST_LOOK_SECONDS:
            return None
        taken = self._cpu_seconds()
        self._passed += passed
        self._stood = self._stood + passed if taken - self._taken < LEAST_SHARE * passed else 0.0
        self._looked, self._taken = now, taken
        if self._stood >= self.still:
            return f"it has given no sign of life and has not computed for {self._stood:.0f} s"
        if self._passed >= self.longest_step:
            return f"one step has taken {self._passed:.0f} s and has not ended"
        return None


def family_cpu_seconds(pid: int) -> float:
    """CPU time that a process and those under it have taken; 0 once it has ended."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = member.cpu_times()
                total += times.user + times.system
    return total


def kill_family(pid: int) -> None:
    """Kill a process and those under it: one that is stopped does not see its parent end."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                member.kill()
