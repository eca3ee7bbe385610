"""What the system lends to processes: memory, CPUs of a container, shared memory, disk, files, text encoding."""

from __future__ import annotations

import locale
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from raylm.cluster.session import ray_files
from raylm.doctor.finding import GB, Finding, State, gigabytes

# The quickstart's peak is under 6 GB; Python with torch, Ray and one worker take 3.
WANTED_MEMORY, LEAST_MEMORY = 6 * GB, 3 * GB
WANTED_DISK, LEAST_DISK = 10 * GB, 1 * GB
# Ray writes nothing more to a disk that is fuller (RAY_local_fs_capacity_threshold).
RAY_FULL = 0.95
WANTED_SHARED = 2 * GB
WANTED_FILES = 4096
NOT_KNOWN = "not known on this system"


@dataclass(frozen=True)
class Limits:
    """What a control group allows: CPUs (None: all) and bytes of memory (None: all)."""

    cpus: float | None = None
    memory: int | None = None


def read_limits(root: Path = Path("/sys/fs/cgroup"), group: str = "/") -> Limits:
    """The narrowest limits of a control group and of those above it, versions 1 and 2.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``, ``memory.max``) and the cgroup-v1 pages.

    Args:
        root: where control groups are mounted.
        group: path of the process's own group, as ``/proc/self/cgroup`` has it; a container mostly sees ``/``.
    """
    cpus: list[float] = []
    memory: list[int] = []
    path = root / group.strip("/")
    for folder in [path, *path.parents]:
        if not folder.is_relative_to(root):
            break
        quota = _words(folder / "cpu.max")
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
            cpus.append(int(quota[0]) / int(quota[1]))
        most = _words(folder / "memory.max")
        if most and most[0].isdigit():
            memory.append(int(most[0]))
    quota = _words(root / "cpu" / "cpu.cfs_quota_us")
    period = _words(root / "cpu" / "cpu.cfs_period_us")
    if quota and period and quota[0].isdigit() and period[0].isdigit():
        cpus.append(int(quota[0]) / int(period[0]))
    most = _words(root / "memory" / "memory.limit_in_bytes")
    if most and most[0].isdigit() and int(most[0]) < 2**60:  # without a limit it is the largest page count
        memory.append(int(most[0]))
    return Limits(min(cpus, default=None), min(memory, default=None))


def own_group(text: str) -> str:
    """Path of version 2's group in ``/proc/self/cgroup``; ``/`` where there is none."""
    return next((line.removeprefix("0::").strip() for line in text.splitlines() if line.startswith("0::")), "/")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return []


def probe_memory() -> list[Finding]:
    """Memory and CPUs: what the machine has, and what the container may take of it."""
    try:
        group = own_group(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    except OSError:
        group = "/"
    total, available = _memory()
    return judge_memory(total, available, read_limits(group=group), os.cpu_count() or 1)


def _memory() -> tuple[int | None, int | None]:
    """Bytes of the machine, and of these free for new processes; None where they are not known."""
    values = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    if "MemTotal" in values:
        return values["MemTotal"], values.get("MemAvailable")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (ValueError, OSError, AttributeError):
        return None, None


def judge_memory(total: int | None, available: int | None, limits: Limits, cpus: int) -> list[Finding]:
    """A line on memory, and one on the container's share of the CPUs where it has a limit.

    Args:
        total, available: bytes of the machine.
        limits: of the control group.
        cpus: of the machine.
    """
    lines = []
    known = [size for size in (total, limits.memory) if size is not None]
    if not known:
        lines.append(Finding("memory", NOT_KNOWN))
    else:
        usable = min(known)
        state: State = "ok" if usable >= WANTED_MEMORY else "warning" if usable >= LEAST_MEMORY else "broken"
        found = gigabytes(total) if total is not None else "size not known"
        free = "" if available is None else f", {gigabytes(available)} free"
        limited = limits.memory is not None and (total is None or limits.memory < total)
        if limited:
            found = f"this container may take {gigabytes(usable)} of {found}"
            mend = "give the container more memory (docker run --memory 8g; limits.memory in Kubernetes)"
        else:
            mend = f"the quickstart takes up to {gigabytes(WANTED_MEMORY)}; take a larger machine or a smaller model"
        if state == "ok" and available is not None and available < LEAST_MEMORY:
            state, mend = "warning", "other processes hold the memory; end some"
        lines.append(Finding("memory", found + free, state, mend if state != "ok" else ""))
    if limits.cpus is not None and limits.cpus < cpus:
        state = "ok" if limits.cpus >= 2 else "warning"
        mend = "" if state == "ok" else "give the container two CPUs (docker run --cpus 2; limits.cpu in Kubernetes)"
        lines.append(Finding("cpu limit", f"this container may use {limits.cpus:g} of {cpus} CPUs", state, mend))
    return lines


def probe_shared_memory(path: Path = Path("/dev/shm")) -> list[Finding]:
    """Size of shared memory, where Ray keeps its objects."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        if sys.platform.startswith("linux"):
            mend = "mount it: mount -t tmpfs -o size=4g tmpfs /dev/shm"
            return [Finding("shared memory", f"no {path}", "warning", mend)]
        return [Finding("shared memory", f"no {path} on this system; Ray keeps its objects in files")]
    return [judge_shared_memory(path, usage.total, usage.free)]


def judge_shared_memory(path: Path, total: int, free: int) -> Finding:
    """One line; ``total`` and ``free`` in bytes. Docker gives a container 64 MB unless told otherwise."""
    found = f"{path}: {gigabytes(free)} of {gigabytes(total)} free"
    if total < WANTED_SHARED:
        mend = "Ray takes the disk instead, slowly; docker run --shm-size 4g, or a memory volume at /dev/shm"
        return Finding("shared memory", found, "warning", mend)
    if free < WANTED_SHARED // 2:
        return Finding("shared memory", found, "warning", "see what fills it (ls -l /dev/shm); end old Ray processes")
    return Finding("shared memory", found)


def probe_disk(directory: Path | None = None) -> list[Finding]:
    """Free space of the working directory, and of Ray's temporary one."""
    place = directory or Path.cwd()
    lines = [_disk("disk", place, f"working directory {place}")]
    ray = ray_files()
    existing = next(folder for folder in [ray, *ray.parents] if folder.exists())
    return [*lines, _disk("ray's files", existing, str(ray), ray=True)]


def _disk(what: str, place: Path, title: str, *, ray: bool = False) -> Finding:
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return Finding(what, f"{title}: {error.strerror}", "broken", "change to a directory that exists")
    writable = os.access(place, os.W_OK | os.X_OK)
    return judge_disk(what, title, usage.total, usage.free, writable, ray=ray)


def judge_disk(what: str, title: str, total: int, free: int, writable: bool, *, ray: bool = False) -> Finding:
    """One line; ``total`` and ``free`` in bytes, ``ray``: whether Ray writes its objects there."""
    found = f"{title}: {gigabytes(free)} of {gigabytes(total)} free"
    elsewhere = "export RAY_TMPDIR=DIRECTORY on another disk" if ray else "work in a directory of another disk"
    if not writable:
        mend = "export RAY_TMPDIR=DIRECTORY that you may write" if ray else "work in a directory that you may write"
        return Finding(what, f"{title}: not writable", "broken" if ray else "warning", mend)
    if free < LEAST_DISK:
        return Finding(what, found, "broken", f"free some space, or {elsewhere}")
    if ray and 1 - free / total > RAY_FULL:
        return Finding(what, f"{found}, over {RAY_FULL:.0%} full", "warning",
                       f"Ray writes no objects to so full a disk: free some space, or {elsewhere}")  # fmt: skip
    if free < WANTED_DISK:
        return Finding(what, found, "warning", f"free some space, or {elsewhere}")
    return Finding(what, found)


def probe_files() -> list[Finding]:
    """How many files a process may hold open."""
    try:
        import resource
    except ImportError:
        return [Finding("open files", NOT_KNOWN)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [judge_files(soft, hard, resource.RLIM_INFINITY)]


def judge_files(soft: int, hard: int, infinity: int = -1) -> Finding:
    """One line on the limits of ``ulimit -n``."""
    found = "no limit" if soft == infinity else f"{soft:,} a process"
    if soft != infinity and soft < WANTED_FILES:
        most = 65536 if hard == infinity else min(hard, 65536)
        mend = f"ulimit -n {most}" if most >= WANTED_FILES else "raise the hard limit (/etc/security/limits.conf)"
        return Finding("open files", found, "warning", f"{mend}: Ray holds many open")
    return Finding("open files", found)


def probe_text() -> list[Finding]:
    """Whether files, names and output are UTF-8."""
    output = getattr(sys.stdout, "encoding", None) or "none"
    return [judge_text(sys.getfilesystemencoding(), locale.getpreferredencoding(False), output)]


def judge_text(names: str, files: str, output: str) -> Finding:
    """One line on the encodings of file names, files and output."""
    others = [name for name in (names, files, output) if name.lower().replace("-", "") not in ("utf8", "none")]
    if others:
        return Finding("text", f"{others[0]}, not UTF-8", "warning", "export LC_ALL=C.UTF-8 (or PYTHONUTF8=1)")
    return Finding("text", "UTF-8")


def probe_compiler() -> list[Finding]:
    """The C++ compiler that ``training.compile`` needs, and only that."""
    wanted = os.environ.get("CXX", "g++")
    place = shutil.which(wanted)
    if place is None:
        return [Finding("c++ compiler", f"no {wanted}; only training.compile needs one")]
    return [Finding("c++ compiler", place)]
