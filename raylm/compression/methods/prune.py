"""Pruning: fewer layers, heads, neurons and channels in a smaller dense model, or zeros in one of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.compression.methods.base import Candidate, Outlook, Recovery
from raylm.compression.models import open_model, save_model
from raylm.config.pruning import PruneSection

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Prune:
    """See :class:`raylm.compression.methods.base.Method`."""

    exports = False

    def check(self, section: PruneSection, outlook: Outlook) -> PretrainedConfig:
        """Refuse what the model does not have, or its family cannot take."""
        from raylm.compression.pruning.checks import pruned_config

        return pruned_config(section, outlook)

    def needs_material(self, section: PruneSection) -> bool:
        """All but the weights' size is measured on samples; which tokens are used, on the text itself."""
        if section.vocabulary is not None:
            return False
        measured = section.criterion != "weight" or section.spread == "sensitivity" or section.rotate
        return measured or section.recovery is not None

    def apply(self, section: PruneSection, candidate: Candidate, output: Path) -> dict[str, Any]:
        """Write the pruned model."""
        from raylm.compression.pruning.cutting import Cutter

        if section.vocabulary is not None:
            return _cut_vocabulary(candidate, output)
        model = open_model(candidate.directory, candidate.head)
        before = sum(parameter.numel() for parameter in model.parameters())
        material = candidate.material
        batches = material.batches(section.samples, section.sequence_length) if self.needs_material(section) else []
        cutter = Cutter(section, material.objective, batches)
        model, told = cutter.zeros(model) if section.sparsity is not None else cutter.shapes(model)
        save_model(model, candidate.directory, output)
        after = sum(parameter.numel() for parameter in model.parameters())
        return {"parameters_before": before, "parameters_after": after, **told}

    def recovery(self, section: PruneSection, candidate: Candidate, work: Path) -> Recovery | None:
        """Training afterwards, where the file has it; zeros stay."""
        if section.recovery is None:
            return None
        keys: dict[str, dict[str, Any]] = {} if section.sparsity is None else {"training": {"keep_zeros": True}}
        return Recovery(section.recovery, keys)

    def describe(self, section: PruneSection) -> str:
        """``pruning to 20 layers, 1024 neurons``."""
        if section.sparsity is not None:
            kind = "2:4 " if section.pattern == "2:4" else ""
            return f"{section.sparsity:.0%} {kind}zeros ({section.criterion})"
        if section.vocabulary is not None:
            return "pruning to the training text's tokens"
        names = ("layers", "heads", "neurons", "width")
        parts = [f"{count} {name}" for name in names if (count := getattr(section, name)) is not None]
        if section.rotate:
            parts[-1] += " of the main directions"
        if section.keep is not None:
            parts.append(f"{section.keep:.0%} of the parameters")
        return f"pruning to {', '.join(parts)}"


def _cut_vocabulary(candidate: Candidate, output: Path) -> dict[str, Any]:
    """Write the model and the tokenizer with the tokens that the training text uses."""
    from raylm.compression.pruning import vocabulary

    tokenizer, model = vocabulary.read_tokenizer(candidate.directory), open_model(candidate.directory, candidate.head)
    used = candidate.material.used_tokens()
    kept = vocabulary.kept_tokens(tokenizer, used, vocabulary.special_numbers(model.config))
    smaller = vocabulary.cut_model(model, candidate.head, kept)
    save_model(smaller, candidate.directory, output)
    vocabulary.write_tokenizer(output, vocabulary.cut_tokenizer(tokenizer, kept), kept)
    counts = [sum(p.numel() for p in one.parameters()) for one in (model, smaller)]
    told = {"used": len(used), "before": model.config.vocab_size, "after": len(kept)}
    return {"parameters_before": counts[0], "parameters_after": counts[1], "vocabulary": told}


METHOD = Prune()
