"""The residual stream in a basis of its main directions, so that a narrower one keeps most of it.

In: a model whose blocks read the stream through RMS norms. Out: one that computes the same, whose channels are the
principal directions of what the norms read, the largest first. One orthogonal matrix serves all blocks, as the stream
passes from each to the next unchanged: it folds into the weights, and the architecture stays. (A matrix of each block's
own, SliceGPT, arXiv:2401.15024, needs further ones between blocks.) An RMS norm without weights commutes with it; the
norms' weights go into the matrices that read them. An output matrix that is the embedding's can take in no norm, so
that the two come apart.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from raylm.compression.pruning.importance import watched
from raylm.compression.pruning.shapes import all_places
from raylm.models.layers import find_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from raylm.models.families.base import Family
    from raylm.tasks.objective import Batch, Objective


def untied(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a model with an output matrix of its own."""
    changed = copy.deepcopy(config)
    changed.tie_word_embeddings = False
    return changed


@torch.no_grad()
def rotate(model: PreTrainedModel, family: Family, objective: Objective, batches: Sequence[Batch]) -> PreTrainedModel:
    """A model that computes the same, whose channels are principal directions.

    Args:
        model: is left as it is; of a ``family`` with ``norms``.
        batches: samples that the directions are found on.
    """
    norms, state = norm_readers(model, family), dict(model.state_dict())
    basis = _principal(model, norms, objective, batches)
    for norm, names in norms.items():
        for name in names:
            # In fp64: errors of a product would add up over the blocks.
            weight = state[f"{name}.weight"].double() * state[f"{norm}.weight"].double()
            state[f"{name}.weight"] = (weight @ basis).float()
        state[f"{norm}.weight"] = torch.ones_like(state[f"{norm}.weight"])
    embedding = model.get_input_embeddings()
    state[f"{_name(model, embedding)}.weight"] = (embedding.weight.double() @ basis).float()
    for place in all_places(model, family):
        state[f"{place.sink}.weight"] = (basis.t() @ state[f"{place.sink}.weight"].double()).float()
        if (bias := state.get(f"{place.sink}.bias")) is not None:
            state[f"{place.sink}.bias"] = (basis.t() @ bias.double()).float()
    rotated = type(model)(untied(model.config)).to(model.dtype)
    rotated.load_state_dict({name: state[name] for name in rotated.state_dict()})
    if hasattr(model, "generation_config"):
        rotated.generation_config = copy.deepcopy(model.generation_config)
    return rotated.eval()


@torch.no_grad()
def kept_shares(
    model: PreTrainedModel, family: Family, kept: int, objective: Objective, batches: Sequence[Batch]
) -> dict[str, float]:
    """Of each norm of a rotated model, the share of its input's square that the first ``kept`` channels have."""
    sums = {name: [0.0, 0.0] for name in norm_readers(model, family)}

    def watch(name: str, given: torch.Tensor) -> None:
        squares = given.float().square()
        squares = squares / squares.sum(dim=-1, keepdim=True)
        sums[name][0] += float(squares[..., :kept].sum())
        sums[name][1] += float(squares.sum())

    with watched(model, list(sums), watch):
        for batch in batches:
            objective.logits(model, batch)
    return {name: part / whole for name, (part, whole) in sums.items()}


@torch.no_grad()
def scale_norms(model: PreTrainedModel, width: int, shares: dict[str, float]) -> None:
    """Have the norms of a model that was cut give numbers as large as before: the mean that they divide by is now over
    fewer and larger channels.

    Args:
        width: before.
        shares: what :func:`kept_shares` found.
    """
    for name, share in shares.items():
        weight = model.get_submodule(name).weight
        weight.fill_(math.sqrt(share * width / len(weight)))


def norm_readers(model: PreTrainedModel, family: Family) -> dict[str, list[str]]:
    """Names of the norms on the residual stream -> names of the matrices that read what each gives."""
    assert family.final_norm is not None
    found: dict[str, list[str]] = {}
    for blocks in find_blocks(model):
        for number, block in enumerate(blocks.modules):
            names = [name for name, _ in block.named_modules()]
            for norm, patterns in family.norms.items():
                readers = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
                prefix = f"{blocks.path}.{number}."
                found[prefix + norm] = [prefix + name for name in readers]
    found[family.final_norm] = [_name(model, model.get_output_embeddings())]
    return found


def _principal(
    model: PreTrainedModel, norms: dict[str, list[str]], objective: Objective, batches: Sequence[Batch]
) -> torch.Tensor:
    """Principal directions of what all norms read, each token of length 1; fp64 [width, directions]."""
    width = model.config.hidden_size
    covariance = torch.zeros(width, width, dtype=torch.float64)

    def watch(name: str, given: torch.Tensor) -> None:
        rows = given.flatten(0, -2).float()
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        covariance.add_((rows.t() @ rows).double())

    with watched(model, list(norms), watch):
        for batch in batches:
            objective.logits(model, batch)
    _, directions = torch.linalg.eigh(covariance)
    return directions.flip(dims=(1,))


def _name(model: PreTrainedModel, module: torch.nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)
