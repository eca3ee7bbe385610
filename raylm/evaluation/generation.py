"""Generating text with a model directory in this process, without a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.base import LARGEST_COUNT
from raylm.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# As of requests to the server.
MOST_TEMPERATURE = 2.0


def generate_text(
    path: str | Path, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> str:
    """The continuation of ``prompt`` by the model at ``path`` (run directory, model directory or hub name), or what an
    encoder-decoder writes to it.

    Args:
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token each time.
        seed: of the random draws at temperatures above 0.

    Raises:
        UserError: an option out of its range, no such model, or a prompt that leaves no room in its positions.
    """
    check_options(prompt, max_new_tokens, temperature, seed)
    from raylm.models.loading import load_parts

    # First: the model's own mistakes have clearer words than those of loading it.
    config, tokenizer = load_parts(path, "MODEL")
    write = _answer if config.is_encoder_decoder else _continue
    tokens = write(path, prompt, tokenizer, _Drawing(max_new_tokens, temperature, seed))
    return tokenizer.decode(tokens, skip_special_tokens=True)


@dataclass(frozen=True)
class _Drawing:
    """How tokens are chosen: at most ``count``, at 0 the likeliest."""

    count: int
    temperature: float
    seed: int

    def tokens(self, model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> list[int]:
        """What ``model.generate`` gives for ``ids`` [1, T]."""
        import torch

        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        )
        torch.manual_seed(self.seed)
        with torch.inference_mode():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.count, **options, **sampling
            )[0].tolist()


def _continue(path: str | Path, prompt: str, tokenizer: PreTrainedTokenizerBase, drawing: _Drawing) -> list[int]:
    """Token ids that go on from a prompt."""
    import torch

    from raylm.models.loading import load_model

    model = load_model(path, key="MODEL").eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if not ids.shape[1]:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise UserError("PROMPT: found no token in it, allowed: a text, as the model has no token to begin with")
        ids = torch.tensor([[first]])
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] + drawing.count > positions:
        raise UserError(
            f"PROMPT: found {ids.shape[1]} tokens and {drawing.count} new ones, allowed: at most the model's "
            f"{positions} positions"
        )
    return drawing.tokens(model, ids, pad_token_id=tokenizer.pad_token_id)[ids.shape[1] :]


def _answer(path: str | Path, prompt: str, tokenizer: PreTrainedTokenizerBase, drawing: _Drawing) -> list[int]:
    """Token ids that an encoder-decoder writes to a text."""
    import torch

    from raylm.data.samples.text_pairs import encode_sources
    from raylm.models.encoder_decoders import source_prefix
    from raylm.models.heads import SEQUENCE_TO_SEQUENCE
    from raylm.models.loading import load_model

    model = load_model(path, key="MODEL", head=SEQUENCE_TO_SEQUENCE).eval()
    (source,), _ = encode_sources(tokenizer, [prompt], prefix=source_prefix(model.config) or "")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and (len(source) > positions or drawing.count >= positions):
        raise UserError(
            f"PROMPT: found {len(source)} tokens, and {drawing.count} new ones, allowed: at most the model's "
            f"{positions} positions each"
        )
    return drawing.tokens(model, torch.from_numpy(source)[None])


def check_options(prompt: str, max_new_tokens: int, temperature: float, seed: int, text: str = "PROMPT") -> None:
    """Refuse options out of their range.

    Args:
        text: what the command calls the prompt.

    Raises:
        UserError: names the option.
    """
    for option, found, least, most in (
        ("--max-new-tokens", max_new_tokens, 1, LARGEST_COUNT),
        ("--temperature", temperature, 0, MOST_TEMPERATURE),
        ("--seed", seed, 0, 2**32 - 1),
    ):
        if not least <= found <= most:
            raise UserError(f"{option}: found {found}, allowed: {least} to {most}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"{text}: found bytes that are not UTF-8, allowed: a text in UTF-8") from None
