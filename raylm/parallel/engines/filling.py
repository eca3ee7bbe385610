"""From a module whose parameters have no memory to one that holds this rank's parts of them, one after the other.

In: modules made of a model's outline (:mod:`raylm.models.weights`), cut or not. Out: the same modules on their device,
with the weights. Under ZeRO 3 each parameter is cut over the ranks as soon as it is there, so that only one of them is
ever whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from raylm.models.weights import Weights
from raylm.parallel.layout.slicing import Slicing


def fill(
    module: nn.Module,
    names: Mapping[nn.Parameter, str],
    weights: Weights,
    device: torch.device,
    share_out: Callable[[nn.Parameter], Any] = lambda parameter: None,
) -> None:
    """Replace the parameters of ``module`` that have no memory, tied ones by one; others stay.

    Args:
        names: parameter -> its name in the model; those that are cut carry their ``slicing``, and those that are kept
            in a form of their own ``pack``, which makes it of their values.
        share_out: called with each parameter as soon as it is filled.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                made[parameter] = _filled(parameter, weights, names[parameter], device)
                share_out(made[parameter])
            owner._parameters[key] = made[parameter]
    module.to(device)


def _filled(parameter: nn.Parameter, weights: Weights, name: str, device: torch.device) -> nn.Parameter:
    slicing = getattr(parameter, "slicing", None) or Slicing(tuple(parameter.shape))
    values = slicing.read(weights.open(name)).to(device, parameter.dtype).contiguous()
    if (pack := getattr(parameter, "pack", None)) is not None:
        return pack(values)
    filled = nn.Parameter(values, requires_grad=parameter.requires_grad)
    # What the cut noted: the slicing, and DeepSpeed's marks.
    filled.__dict__.update(parameter.__dict__)
    return filled


def share_out_by_deepspeed(config: dict[str, Any]) -> Callable[[nn.Parameter], Any]:
    """For ZeRO 3: a function that cuts one parameter over the ranks (``deepspeed.zero.Init`` of a filled module).

    Args:
        config: what ``deepspeed.initialize`` will be given.
    """
    import deepspeed

    return lambda parameter: deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config)
