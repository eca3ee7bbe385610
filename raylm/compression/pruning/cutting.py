"""A ``prune`` step on a loaded model: what goes is chosen, and is cut out.

In: the section, the model, and samples. Out: the smaller model, and what the report tells of the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from raylm.compression.pruning.importance import block_scores, input_scores
from raylm.compression.pruning.places import Place, find_places
from raylm.compression.pruning.rotation import kept_shares, rotate, scale_norms
from raylm.compression.pruning.scan import block_sparsities, mean_loss
from raylm.compression.pruning.shapes import Surgery, cut_config
from raylm.compression.pruning.zeros import set_zeros
from raylm.config.pruning import PruneSection
from raylm.models.families import find_family
from raylm.models.families.base import Family, Units
from raylm.models.families.build import why_invalid
from raylm.models.layers import find_blocks, keep_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raylm.tasks.objective import Batch, Objective

# Of the samples, batches that a scan measures the loss on after each cut.
SCAN_BATCHES = 2
# Of what there is of a kind, the share that a scan takes out at a time; neurons in multiples of 64.
SCAN_STEP, NEURONS_MULTIPLE = 1 / 8, 64


@dataclass(frozen=True)
class Cutter:
    """One step.

    Attributes:
        batches: samples that importance is measured on; empty where the weights alone tell.
    """

    section: PruneSection
    objective: Objective
    batches: Sequence[Batch]

    def zeros(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model with zeros."""
        section, told = self.section, {}
        assert section.sparsity is not None
        count = sum(len(blocks.modules) for blocks in find_blocks(model))
        sparsities = [section.sparsity] * count
        if section.spread == "sensitivity":
            sparsities, told["scan"] = block_sparsities(
                model, section.sparsity, self.objective, self.batches[:SCAN_BATCHES]
            )
        set_zeros(model, section.criterion, sparsities, section.pattern, self.objective, self.batches)
        return model, told

    def shapes(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The smaller model."""
        section = self.section
        if section.keep is not None:
            return self._by_budget(model, section.keep)
        told: dict[str, Any] = {}
        if section.layers is not None:
            model, told["layers"] = self.layers(model, section.layers)
        if section.width is not None:
            model = self.width(model, section.width, section.heads)
        elif section.heads is not None and (units := _family(model).heads) is not None:
            model = self.units(model, units, _groups(model, units, section.heads))
        if section.neurons is not None and (units := _family(model).neurons) is not None:
            model = self.units(model, units, section.neurons)
        return model, told

    def layers(self, model: PreTrainedModel, kept: int) -> tuple[PreTrainedModel, dict[str, list[int]]]:
        """``kept`` blocks of each list, those that matter most; and their numbers."""
        numbers = {}
        for blocks in find_blocks(model):
            scores = block_scores(model, blocks, self.section.criterion, self.objective, self.batches)
            numbers[blocks.key] = _largest(scores, kept)
        return keep_layers(model, numbers).eval(), numbers

    def units(self, model: PreTrainedModel, units: Units, kept: int) -> PreTrainedModel:
        """``kept`` heads (groups of them, where they are grouped) or neurons of each block."""
        surgery = Surgery(model, _family(model))
        surgery.units(self._chosen(model, units, kept))
        return surgery.build()

    def _chosen(self, model: PreTrainedModel, units: Units, kept: int) -> list[tuple[Place, list[int]]]:
        places = find_places(model, units)
        names = [place.sink for place in places]
        scores = input_scores(model, names, self.section.criterion, self.objective, self.batches)
        each = {place.sink: scores[place.sink].view(place.count, place.size).sum(dim=1) for place in places}
        if units.tables:
            # The first block's table serves all attentions of its kind in the stack, so these keep the same heads.
            for kind in {_kind(place) for place in places}:
                same = [place.sink for place in places if _kind(place) == kind]
                total = torch.stack([each[name] / each[name].sum().clamp(min=1e-12) for name in same]).sum(dim=0)
                each |= dict.fromkeys(same, total)
        return [(place, _largest(each[place.sink].tolist(), kept)) for place in places]

    def width(self, model: PreTrainedModel, kept: int, heads: int | None = None) -> PreTrainedModel:
        """``kept`` channels of the residual stream, and ``heads`` heads of each block (None for all); where the width
        decides the heads' size, as many fewer heads as it wants."""
        family = _family(model)
        if self.section.rotate:
            model = rotate(model, family, self.objective, self.batches)
        surgery, units = Surgery(model, family), family.heads
        if units is not None and units.size_key is None:
            size = getattr(model.config, str(family.width_key)) // getattr(model.config, units.key)
            surgery.units(self._chosen(model, units, kept // size))
        elif units is not None and heads is not None:
            # At once: a width that fits the fewer heads alone would be no valid configuration in between.
            surgery.units(self._chosen(model, units, _groups(model, units, heads)))
        if not self.section.rotate:
            surgery.width(torch.as_tensor(self._channels(model, family, kept)))
            return surgery.build()
        surgery.width(torch.arange(kept))
        smaller, before = surgery.build(), int(getattr(model.config, str(family.width_key)))
        scale_norms(smaller, before, kept_shares(model, family, kept, self.objective, self.batches))
        return smaller

    def _channels(self, model: PreTrainedModel, family: Family, kept: int) -> list[int]:
        """By what the matrices that read the stream get of each channel, every one of them alike."""
        all_units = [units for units in (family.heads, family.neurons) if units is not None]
        readers = [
            name
            for units in all_units
            for place in find_places(model, units)
            for name in (*place.sources, *place.shared_sources)
        ]
        scores = input_scores(model, readers, self.section.criterion, self.objective, self.batches)
        width = getattr(model.config, str(family.width_key))
        # Those of a cross-attention read the encoder.
        alike = [one / one.sum().clamp(min=1e-12) for one in scores.values() if len(one) == width]
        return _largest(torch.stack(alike).sum(dim=0).tolist(), kept)

    def _by_budget(self, model: PreTrainedModel, keep: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Cut what costs least for each parameter that goes, again and again, until few enough are left."""
        measured = self.batches[:SCAN_BATCHES]
        size, loss = inner_parameters(model), mean_loss(model, self.objective, measured)
        wanted, table = keep * size, []
        while size > wanted:
            tried = []
            for kind, smaller in self._smaller(model):
                saved = size - inner_parameters(smaller)
                after = mean_loss(smaller, self.objective, measured)
                row = {"cut": kind, "parameters": size - saved, "loss": after}
                tried.append(((after - loss) / saved, row, smaller))
            if not tried:
                break
            _, row, model = min(tried, key=lambda one: one[0])
            table.append(row | {"others": {one["cut"]: one["loss"] for _, one, _ in tried if one is not row}})
            size, loss = row["parameters"], row["loss"]
        return model, {"scan": table}

    def _smaller(self, model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
        """The model after each kind of cut that it can take."""
        family, found = _family(model), []
        least = min(len(blocks.modules) for blocks in find_blocks(model))
        if least > 1:
            found.append(("layers", self.layers(model, least - max(1, round(least * SCAN_STEP)))[0]))
        if (heads := family.heads) is not None and heads.size_key is not None:
            groups = find_places(model, heads)[0].count
            # Not every number of heads is a valid configuration.
            tried = range(groups - max(1, round(groups * SCAN_STEP)), 0, -1)
            valid = (n for n in tried if why_invalid(cut_config(model.config, heads, n, groups)) is None)
            if (kept := next(valid, None)) is not None:
                found.append(("heads", self.units(model, heads, kept)))
        if (neurons := family.neurons) is not None:
            count = find_places(model, neurons)[0].count
            step = NEURONS_MULTIPLE * max(1, round(count * SCAN_STEP / NEURONS_MULTIPLE))
            if count > step:
                found.append(("neurons", self.units(model, neurons, count - step)))
        return found


def _family(model: PreTrainedModel) -> Family:
    family = find_family(model.config.model_type)
    assert family is not None
    return family


def _groups(model: PreTrainedModel, units: Units, heads: int) -> int:
    """Groups that ``heads`` heads are."""
    return heads * find_places(model, units)[0].count // getattr(model.config, units.key)


def _kind(place: Place) -> tuple[str, str]:
    """The stack, and the name in the block without its number."""
    return place.stack, place.sink.removeprefix(f"{place.stack}.").partition(".")[2]


def _largest(scores: Sequence[float], kept: int) -> list[int]:
    """Numbers of the ``kept`` largest scores, in order."""
    return sorted(sorted(range(len(scores)), key=lambda number: -scores[number])[:kept])


def inner_parameters(model: PreTrainedModel) -> int:
    """Parameters of the blocks: all but embeddings, heads and the last norm."""
    return sum(p.numel() for blocks in find_blocks(model) for block in blocks.modules for p in block.parameters())
