"""Makes, updates or repairs ``.venv`` with the locked packages of ``cluster/``; needs Python and pip alone.

    python jobs/environment.py          # what trains and serves, for this machine
    python jobs/environment.py --test   # what tests as well

Where there is an NVIDIA GPU the set is the GPU one. Elsewhere it is the CPU one, with a CPU build of torch: the one
that pip is configured with, else the one of PyTorch's own index, else PyPI's build, which brings its CUDA libraries.
``--torch cpu`` or ``cuda`` (or RAYLM_TORCH) decides by hand. An environment counts as made once the packages that all
rests on were imported; one that was not finished is made anew on the next start.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "cluster"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST, NEWEST = (3, 11), (3, 14)
# Bytes on disk of an environment, measured, with what pip holds at the same time.
NEEDED = {"cpu": 4e9, "cuda": 8e9, "gpu": 12e9}
LINE_SECONDS = 15.0

# Kind, what pip says, what the user reads. The first match counts: without a network pip says "No matching" as well.
FAULTS = (
    ("full", r"No space left on device|Disk quota exceeded|not enough space", "the disk is full"),
    ("other", r"Read-only file system|Permission denied", "a directory cannot be written to"),
    (
        "other",
        r"DO NOT MATCH THE HASHES",
        "a downloaded package is not the locked one",
    ),
    (
        "network",
        r"NewConnectionError|ConnectTimeout|ReadTimeout|Read timed out|Connection refused|ConnectionReset|ProxyError"
        r"|SSLError|IncompleteRead|Network is unreachable|Name or service not known|Temporary failure in name"
        r"|Max retries exceeded|NameResolutionError|Connection broken",
        "the package index does not answer; check the network, the proxy, and `python -m pip config list`",
    ),
    (
        "missing",
        r"No matching distribution found for (?P<what>\S+)",
        "no index has {what} for this Python and machine",
    ),
)


class InstallError(Exception):
    """What went wrong in one sentence, for people; ``kind`` is one of FAULTS'."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


class Environment:
    """A virtual environment and what it is to hold.

    Args:
        directory: of the environment.
        torch: "cpu" or "cuda", the build that this machine is to have.
        test: whether it holds what the tests need.
    """

    def __init__(self, directory: Path, torch: str, test: bool) -> None:
        self.directory, self.torch = directory, torch
        self.python = directory / "bin" / "python"
        self.log = directory / "install.log"
        self._state = directory / "raylm.json"
        names = ["build", "cpu", *(["gpu"] if torch == "cuda" else []), *(["test"] if test else [])]
        self.sets = [LOCKS / f"requirements-{name}.txt" for name in names]

    def is_ready(self) -> bool:
        """Whether a finished installation of just these sets is still whole."""
        state = self.read_state()
        if state is None or any(state["sets"].get(path.name) != _digest(path) for path in self.sets):
            return False
        wanted = {"torch": self.torch, "cuda": _digest(LOCKS / "requirements-cuda.txt"), "project": _project_digest()}
        if any(state[key] != value for key, value in wanted.items()):
            return False
        return self._is_whole(state)

    def read_state(self) -> dict | None:
        """What the last finished installation wrote; None if none was finished or its interpreter is gone."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if self.python.exists() else None

    def install(self, reporter: Reporter) -> None:
        """Make or update the environment.

        Raises:
            InstallError: it could not be.
        """
        state = self.read_state()
        # A test set that is there already stays up to date with the others.
        test = LOCKS / "requirements-test.txt"
        if state and test.name in state["sets"] and test not in self.sets:
            self.sets.append(test)
        kept = state is not None and self._is_whole(state) and state["torch"] == self.torch
        if not kept or not self._runs_on(state["python"]):
            self._make_empty(reporter)
        self._state.unlink(missing_ok=True)
        self.log.write_text("", encoding="utf-8")
        build, cpu, *others = self.sets
        self._install_set(build, reporter)
        # Before torch: deepspeed, which comes as source, looks for a CUDA compiler where it finds torch.
        self._install_set(cpu, reporter)
        self._install_torch(reporter)
        for path in others:
            self._install_set(path, reporter)
        self.pip("raylm itself", reporter, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        self._check_imports(reporter)
        state = {
            "python": self._version(),
            "torch": self.torch,
            "sets": {path.name: _digest(path) for path in self.sets},
            "cuda": _digest(LOCKS / "requirements-cuda.txt"),
            "project": _project_digest(),
            "packages": sorted(self._packages() or ()),
        }
        partial = self._state.with_suffix(".part")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(self._state)

    def pip(self, what: str, reporter: Reporter, *arguments: str) -> None:
        """``pip install`` with ``arguments``.

        Raises:
            InstallError: pip failed.
        """
        command = [
            str(self.python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
            "--progress-bar", "off", *arguments,
        ]  # fmt: skip
        lines = []
        with self.log.open("a", encoding="utf-8") as log, reporter.step(f"installing {what}") as step:
            log.write(f"$ {' '.join(command)}\n")
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ) as process:
                for line in process.stdout:
                    log.write(line)
                    lines.append(line)
                    step.read(line)
        if process.returncode:
            raise _explain("".join(lines), process.returncode)

    def _make_empty(self, reporter: Reporter) -> None:
        if self.directory.exists():
            reporter.say(f"{self.directory.name} is not whole, or for another Python or torch: making it anew")
            shutil.rmtree(self.directory)
        found = subprocess.run([sys.executable, "-m", "venv", str(self.directory)], capture_output=True, text=True)
        if found.returncode:
            output = found.stdout + found.stderr
            if "ensurepip" in output:
                version = f"{sys.version_info.major}.{sys.version_info.minor}"
                raise InstallError(
                    f"this Python has no pip for new environments: `apt-get install python{version}-venv`"
                )
            raise _explain(output, found.returncode)

    def _install_set(self, path: Path, reporter: Reporter) -> None:
        count = len(re.findall(r"^[A-Za-z0-9._-]+==", path.read_text(encoding="utf-8"), re.MULTILINE))
        self.pip(
            f"cluster/{path.name}, {count} packages", reporter,
            "--no-deps", "--no-build-isolation", "--require-hashes", "--requirement", str(path),
        )  # fmt: skip

    def _install_torch(self, reporter: Reporter) -> None:
        locked = LOCKS / "requirements-cuda.txt"
        version = re.search(r"^torch==([^\s;]+)", locked.read_text(encoding="utf-8"), re.MULTILINE)[1]
        # On macOS PyPI has the only build, without CUDA.
        if self.torch == "cpu" and sys.platform == "linux":
            configured = ("torch, CPU build", ())
            pytorch = (
                "torch, CPU build of PyTorch's index",
                ("--index-url", CPU_INDEX, "--timeout", "10", "--retries", "1"),
            )
            for what, source in (configured, pytorch):
                try:
                    self.pip(what, reporter, "--no-deps", *source, f"torch=={version}+cpu")
                    return
                except InstallError as error:
                    if error.kind != "missing" and not (source and error.kind == "network"):
                        raise
            reporter.say(
                "no index here has a CPU build of torch: taking PyPI's, with its CUDA libraries (3 GB to load)"
            )
            check_space(self.directory.parent, NEEDED["cuda"])
        self._install_set(locked, reporter)

    def _check_imports(self, reporter: Reporter) -> None:
        with reporter.step("importing torch, ray, deepspeed, transformers and openvino"):
            command = [str(self.python), str(ROOT / "raylm" / "doctor" / "imports.py")]
            found = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if found.returncode:
            raise InstallError((found.stdout + found.stderr).strip().splitlines()[-1])

    def _version(self) -> str:
        command = [str(self.python), "-c", "import sys; print('{}.{}.{}'.format(*sys.version_info))"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    def _runs_on(self, version: str) -> bool:
        """Whether an environment made by Python ``version`` serves the one that runs this, by RAYLM_PYTHON or not."""
        return "RAYLM_PYTHON" not in os.environ or version == "{}.{}.{}".format(*sys.version_info)

    def _is_whole(self, state: dict) -> bool:
        """Whether all that was installed is there; pip itself looks no further than a package's metadata."""
        return set(state["packages"]) <= (self._packages() or set())

    def _packages(self) -> set[str] | None:
        """Names of what lies in site-packages."""
        folder = next(iter(sorted((self.directory / "lib").glob("python3.*/site-packages"))), None)
        return {entry.name for entry in os.scandir(folder) if entry.name != "__pycache__"} if folder else None


class Reporter:
    """One line a step on stderr; while a step runs, how far it is."""

    def say(self, line: str) -> None:
        """A line of its own."""
        print(f"raylm: {line}", file=sys.stderr, flush=True)

    def step(self, what: str) -> Step:
        """A step that may take long, as a context manager."""
        self.say(what)
        return Step(self, what)


class Step:
    """Counts the packages that pip says it has collected; from time to time says so, or that it is at work."""

    def __init__(self, reporter: Reporter, what: str) -> None:
        self._reporter, self._what = reporter, what
        self._collected = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> Step:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def read(self, line: str) -> None:
        """A line of pip's output."""
        self._collected += line.startswith("Collecting ")

    def _speak(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(LINE_SECONDS):
            collected = f", {self._collected} collected" if self._collected else ""
            self._reporter.say(f"  still {self._what}{collected}, {time.monotonic() - began:.0f} s")


def _explain(output: str, status: int) -> InstallError:
    for kind, pattern, remedy in FAULTS:
        match = re.search(pattern, output)
        if match:
            return InstallError(remedy.format(**match.groupdict()), kind)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR: ", "error: ")) and line != "ERROR: Exception:"]
    return InstallError((errors or lines or [f"pip ended with status {status}"])[-1])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _project_digest() -> str:
    """Of what an editable installation copies: names, scripts, version."""
    return _digest(ROOT / "pyproject.toml") + _digest(ROOT / "raylm" / "__init__.py")


def has_nvidia_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is loaded and a device is there."""
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version"))


def check_space(directory: Path, needed: float) -> None:
    """Refuse to begin what will not fit.

    Raises:
        InstallError: ``directory`` has less than ``needed`` bytes free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise InstallError(f"{directory}: found {free / 1e9:.1f} GB free, needed: {needed / 1e9:.0f} GB", "full")


@contextlib.contextmanager
def one_at_a_time(reporter: Reporter) -> Iterator[None]:
    """Hold the lock of this clone, so that two starts do not install into one environment."""
    with Path(__file__).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.say("waiting for another installation into this .venv")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(environment: Environment, reporter: Reporter) -> None:
    """Install what is missing; nothing at all where the environment is ready.

    Raises:
        InstallError: it could not be; the next call begins anew.
    """
    if environment.is_ready():
        return
    if not os.access(environment.directory.parent, os.W_OK):
        raise InstallError(f"{environment.directory.parent}: found a directory without write access")
    with one_at_a_time(reporter):
        if environment.is_ready():
            return
        if environment.read_state() is None:
            kind = "gpu" if environment.torch == "cuda" else "cpu"
            check_space(environment.directory.parent, NEEDED[kind])
            reporter.say(
                f"making {environment.directory.name} for {kind.upper()}s, {NEEDED[kind] / 1e9:.0f} GB, some minutes"
            )
        began = time.monotonic()
        try:
            environment.install(reporter)
        except InstallError as error:
            if error.kind == "full":  # what is half-made would only keep the disk full
                shutil.rmtree(environment.directory, ignore_errors=True)
            raise
        reporter.say(f"{environment.directory.name} is ready after {time.monotonic() - began:.0f} s")


def main() -> int:
    """Entry point: 0 done, 1 it could not be installed, 2 wrong arguments or Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="with what the tests need")
    parser.add_argument("--torch", choices=("cpu", "cuda"), default=os.environ.get("RAYLM_TORCH") or None)
    parser.add_argument("--directory", type=Path, default=ROOT / ".venv", help="of the environment; .venv by default")
    arguments = parser.parse_args()
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        print(f"raylm: error: found Python {sys.version.split()[0]}, allowed: 3.11 to 3.14", file=sys.stderr)
        return 2
    if arguments.torch not in (None, "cpu", "cuda"):
        print(f"raylm: error: RAYLM_TORCH: found {arguments.torch}, allowed: cpu, cuda", file=sys.stderr)
        return 2
    torch = arguments.torch or ("cuda" if has_nvidia_gpu() else "cpu")
    environment = Environment(arguments.directory.absolute(), torch, arguments.test)
    try:
        make(environment, Reporter())
    except (InstallError, OSError, subprocess.SubprocessError) as error:
        log = f" (log: {environment.log})" if environment.log.exists() else ""
        print(f"raylm: error: not installed: {error}{log}; the same command begins again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("raylm: interrupted; the same command begins again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
