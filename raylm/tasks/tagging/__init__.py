"""Tagging: say of each word of a sentence what it is, or to which span it belongs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raylm.data.loading import resolve_model
from raylm.data.samples.word_windows import check_word_tokenizer
from raylm.models.chains import read_chain
from raylm.models.encoders import encoder_positions
from raylm.models.heads import TAGGER
from raylm.tasks.base import Evaluation, Measure, Service, Task
from raylm.tasks.tagging.decoding import Decoder
from raylm.tasks.tagging.objective import TaggingObjective
from raylm.tasks.tagging.sentences import describe, open_sentences, tag_agreement

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from raylm.config.serving import ServingSection


def _settings(source: str, config: PretrainedConfig, serving: ServingSection) -> dict[str, Any]:
    return {"context_length": encoder_positions(config), "decoder": Decoder.of(source, config)}


def _check(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, serving: ServingSection, path: str) -> None:
    check_word_tokenizer(tokenizer, path)
    read_chain(resolve_model(path), config)


TASK = Task(
    name="tagging",
    head=TAGGER,
    objective=TaggingObjective,
    evaluation=Evaluation(
        open=open_sentences,
        measures=(
            Measure("token_accuracy", "token accuracy, %", "larger", 2),
            Measure("span_precision", "precision of spans, %", "larger", 2),
            Measure("span_recall", "recall of spans, %", "larger", 2),
            Measure("span_f1", "F1 of spans, %", "larger", 2),
        ),
        closeness=tag_agreement,
        unit="sentences",
        results="tags.jsonl",
        describe=describe,
    ),
    service=Service(
        name="tagging",
        what="a tagger",
        route="tag",
        example={"model": "", "input": ["Anna lives in Berlin."]},
        settings=_settings,
        check=_check,
    ),
)
