"""N-gram models: the probability of a token from how often it followed the tokens before it. Counted, not trained.

In: a stream of tokens. Out: a transformers model whose logits are log-probabilities, so that whatever scores, generates
or serves a network does so with it. Probabilities are interpolated over the orders 1 to n, after modified Kneser-Ney or
Witten-Bell (Chen and Goodman 1998, sections 2.7, 2.5 and 3). A document's tokens never depend on the one before it: the
end-of-text token begins a context.

The tables of order k hold the contexts (n-grams of order k - 1, by their place in the tables below; those of order 1
are the tokens themselves) and, sorted, ``place of the context x vocabulary + token``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PretrainedConfig
from transformers import PreTrainedModel as Model
from transformers.modeling_outputs import CausalLMOutputWithPast

from raylm.errors import UserError
from raylm.models.families.base import Family, OwnFamily
from raylm.models.families.ngram_counts import SMOOTHINGS, Order, count_orders

MOST_ORDER = 8
# Below the smallest probability that fp32 takes the logarithm of.
LEAST = 1e-38


class NgramConfig(PretrainedConfig):
    """Configuration of :class:`NgramForCausalLM`.

    Args:
        order: tokens of the longest n-gram, 1 to 8.
        smoothing: modified_kneser_ney or witten_bell.
        table_sizes: entries of the tables of orders 2 to n; they come from counting.
        bos_token_id, eos_token_id: the token that ends a document and begins a context.
    """

    model_type = "ngram"

    def __init__(
        self,
        vocab_size: int = 0,
        order: int = 3,
        smoothing: str = "modified_kneser_ney",
        table_sizes: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.order, self.smoothing = vocab_size, order, smoothing
        self.table_sizes = table_sizes or [0] * (order - 1)
        # The tokens before, which are all that a step keeps, lie in a cache as the one key of one layer.
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = self.hidden_size = 1
        super().__init__(**{**kwargs, "tie_word_embeddings": False})


class Table(nn.Module):
    """The n-grams of one order.

    Attributes:
        keys: int64 [entries], sorted.
        first: int64 [contexts + 1]; the entries of context c are those from first[c] to first[c + 1].
        weights: fp32 [entries]; the probability beyond what the lower order gives.
        rest: fp32 [contexts]; the weight of the lower order.
    """

    def __init__(self, contexts: int, entries: int) -> None:
        super().__init__()
        self.keys = _fixed(torch.zeros(entries, dtype=torch.int64))
        self.first = _fixed(torch.zeros(contexts + 1, dtype=torch.int64))
        self.weights = _fixed(torch.zeros(entries))
        self.rest = _fixed(torch.ones(contexts))

    def fill(self, order: Order) -> None:
        """Take what was counted."""
        for name in ("keys", "first", "weights", "rest"):
            getattr(self, name).data.copy_(torch.from_numpy(getattr(order, name)))

    def find(self, contexts: torch.Tensor, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Places of the n-grams of ``contexts`` (-1 is none) and ``tokens``, int64 of one shape; -1 where not seen."""
        if not len(self.keys):
            return torch.full_like(contexts, -1)
        wanted = contexts * vocabulary + tokens
        places = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return torch.where((contexts >= 0) & (self.keys[places] == wanted), places, -1)

    def interpolate(self, lower: torch.Tensor, contexts: torch.Tensor) -> None:
        """Make the probabilities of the lower order those of this one, in place.

        Args:
            lower: fp32 [positions, vocabulary].
            contexts: int64 [positions]; -1 where the context was not seen.
        """
        (rows,) = (contexts >= 0).nonzero(as_tuple=True)
        seen = contexts[rows]
        lower[rows] *= self.rest[seen, None]
        counts = self.first[seen + 1] - self.first[seen]
        # Entry number i of its row stands i places behind the row's first.
        offsets = torch.arange(int(counts.sum()), device=lower.device) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        places = self.first[seen].repeat_interleave(counts) + offsets
        tokens = self.keys[places] % lower.shape[1]
        # No pair of a row and a token comes twice.
        lower[rows.repeat_interleave(counts), tokens] += self.weights[places]


class NgramForCausalLM(Model, GenerationMixin):
    """An n-gram model; its logits are log-probabilities."""

    config_class = NgramConfig
    _keep_in_fp32_modules_strict = ("tables", "unigrams")
    main_input_name = "input_ids"

    def __init__(self, config: NgramConfig) -> None:
        super().__init__(config)
        self.unigrams = _fixed(torch.full((config.vocab_size,), 1 / max(1, config.vocab_size)))
        contexts = [config.vocab_size, *config.table_sizes]
        self.tables = nn.ModuleList(
            Table(below, entries) for below, entries in zip(contexts, config.table_sizes, strict=False)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: what was counted is loaded."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Log-probabilities of the next token at each position.

        Args:
            input_ids: int64 [sequences, time].
            attention_mask: [sequences, time, with what the cache holds]; 0 marks padding, which no token depends on.
            past_key_values: the tokens before ``input_ids``.
            labels: int64 [sequences, time]; -100 is not counted. The loss is that of the next token.
            use_cache: whether to give a cache back.
            logits_to_keep: of the last positions only; 0 is all.
        """
        tokens = input_ids
        if past_key_values is not None or use_cache:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            kept = input_ids[:, None, :, None].to(torch.float64)
            tokens = past_key_values.update(kept, kept, 0)[0][:, 0, :, 0].to(torch.int64)
        usable = torch.ones_like(tokens, dtype=torch.bool)
        if attention_mask is not None and attention_mask.dim() == 2:
            usable = attention_mask[:, -tokens.shape[1] :].bool()
        history = self._history(tokens, usable)[:, -input_ids.shape[1] :]
        if isinstance(logits_to_keep, torch.Tensor):
            history = history[:, logits_to_keep]
        elif logits_to_keep:
            history = history[:, -logits_to_keep:]
        logits = self._probabilities(history.flatten(0, 1)).clamp_(min=LEAST).log_()
        logits = logits.view(*history.shape[:2], -1)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _history(self, tokens: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
        """The tokens that each position's next one depends on, the nearest first, int64 [sequences, time, order - 1].

        -1 is none: before the sequence, padding, and what lies before an end of text.
        """
        known = torch.where(usable, tokens, -1)
        ends = torch.as_tensor(self.config.eos_token_id, device=tokens.device)
        columns: list[torch.Tensor] = []
        for back in range(self.config.order - 1):
            column = torch.full_like(known, -1)
            if back < known.shape[1]:
                column[:, back:] = known[:, : known.shape[1] - back]
            if columns:
                column = torch.where((columns[-1] < 0) | torch.isin(columns[-1], ends), -1, column)
            columns.append(column)
        return torch.stack(columns, -1) if columns else known[..., None][..., :0]

    def _probabilities(self, history: torch.Tensor) -> torch.Tensor:
        """fp32 [positions, vocabulary] after ``history``, int64 [positions, order - 1], the nearest first."""
        vocabulary = self.config.vocab_size
        found = self.unigrams.repeat(len(history), 1)
        for length, table in enumerate(self.tables, start=1):
            contexts = history[:, length - 1]
            for place in range(length - 1):
                contexts = self.tables[place].find(contexts, history[:, length - 2 - place], vocabulary)
            table.interpolate(found, contexts)
        return found


def _fixed(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def count(config: NgramConfig, tokens: np.ndarray) -> NgramForCausalLM:
    """Count a model.

    Args:
        config: ``eos_token_id`` is what separates documents.
        tokens: of the documents, with an end of text before each and after the last, integers [n].

    Raises:
        UserError: there are fewer tokens than an n-gram has.
    """
    if len(tokens) <= config.order:
        raise UserError(
            f"model.config.order: found {config.order}, allowed: fewer than the {len(tokens)} training tokens"
        )
    unigrams, orders = count_orders(tokens, config.order, config.vocab_size, config.eos_token_id, config.smoothing)
    config.table_sizes = [len(order.keys) for order in orders]
    model = NgramForCausalLM(config)
    model.unigrams.data.copy_(torch.from_numpy(unigrams))
    for table, order in zip(model.tables, orders, strict=True):
        table.fill(order)
    return model.eval()


def check(config: PretrainedConfig) -> None:
    """Refuse an order or a smoothing that there is not.

    Raises:
        UserError: one line.
    """
    if type(config.order) is not int or not 1 <= config.order <= MOST_ORDER:
        raise UserError(f"model.config.order: found {config.order}, allowed: an integer from 1 to {MOST_ORDER}")
    if config.smoothing not in SMOOTHINGS:
        raise UserError(f"model.config.smoothing: found {config.smoothing!r}, allowed: {', '.join(SMOOTHINGS)}")


def register() -> None:
    """Let transformers open such models."""
    AutoConfig.register("ngram", NgramConfig, exist_ok=True)
    AutoModelForCausalLM.register(NgramConfig, NgramForCausalLM, exist_ok=True)


FAMILY = Family(
    model_type="ngram", own=OwnFamily(register=register, keys=("order", "smoothing"), check=check, count=count)
)
