"""The import check: one line on what is broken, with the remedy; nothing where all is well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylm.doctor.imports import Import, check_imports, describe, remedy

SCRIPT = Path(__file__).resolve().parents[2] / "raylm" / "doctor" / "imports.py"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of the importing process."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_all_is_well(packages: Path) -> None:
    (packages / "fine.py").write_text("print('a banner that some packages print')")
    results = check_imports(["json", "fine"], 60)
    assert [(result.name, result.error) for result in results] == [("json", ""), ("fine", "")]
    assert describe(results) == ""


def test_every_kind_of_breakage_is_told_and_the_rest_goes_on(packages: Path) -> None:
    (packages / "raises.py").write_text("raise OSError('libcudnn.so.9: cannot open shared object file: No such file')")
    (packages / "crashes.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    (packages / "leaves.py").write_text("import os; os._exit(3)")
    (packages / "needs.py").write_text("import absent_dependency")
    names = ["raises", "crashes", "leaves", "needs", "absent_package", "json"]
    results = check_imports(names, 60)
    assert [result.name for result in results] == names
    errors = {result.name: result.error for result in results}
    assert errors["crashes"] == "the importing process was ended by SIGILL"
    assert errors["leaves"] == "the importing process ended with status 3"
    assert errors["json"] == ""
    line = describe(results)
    assert "\n" not in line
    assert line.startswith("import raises failed: OSError: libcudnn.so.9")
    assert "broken too: crashes, leaves, needs, absent_package" in line
    assert "CUDA build without its CUDA libraries" in line
    assert remedy("needs", errors["needs"]) == "python -m pip install absent_dependency, which needs needs"
    assert remedy("absent_package", errors["absent_package"]) == "python -m pip install absent_package"
    assert "AVX2" in remedy("crashes", errors["crashes"])


def test_the_time_limit_holds(packages: Path) -> None:
    (packages / "hangs.py").write_text("import time; time.sleep(600)")
    results = check_imports(["json", "hangs", "os"], 3)
    assert [result.timed_out for result in results] == [False, True, True]
    assert results[1] == Import("hangs", error="not imported within 3 s", timed_out=True)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        ("ImportError: libgomp.so.1: cannot open shared object file: No such file or directory", "libgomp.so.1"),
        ("ImportError: /lib/libc.so.6: version `GLIBC_2.38' not found", "too old"),
        ("the importing process was ended by SIGKILL", "memory"),
        ("AttributeError: module 'numpy' has no attribute 'x'", "--force-reinstall --no-cache-dir torch"),
    ],
)
def test_remedies(error: str, part: str) -> None:
    assert part in remedy("torch", error)


def test_by_path_with_the_standard_library_alone(packages: Path) -> None:
    (packages / "fine.py").write_text("")
    command = [sys.executable, "-S", str(SCRIPT)]  # without site-packages
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    well = subprocess.run([*command, "fine"], capture_output=True, text=True, env=environment, timeout=60)
    assert (well.returncode, well.stdout, well.stderr) == (0, "", "")
    (packages / "broken.py").write_text("1 / 0")
    broken = subprocess.run([*command, "fine", "broken"], capture_output=True, text=True, env=environment, timeout=60)
    assert broken.returncode == 1
    assert broken.stderr.count("\n") == 1
    assert "import broken failed: ZeroDivisionError" in broken.stderr
