"""Section about what is cut out of a model: ``prune`` of ``compression.steps``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylm.config.base import Count, Section
from raylm.config.recovery import RecoverySection

SHAPES = ("layers", "heads", "neurons", "width", "keep")


class PruneSection(Section):
    """``compression.steps: [{prune: ...}]``: fewer layers, heads, neurons, channels, or weights that are zero.

    Cutting shapes makes a smaller dense model. Zeros keep the shapes.
    """

    layers: Count | None = None
    """Layers that remain."""
    heads: Count | None = None
    """Attention heads that remain in each layer; of grouped ones (GQA) whole groups go."""
    neurons: Count | None = None
    """Neurons of each feed-forward network that remain; a multiple of 64."""
    width: Count | None = None
    """Width of the residual stream that remains; a multiple of 64."""
    rotate: bool = False
    """Before width is cut, turn the residual stream into the basis of its main directions, the same for all layers;
    Llama only. Embeddings and output matrix, where they are one, come apart."""
    keep: float | None = Field(default=None, gt=0, lt=1)
    """Share of the parameters outside of the embeddings that remain; a scan of what each cut costs spreads it over
    layers, heads and neurons."""
    vocabulary: Literal["used"] | None = None
    """used: the tokens that the training text uses remain, and the tokenizer cuts that text as before. A step of its
    own, behind all that trains or reads samples."""
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Share of the weights of matrices that become zero."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """2:4 leaves two of four weights side by side."""
    spread: Literal["uniform", "sensitivity"] = "uniform"
    """How sparsity is spread over layers."""
    importance: Literal["auto", "weight", "activation", "taylor", "wanda", "sparsegpt"] = "auto"
    """What tells what goes: the weights' size; with samples of the training text activations, the loss's first
    derivative (taylor, Molchanov et al. 2019), Wanda (arXiv:2306.11695) or SparseGPT (arXiv:2301.00774), of which the
    last two are for zeros alone. auto: activation for shapes, wanda for zeros."""
    samples: Count = 64
    """Sequences of training text that importance is measured on."""
    sequence_length: Count = 256
    """Tokens of such a sequence."""
    recovery: RecoverySection | None = None
    """Training afterwards."""

    @model_validator(mode="after")
    def _something(self) -> PruneSection:
        shapes = [name for name in SHAPES if getattr(self, name) is not None]
        if self.sparsity is not None and shapes:
            raise ValueError(f"sparsity: leave it out with {shapes[0]}; zeros are a step of their own")
        if self.vocabulary is not None:
            if others := [*shapes, *(["sparsity"] if self.sparsity else []), *(["recovery"] if self.recovery else [])]:
                raise ValueError(f"{others[0]}: leave it out with vocabulary, which is a step of its own")
            return self
        if self.sparsity is None and not shapes:
            raise ValueError(
                f"found nothing to prune, allowed: one or more of {', '.join(SHAPES)}, or sparsity, or vocabulary"
            )
        if self.rotate and self.width is None:
            raise ValueError("rotate: found true, allowed with width")
        if self.keep is not None and len(shapes) > 1:
            other = next(name for name in shapes if name != "keep")
            raise ValueError(f"keep: leave it out with {other}")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"sparsity: found {self.sparsity}, allowed with pattern 2:4: 0.5")
        if self.sparsity is None and self.importance in ("wanda", "sparsegpt"):
            raise ValueError(f"importance: found {self.importance}, allowed with sparsity only")
        if self.sparsity is not None and self.importance in ("activation", "taylor"):
            raise ValueError(
                f"importance: found {self.importance}, allowed with sparsity: auto, weight, wanda, sparsegpt"
            )
        return self

    @property
    def criterion(self) -> str:
        """``importance`` with auto decided."""
        if self.importance != "auto":
            return self.importance
        return "activation" if self.sparsity is None else "wanda"
