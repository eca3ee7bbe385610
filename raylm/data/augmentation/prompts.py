"""What ``data.augmentation`` asks a served model, in English or, of a Chinese text, in Chinese, and how it is read."""

from __future__ import annotations

import re

from raylm.config.augmentation import MethodSection
from raylm.data.augmentation.served_model import ServedModel, Unanswered
from raylm.data.sources.documents import Document
from raylm.data.words import CJK

# Method -> (English, Chinese).
TEMPLATES = {
    "paraphrase": (
        "Rewrite the following text in other words. Keep its meaning and its language. Answer with the rewritten text "
        "only.\n\n{text}",
        "请用不同的词句改写下面的文字，保持原意，仍用中文。只回答改写后的文字。\n\n{text}",
    ),
    "back_translation": (
        "Translate the following text into {language}. Answer with the translation only.\n\n{text}",
        "请把下面的文字翻译成{language}。只回答译文。\n\n{text}",
    ),
    "generate": (
        "Write another text of the same kind and about the same length as the following one, on a related subject. "
        "Answer with the text only.\n\n{text}",
        "请写一段与下文同类、长度相近、主题相关的新文字。只回答这段文字。\n\n{text}",
    ),
    "generate pair": (
        "Here are a question and its answer.\n\n{context}Question: {prompt}\nAnswer: {answer}\n\nWrite one more "
        "question on the same subject and its right answer. Reply with two lines, 'Question: ...' and 'Answer: ...'.",
        "下面是一个问题和它的答案。\n\n{context}问题：{prompt}\n答案：{answer}\n\n请再写一个同一主题的问题和正确答案。"
        "只回答两行：“问题：……”和“答案：……”。",
    ),
}
_LETTERS = re.compile(r"[^\W\d_]")
_CJK = re.compile(f"[{CJK}]")
_QUESTION = re.compile(r"(?:question|问题)\s*[:：]", re.IGNORECASE)
_ANSWER = re.compile(r"\n[^\S\n]*(?:answer|答案|回答)\s*[:：]", re.IGNORECASE)


def is_chinese(text: str) -> bool:
    """Whether at least half of the letters are Chinese."""
    return 2 * len(_CJK.findall(text)) >= max(1, len(_LETTERS.findall(text)))


def fill(template: str, **values: str) -> str:
    """``template`` with {name} replaced by each value; other braces, in values too, stay."""
    return re.sub("|".join(f"{{{name}}}" for name in values), lambda match: values[match[0][1:-1]], template)


async def ask_for_text(model: ServedModel, method: MethodSection, text: str, seed: int) -> str:
    """A paraphrase of ``text``, its translation there and back, or another text of its kind.

    Raises:
        Unanswered: the model gave nothing usable.
    """
    chinese = is_chinese(text)
    template = method.template or TEMPLATES[method.method][chinese]
    if method.method != "back_translation":
        return await model.ask(fill(template, text=text), seed)
    between = method.language or ("French", "英文")[chinese]
    original = method.original_language or ("English", "中文")[chinese]
    there = await model.ask(fill(template, text=text, language=between), seed)
    # The way back is asked in the language of the first question, whatever the text is in now.
    return await model.ask(fill(method.back_template or template, text=there, language=original), seed)


async def ask_for_pair(model: ServedModel, method: MethodSection, document: Document, seed: int) -> tuple[str, str]:
    """A new question and its answer, after the pattern of a pair.

    Raises:
        Unanswered: the model gave nothing usable.
    """
    template = method.template or TEMPLATES["generate pair"][is_chinese(document.text)]
    context = f"{document.context}\n\n" if document.context else ""
    asked = fill(template, text=document.text, prompt=document.prompt, answer=document.answer, context=context)
    return pair_in(await model.ask(asked, seed))


def pair_in(text: str) -> tuple[str, str]:
    """The question and the answer that ``text`` has after these words.

    Raises:
        Unanswered: it has none.
    """
    question = _QUESTION.search(text)
    answer = _ANSWER.search(text, question.end()) if question else None
    if question is not None and answer is not None:
        found = text[question.end() : answer.start()].strip(), text[answer.end() :].strip()
        if all(found):
            return found
    raise Unanswered("no lines 'Question: ...' and 'Answer: ...' in the answer")
