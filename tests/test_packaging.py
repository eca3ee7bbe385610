"""The wheel is whole: every file that the code reads is in it, from the tree and from the sdist alike."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import raylm

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECIPES = {
    path.relative_to(ROOT / "jobs" / "recipes").as_posix() for path in (ROOT / "jobs" / "recipes").rglob("*.yaml")
}


def test_what_the_build_is_told_to_take_is_there() -> None:
    targets = PROJECT["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["only-include"] == ["raylm", "jobs/recipes"]
    assert targets["wheel"]["sources"] == {"jobs/recipes": "raylm/jobs/recipes"}
    for source in [*targets["wheel"]["only-include"], *(name.lstrip("/") for name in targets["sdist"]["include"])]:
        assert (ROOT / source).is_dir(), source
    # A copy in the tree would hide the recipes' one source.
    assert not (ROOT / "raylm" / "jobs").exists()
    assert (ROOT / "raylm" / "py.typed").is_file()


def test_version_has_one_place_and_classifiers_fit_the_range() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"0\.\d+\.\d+", raylm.__version__)
    assert f'__version__ = "{raylm.__version__}"' in (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).read_text()
    minors = sorted(
        int(match[1])
        for line in PROJECT["project"]["classifiers"]
        if (match := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line))
    )
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_no_file_beside_the_package_is_read() -> None:
    """What lies beside raylm/ in the repository is not there in a wheel: one room alone knows how to find it."""
    reads = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "raylm").rglob("*.py")
        if re.search(r"__file__.*parent.*parent|__file__.*parents\[[1-9]", path.read_text())
    }
    # Processes beside a replica are told where to import raylm from, and a head's code where it may not be: the same in
    # a clone and in site-packages.
    assert reads <= {"raylm/serving/helper_process.py", "raylm/models/own_code.py"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """sdist, the wheel from the tree, and the wheel from the sdist; built offline by the backend in the environment."""
    folder = tmp_path_factory.mktemp("dist")
    sdist = "import sys, os; os.chdir(sys.argv[1]); from hatchling.build import build_sdist; build_sdist(sys.argv[2])"
    subprocess.run([sys.executable, "-c", sdist, str(ROOT), str(folder)], check=True, timeout=120)
    (archive,) = folder.glob("*.tar.gz")
    wheels = {}
    for name, source in {"tree": ROOT, "from sdist": archive}.items():
        place = folder / name.replace(" ", "-")
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*command, "--wheel-dir", str(place), str(source)], check=True, timeout=300)
        (wheels[name],) = place.glob("*.whl")
    return {"sdist": archive, **wheels}


@pytest.mark.slow
def test_wheel_holds_everything(built: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built["tree"]) as wheel, zipfile.ZipFile(built["from sdist"]) as again:
        names = set(wheel.namelist())
        assert {name: wheel.read(name) for name in names} == {name: again.read(name) for name in again.namelist()}
        tracked = subprocess.run(
            ["git", "ls-files", "raylm"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
        assert set(tracked) <= names
        assert {f"raylm/jobs/recipes/{name}" for name in RECIPES} <= names
        (information,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        assert f"{information}/licenses/LICENSE" in names
        assert "raylm = raylm.cli:run_and_exit" in wheel.read(f"{information}/entry_points.txt").decode()
        assert f"Version: {raylm.__version__}\n" in wheel.read(f"{information}/METADATA").decode()
        wheel.extractall(tmp_path / "installed")
    with tarfile.open(built["sdist"]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"jobs/recipes/{name}" for name in RECIPES} | {"pyproject.toml", "LICENSE", "README.md"} <= held
    # From an empty directory, with nothing of the repository on the path.
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import raylm; from raylm.recipes import find_recipe; "
        "print(raylm.__file__); print(find_recipe('quickstart/serve').path)"
    )
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "installed")],
        cwd=empty, check=True, capture_output=True, text=True, env={"PATH": ""}, timeout=60,
    ).stdout.splitlines()  # fmt: skip
    assert all(line.startswith(str(tmp_path / "installed" / "raylm")) for line in shown)
