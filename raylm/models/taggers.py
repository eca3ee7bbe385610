"""Token classifiers as transformers has them, and the same with a chain over their tags.

In: a configuration, whose ``tagging_head`` decides. A model with a chain has it as ``crf``; its forward pass gives the
same logits as one without, so that its directory is one that ``AutoModelForTokenClassification`` loads.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from raylm.models.chains import NAMES, Chain, has_chain


class LinearChain(nn.Module):
    """Scores of neighbouring tags; see :mod:`raylm.models.chains`.

    Args:
        tags: how many there are.
    """

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(tags, tags))
        self.starts = nn.Parameter(torch.zeros(tags))
        self.ends = nn.Parameter(torch.zeros(tags))

    def reset(self) -> None:
        """All sequences score what their words do."""
        for name in NAMES:
            init.zeros_(getattr(self, name))

    def forward(
        self, logits: torch.Tensor | None = None, targets: torch.Tensor | None = None, ignored: int = -100
    ) -> torch.Tensor | Chain:
        """The negative log-likelihood in nats of the ``targets``, summed over sentences; without logits the scores.

        It is a forward pass in either case: that is when ZeRO 3 has the whole parameters.

        Args:
            logits: [batch, time, tags].
            targets: int64 [batch, time], ``ignored`` where there is no word.
        """
        if logits is None or targets is None:
            return Chain(*(getattr(self, name).detach().double().cpu().numpy() for name in NAMES))
        present = targets != ignored
        lengths = present.sum(dim=1)
        # The words of a sentence one behind the other, whatever stands between them.
        order = (~present).int().argsort(dim=1, stable=True)[:, : max(1, int(lengths.max()))]
        scores = logits.float().gather(1, order[:, :, None].expand(-1, -1, logits.shape[2]))
        tags, present = targets.gather(1, order).clamp(min=0), present.gather(1, order)
        transitions, starts, ends = self.transitions.float(), self.starts.float(), self.ends.float()
        total = starts + scores[:, 0]
        for place in range(1, order.shape[1]):
            further = torch.logsumexp(total[:, :, None] + transitions, dim=1) + scores[:, place]
            total = torch.where(present[:, place, None], further, total)
        last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        words = scores.gather(2, tags[:, :, None])[:, :, 0]
        pairs = transitions[tags[:, :-1], tags[:, 1:]]
        given = starts[tags[:, 0]] + ends[last] + (words * present).sum(dim=1) + (pairs * present[:, 1:]).sum(dim=1)
        return ((torch.logsumexp(total + ends, dim=1) - given) * (lengths > 0)).sum()


class _Chained:
    """What makes a token classifier of transformers one with a chain."""

    def __init__(self, config: PretrainedConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self.crf = LinearChain(config.num_labels)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LinearChain):
            module.reset()
        else:
            super()._init_weights(module)


class TaggerModels:
    """Builds and loads taggers as transformers' own auto class does."""

    @staticmethod
    def from_config(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """A new model."""
        if has_chain(config):
            return _chained(type(config))._from_config(config, **options)
        return AutoModelForTokenClassification.from_config(config, **options)

    @staticmethod
    def from_pretrained(source: str | Path, config: PretrainedConfig | None = None, **options: Any) -> PreTrainedModel:
        """A model from a directory."""
        config = config or AutoConfig.from_pretrained(source)
        if has_chain(config):
            options.pop("trust_remote_code", None)
            return _chained(type(config)).from_pretrained(source, config=config, **options)
        return AutoModelForTokenClassification.from_pretrained(source, config=config, **options)


@functools.cache
def _chained(config: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The token classifier for a class of configurations, with a chain; it keeps its name."""
    plain = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[config]
    return type(plain.__name__, (_Chained, plain), {"__module__": plain.__module__})
