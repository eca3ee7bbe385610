"""Which tokens end an answer: none of the original's is lost, and the template's own turn end is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raylm.data.chat import CHAT_TEMPLATE, PLAIN_TEMPLATE
from raylm.models.stops import end_token_ids, stop_tokens, turn_end

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPACED = "{% for message in messages %}{{ message['content'] + ' ' + eos_token }}{% endfor %}"
OPEN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
STRICT = "{{ raise_exception('a system message comes first') }}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|im_end|>x"]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, **{token: 1 + i for i, token in enumerate(SPECIAL)}}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", extra_special_tokens=SPECIAL[1:], unk_token="<unk>"
    )
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, 3), (SPACED, 1), (CHAT_TEMPLATE, 1), (PLAIN_TEMPLATE, 1), (OPEN, None), (STRICT, None), (None, None)],
)
def test_what_a_template_ends_a_turn_with(template: str | None, expected: int | None) -> None:
    assert turn_end(tokenizer(template)) == expected


def test_no_stop_of_the_original_is_lost(tmp_path: Path) -> None:
    assert stop_tokens(tokenizer(None), None) == [1]
    assert stop_tokens(tokenizer(CHATML), None) == [1, 3]
    assert stop_tokens(tokenizer(CHATML), str(tmp_path)) == [1, 3]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert stop_tokens(tokenizer(CHATML), str(tmp_path)) == [1, 2, 3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    assert end_token_ids(str(tmp_path)) == {5, 3}
    assert stop_tokens(tokenizer(CHATML), str(tmp_path)) == [1, 3, 5]
