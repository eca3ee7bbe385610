"""How far up in a model each parameter stands, and what of it ``freezing`` has trained, how fast and from when on."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from raylm.config.adapter import FreezingSection
from raylm.errors import UserError
from raylm.models.layers import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES_SHOWN = 6


@dataclass(frozen=True, order=True)
class Rate:
    """How a parameter is trained.

    Attributes:
        opens: the step, from 0, with which its training begins.
        factor: its learning rate as a share of the run's.
    """

    opens: int = 0
    factor: float = 1.0


def depths(model: PreTrainedModel) -> dict[str, int]:
    """The depth of each parameter by name: 0 of what comes before the blocks, 1 of the first block, and so on; one more
    than the last block's of what comes after them."""
    lists = find_blocks(model)
    top = max(len(blocks.modules) for blocks in lists) + 1
    found, passed = {}, False
    for name, _ in model.named_parameters():
        inside = next((blocks.path for blocks in lists if name.startswith(f"{blocks.path}.")), None)
        if inside is not None:
            passed = True
            found[name] = int(name.removeprefix(f"{inside}.").partition(".")[0]) + 1
        else:
            found[name] = top if passed else 0
    return found


class Freezing:
    """What a ``freezing`` section says of a model.

    Args:
        model: may be without memory.

    Raises:
        UserError: a pattern fits no parameter, there are fewer blocks than ``layers``, or nothing is trained.
    """

    def __init__(self, section: FreezingSection, model: PreTrainedModel) -> None:
        self._section, self._depths = section, depths(model)
        self._top = max(self._depths.values())
        if section.layers is not None and section.layers >= self._top:
            raise UserError(f"freezing.layers: found {section.layers}, allowed: at most the model's {self._top - 1}")
        for pattern in section.train or ():
            if not any(fnmatchcase(name, pattern) for name in self._depths):
                shown = ", ".join(list(self._depths)[:: max(1, len(self._depths) // NAMES_SHOWN)][:NAMES_SHOWN])
                raise UserError(
                    f"freezing.train: found '{pattern}', which fits no parameter; allowed: names such as {shown}, with "
                    "* for what varies"
                )
        if not any(map(self.trains, self._depths)):
            raise UserError("freezing: nothing is left that is trained; allowed: fewer layers, or other patterns")

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained at all."""
        section = self._section
        if section.layers is not None and self._depths[name] <= section.layers:
            return False
        return section.train is None or any(fnmatchcase(name, pattern) for pattern in section.train)

    def rate(self, name: str) -> Rate:
        """How a parameter is trained."""
        below = self._top - self._depths[name]
        decay, every = self._section.layer_decay, self._section.unfreeze_every_steps
        return Rate(below * every if every else 0, decay**below if decay else 1.0)
