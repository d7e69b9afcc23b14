"""Which fast kernels this process uses: each is tried on this machine before it is trusted.

A kernel is a faster way to compute what a plain layer computes. The first time that one is asked for in a dtype on a
kind of device, it runs on a few numbers and is compared with the plain layer in float64. One that raises (oneDNN's
bfloat16 products do on CPUs without AVX-512) or disagrees is not used, and the plain layer runs instead.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from svdlab.errors import SvdlabError
from svdlab.svd.modules import own_modules

# Names with commas between them, or "all": kernels that are not to be used.
OFF = "SVDLAB_KERNELS_OFF"
# How much farther from the float64 result than the plain layer a kernel may be, as for every tensor of a parity trace.
TOLERANCE = 4.0
# Whole numbers in a row of the grid in which a weight is summed up.
_GRID = 128
CPU_FLOATS = (torch.float32, torch.bfloat16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Network = TypeVar("Network", bound=nn.Module)
# A module of plain layers, and what to call it with.
Trial = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Kernel:
    """One fast way.

    Attributes:
        name: for people, and for ``SVDLAB_KERNELS_OFF``.
        summary: what it does, one line.
        dtypes: in which it is worth it.
        trial: makes a module of plain layers and its arguments, small, in float32 on the CPU.
        accelerators: whether it also serves devices other than CPUs.
    """

    name: str
    summary: str
    dtypes: tuple[torch.dtype, ...]
    trial: Callable[[], Trial]
    accelerators: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel is used in a dtype on a kind of device, and why (not)."""

    used: bool
    why: str


def content(weight: Tensor) -> Any:
    """What tells whether a weight holds other numbers than before, for a small part of what its product costs.

    Its bits as whole numbers, in a grid, summed along both sides: a single other bit is in the sums, numbers that
    have changed places are, and so is every edit that torch counts no version for: of ``parameter.data``, by a fused
    optimizer, of what was made in ``torch.inference_mode``.

    Args:
        weight: of any shape, dtype and layout. One that is only simulated holds no numbers and is never another.
    """
    if isinstance(weight, FakeTensor):
        return ()
    numbers = weight.detach().contiguous().flatten()
    if numbers.storage_offset() * numbers.itemsize % 8:  # not where eight bytes can be read at once
        numbers = numbers.clone()
    octets = numbers.view(torch.uint8)
    whole = len(octets) // (8 * _GRID) * 8 * _GRID
    grid = octets[:whole].view(torch.int64).view(-1, _GRID)
    parts = grid.sum(0), grid.sum(1), octets[whole:]
    return weight.dtype, weight.shape, *(part.numpy().tobytes() for part in parts)


# One object for every block of ``unedited_weights``.
_unedited: ContextVar[object | None] = ContextVar("unedited", default=None)


@contextmanager
def unedited_weights() -> Iterator[None]:
    """Within, no weight is edited: a layer compares what it has packed with its weight at its first call alone.

    The comparison is a tenth of a UNet pass of the embedded checkpoint.
    """
    token = _unedited.set(object())
    try:
        yield
    finally:
        _unedited.reset(token)


class WeightCache:
    """What a fast layer makes of its weight, made anew whenever that holds other numbers.

    Modules that share their parameters share it, too. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, list[Tensor]] | None = None
        self._compared: object | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is held."""
        return self._held is None

    def get(self, weight: Tensor, make: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """What ``make`` gives for ``weight``, kept."""
        held, block = self._held, _unedited.get()
        if held is not None and block is not None and block is self._compared:
            return held[1]
        numbers = content(weight)
        if held is None or held[0] != numbers:
            # One assignment, for a thread that reads meanwhile.
            held = self._held = numbers, make(weight)
        self._compared = block
        return held[1]

    def __deepcopy__(self, memo: Any) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> Any:
        return WeightCache, ()


KERNELS: dict[str, Kernel] = {}
# The class that takes a plain layer's place.
FAST: dict[type[nn.Module], type[nn.Module]] = {}


def register(kernel: Kernel) -> Kernel:
    """Add a kernel to those that ``svdlab kernels`` lists."""
    KERNELS[kernel.name] = kernel
    return kernel


Fast = TypeVar("Fast", bound=type[nn.Module])


def replaces(plain: type[nn.Module]) -> Callable[[Fast], Fast]:
    """Declare that a class computes what ``plain`` computes, on the same attributes."""

    def declare(fast: Fast) -> Fast:
        FAST[plain] = fast
        return fast

    return declare


def use_kernels(network: Network) -> Network:
    """Swap the fast layers in, in place; what a checkpoint is loaded for inference through.

    Weights, names and hooks stay. A fast layer falls back to the plain one wherever ``usable`` says no: while autograd
    records, under ``torch.compile``, and for what does not run on this machine.
    """
    for module in network.modules():
        if fast := FAST.get(type(module)):
            module.__class__ = fast
            module.cache = WeightCache()  # type: ignore[assignment]
    return network


def drop_kernels(network: Network) -> Network:
    """Put the plain layers back, in place: for whoever changes what a layer that a kernel would skip computes."""
    slow = {fast: plain for plain, fast in FAST.items()}
    for module in network.modules():
        module.__class__ = slow.get(type(module), type(module))
    return network


def plain(network: Network) -> Network:
    """A copy of a network with the plain layers, on the same weights: what one trains, compiles or reads."""
    return drop_kernels(own_modules(network))


_verdicts: dict[tuple[str, str, torch.dtype], Verdict] = {}
_trying: set[tuple[str, str, torch.dtype]] = set()
# A thread that asks for what another one is trying waits; the trial itself asks again, and goes on.
_lock = threading.RLock()


def usable(kernel: Kernel, x: Tensor) -> bool:
    """Whether to take the fast way for ``x``: in inference, where it agreed.

    ``torch.compile`` sees the plain network, and autocast chooses the dtypes of the plain layers.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return False
    return verdict(kernel, kind, x.dtype).used


def verdict(kernel: Kernel, device: str, dtype: torch.dtype) -> Verdict:
    """Whether a kernel is used; tried on this machine once per process, kind of device and dtype.

    Args:
        kernel: which.
        device: "cpu", "cuda", ...; "meta" stands for an accelerator that is simulated, where nothing can be tried.
        dtype: of the activations.
    """
    key = (kernel.name, device, dtype)
    if (known := _verdicts.get(key)) is not None:
        return known
    with _lock:
        if key in _trying:
            return Verdict(True, "on trial")
        if key not in _verdicts:
            _trying.add(key)
            try:
                _verdicts[key] = _judge(kernel, device, dtype)
            finally:
                _trying.remove(key)
        return _verdicts[key]


def _judge(kernel: Kernel, device: str, dtype: torch.dtype) -> Verdict:
    if kernel.name in refused():
        return Verdict(False, f"switched off by {OFF}")
    if device != "cpu" and not kernel.accelerators:
        return Verdict(False, "for CPUs")
    if dtype not in kernel.dtypes:
        return Verdict(False, f"not for {str(dtype).removeprefix('torch.')}")
    if device == "meta":
        return Verdict(True, "simulated, not tried")
    # Memory is simulated in modes whose tensors have no data; and nobody's random draws may change.
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            ratio = noise_ratio(*kernel.trial(), torch.device(device), dtype)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            return Verdict(False, f"does not run here: {(str(error) or type(error).__name__).splitlines()[0]}")
    if not ratio <= TOLERANCE:
        return Verdict(False, f"disagrees with the plain layer: noise ratio {ratio:.3g}")
    return Verdict(True, f"agrees with the plain layer: noise ratio {ratio:.2g}")


def noise_ratio(layer: nn.Module, inputs: tuple[Tensor, ...], device: torch.device | str, dtype: torch.dtype) -> float:
    """The fast layer's distance from the plain one's float64 result, over the plain one's own in ``dtype``.

    Args:
        layer: plain; its weights are drawn here.
        inputs: of its forward.
        device, dtype: where and in what both run.
    """
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    layer = layer.to(device, dtype).requires_grad_(False)
    inputs = tuple(t.to(device, dtype) for t in inputs)
    result, expected = (y(*inputs).cpu().double() for y in (use_kernels(own_modules(layer)), layer))
    # On the CPU: not every device has float64.
    truth = layer.to("cpu", torch.float64)(*(t.cpu().double() for t in inputs))
    size, eps = truth.norm(), torch.finfo(dtype).eps
    # Where the truth is rounded as coarsely as the result, it cannot tell a few roundings apart.
    floor = max(float((expected - truth).norm() / size), 100 * eps if dtype == torch.float64 else eps)
    return float((result - truth).norm() / size) / floor


@functools.cache
def refused() -> frozenset[str]:
    """The kernels that ``SVDLAB_KERNELS_OFF`` names.

    Raises:
        SvdlabError: a name that is not a kernel's.
    """
    names = [name.strip() for name in os.environ.get(OFF, "").split(",") if name.strip()]
    if names == ["all"]:
        return frozenset(KERNELS)
    for name in names:
        if name not in KERNELS:
            raise SvdlabError(f"{OFF}: got {name!r}, allowed: all, or some of {', '.join(KERNELS)}")
    return frozenset(names)


def forget() -> None:
    """Try everything anew, and read ``SVDLAB_KERNELS_OFF`` again: for tests."""
    _verdicts.clear()
    refused.cache_clear()
