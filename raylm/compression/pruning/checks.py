"""What a ``prune`` step can do to a model, told from its configuration: refused, or the smaller configuration."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from raylm.compression.methods.base import Outlook
from raylm.compression.pruning.places import find_places
from raylm.compression.pruning.rotation import untied
from raylm.compression.pruning.shapes import cut_config, width_config
from raylm.compression.pruning.zeros import linear_names
from raylm.config.pruning import SHAPES, PruneSection
from raylm.errors import UserError
from raylm.models.families import find_family
from raylm.models.families.build import why_invalid
from raylm.models.layers import find_blocks, with_layers
from raylm.models.weights import make_outline

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.models.families.base import Family, Units
    from raylm.models.heads import Head

KEY, MULTIPLE = "compression.steps: prune", 64
LEAST_VOCABULARY = 64


def pruned_config(section: PruneSection, outlook: Outlook) -> PretrainedConfig:
    """The configuration of the model after the step; of a budget, which decides later, that before.

    Raises:
        UserError: one line.
    """
    config, head = outlook.config, outlook.head
    if section.vocabulary is not None:
        # How many stay is found in the text: at least the bytes.
        smaller = copy.deepcopy(config)
        smaller.vocab_size = min(LEAST_VOCABULARY, config.vocab_size)
        return smaller
    model = make_outline(config, head).model
    family = find_family(config.model_type)
    blocks = find_blocks(model)
    if section.sparsity is not None:
        if section.pattern == "2:4":
            _check_fours(model)
        return config
    if family is None or family.neurons is None or family.heads is None:
        given = next(name for name in SHAPES if getattr(section, name) is not None)
        if section.layers is None or given != "layers":
            raise UserError(f"{KEY}.{given}: found a {config.model_type} model, allowed for it: layers, sparsity")
    if section.layers is not None:
        for one in blocks:
            _least(section.layers, len(one.modules), "layers", one.key)
        config = with_layers(config, {one.key: list(range(section.layers)) for one in blocks})
    if family is None or family.neurons is None or family.heads is None:
        return config
    if section.width is not None:
        config = _narrower(section, config, family)
    if section.heads is not None:
        config = _fewer_heads(section, config, family, head)
    if section.neurons is not None:
        count = find_places(model, family.neurons)[0].count
        _least(section.neurons, count, "neurons", family.neurons.key)
        _multiple(section.neurons, "neurons")
        config = cut_config(config, family.neurons, section.neurons, count)
    _valid(config, section)
    return config


def _valid(config: PretrainedConfig, section: PruneSection) -> None:
    """Refuse a configuration that transformers would not load.

    Raises:
        UserError: says why.
    """
    if (reason := why_invalid(config)) is not None:
        given = ", ".join(f"{name} {count}" for name in SHAPES if (count := getattr(section, name)) is not None)
        raise UserError(f"{KEY}: found {given}, of which transformers takes no {config.model_type} model: {reason}")


def _check_fours(model: object) -> None:
    from raylm.compression.pruning.places import width_in

    for names in linear_names(model):  # type: ignore[arg-type]
        for name in names:
            if (width := width_in(model.get_submodule(name))) % 4:  # type: ignore[attr-defined]
                raise UserError(
                    f"{KEY}.pattern: found 2:4, allowed where widths are multiples of 4; {name} has {width}"
                )


def _narrower(section: PruneSection, config: PretrainedConfig, family: Family) -> PretrainedConfig:
    width = section.width
    assert width is not None and family.width_key is not None and family.heads is not None
    old = int(getattr(config, family.width_key))
    _least(width, old, "width", family.width_key)
    _multiple(width, "width")
    if section.rotate:
        if not family.norms:
            raise UserError(
                f"{KEY}.rotate: found true, allowed for a {config.model_type} model: false, as its norms take the mean "
                "away or are not known"
            )
        config = untied(config)
    smaller = width_config(config, family, width)
    if family.heads.size_key is None:
        heads = int(getattr(config, family.heads.key))
        size = old // heads
        if width % size:
            raise UserError(
                f"{KEY}.width: found {width}, allowed for a {config.model_type} model: a multiple of {size}, the "
                "size of its heads, as fewer channels are fewer heads"
            )
        setattr(smaller, family.heads.key, width // size)
    return smaller


def _fewer_heads(section: PruneSection, config: PretrainedConfig, family: Family, head: Head) -> PretrainedConfig:
    units, heads = family.heads, section.heads
    assert units is not None and heads is not None
    if units.size_key is None:
        if section.width is None or heads != getattr(config, units.key):
            raise UserError(
                f"{KEY}.heads: found {heads}, allowed for a {config.model_type} model: leave it out and give width, "
                "from which the number of its heads follows"
            )
        return config
    count = int(getattr(config, units.key))
    _least(heads, count, "heads", units.key)
    groups = _group_count(config, units, head)
    if heads % (count // groups):
        raise UserError(
            f"{KEY}.heads: found {heads}, allowed: a multiple of {count // groups}, as so many share keys and values"
        )
    return cut_config(config, units, heads * groups // count, groups)


def _group_count(config: PretrainedConfig, units: Units, head: Head) -> int:
    return find_places(make_outline(config, head).model, units)[0].count


def _least(found: int, count: int, name: str, key: str) -> None:
    if found >= count:
        raise UserError(f"{KEY}.{name}: found {found}, allowed: less than {count}, the model's {key}")


def _multiple(found: int, name: str) -> None:
    if found % MULTIPLE:
        raise UserError(f"{KEY}.{name}: found {found}, allowed: a multiple of {MULTIPLE}")
