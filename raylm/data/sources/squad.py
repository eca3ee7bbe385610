"""The outer form of a SQuAD file (Rajpurkar et al. 2016), which pairs and questions are read from alike."""

from __future__ import annotations

import json
from typing import Any

from raylm.data.sources.streams import BYTE_ORDER_MARK, InputErrors, open_bytes
from raylm.errors import UserError


def read_articles(path: str, errors: InputErrors, allowed: str) -> list[Any]:
    """The articles of one file, nested or a flat list; none where the file was skipped as undecodable.

    Args:
        allowed: what the message says is allowed instead.

    Raises:
        UserError: it is no JSON, or holds no list of articles.
    """
    with open_bytes(path) as stream:
        text = errors.decode(stream.read().removeprefix(BYTE_ORDER_MARK), path, 0)
    if text is None:
        return []
    try:
        content = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: malformed JSON: {getattr(error, 'msg', error)}") from None
    articles = content.get("data") if isinstance(content, dict) else content
    if not isinstance(articles, list):
        raise UserError(f"{path}: not a SQuAD file: found no list 'data'; allowed: {allowed}")
    return articles
