"""Linear chains over the tags of a sentence: the likeliest sequence, and how likely each tag is in it.

A sequence of tags scores the sum of its words' logits, of a score for each pair of neighbours, and of one for the first
and for the last tag; its probability is the softmax of that over all sequences (Lafferty et al. 2001, a conditional
random field). The best one is found by Viterbi's algorithm (1967), the probability of a tag by the forward-backward
algorithm (Rabiner 1989).

A model has the scores beside its own weights in ``model.safetensors``: ``crf.transitions`` [from, to], ``crf.starts``
and ``crf.ends`` [tags], and ``"tagging_head": "crf"`` in its configuration. Its logits are those of any other tagger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHAIN = "crf"
NAMES = ("transitions", "starts", "ends")
# How much faster than the network the scores of a chain are trained: they begin at nothing, and are few.
CHAIN_RATE = 100.0

Follows = Callable[[int | None, int | None], bool]


@dataclass(frozen=True)
class Chain:
    """Scores of neighbours, fp64; minus infinity where a pair is not allowed.

    Attributes:
        transitions: [from, to].
        starts, ends: [tags].
    """

    transitions: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def within(self, follows: Follows) -> Chain:
        """The chain without the pairs that ``follows`` does not allow; None stands for the beginning and the end."""
        tags = range(len(self.starts))
        pairs = np.array([[follows(one, other) for other in tags] for one in tags])
        first, last = (np.array([allowed(tag) for tag in tags]) for allowed in (
            lambda tag: follows(None, tag), lambda tag: follows(tag, None),
        ))  # fmt: skip
        return Chain(
            np.where(pairs, self.transitions, -np.inf),
            np.where(first, self.starts, -np.inf),
            np.where(last, self.ends, -np.inf),
        )

    def path(self, logits: np.ndarray) -> list[int]:
        """The best sequence of tags for ``logits`` [words, tags], at least one word."""
        logits = logits.astype(np.float64)
        best, came = self.starts + logits[0], []
        for row in logits[1:]:
            scores = best[:, None] + self.transitions
            came.append(scores.argmax(axis=0))
            best = scores.max(axis=0) + row
        found = [int((best + self.ends).argmax())]
        for back in reversed(came):
            found.append(int(back[found[-1]]))
        return found[::-1]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of each tag at each word, [words, tags], for ``logits`` [words, tags], at least one word."""
        logits = logits.astype(np.float64)
        forward, backward = np.empty_like(logits), np.empty_like(logits)
        forward[0], backward[-1] = self.starts + logits[0], self.ends
        for place in range(1, len(logits)):
            forward[place] = np.logaddexp.reduce(forward[place - 1][:, None] + self.transitions) + logits[place]
        for place in range(len(logits) - 2, -1, -1):
            backward[place] = np.logaddexp.reduce(self.transitions + logits[place + 1] + backward[place + 1], axis=1)
        both = forward + backward
        return np.exp(both - np.logaddexp.reduce(both, axis=1)[:, None])


def has_chain(config: Any) -> bool:
    """Whether a configuration is that of a tagger with a chain."""
    return getattr(config, "tagging_head", None) == CHAIN


def read_chain(source: str | Path, config: PretrainedConfig) -> Chain | None:
    """The chain in the weights of the model in a directory; None where it has none.

    Raises:
        UserError: the configuration says that there is one, and the weights lack it.
    """
    if not has_chain(config):
        return None
    from safetensors import safe_open

    found: dict[str, np.ndarray] = {}
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            found |= {
                name: file.get_tensor(key).double().numpy() for name in NAMES if (key := f"{CHAIN}.{name}") in keys
            }
    if missing := [f"{CHAIN}.{name}" for name in NAMES if name not in found]:
        raise UserError(f"model.path: the weights in {source} lack {', '.join(missing)}, which the tagger decodes with")
    return Chain(**found)
