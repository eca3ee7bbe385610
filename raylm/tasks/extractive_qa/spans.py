"""From a reader's scores of tokens to one answer in the context.

Devlin et al. 2019, "BERT", section 4.3: the score of a span is the sum of its first and last token's; the best span
with an end at or behind its start wins, over all windows of the question; where the model knows questions without an
answer, the null score is the class token's sum, its smallest over the windows (the authors' code), and there is no
answer where it is above the best span's by more than a threshold. The score that is given out is the span's share of
the softmax over all spans (and none) of all windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raylm.data.samples.windows import Window

# Logit of what was not there; finite, so that no difference of it is not a number.
NOTHING = -1e9


@dataclass(frozen=True)
class AnswerSpan:
    """What a reader found.

    Attributes:
        text: a substring of the context; empty where there is no answer.
        start, end: its characters, ``context[start:end]``; both 0 where there is none.
        score: probability among all spans that were looked at, and of none where a threshold asks for it.
        no_answer: whether the null threshold was passed.
        null_margin: the null score less the best span's, logits.
        logit: the score of what was chosen, before the softmax.
        mass: logarithm of the sum over all that was looked at: with it answers from several contexts can be compared.
    """

    text: str
    start: int
    end: int
    score: float
    no_answer: bool
    null_margin: float
    logit: float = NOTHING
    mass: float = NOTHING


def best_answer(
    context: str,
    windows: list[Window],
    logits: list[np.ndarray],
    max_answer_tokens: int,
    null_threshold: float | None = None,
) -> AnswerSpan:
    """The best answer over the ``windows`` of a question.

    Args:
        context: the text that the windows were cut from.
        windows: at least one for a context with a token.
        logits: of each window, fp32 [T or more, 2]: first and last token.
        max_answer_tokens: longest answer.
        null_threshold: see above; None always answers.
    """
    if not windows:
        return AnswerSpan("", 0, 0, 1.0, True, np.inf)
    best, nulls, total = (-np.inf, 0, 0, 0), [], []
    for number, (window, scores) in enumerate(zip(windows, logits, strict=True)):
        inside = scores[window.first : window.last + 1].astype(np.float64)
        sums = inside[:, :1] + inside[None, :, 1]
        length = len(inside)
        allowed = np.tri(length, k=max_answer_tokens - 1, dtype=bool) & ~np.tri(length, k=-1, dtype=bool)
        sums = np.where(allowed, sums, -np.inf)
        first, last = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[first, last] > best[0]:
            best = (float(sums[first, last]), number, int(first) + window.first, int(last) + window.first)
        nulls.append(float(scores[window.null].astype(np.float64).sum()))
        total.append(_log_sum(sums[allowed]))
    null = min(nulls)
    if null_threshold is not None:
        total.append(null)
    normalizer = _log_sum(np.array(total))
    margin = null - best[0]
    if null_threshold is not None and margin > null_threshold:
        return AnswerSpan("", 0, 0, float(np.exp(null - normalizer)), True, margin, null, normalizer)
    _, number, first, last = best
    start, end = int(windows[number].offsets[first, 0]), int(windows[number].offsets[last, 1])
    # Some tokenizers count the space before a word to it.
    while start < end and context[start].isspace():
        start += 1
    while end > start and context[end - 1].isspace():
        end -= 1
    share = float(np.exp(best[0] - normalizer))
    return AnswerSpan(context[start:end], start, end, share, False, margin, best[0], normalizer)


def _log_sum(values: np.ndarray) -> float:
    highest = float(values.max())
    return highest + float(np.log(np.exp(values - highest).sum()))
