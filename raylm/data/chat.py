"""The one place that knows how a question, a passage and an answer become messages, and messages become text.

``prepare`` lays out pairs with these functions and ``/v1/qa`` asks with them, so that a model is asked in the very
form that it was trained on. Needs no tokenizer library: templates are plain Jinja strings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from raylm.errors import UserError

# Of a tokenizer that has our special tokens: <|user|>question<|assistant|>answer<|endoftext|>
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + eos_token -}}"
    "{%- else -%}{{- '<|user|>' + message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# Of a reused tokenizer without a template of its own: words instead of new tokens, so that its vocabulary stays.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- 'Answer: ' + message['content'] + eos_token -}}"
    "{%- else -%}{{- 'Question: ' + message['content'] + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Answer: ' -}}{%- endif -%}"
)

# As OpenAI's and Qwen's models have it; the roles are plain words.
CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# As Llama 3 has it, without the text about dates and tools that it puts before the first message.
LLAMA3_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + "
    "'<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)

# Name -> template, and the tokens that it needs.
NAMED_TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (CHATML_TEMPLATE, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3_TEMPLATE, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "plain": (PLAIN_TEMPLATE, ()),
}


def find_template(value: str, tokens: Collection[str]) -> str:
    """The template of that name, or in that file.

    Args:
        tokens: what the tokenizer has as tokens of their own.

    Raises:
        UserError: there is none, or the tokenizer lacks a token of it.
    """
    if value in NAMED_TEMPLATES:
        template, needed = NAMED_TEMPLATES[value]
        missing = [token for token in needed if token not in tokens]
        if missing:
            raise UserError(
                f"data.chat_template: found {value}, whose {', '.join(missing)} the tokenizer does not have; allowed: "
                "plain, or a file with a template of tokens that it has"
            )
        return template
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"data.chat_template: found {value}, which is no file of text; allowed: {', '.join(NAMED_TEMPLATES)}, or "
            "such a file"
        ) from None


def user_message(question: str, context: str | None = None) -> str:
    """What the user says: the passage, if any, a blank line, and the question."""
    return f"{context}\n\n{question}" if context else question


def question_messages(question: str, context: str | None = None) -> list[dict[str, str]]:
    """Messages that ask a question, for ``apply_chat_template(..., add_generation_prompt=True)``."""
    return [{"role": "user", "content": user_message(question, context)}]


def pair_messages(question: str, answer: str, context: str | None = None) -> list[dict[str, str]]:
    """Messages of a whole prompt/answer pair."""
    return [*question_messages(question, context), {"role": "assistant", "content": answer}]


def neutralize(text: str, special_tokens: Iterable[str]) -> str:
    """``text`` in which nothing reads as a special token: ``<|user|>`` becomes ``< |user|>``.

    A tokenizer takes the special tokens of a rendered conversation for what they say, wherever they stand; without
    this, text from outside could end the user's turn and speak as the assistant.
    """
    for token in sorted(special_tokens, key=len, reverse=True):
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
