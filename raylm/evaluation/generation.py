"""Generating text with a model directory in this process, without a server."""

from __future__ import annotations

from pathlib import Path

from raylm.config.base import LARGEST_COUNT
from raylm.errors import UserError

# As of requests to the server.
MOST_TEMPERATURE = 2.0


def generate_text(
    path: str | Path, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> str:
    """The continuation of ``prompt`` by the model at ``path`` (run directory, model directory or hub name).

    Args:
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token each time.
        seed: of the random draws at temperatures above 0.

    Raises:
        UserError: an option out of its range, no such model, or a prompt that leaves no room in its positions.
    """
    check_options(prompt, max_new_tokens, temperature, seed)
    import torch

    from raylm.models.loading import load_model, load_parts

    # First: the model's own mistakes have clearer words than those of loading it.
    _, tokenizer = load_parts(path, "MODEL")
    model = load_model(path, key="MODEL").eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if not ids.shape[1]:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise UserError("PROMPT: found no token in it, allowed: a text, as the model has no token to begin with")
        ids = torch.tensor([[first]])
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] + max_new_tokens > positions:
        raise UserError(
            f"PROMPT: found {ids.shape[1]} tokens and {max_new_tokens} new ones, allowed: at most the model's "
            f"{positions} positions"
        )
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, **sampling,
        )  # fmt: skip
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


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
