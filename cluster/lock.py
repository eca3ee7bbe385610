"""Makes the locked sets of packages in this folder again from ``pyproject.toml``, or checks that they install.

    python cluster/lock.py            # resolve again; versions that still fit stay as they are
    python cluster/lock.py --upgrade  # take the newest versions
    python cluster/lock.py --check    # every Python and platform finds an archive of every package

One resolution over all extras (uv, for all platforms at once) fixes the versions; each file is a part of it, with
hashes, so that a package has one version in all of them:

    requirements-build.txt   what builds raylm, and the one package that comes as source only (deepspeed)
    requirements-cpu.txt     training, compression and serving on CPUs, without torch
    requirements-cuda.txt    PyPI's build of torch for Linux with its CUDA libraries
    requirements-gpu.txt     both of these, and vLLM
    requirements-test.txt    what the tests need beside one of them

torch is apart since a machine without a GPU takes its CPU build, which PyPI has not (``jobs/environment.py``).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent / "pyproject.toml"
UV_VERSION = "0.13.9"
# The release that vLLM's newest version with transformers below 5.6 (optimum-intel's bound) is built for.
TORCH = "torch==2.13.0"
OLDEST_PYTHON = "3.11"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# uv's names. Wheels of openvino for aarch64 need glibc 2.35, of llguidance (vLLM's) 2.31, of torch macOS 14.
PLATFORMS = {
    "cpu": ("x86_64-manylinux_2_28", "aarch64-manylinux_2_35", "aarch64-apple-darwin"),
    "test": ("x86_64-manylinux_2_28", "aarch64-manylinux_2_35", "aarch64-apple-darwin"),
    "gpu": ("x86_64-manylinux_2_31", "aarch64-manylinux_2_35"),
}
SOURCE_ONLY = ("deepspeed",)
COMMON = ("cpu", "chinese", "adapters", "scorers")
CPU_EXTRAS, GPU_EXTRAS, TEST_EXTRAS = COMMON, (*COMMON, "qlora", "gpu"), (*COMMON, "qlora", "test")
# Of a CUDA build of torch alone. torchvision, which optimum-intel asks for and raylm's use of it does not import, has
# to match the build of torch: only the GPU set has it.
_CUDA = re.compile(r"torch|torchvision|triton|cuda-.*|nvidia-.*")
_BLOCK = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+).*(?:\n[ ]+--hash=.*)*", re.MULTILINE)


@dataclass(frozen=True)
class Pin:
    """A package of a set: its lines in a requirements file."""

    name: str
    version: str
    lines: str


def read_pins(text: str) -> dict[tuple[str, str], Pin]:
    """Pins of a requirements file by (name, version); a package may have one version per Python."""
    found = (Pin(match["name"], match["version"], match[0]) for match in _BLOCK.finditer(text))
    return {(pin.name, pin.version): pin for pin in found}


def make_sets(uv: Path, upgrade: bool) -> dict[str, str]:
    """Texts of the files by their names."""
    with tempfile.TemporaryDirectory() as scratch:
        everything, torch = Path(scratch, "everything.txt"), Path(scratch, "torch.txt")
        torch.write_text(f"{TORCH}\n", encoding="utf-8")
        if not upgrade:  # what the files hold already is uv's first choice
            pins = [*read_pins(_read_all()).values(), Pin("", "", TORCH)]
            everything.write_text("".join(f"{pin.lines}\n" for pin in pins), encoding="utf-8")
        extras = dict.fromkeys([*GPU_EXTRAS, *TEST_EXTRAS])
        _compile(uv, PROJECT, everything, [torch], extras)

        def part(name: str, source: Path, chosen: tuple[str, ...] = ()) -> dict[tuple[str, str], Pin]:
            output = Path(scratch, name)
            _compile(uv, source, output, [torch, everything], dict.fromkeys(chosen))
            return read_pins(output.read_text(encoding="utf-8"))

        build = Path(scratch, "build.in")
        # deepspeed's, and raylm's own: both are built without isolation, with what is locked here.
        requires = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["build-system"]["requires"]
        build.write_text("\n".join(["setuptools", "wheel", *requires]), encoding="utf-8")
        build_pins = part("build.txt", build)
        cpu_all = part("cpu.txt", PROJECT, CPU_EXTRAS)
        gpu_all = part("gpu.txt", PROJECT, GPU_EXTRAS)
        test_all = part("test.txt", PROJECT, TEST_EXTRAS)
        torch_alone = part("torch-alone.txt", torch)
    cpu = {key: pin for key, pin in cpu_all.items() if not _CUDA.fullmatch(pin.name)}
    cuda = {key: pin for key, pin in torch_alone.items() if _CUDA.fullmatch(pin.name)}
    gpu = {key: pin for key, pin in gpu_all.items() if key not in cpu and key not in cuda}
    test = {key: pin for key, pin in test_all.items() if key not in cpu and not _CUDA.fullmatch(pin.name)}
    return {
        "requirements-build.txt": _file("Builds what comes as source only: installed first.", build_pins),
        "requirements-cpu.txt": _file("Everything but torch, for machines without a GPU.", cpu),
        "requirements-cuda.txt": _file("PyPI's torch for Linux with its CUDA libraries.", cuda),
        "requirements-gpu.txt": _file(
            "Everything for machines with an NVIDIA GPU.", gpu, "-r requirements-cpu.txt\n-r requirements-cuda.txt\n"
        ),
        "requirements-test.txt": _file("What the tests need beside the CPU or the GPU set.", test),
    }


def check(uv: Path) -> int:
    """Look for an archive of each pin on each Python and platform; prints a line each, returns how many fail."""
    failures = 0
    for name, platforms in PLATFORMS.items():
        for python in PYTHONS:
            for platform in platforms:
                command = [
                    uv, "pip", "compile", FOLDER / f"requirements-{name}.txt", "--no-deps", "--quiet", "--no-header",
                    "--python-version", python, "--python-platform", platform, "--no-python-downloads",
                    "--only-binary", ":all:", *(word for package in SOURCE_ONLY for word in ("--no-binary", package)),
                ]  # fmt: skip
                found = subprocess.run(command, capture_output=True, text=True, timeout=600, env=_environment())
                failures += found.returncode != 0
                verdict = "ok" if found.returncode == 0 else f"FAILS: {' '.join(found.stderr.split())[:400]}"
                print(f"{name:5} Python {python:5} {platform:24} {verdict}", flush=True)
    return failures


def _compile(uv: Path, source: Path, output: Path, constraints: list[Path], extras: dict[str, None]) -> None:
    command = [
        uv, "pip", "compile", source, "--output-file", output, "--universal", "--python-version", OLDEST_PYTHON,
        "--generate-hashes", "--no-header", "--no-annotate", "--quiet", "--no-python-downloads",
        *(word for extra in extras for word in ("--extra", extra)),
        *(word for path in constraints for word in ("--constraint", path)),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=1200, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}


def _read_all() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("requirements-*.txt")))


def _file(purpose: str, pins: dict[tuple[str, str], Pin], head: str = "") -> str:
    lines = "\n".join(pin.lines for pin in sorted(pins.values(), key=lambda pin: (pin.name, pin.version)))
    return f"# {purpose}\n# Made by cluster/lock.py from pyproject.toml; do not edit.\n{head}{lines}\n"


def main() -> int:
    """Entry point; exit status 1 where the check finds a package without an archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    parser.add_argument("--check", action="store_true", help="only check the files that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        binaries = Path(folder, "bin")
        subprocess.run([binaries / "pip", "install", "--quiet", f"uv=={UV_VERSION}"], check=True, timeout=600)
        if arguments.check:
            return 1 if check(binaries / "uv") else 0
        for name, text in make_sets(binaries / "uv", arguments.upgrade).items():
            (FOLDER / name).write_text(text, encoding="utf-8")
            print(f"{name}: {len(read_pins(text))} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
