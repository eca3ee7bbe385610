"""Files that a set was made of, noticed where they have changed since."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from raylm.config.data import DataSection
from raylm.data.prepare.inputs import check_unchanged, note_inputs, open_inputs, stamps_of
from raylm.errors import UserError


def touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "longer": (lambda folder: (folder / "a.txt").write_text("one, two"), r"a\.txt has changed \(3 bytes, now 8\)"),
    "as long": (lambda folder: touch(folder / "b.txt"), r"b\.txt has changed \(same size, another time\)"),
    "new": (lambda folder: (folder / "c.txt").write_text("three"), r"c\.txt has come"),
    "removed": (lambda folder: (folder / "b.txt").unlink(), r"b\.txt is gone"),
    "validation": (lambda folder: (folder.parent / "v.txt").write_text("fi"), r"v\.txt has changed"),
    "evaluation": (lambda folder: (folder.parent / "e.txt").write_text("fi"), r"e\.txt has changed"),
    "target": (lambda folder: touch(folder.parent / "zh.txt"), r"en\.txt has changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_is_named(change: str, tmp_path: Path) -> None:
    folder, prepared = tmp_path / "text", tmp_path / "set"
    folder.mkdir()
    prepared.mkdir()
    for path, text in ((folder / "a.txt", "one"), (folder / "b.txt", "two")):
        path.write_text(text)
    for name in ("v.txt", "e.txt", "en.txt", "zh.txt"):
        (tmp_path / name).write_text("four")
    data = DataSection(
        train=[str(folder), {"path": str(tmp_path / "en.txt"), "target": str(tmp_path / "zh.txt")}, "stdlib-docs"],
        validation=str(tmp_path / "v.txt"),
        decontamination={"sources": [str(tmp_path / "e.txt")]},
    )
    note_inputs(prepared, stamps_of(open_inputs(data)))
    check_unchanged(prepared, data, prepared)
    act, expected = CHANGES[change]
    act(folder)
    with pytest.raises(UserError, match=rf"^data: .*{expected}.* since .*/set was prepared; choose another run\.name"):
        check_unchanged(prepared, data, prepared)


def test_a_set_of_an_older_raylm_is_taken_as_it_is(tmp_path: Path) -> None:
    check_unchanged(tmp_path, DataSection(train=str(tmp_path / "gone.txt")), tmp_path)
