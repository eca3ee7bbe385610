"""Files that a set was made of, noticed where they have changed since."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from raylm.config.data import DataSection
from raylm.data.prepare.inputs import (
    check_run_unchanged,
    check_unchanged,
    note_inputs,
    open_inputs,
    run_stamps,
    stamps_of,
    tokenizer_stamps,
)  # fmt: skip
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
    with pytest.raises(UserError, match=rf"^data: .*{expected}.* since .*/set was made; choose another run\.name"):
        check_unchanged(prepared, data, prepared)


def test_a_set_of_an_older_raylm_is_taken_as_it_is(tmp_path: Path) -> None:
    check_unchanged(tmp_path, DataSection(train=str(tmp_path / "gone.txt")), tmp_path)


@pytest.mark.parametrize(
    ("noted", "act", "expected"),
    [
        (True, lambda model: touch(model / "tokenizer.json"), r"^tokenizer: .*tokenizer\.json has changed \(same size"),
        (True, lambda model: None, None),
        (True, shutil.rmtree, None),
        # A set of an older raylm.
        (False, lambda model: touch(model / "tokenizer.json"), None),
    ],
    ids=["changed", "the same", "gone", "not noted"],
)
def test_an_existing_tokenizer_is_part_of_a_set(
    tmp_path: Path, noted: bool, act: Callable[[Path], object], expected: str | None
) -> None:
    model, prepared = tmp_path / "model", tmp_path / "set"
    for folder in (model, prepared):
        folder.mkdir()
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "a.txt").write_text("one")
    data = DataSection(train=str(tmp_path / "a.txt"))
    note_inputs(prepared, stamps_of(open_inputs(data)) | tokenizer_stamps(model if noted else None))
    act(model)
    if expected is None:
        check_unchanged(prepared, data, prepared, model)
    else:
        with pytest.raises(UserError, match=expected):
            check_unchanged(prepared, data, prepared, model)


RUN_CHANGES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "weights": (lambda root: touch(root / "model" / "model.safetensors"), r"model\.safetensors has changed"),
    "tokenizer": (
        lambda root: (root / "model" / "tokenizer.json").write_text("{ }"),
        r"tokenizer\.json has changed",
    ),
    "another set": (lambda root: (root / "set" / "manifest.json").write_text("[2]"), r"manifest\.json has changed"),
    "text": (lambda root: (root / "v.txt").write_text("more"), r"v\.txt has changed"),
    "nothing": (lambda root: None, None),
    # A copy of the same set, a model that was moved away, and what is no part of a model.
    "the same set": (lambda root: touch(root / "set" / "manifest.json"), None),
    "gone": (lambda root: shutil.rmtree(root / "model"), None),
    "notes": (lambda root: (root / "model" / "README.md").write_text("x"), None),
}


@pytest.mark.parametrize("change", RUN_CHANGES)
def test_a_finished_run_is_not_that_of_another_model_or_set(change: str, tmp_path: Path) -> None:
    for name, text in (("model/config.json", "{}"), ("model/model.safetensors", "w"), ("model/tokenizer.json", "{}"),
                       ("set/manifest.json", "[1]"), ("v.txt", "text"), ("run/report.json", "{}")):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    data = DataSection(train=str(tmp_path / "set"), validation=str(tmp_path / "v.txt"))
    run, model = tmp_path / "run", str(tmp_path / "model")
    check_run_unchanged(run, data, model)
    note_inputs(run, run_stamps(data, model))
    act, expected = RUN_CHANGES[change]
    act(tmp_path)
    if expected is None:
        check_run_unchanged(run, data, model)
    else:
        with pytest.raises(UserError, match=rf"^{tmp_path}/.*{expected}.* since {run} was made; choose another run"):
            check_run_unchanged(run, data, model)
