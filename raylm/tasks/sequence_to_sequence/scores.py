"""How well written texts agree with references: BLEU, chrF and ROUGE, by the libraries that papers report with.

BLEU: Papineni et al. 2002; chrF: Popovic 2015; both by sacrebleu (Post 2018), whose signature says how words were
counted. ROUGE-1, ROUGE-2 and ROUGE-L: Lin 2004, F1, by torchmetrics, on lower-cased words, of languages that write
without spaces on characters. Needs the extra ``scorers``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from raylm.errors import UserError
from raylm.tasks.intervals import RESAMPLES

# sacrebleu's tokenizers of languages that write without spaces; those for Japanese words need MeCab.
TOKENIZERS = {"zh": "zh", **dict.fromkeys(("ja", "th", "lo", "km", "my"), "char")}
DEFAULT_TOKENIZER = "13a"
ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}
_WORDS = re.compile(r"\w+")
# Characters of other scripts one by one, what is written in Latin letters and digits in words.
_CHARACTERS = re.compile(r"[A-Za-z0-9]+|[^\W_]")


def check_scorers() -> None:
    """Refuse to begin without the libraries.

    Raises:
        UserError: names the extra.
    """
    missing = [name for name in ("sacrebleu", "torchmetrics") if find_spec(name) is None]
    if missing:
        found = " and ".join(missing)
        raise UserError(f"evaluation: {found} not found, needed to compare texts: pip install 'raylm[scorers]'")


def units(text: str, language: str | None) -> list[str]:
    """What ROUGE counts: words, or characters of a ``language`` without spaces."""
    return (_CHARACTERS if language in TOKENIZERS else _WORDS).findall(text.lower())


def compare(hypotheses: Sequence[str], references: Sequence[str], language: str | None) -> dict[str, Any]:
    """Figures in percent, larger is better.

    Args:
        hypotheses, references: one of each for a text, at least one.
        language: of the texts, two or three letters; None for one that writes words with spaces.

    Returns:
        bleu with its 95% interval (1000 samples of the texts, Koehn 2004) and signature, chrf, rouge1, rouge2, rouge_l.
    """
    from sacrebleu.metrics import BLEU, CHRF
    from torchmetrics.functional.text.rouge import rouge_score

    bleu = BLEU(tokenize=TOKENIZERS.get(language or "", DEFAULT_TOKENIZER))
    found = bleu.corpus_score(list(hypotheses), [list(references)], n_bootstrap=RESAMPLES)
    rouge = rouge_score(
        list(hypotheses), list(references), rouge_keys=tuple(ROUGE), normalizer=lambda text: text,
        tokenizer=lambda text: units(text, language),
    )  # fmt: skip
    return {
        "bleu": found.score,
        "bleu_interval": [found._mean - found._ci, found._mean + found._ci],
        "bleu_signature": str(bleu.get_signature()),
        "chrf": CHRF().corpus_score(list(hypotheses), [list(references)]).score,
        **{name: 100.0 * float(rouge[f"{key}_fmeasure"]) for key, name in ROUGE.items()},
    }
