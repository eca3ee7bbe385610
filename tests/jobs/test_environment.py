"""jobs/environment.py on a repository in small: real pip and environments, packages of one line, no network."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_wheels import write_wheel

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("ray", "deepspeed", "transformers", "openvino")
BACKEND = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from tiny_wheels import write_wheel
def build_editable(folder, settings=None, metadata=None):
    return write_wheel(pathlib.Path(folder), "raylm", "1.0", "").name
def get_requires_for_build_editable(settings=None):
    return []
"""


class Clone:
    """A repository with the real installer, and an index of wheels in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.wheels = root, root / "wheels"
        for folder in ("wheels", "cluster", "jobs", "raylm/doctor"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "jobs" / "environment.py", root / "jobs")
        shutil.copy(ROOT / "raylm" / "doctor" / "imports.py", root / "raylm" / "doctor")
        (root / "raylm" / "__init__.py").write_text("")
        (root / "backend.py").write_text(BACKEND.format(tests=str(Path(__file__).parent)))
        (root / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        self.lock("build", {"builder": ""})
        self.lock("cpu", dict.fromkeys(HEAVY, ""))
        self.lock("cuda", {"torch": "build = 'cuda'"})
        self.lock("test", {"tester": ""})
        self.write("torch", "1.0+cpu", "build = 'cpu'")

    def write(self, name: str, version: str, code: str) -> Path:
        return write_wheel(self.wheels, name, version, code)

    def lock(self, name: str, packages: dict[str, str]) -> None:
        """A locked set of ``packages``, name -> code."""
        lines = []
        for package, code in packages.items():
            digest = hashlib.sha256(self.write(package, "1.0", code).read_bytes()).hexdigest()
            lines.append(f"{package}==1.0 \\\n    --hash=sha256:{digest}\n")
        (self.root / "cluster" / f"requirements-{name}.txt").write_text("".join(lines))

    def start(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "RAYLM_"))}
        environment |= {
            "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull,
            "RAYLM_TORCH": "cpu",
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, "jobs/environment.py", *arguments],
            cwd=self.root, capture_output=True, text=True, timeout=300, env=environment | variables,
        )  # fmt: skip

    def imports(self, code: str) -> str:
        command = [str(self.root / ".venv" / "bin" / "python"), "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return found.stdout.strip() or found.stderr.strip().splitlines()[-1]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture(scope="module")
def environment():
    """The installer as a module, for its pure parts."""
    spec = importlib.util.spec_from_file_location("raylm_environment", ROOT / "jobs" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_makes_takes_the_cpu_build_and_is_silent_when_ready(clone: Clone) -> None:
    made = clone.start()
    assert made.returncode == 0, made.stderr
    assert clone.imports("import torch; print(torch.build)") == "cpu"
    assert "No module named" in clone.imports("import tester")
    again = clone.start()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    # The test set comes on top, and stays when a start without it follows.
    assert clone.start("--test").returncode == 0
    assert clone.imports("import tester; print('there')") == "there"
    clone.lock("cpu", dict.fromkeys([*HEAVY, "newcomer"], ""))
    assert clone.start().returncode == 0
    assert clone.imports("import tester, newcomer; print('there')") == "there"


@pytest.mark.slow
def test_without_a_cpu_build_the_cuda_one_comes_with_its_libraries(clone: Clone) -> None:
    (clone.wheels / "torch-1.0+cpu-py3-none-any.whl").unlink()
    made = clone.start()
    assert made.returncode == 0, made.stderr
    assert "taking PyPI's" in made.stderr
    assert clone.imports("import torch; print(torch.build)") == "cuda"


@pytest.mark.slow
def test_half_made_environments_are_repaired(clone: Clone) -> None:
    clone.write("torch", "1.0+cpu", "raise ImportError('libcudnn.so.9: cannot open shared object file')")
    broken = clone.start()
    lines = [line for line in broken.stderr.splitlines() if "error" in line]
    assert broken.returncode == 1 and len(lines) == 1
    assert "torch" in lines[0] and "libcudnn.so.9" in lines[0]
    clone.write("torch", "1.0+cpu", "build = 'cpu'")
    assert clone.start().returncode == 0
    site = next((clone.root / ".venv" / "lib").glob("python3*/site-packages"))
    (site / "ray.py").unlink()  # its metadata is still there
    repaired = clone.start()
    assert repaired.returncode == 0, repaired.stderr
    assert clone.imports("import ray, torch; print(torch.build)") == "cpu"


@pytest.mark.slow
def test_wrong_hash_and_missing_package_end_with_one_line(clone: Clone) -> None:
    clone.write("ray", "1.0", "other = 'code'")
    wrong = clone.start()
    assert wrong.returncode == 1 and "a downloaded package is not the locked one" in wrong.stderr.splitlines()[-1]
    (clone.wheels / "ray-1.0-py3-none-any.whl").unlink()
    missing = clone.start()
    assert missing.returncode == 1 and "no index has ray==1.0" in missing.stderr.splitlines()[-1]
    assert "Traceback" not in wrong.stderr + missing.stderr


def test_wrong_torch_is_refused_before_anything_is_made(clone: Clone) -> None:
    refused = clone.start(RAYLM_TORCH="rocm")
    assert refused.returncode == 2 and "found rocm, allowed: cpu, cuda" in refused.stderr
    assert not (clone.root / ".venv").exists()


@pytest.mark.parametrize(
    ("output", "kind", "words"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "full",
            "disk is full",
        ),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for ray==2.60.0",
            "network",
            "does not answer",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "missing", "no index has torch==2.13.0+cpu"),
        ("OSError: [Errno 30] Read-only file system: '/x'", "other", "cannot be written to"),
        ("ERROR: something else\nmore", "other", "ERROR: something else"),
        ("", "other", "status 7"),
    ],
)
def test_what_pip_says_becomes_one_sentence(environment, output: str, kind: str, words: str) -> None:
    error = environment._explain(output, 7)
    assert error.kind == kind and words in str(error) and "\n" not in str(error)


def test_space_is_asked_for_before_anything_is_made(environment, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    environment.check_space(tmp_path, free / 2)
    with pytest.raises(environment.InstallError, match=r"found [\d.]+ GB free, needed: \d+ GB") as found:
        environment.check_space(tmp_path, free * 2.0 + 1e9)
    assert found.value.kind == "full"
