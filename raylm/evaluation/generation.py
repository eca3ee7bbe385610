"""Generating text with a model directory in this process, without a server."""

from __future__ import annotations

from pathlib import Path


def generate_text(
    path: str | Path, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> str:
    """The continuation of ``prompt`` by the model at ``path`` (run directory, model directory or hub name).

    Args:
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token each time.
        seed: of the random draws at temperatures above 0.

    Raises:
        UserError: there is no such model, or the prompt leaves no room in its positions.
    """
    import torch

    from raylm.data.loading import load_tokenizer
    from raylm.errors import UserError
    from raylm.models.loading import load_model

    tokenizer, model = load_tokenizer(path), load_model(path).eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if not ids.shape[1]:
        ids = torch.tensor([[tokenizer.bos_token_id]])
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] + max_new_tokens > positions:
        raise UserError(
            f"prompt: found {ids.shape[1]} tokens and {max_new_tokens} new ones, allowed: at most the model's "
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
