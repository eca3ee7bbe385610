"""Heads of the user's own: which one the YAML file names, which one a model has, and whether its code may run.

A head is a factory by its import path. It is called with the model's configuration and makes a module, which gets the
last hidden states [n, T, width] and the attention mask [n, T] and gives logits. A model with one has it in its
configuration, as ``"own_head": {"path": "heads:MeanPooled", "options": {}}``, and its class is named so that
``architectures`` tells it from a model with a head of transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.errors import UserError
from raylm.models.own_code import copy_module, import_attribute, refuse_other_code, told

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from raylm.config.model import ObjectiveSection
    from raylm.models.heads import Head

KEY = "objective.head"
# Of the configuration, and of the module in the model, which its weights are named by.
SETTING = ATTRIBUTE = "own_head"
# In front of what the class of a model with such a head ends with.
MARK = "OwnHead"


@dataclass(frozen=True)
class OwnHead:
    """A head from outside; its code is imported where it is made.

    Attributes:
        name: its import path, ``module:attribute``.
        options: arguments of the factory beside the configuration.
        folder: which its module is imported from where the PYTHONPATH has none.
        is_copy: ``folder`` is a model's, and what it holds is what the model was trained with.
        key: of the YAML file, for messages.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    folder: str | None = None
    is_copy: bool = False
    key: str = KEY

    def load(self) -> Callable[..., nn.Module]:
        """The factory.

        Raises:
            UserError: it cannot be imported or called, or it is not the code that the model was trained with.
        """
        found = import_attribute(self.name, self.key, self.folder)
        if not callable(found):
            raise UserError(
                f"{self.key}: found '{self.name}' of type {type(found).__name__}, allowed: a class of modules, or a "
                "function that makes one"
            )
        if self.is_copy and self.folder is not None:
            refuse_other_code(self.name, self.key, self.folder)
        return found

    def make(self, config: PretrainedConfig) -> nn.Module:
        """A new head of a model of this configuration, on torch's default device.

        Raises:
            UserError: the factory fails, or makes no module.
        """
        from torch import nn

        factory = self.load()
        try:
            made = factory(config, **self.options)
        except Exception as error:  # whatever a factory of the user's raises
            options = f" and head_options {self.options}" if self.options else ""
            raise UserError(
                f"{self.key}: {self.name} with the model's configuration{options}: {told(error)}"
            ) from error
        if not isinstance(made, nn.Module):
            raise UserError(
                f"{self.key}: {self.name} made a {type(made).__name__}, allowed: a module (torch.nn.Module)"
            )
        return made

    def fresh(self, config: PretrainedConfig, seed: int) -> nn.Module:
        """A new head in main memory, drawn from ``seed`` as its own constructor does."""
        import torch

        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            return self.make(config)

    def drawn(self, config: PretrainedConfig, seed: int) -> dict[str, torch.Tensor]:
        """The parameters of :meth:`fresh` by their names in the model."""
        return {f"{ATTRIBUTE}.{name}": p.detach().float() for name, p in self.fresh(config, seed).named_parameters()}

    def copy_code(self, output: Path) -> None:
        """Put the module beside the model in ``output``, if it lies in :attr:`folder`."""
        copy_module(self.name, self.folder, output)

    def setting(self) -> dict[str, Any]:
        """What the configuration of a model with it has as :data:`SETTING`."""
        return {"path": self.name, "options": self.options}


def is_import_path(head: str) -> bool:
    """Whether a value of ``objective.head`` is a head of the user's own."""
    return ":" in head


def with_own_head(head: Head, section: ObjectiveSection) -> Head:
    """``head`` as the section says; its code is imported.

    Raises:
        UserError: it cannot be.
    """
    if not is_import_path(section.head):
        return head
    own = OwnHead(section.head, section.head_options, section.imports_from)
    own.load()
    return replace(head, own=own)


def recorded_head(config: PretrainedConfig, head: Head, source: str = "the model") -> OwnHead | None:
    """The head of the user's own that a model has where transformers has ``head``; imports nothing.

    Raises:
        UserError: its configuration says that there is one, but not which.
    """
    if not any(name.endswith(f"{MARK}{head.class_ending}") for name in config.architectures or ()):
        return None
    found = getattr(config, SETTING, None)
    path, options = (found.get("path"), found.get("options", {})) if isinstance(found, dict) else (None, None)
    if not isinstance(path, str) or not is_import_path(path) or not isinstance(options, dict):
        raise UserError(f"model.path: {source} is damaged: its config.json has no {SETTING} with path and options")
    return OwnHead(path, options)


def usable_head(head: Head, config: PretrainedConfig, source: str, key: str, *, trusted: bool) -> Head:
    """``head`` of a model that is used as it is; its code is imported from the model's directory or the PYTHONPATH if
    it is ``trusted``.

    Args:
        source: the model's directory or hub name.
        key: of the model's path, for messages.

    Raises:
        UserError: the model has a head of the user's own, which may not be imported or cannot be.
    """
    own = recorded_head(config, head, source)
    if own is None:
        return head
    trust = f"{key.removesuffix('path')}trust_code"
    if not trusted:
        raise UserError(
            f"{key}: found {source}, whose head is code of its own ({own.name}), allowed with {trust}: true, which "
            "runs that code"
        )
    own = replace(own, folder=source if Path(source).is_dir() else None, is_copy=True, key=trust)
    own.load()
    return replace(head, own=own)


def refuse_own_head(config: PretrainedConfig, head: Head, source: str, key: str, what: str) -> None:
    """Refuse a model with a head of the user's own for ``what`` cannot be done with one.

    Raises:
        UserError: one line.
    """
    if (own := recorded_head(config, head, source)) is not None:
        raise UserError(
            f"{key}: found {source}, whose head is code of its own ({own.name}), allowed to {what}: a head of "
            "transformers' own (objective.head: linear), or crf"
        )


def check_same_head(config: PretrainedConfig, head: Head, section: ObjectiveSection) -> None:
    """Refuse to train a model with a head of the user's own further with another one.

    Raises:
        UserError: one line.
    """
    own = recorded_head(config, head)
    if own is None:
        return
    if section.head != own.name:
        raise UserError(f"{KEY}: found {section.head}, allowed: {own.name}, as the model at model.path has it")
    if section.head_options != own.options:
        raise UserError(
            f"objective.head_options: found {section.head_options}, allowed: {own.options}, as the model at model.path "
            "was made with them"
        )
