"""Several adapters over one model: each row of a batch gets what its own adapter adds, y + s B (A x).

The model's weights are in memory once, and rows of all adapters, and of none, go through them together (as in S-LoRA,
arXiv:2311.03285, and Punica, arXiv:2310.18547); only the small products are computed by groups of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from raylm.models.lora import LoraLayer


class RowAdapters:
    """Adapters hung onto a model's layers; without :meth:`rows` the model computes what it did before.

    Args:
        model: on the device it runs on.
        adapters: their layers by their names in the model.
    """

    def __init__(self, model: PreTrainedModel, adapters: dict[str, dict[str, LoraLayer]]) -> None:
        self.names = frozenset(adapters)
        # Of a pass: the rows of each adapter, None for all of them, and rows and columns of the batch.
        self._groups: list[tuple[str, torch.Tensor | None]] = []
        self._shape = (1, 1)
        modules = dict(model.named_modules())
        for layer in sorted({layer for layers in adapters.values() for layer in layers}):
            weight = modules[layer].weight
            parts = {
                name: LoraLayer(
                    layers[layer].first.to(weight.device, weight.dtype),
                    layers[layer].second.to(weight.device, weight.dtype),
                    layers[layer].scale,
                )
                for name, layers in adapters.items()
                if layer in layers
            }
            modules[layer].register_forward_hook(_Hook(self, layer, parts))
        self._device = model.device

    def check(self, name: str | None) -> None:
        """Refuse an adapter that is not here."""
        if name is not None and name not in self.names:
            raise ValueError(f"the engine has no adapter {name}")

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None], columns: int) -> Iterator[None]:
        """Within the block the model's passes are over these rows.

        Args:
            names: each row's adapter, None for none.
            columns: tokens of each row in this pass.
        """
        if len(set(names)) == 1:
            self._groups = [(name, None) for name in set(names) if name is not None]
        else:
            self._groups = [
                (name, torch.tensor([row for row, found in enumerate(names) if found == name], device=self._device))
                for name in sorted({name for name in names if name is not None})
            ]
        self._shape = (len(names), columns)
        try:
            yield
        finally:
            self._groups = []

    def add(self, layer: str, parts: dict[str, LoraLayer], inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """``output`` with what the rows' adapters add."""
        for name, rows in self._groups:
            part = parts.get(name)
            if part is None:
                continue
            if rows is None:
                output = output + linear(linear(inputs, part.first), part.second) * part.scale
                continue
            read, written = self._by_row(layer, inputs), self._by_row(layer, output)
            added = linear(linear(read[rows], part.first), part.second) * part.scale
            output = written.index_add(0, rows, added.to(written.dtype)).view(output.shape)
        return output

    def _by_row(self, layer: str, values: torch.Tensor) -> torch.Tensor:
        """Values as [rows, ...]; some families put the tokens of all rows one behind the other."""
        count, columns = self._shape
        if values.ndim > 2 and values.shape[0] == count:
            return values
        if values.ndim == 2 and values.shape[0] == count * columns:
            return values.reshape(count, columns, -1)
        raise RuntimeError(
            f"{layer} reads tokens apart from their texts: adapters of it cannot be served beside each other"
        )


class _Hook:
    """What torch calls after a layer's pass."""

    def __init__(self, adapters: RowAdapters, layer: str, parts: dict[str, LoraLayer]) -> None:
        self._adapters, self._layer, self._parts = adapters, layer, parts

    def __call__(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self._adapters._groups:
            return None
        return self._adapters.add(self._layer, self._parts, inputs[0], output)
