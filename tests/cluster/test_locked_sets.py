"""The locked sets agree with pyproject.toml and with each other, and the Python versions are the same everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMES = ("build", "cpu", "cuda", "gpu", "test")
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)", re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / "cluster" / f"requirements-{name}.txt").read_text(encoding="utf-8")


def pins(*names: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        for match in PIN.finditer(read(name)):
            found.setdefault(canonicalize_name(match["name"]), set()).add(match["version"])
    return found


@pytest.mark.parametrize(
    ("extras", "sets"),
    [(("cpu", "chinese"), ("cpu", "cuda")), (("gpu",), ("cpu", "cuda", "gpu")), (("test",), ("cpu", "cuda", "test"))],
)
def test_sets_satisfy_pyproject(extras: tuple[str, ...], sets: tuple[str, ...]) -> None:
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    locked = pins(*sets)
    assert len(wanted) > 25
    for line in wanted:
        requirement = Requirement(line)
        versions = locked.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement.name} is in none of {sets}: python cluster/lock.py"
        assert all(version in requirement.specifier for version in versions), f"{line}: locked {versions}"


def test_every_pin_has_hashes_and_one_version_in_all_sets() -> None:
    for name in NAMES:
        blocks = re.split(r"\n(?=[A-Za-z0-9._-]+==)", read(name))[1:]
        assert blocks and all("--hash=sha256:" in block for block in blocks), name
    # Two versions of a package stand for two ranges of Python, and then together in one file.
    for package, versions in pins(*NAMES).items():
        for name in NAMES:
            assert pins(name).get(package, versions) == versions, f"{package} in {name}: {versions}"


def test_nodes_get_no_test_packages_and_cpus_no_cuda() -> None:
    nodes = pins("build", "cpu", "cuda", "gpu")
    assert not {"pytest", "pytest-xdist", "moto", "flask", "ruff", "boto3"} & nodes.keys()
    assert {"pytest", "moto", "ruff"} <= pins("test").keys()
    cpu = pins("cpu").keys()
    assert not [package for package in cpu if package == "torch" or package.startswith(("nvidia-", "cuda-", "triton"))]
    assert {"torch", "nvidia-cudnn-cu13", "nvidia-cublas"} <= pins("cuda").keys()
    assert {"-r requirements-cpu.txt", "-r requirements-cuda.txt"} <= set(read("gpu").splitlines())


def test_python_versions_are_the_same_everywhere() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [version for version in ("3.10", *VERSIONS, "3.15") if version in supported] == list(VERSIONS)
    prefix = "Programming Language :: Python :: "
    classifiers = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix + "3.")]
    assert classifiers == list(VERSIONS)
    assert "3.11 to 3.14" in (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / "jobs" / "environment.sh").read_text(encoding="utf-8")
    assert "(3, 11) <= sys.version_info[:2] <= (3, 14)" in script and "Python 3.11 to 3.14" in script
    assert "OLDEST, NEWEST = (3, 11), (3, 14)" in (ROOT / "jobs" / "environment.py").read_text(encoding="utf-8")
    assert str(VERSIONS).replace("'", '"') in (ROOT / "cluster" / "lock.py").read_text(encoding="utf-8")


def test_lock_says_what_it_does() -> None:
    found = subprocess.run(
        [sys.executable, str(ROOT / "cluster" / "lock.py"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0 and "--check" in found.stdout and "--upgrade" in found.stdout
