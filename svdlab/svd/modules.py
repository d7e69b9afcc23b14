"""What the three networks have in common; and networks that share their weights and nothing else.

What edits one of these, the other does not notice.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class Network(nn.Module):
    """A network with a ``config``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device


def no_effect(name: str, why: str) -> None:
    """Say that a switch of diffusers changes nothing here."""
    warnings.warn(f"svdlab: {name} has no effect: {why}", stacklevel=3)


def own_modules(network: Module) -> Module:
    """The same parameters and buffers in module objects of their own.

    Hooks and attributes that are set on the result, also in another thread, do not reach ``network``. Hooks that are
    there already come along.
    """
    other = type(network).__new__(type(network))
    # A module's parameters, buffers, children and hooks are all held in dictionaries.
    other.__dict__ = {name: v.copy() if isinstance(v, dict) else v for name, v in vars(network).items()}
    for name, child in network._modules.items():
        other._modules[name] = None if child is None else own_modules(child)
    return other


def cast_copy(network: Module, dtype: torch.dtype) -> Module:
    """``own_modules`` with the weights in another dtype; those of ``network`` stay as they are."""
    other = own_modules(network)
    for module in other.modules():
        if "cache" in vars(module):  # of a kernel: what it holds is of the other weights
            module.cache = type(module.cache)()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)
    return other


def state_of(module: nn.Module) -> list[object]:
    """What an edit of a module can change: its class, its attributes, its hooks and its weights."""
    held = {name: v for name, v in vars(module).items() if name not in ("_modules", "cache")}
    items = [(name, sorted(map(id, v.values())) if isinstance(v, dict) else id(v)) for name, v in held.items()]
    return [type(module), sorted(items, key=lambda item: item[0])]
