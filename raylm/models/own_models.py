"""Encoders of transformers with a head of the user's own, built and loaded as transformers' auto classes do.

In: a head (:mod:`raylm.models.own_heads`) and a configuration. Out: a ``PreTrainedModel`` that has the family's network
without a pooling layer under its usual name, and the head as ``own_head``. The weights of a new head are those that its
constructor gives it; transformers' rules touch the network alone.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from raylm.errors import UserError
from raylm.models.own_code import told
from raylm.models.own_heads import ATTRIBUTE, MARK, OwnHead, recorded_head

if TYPE_CHECKING:
    from raylm.models.heads import Head

# Of the example that a head is tried on: how many of each text's tokens are no padding.
TRIED_LENGTHS = (5, 3, 1)


class OwnHeadModels:
    """Builds and loads models, those with a head of the user's own where ``head`` has one.

    Args:
        plain: transformers' class that builds and loads those without.
    """

    def __init__(self, plain: Any, head: Head) -> None:
        self._plain, self._head = plain, head

    def from_config(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """A new model.

        Raises:
            UserError: the head cannot be made, or the configuration's is code that nobody has allowed.
        """
        if self._head.own is None:
            self._refuse(config)
            return self._plain.from_config(config, **options)
        return _model_class(type(config), self._head)._from_config(config, **options)

    def from_pretrained(
        self, source: str | Path, config: PretrainedConfig | None = None, **options: Any
    ) -> PreTrainedModel:
        """A model from a directory.

        Args:
            config: instead of the directory's own, where the head is new; it is drawn from torch's seed.

        Raises:
            UserError: as above, or the weights of the head are missing.
        """
        own = self._head.own
        if own is None:
            self._refuse(config or AutoConfig.from_pretrained(source))
            return self._plain.from_pretrained(source, config=config, **options)
        found, is_new = config or AutoConfig.from_pretrained(source), config is not None
        options.pop("trust_remote_code", None)
        model, report = _model_class(type(found), self._head).from_pretrained(
            source, config=found, output_loading_info=True, **options
        )
        missing = [name for name in report["missing_keys"] if name.startswith(f"{ATTRIBUTE}.")]
        if missing and not is_new:
            raise UserError(f"model.path: the weights in {source} lack {missing[0]} of its head {own.name}")
        drawn = own.drawn(found, torch.initial_seed()) if missing else {}
        with torch.no_grad():
            for name in missing:
                model.get_parameter(name).copy_(drawn[name])
        model.fill_buffers()
        return model

    def _refuse(self, config: PretrainedConfig) -> None:
        # Stages refuse it before, with the key that allows it; what is left is a model in another part.
        if (own := recorded_head(config, self._head)) is not None:
            raise UserError(f"{own.key}: a model has the head {own.name}, code of its own, which is not imported here")


class _WithOwnHead:
    """What makes a family's base class a model with a head of the user's own.

    Attributes:
        own: the head.
    """

    own: OwnHead

    def __init__(self, config: PretrainedConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        network = MODEL_MAPPING[type(config)]
        # A pooling layer would be trained by nothing.
        pools = "add_pooling_layer" in inspect.signature(network.__init__).parameters
        setattr(self, self.base_model_prefix, network(config, **({"add_pooling_layer": False} if pools else {})))
        setattr(self, ATTRIBUTE, self.own.make(config))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """transformers' rule for the network's modules; of the head only what is saved nowhere."""
        if module is self.own_head:
            self.fill_buffers()
        elif not any(module is part for part in self.own_head.modules()):
            super()._init_weights(module)

    def fill_buffers(self) -> None:
        """Give the head's buffers the values that its constructor does, the same on every process."""
        if not any(True for _ in self.own_head.buffers()):
            return
        given = dict(self.own.fresh(self.config, 0).named_buffers())
        with torch.no_grad():
            for name, buffer in self.own_head.named_buffers():
                buffer.copy_(given[name])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Token ids [n, T] to ``logits``: what the head gives for hidden states [n, T, width] and the mask [n, T]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        network = getattr(self, self.base_model_prefix)
        hidden = network(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        return SequenceClassifierOutput(logits=self.own_head(hidden, attention_mask))


def _model_class(config: type[PretrainedConfig], head: Head) -> type[PreTrainedModel]:
    """The class of models for a class of configurations; ``architectures`` has its name."""
    network = MODEL_MAPPING[config]
    base = next(one for one in network.__mro__[1:] if issubclass(one, PreTrainedModel) and one is not PreTrainedModel)
    name = f"{network.__name__.removesuffix('Model')}{MARK}{head.class_ending}"
    return type(name, (_WithOwnHead, base), {"__module__": base.__module__, "own": head.own})


def check_own_head(head: Head, config: PretrainedConfig, labels: int, *, bf16: bool) -> None:
    """Try a head of the user's own on example hidden states of so many ``labels``, forward and backward.

    Args:
        config: of the model that gets it.
        bf16: whether training computes in bf16.

    Raises:
        UserError: it fails, gives logits of another shape, or depends on what stands at the padding.
    """
    own = head.own
    assert own is not None
    config = copy.deepcopy(config)
    config.num_labels = labels
    module = own.fresh(config, 0)
    _check_parts(own, module)
    # Outlines and loaded models begin without memory.
    with torch.device("meta"):
        own.make(config)
    count, length = len(TRIED_LENGTHS), max(TRIED_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, length, config.hidden_size, generator=generator)
    mask = (torch.arange(length) < torch.tensor(TRIED_LENGTHS)[:, None]).long()
    tried = f"{own.key}: {own.name} on example hidden states {list(hidden.shape)} and attention mask {list(mask.shape)}"
    shape = [count, length, labels] if head.name == "tagging" else [count, labels]
    logits = _tried(module.train(), hidden.requires_grad_(), mask, tried, shape)
    try:
        logits.sum().backward()
    except Exception as error:  # whatever a module of the user's raises
        raise UserError(f"{tried} has no backward pass: {told(error)}") from error
    if untouched := [name for name, parameter in module.named_parameters() if parameter.grad is None]:
        raise UserError(f"{tried} leaves its parameter {untouched[0]} without a gradient, allowed: those that it uses")
    with torch.no_grad():
        module.eval()
        other = torch.where(mask[:, :, None] == 1, hidden, hidden + 1)
        before, after = (_tried(module, given, mask, tried, shape) for given in (hidden, other))
        if head.name == "tagging":
            before, after = (found[mask == 1] for found in (before, after))
        if not torch.allclose(before, after, atol=1e-4):
            raise UserError(
                f"{tried} gives other logits with other hidden states at the padding, allowed: those that follow from "
                "where the mask is 1, as it depends on the batch how much padding a text has"
            )
        if bf16:
            _tried(own.fresh(config, 0).bfloat16(), hidden.bfloat16(), mask, f"{tried} in bf16", shape)


def _check_parts(own: OwnHead, module: nn.Module) -> None:
    """Refuse what a checkpoint does not hold, and what is not trained."""
    held = set(module.state_dict()) - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if held:
        raise UserError(
            f"{own.key}: {own.name} has the buffer {sorted(held)[0]}, allowed: parameters, and buffers with "
            "persistent=False, as a checkpoint holds parameters alone"
        )
    if fixed := [name for name, parameter in module.named_parameters() if not parameter.requires_grad]:
        raise UserError(
            f"{own.key}: {own.name} has the parameter {fixed[0]} that is not trained, allowed: a buffer with "
            "persistent=False"
        )


def _tried(module: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, tried: str, shape: list[int]) -> torch.Tensor:
    """What a head gives for an example, in fp32.

    Raises:
        UserError: it fails, or gives no finite logits of this ``shape``.
    """
    try:
        logits = module(hidden, mask)
    except Exception as error:  # whatever a module of the user's raises
        raise UserError(f"{tried}: {told(error)}") from error
    if not isinstance(logits, torch.Tensor):
        raise UserError(f"{tried} returned a {type(logits).__name__}, allowed: a tensor of logits, {shape}")
    if list(logits.shape) != shape or not logits.is_floating_point():
        found = f"the shape {list(logits.shape)}" if logits.is_floating_point() else str(logits.dtype)
        raise UserError(f"{tried} returned {found}, allowed: logits, {shape}")
    if not torch.isfinite(logits).all():
        raise UserError(f"{tried} returned logits that are not finite")
    return logits.float()
