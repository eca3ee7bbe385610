"""The one place that knows how a question, a passage and an answer become messages, and messages become text.

``prepare`` lays out pairs with these functions and ``/v1/qa`` asks with them, so that a model is asked in the very
form that it was trained on. Needs no tokenizer library: templates are plain Jinja strings.
"""

from __future__ import annotations

from collections.abc import Iterable

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
