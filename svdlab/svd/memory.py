"""Peak memory of a generation, without weights and without a GPU.

The networks run on tensors that have a shape and no data, while every storage that comes and goes is counted. An
accelerator is simulated on the meta device; a CPU, where layers prepare their weights and normalise in their own way,
with FakeTensorMode. What no simulation counts: an accelerator's context and its kernels' own workspaces.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from svdlab.errors import SvdlabError
from svdlab.svd.config import Configs, per_level
from svdlab.svd.kernels import plain, use_kernels
from svdlab.svd.kernels.pieces import simulating
from svdlab.svd.settings import GIB, GenerationSettings
from svdlab.svd.workloads import NETWORKS, WORKLOADS, Maker, workload_calls

# Of a device's free memory: the rest is for fragments and for kernels' workspaces.
_USABLE = 0.9


if torch.backends.mkldnn.is_available():

    @torch.library.register_fake("mkldnn::_reorder_convolution_weight")
    @torch.library.register_fake("mkldnn::_reorder_linear_weight")
    def _blocked_weight(weight: Tensor, *layout: Any) -> Tensor:
        """The blocked weight of a packed layer is as large as the plain one."""
        return torch.empty_like(weight)

    @torch.library.register_fake("mkldnn::_linear_pointwise.binary")
    def _product_with(x: Tensor, other: Tensor, *_: Any) -> Tensor:
        """A product that another tensor is added to or multiplied with is as large as that."""
        return torch.empty_like(other)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on: ``live`` now, ``peak`` at most.

    A tensor that was there before costs nothing, and neither does a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.add(storage)
        result = func(*args, **(kwargs or {}))
        if func is _PLAIN and result.is_meta and args[0].is_contiguous(memory_format=torch.channels_last):
            # As accelerators' kernels give it for such images; the meta device does not.
            result = result.contiguous(memory_format=torch.channels_last)
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        if func in _CONVOLUTIONS:
            self.peak = max(self.peak, self.live + _workspace(func, args[0], args[1], result))
        return result

    def _change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def _storages(values: Any) -> Iterator[Any]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))


_PLAIN, _PACKED = torch.ops.aten.convolution.default, None
if torch.backends.mkldnn.is_available():
    _PACKED = torch.ops.mkldnn._convolution_pointwise.default
_CONVOLUTIONS = {_PLAIN, _PACKED}


def _workspace(func: Any, images: Tensor, weight: Tensor, result: Tensor) -> int:
    """Bytes that a convolution of (N, C, H, W) takes for itself."""
    on_cpu = images.device.type == "cpu"
    if on_cpu and not _has_onednn(images.dtype):  # unfolded: a column of inputs for every output
        return result[:, 0].numel() * weight[0].numel() * images.element_size() if weight[0, 0].numel() > 1 else 0
    if on_cpu and func is _PLAIN:
        return weight.nbytes  # blocked anew in every call
    # Packed weights and those on accelerators want channels_last images, and copy others.
    return 0 if images.is_contiguous(memory_format=torch.channels_last) else images.nbytes


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether this CPU convolves a dtype in oneDNN, without unfolding it."""
    ask: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: torch.backends.mkldnn.is_available,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in ask and ask[dtype]()


class KnownShapes(TorchDispatchMode):
    """Meta tensors without the arithmetic: what an operator gives for arguments of known shapes is worked out once.

    torch does it anew in every call, for many operators in Python, which takes two thirds of a simulation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = func, _described(args), _described(tuple(kwargs.items()))
        if (known := self._known.get(key)) is not None:
            many, recipes = known
            results = [args[r] if isinstance(r, int) else torch.empty_strided(**r, device="meta") for r in recipes]
            return tuple(results) if many else results[0]
        result = func(*args, **kwargs)
        many = isinstance(result, tuple)
        if recipes := _recipes(result if many else (result,), args, kwargs):
            self._known[key] = many, recipes
        return result


def _described(value: Any) -> Any:
    """What of an argument decides the shape of a result; hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(_described(v) for v in value)
    return type(value), value


def _recipes(results: Sequence[Any], args: Sequence[Any], kwargs: Any) -> list[Any] | None:
    """How to make results again: the index of the argument that it is, or size, stride and dtype.

    None where there is no such way: views of an argument, and what is no tensor on the meta device.
    """
    given, recipes = set(_storages((args, kwargs))), []
    for result in results:
        if not isinstance(result, Tensor) or result.device.type != "meta":
            return None
        same = [i for i, argument in enumerate(args) if argument is result]
        if not same and result.untyped_storage() in given:
            return None
        recipes.append(same[0] if same else {"size": result.shape, "stride": result.stride(), "dtype": result.dtype})
    return recipes


class _FusedAttention(TorchFunctionMode):
    """Attention as accelerators' fused kernels run it: no matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, False)[0]
        return func(*args, **(kwargs or {}))


def measured_peak(function: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Bytes that a call really allocates at its peak, beside what was allocated before: the allocator's own count."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells stderr of its start and its end otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@dataclass(frozen=True)
class Footprint:
    """Memory of one workload.

    Attributes:
        name: a key of ``WORKLOADS``.
        chunk: frames decoded at a time, in the decodes.
        weights: bytes of the network that runs, with what its layers keep prepared of them.
        activations: bytes beside at the peak.
    """

    name: str
    chunk: int | None
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes with no other network on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class Option:
    """One way to run a generation within a budget.

    Attributes:
        cfg, decode: as in the settings.
        offload: each network is on the device only while it runs. Otherwise the others leave it for the decode alone,
            where that would not fit beside them (``SVDPipeline._room_for_decode``).
        decode_chunk_size: the largest that fits; None when none does.
        peak: bytes with that chunk, or with a chunk of 1.
        fits: whether the peak is within the budget.
    """

    cfg: str
    offload: bool
    decode: str
    decode_chunk_size: int | None
    peak: int
    fits: bool


class Simulation:
    """The memory of one generation, workload by workload.

    Args:
        configs: the architecture.
        settings: with height, width and number of frames.
        device: where it would run; any accelerator is simulated alike.
    """

    def __init__(self, configs: Configs, settings: GenerationSettings, device: str | torch.device = "cuda"):
        self.configs, self.settings = configs, settings
        self._place = "cpu" if torch.device(device).type == "cpu" else "meta"
        self._mode: AbstractContextManager[Any] = FakeTensorMode() if self._place == "cpu" else KnownShapes()
        self._networks: dict[tuple[str, torch.dtype], tuple[nn.Module, int]] = {}
        self._footprints: dict[tuple[str, int | None], Footprint] = {}

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each network at rest."""
        return {name: self._network(name, self.settings.torch_dtype)[1] for name in NETWORKS}

    def footprint(self, name: str, chunk: int | None = None) -> Footprint:
        """One workload's; ``chunk`` is for the decodes, by default what ``decode_chunk_size=None`` gives."""
        dtype, frames = self.settings.torch_dtype, self.settings.num_frames or 1
        if name == "vae_encode":
            dtype = self.configs.vae.encoder_dtype(dtype)
        if name.startswith("decode"):
            chunk = min(chunk or (2 if name == "decode_exact" else frames), frames)
        else:
            chunk = None
        if (name, chunk) not in self._footprints:
            network, weights = self._network(WORKLOADS[name], dtype)
            call = workload_calls(self.configs, self.settings)[name]
            live = LiveStorages()
            self._run(lambda new: call(network, new, chunk), dtype, live)
            self._footprints[name, chunk] = Footprint(name, chunk, weights, live.peak)
        return self._footprints[name, chunk]

    def flops(self, name: str, chunk: int | None = None) -> int:
        """Multiplications and additions of a workload's products, convolutions and attention, on the plain network."""
        dtype = self.settings.torch_dtype
        network, call = (
            plain(self._network(WORKLOADS[name], dtype)[0]),
            workload_calls(self.configs, self.settings)[name],
        )
        counter = FlopCounterMode(display=False)
        self._run(lambda new: call(network, new, chunk), dtype, counter)
        return counter.get_total_flops()

    def peak(self, footprint: Footprint, offload: bool) -> int:
        """Bytes on the device in a workload: with the other networks' weights unless they are offloaded."""
        network = WORKLOADS[footprint.name]
        others = 0 if offload else sum(size for name, size in self.weights.items() if name != network)
        return footprint.peak + others

    def option(self, cfg: str, offload: bool, decode: str, budget: float) -> Option:
        """The largest decode chunk within a budget in bytes, if any."""
        names = ("image_encoder", "vae_encode", f"unet_{cfg}")
        peak = max(self.peak(self.footprint(name), offload) for name in names)

        def decode_peak(chunk: int) -> int:
            footprint = self.footprint(f"decode_{decode}", chunk)
            beside = self.peak(footprint, offload)
            return beside if beside <= budget else footprint.peak

        # Memory grows with the chunk, so that as many sizes fit as the largest one that does.
        chunk = bisect.bisect_right(range(1, (self.settings.num_frames or 1) + 1), budget, key=decode_peak)
        peak = max(peak, decode_peak(chunk or 1))
        return Option(cfg, offload, decode, chunk or None, peak, peak <= budget)

    def options(self, budget: float) -> list[Option]:
        """Every way to run it, in the order to try them: exact first, then with the least transfers and passes."""
        ways = itertools.product(("exact", "parity"), (False, True), ("batched", "sequential"))
        return [self.option(cfg, offload, decode, budget) for decode, offload, cfg in ways]

    def _run(self, function: Callable[[Maker], Any], dtype: torch.dtype, counter: AbstractContextManager[Any]) -> None:
        """Call a function with a maker of empty tensors, while a mode counts."""
        new = functools.partial(torch.empty, dtype=dtype, device=self._place)
        fused = nullcontext() if self._place == "cpu" or dtype == torch.float64 else _FusedAttention()
        token = simulating.set(True)
        try:
            # Entered last it is called first: before what knows a result and calls no operator for it.
            with self._mode, fused, torch.no_grad(), counter:
                function(new)
        finally:
            simulating.reset(token)

    def _small_size(self) -> dict[str, int]:
        """A small height and width that the UNet halves to odd numbers where it does so with the whole ones.

        Where sides double exactly, an upsampling prepares other weights than where they do not.
        """
        factor, levels = self.configs.vae.scale_factor, len(self.configs.unet.block_out_channels)
        least = max(8, 2 ** (levels - 1))
        sides = {"height": self.settings.height or 0, "width": self.settings.width or 0}
        return {name: (side // factor % least + least) * factor for name, side in sides.items()}

    def _network(self, name: str, dtype: torch.dtype) -> tuple[Any, int]:
        """A network without data, and the bytes that it and what its layers prepare of their weights would take."""
        if (name, dtype) not in self._networks:
            with torch.device("meta"):
                network = NETWORKS[name](getattr(self.configs, name))
            shapes = {key: value.shape for key, value in network.state_dict().items()}
            with self._mode:
                state = {key: torch.empty(shape, dtype=dtype, device=self._place) for key, shape in shapes.items()}
            network.load_state_dict(state, assign=True)
            use_kernels(network.eval().requires_grad_(False))
            small = self.settings.replace(**self._small_size(), num_frames=2, num_videos_per_prompt=1)
            calls = [call for key, call in workload_calls(self.configs, small).items() if WORKLOADS[key] == name]
            prepared = LiveStorages()
            for call in calls:
                self._run(lambda new, call=call: call(network, new, 1), dtype, prepared)  # type: ignore[misc]
            own = sum(value.nbytes for value in state.values())
            self._networks[name, dtype] = network, own + prepared.live
        return self._networks[name, dtype]


@functools.lru_cache(maxsize=4)
def simulate(configs: Configs, settings: GenerationSettings, device: str) -> Simulation:
    """A ``Simulation`` that is kept, so that a sweep simulates once."""
    return Simulation(configs, settings, device)


def free_bytes(device: str | torch.device) -> int:
    """What is free on a device for tensors, the allocator's own reserve included."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    import psutil

    return psutil.virtual_memory().available


def least_bytes(configs: Configs, settings: GenerationSettings) -> int:
    """What the activations of a generation take at the very least, however it is run: a bound without a simulation.

    Held at once are the UNet's skip connections of one half of the guidance, or all frames in float32 and the widest
    activation of the one that is decoded, or of the image that is encoded.

    Args:
        configs: the architecture.
        settings: with height, width and number of frames.
    """
    assert settings.height and settings.width and settings.num_frames
    frames, size = settings.num_videos_per_prompt * settings.num_frames, settings.torch_dtype.itemsize
    factor, widths = configs.vae.scale_factor, configs.unet.block_out_channels
    pixels, skips = settings.height * settings.width, 0
    height, width = settings.height // factor, settings.width // factor
    for level, layers in enumerate(per_level("layers_per_block", configs.unet.layers_per_block, len(widths))):
        # What comes into a level, or is its input halved, and every layer's output.
        skips += (widths[max(level - 1, 0)] + layers * widths[level]) * height * width
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    decode = frames * 3 * pixels * max(size, 4) + configs.vae.block_out_channels[0] * pixels * size
    return max(frames * skips * size, decode)


def check_fits(configs: Configs, settings: GenerationSettings, device: str | torch.device) -> None:
    """Refuse a generation that cannot fit what is free on a device, even in the smallest decode chunks.

    Raises:
        SvdlabError: with the size, ``least_bytes``, and what is free.
    """
    least, free = least_bytes(configs, settings), free_bytes(device)
    if least > free:
        raise SvdlabError(
            f"{settings.num_frames} frames of {settings.width}x{settings.height}, {settings.dtype}: at least "
            f"{least / GIB:.1f} GiB, allowed: {free / GIB:.1f} GiB, what is free on {device}; --force tries"
        )


def _simulated_decode(configs: Configs, settings: GenerationSettings, device: str | torch.device) -> Simulation:
    """One simulation for all clips whose decode takes the same: of a size, a number and a dtype."""
    decides = ("height", "width", "num_frames", "num_videos_per_prompt", "dtype")
    same = GenerationSettings(**{name: getattr(settings, name) for name in decides})
    return simulate(configs, same, torch.device(device).type)


def decode_fits(configs: Configs, settings: GenerationSettings, device: str | torch.device) -> bool:
    """Whether a decode, with ``decode_chunk_size="auto"`` the smallest, fits what is free on a device now."""
    size = settings.decode_chunk_size
    exact = settings.decode == "exact" or not isinstance(size, int)
    simulation = _simulated_decode(configs, settings, device)
    chunk = size if isinstance(size, int) else 1 if size == "auto" else None
    footprint = simulation.footprint("decode_exact" if exact else "decode_parity", chunk)
    return footprint.activations <= _USABLE * free_bytes(device)


def largest_chunk(configs: Configs, settings: GenerationSettings, device: str | torch.device) -> int:
    """The largest exact decode chunk whose activations fit what is free on a device now; at least 1."""
    simulation = _simulated_decode(configs, settings, device)
    chunks, budget = range(1, (settings.num_frames or 1) + 1), _USABLE * free_bytes(device)
    fit = bisect.bisect_right(chunks, budget, key=lambda chunk: simulation.footprint("decode_exact", chunk).activations)
    return max(1, fit)
