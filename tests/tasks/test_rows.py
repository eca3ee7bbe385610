"""Tasks whose rows are examples: what their data section may say, and that rows are read as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylm.config.data import DataSection
from raylm.data.samples.labelled import evaluation_labelled
from raylm.errors import UserError
from raylm.tasks import all_tasks, find_task

WITH_ROWS = [task.name for task in all_tasks() if task.objective is not None and task.objective.rows is not None]
FOR_TEXT = {
    "cleaning": {"html": True},
    "deduplication": {"near": False},
    "decontamination": {"sources": ["test.jsonl"]},
    "augmentation": {"methods": [{"method": "delete"}]},
}


def test_which_tasks_read_rows() -> None:
    assert WITH_ROWS == ["sequence_to_sequence", "extractive_qa", "classification", "tagging", "preference"]


@pytest.mark.parametrize("name", WITH_ROWS)
def test_what_is_for_running_text_is_refused(name: str) -> None:
    rows = find_task(name).objective.rows
    rows.check(DataSection(train="rows.jsonl", errors="skip", encoding="detect"), name)
    for key, values in FOR_TEXT.items():
        section = DataSection.model_validate({"train": "rows.jsonl", key: values})
        with pytest.raises(UserError, match=rf"data\.{key}: leave it out, it is not for .* \(objective\.type {name}\)"):
            rows.check(section, name)


def test_labelled_rows_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\n今天下雨,天气\n".encode("gb18030"))
    found = evaluation_labelled(DataSection(train=str(path), encoding="gb18030"))
    assert [(row.text, row.label) for row in found] == [("今天下雨", "天气")]
    with pytest.raises(UserError, match=r"rows\.csv"):
        evaluation_labelled(DataSection(train=str(path)))
