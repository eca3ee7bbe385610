"""The records of the tasks, and what one more of them takes."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from transformers import BartConfig, BertConfig, GPT2Config, T5Config

from raylm.config.model import ObjectiveSection
from raylm.config.tasks import TASKS, TRAINED_TASKS, TaskNeeds
from raylm.models.encoder_decoders import pairs_note
from raylm.models.heads import Head
from raylm.tasks import all_tasks, find_task, make_objective, task_of
from raylm.tasks.base import Service, Task
from raylm.tasks.classification.objective import ClassificationObjective


def test_every_name_has_its_record() -> None:
    for name in TASKS:
        task = find_task(name)
        assert task.name == name
        assert (task.objective is not None) == (name in TRAINED_TASKS)
        if task.objective is not None:
            assert (task.objective.name, task.objective.head) == (name, task.head)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(), "causal"),
        (T5Config(), "span"),
        (T5Config(task_specific_params={"summarization": {"prefix": "summarize: "}}), "span"),
        (T5Config(**pairs_note("")), "sequence_to_sequence"),
        (BartConfig(), "sequence_to_sequence"),
        (BertConfig(), "embedding"),
        (BertConfig(architectures=["BertForMaskedLM"]), "embedding"),
        (BertConfig(architectures=["BertForQuestionAnswering"]), "extractive_qa"),
        (BertConfig(architectures=["BertForSequenceClassification"]), "classification"),
        (BertConfig(architectures=["BertForTokenClassification"]), "tagging"),
    ],
)
def test_a_model_says_what_it_is_for(config: object, expected: str) -> None:
    assert task_of(config).name == expected


@pytest.mark.parametrize(
    ("model_type", "task", "objective"),
    [
        ("gpt2", "auto", "causal"),
        ("bert", "auto", "masked"),
        ("t5", "auto", "span"),
        ("t5", "sequence_to_sequence", "sequence_to_sequence"),
        ("marian", "auto", "sequence_to_sequence"),
        ("roberta", "auto", "masked"),
        ("mistral", "auto", "causal"),
        ("bert", "classification", "classification"),
        ("roberta", "extractive_qa", "extractive_qa"),
        ("bert", "tagging", "tagging"),
    ],
)
def test_what_models_are_trained_on(model_type: str, task: str, objective: str) -> None:
    assert make_objective(ObjectiveSection(type=task), model_type).name == objective


def test_a_new_task_is_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head("choosing", "encoder", "AutoModelForMultipleChoice", ("logits",), "chooser", "ForMultipleChoice")
    objective = type("ChoosingObjective", (ClassificationObjective,), {"name": "choosing", "head": head})
    module = ModuleType("raylm.tasks.choosing")
    module.TASK = Task("choosing", head, Service("choosing", "a chooser", "choose", {}), objective)
    monkeypatch.setitem(sys.modules, "raylm.tasks.choosing", module)
    monkeypatch.setitem(TASKS, "choosing", TaskNeeds(trains_encoders=True))
    assert task_of(BertConfig(architectures=["BertForMultipleChoice"])) is module.TASK
    section = ObjectiveSection.model_construct(type="choosing")
    assert type(make_objective(section, "bert")) is objective
    assert module.TASK in all_tasks()
