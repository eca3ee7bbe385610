"""``bash tests/run.sh --help`` and the topics that its ``-m`` chooses by."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import topic_of
from tests.readme_commands import ROOT, registered_markers

TESTS = ROOT / "tests"


def test_help_needs_no_environment_and_names_every_marker() -> None:
    result = subprocess.run(
        ["/bin/bash", str(TESTS / "run.sh"), "--help"], capture_output=True, text=True, timeout=30, cwd="/"
    )
    assert (result.returncode, result.stderr) == (0, "")
    named = {line.split()[0] for line in result.stdout.partition("Markers")[2].splitlines()[1:] if line[:2] == "  "}
    assert named == registered_markers()
    assert '-m "training and not slow"' in result.stdout


@pytest.mark.parametrize(
    ("path", "topic"),
    [
        ("serving/test_routes.py", "serving"),
        ("serving/engines/test_pace.py", "serving"),
        ("test_cluster.py", "cluster"),
        ("test_readmes.py", "docs"),
        ("test_pages.py", "cli"),
    ],
)
def test_a_topic_is_the_folder(path: str, topic: str) -> None:
    assert topic_of(TESTS / path, registered_markers()) == topic


def test_a_folder_without_a_marker_is_refused() -> None:
    with pytest.raises(pytest.UsageError, match="tests/other: add the marker 'other'"):
        topic_of(Path(TESTS / "other" / "test_x.py"), registered_markers())


def test_this_test_is_marked(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("cli") is not None
