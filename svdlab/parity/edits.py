"""Edits of a network's modules, of which bugs inside networks are made.

An edit ``(network) -> None`` works on modules of the caller's own (``svdlab.svd.modules.own_modules``), which may be
copied again afterwards. So a replaced method goes into the module's class, and a hook reads the module that it is
given: a bound method or a captured module would belong to the copy that was edited. Where a fast kernel would skip
what an edit changes, the plain layers come back first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from svdlab.svd.kernels import drop_kernels
from svdlab.svd.vae import VAE

Edit = Callable[[nn.Module], None]
Kind = TypeVar("Kind", bound=nn.Module)


ANYWHERE = ".*"


def of_kind(network: nn.Module, kind: type[Kind], where: str = ANYWHERE) -> Iterator[Kind]:
    """Every module of a class whose path matches the whole of a regular expression."""
    for name, module in network.named_modules():
        if isinstance(module, kind) and re.fullmatch(where, name):
            yield module


def edits(*parts: Edit) -> Edit:
    """One edit after the other."""

    def edit(network: nn.Module) -> None:
        for part in parts:
            part(network)

    return edit


def setting(kind: type[nn.Module], name: str, value: Callable[[Any], Any], where: str = ANYWHERE) -> Edit:
    """An edit of one attribute of every module of a kind."""

    def edit(network: nn.Module) -> None:
        for module in of_kind(network, kind, where):
            setattr(module, name, value(getattr(module, name)))

    return edit


def set_to(kind: type[nn.Module], name: str, value: Any, where: str = ANYWHERE) -> Edit:
    """An edit that gives one attribute of every module of a kind this value."""
    return setting(kind, name, lambda _: value, where)


def replaced_method(kind: type[nn.Module], name: str, method: Callable[..., Any], where: str = ANYWHERE) -> Edit:
    """An edit that gives every module of a kind another method.

    Args:
        kind: the plain layer; a kernel's subclass is edited alike.
        name: of the method.
        method: called as ``method(original, self, *arguments)``.
        where: see ``of_kind``.
    """

    def edit(network: nn.Module) -> None:
        for module in of_kind(network, kind, where):
            module.__class__ = _with_method(type(module), name, method)  # type: ignore[arg-type]

    return edit


@cache
def _with_method(kind: type[nn.Module], name: str, method: Callable[..., Any]) -> type[nn.Module]:
    original = getattr(kind, name)

    def replacement(self: nn.Module, *args: Any) -> Any:
        return method(original, self, *args)

    return type(kind.__name__, (kind,), {name: replacement, "__module__": kind.__module__})


def on_output(kind: type[nn.Module], change: Callable[[nn.Module, Any, Tensor], Tensor], where: str = ANYWHERE) -> Edit:
    """An edit that puts ``change(module, arguments, output)`` in the place of every output of a kind of module."""

    def edit(network: nn.Module) -> None:
        for module in of_kind(network, kind, where):
            module.register_forward_hook(change)

    return edit


def on_input(kind: type[nn.Module], change: Callable[..., tuple[Any, ...]], where: str = ANYWHERE) -> Edit:
    """An edit that calls every module of a kind with ``change(module, arguments)``."""

    def edit(network: nn.Module) -> None:
        for module in of_kind(network, kind, where):
            module.register_forward_pre_hook(change)

    return edit


def on_plain_decoder(edit: Edit) -> Edit:
    """An edit of what the exact decode in chunks would not run: the VAE's decoder is plain again, and runs at once."""

    def plain(vae: nn.Module) -> None:
        drop_kernels(vae.get_submodule("decoder"))
        if isinstance(vae, VAE):
            vae.__class__ = VAE
        edit(vae)

    return plain


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Another weight or bias of the same shape; a weight with a kernel's cache of its own."""
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=False))
    if name == "weight" and "cache" in vars(module):  # what it holds is of the weight that other modules still have
        module.cache = type(module.cache)()


def reweighted(
    kind: type[nn.Module], name: str, change: Callable[[Tensor], Tensor | None], where: str = ANYWHERE
) -> Edit:
    """An edit of a weight or bias of every module of a kind; None leaves one as it is."""

    def edit(network: nn.Module) -> None:
        for module in of_kind(network, kind, where):
            held = getattr(module, name)
            changed = None if held is None else change(held.detach())
            if changed is not None:
                replace_parameter(module, name, changed)

    return edit


def in_dtype(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Round to a narrower dtype, and go on in the wider one."""
    return lambda x: x.to(dtype).to(x.dtype)
