"""Peak memory of a generation, without weights and without a GPU: ``svdlab memory``.

The networks run on tensors that have a shape and no data, while every storage that comes and goes is counted. An
accelerator is simulated on the meta device; a CPU, where layers prepare their weights and normalise in their own way,
with FakeTensorMode. What no simulation sees: an accelerator's context and its kernels' own workspaces.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from svdlab.cli.options import JSON, check_device, settings_options
from svdlab.files import check_folder, write_json
from svdlab.svd import VAE, CLIPVision, UNet
from svdlab.svd.checkpoint import ARCHITECTURES, Configs, load_configs, resolve_size
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import decode_latents, predict_noise

GIB = 2**30
NETWORKS: dict[str, type[Any]] = {"image_encoder": CLIPVision, "vae": VAE, "unet": UNet}
# Of a device's free memory: the rest is for fragments and for kernels' workspaces.
_USABLE = 0.9


if torch.backends.mkldnn.is_available():

    @torch.library.register_fake("mkldnn::_reorder_convolution_weight")
    @torch.library.register_fake("mkldnn::_reorder_linear_weight")
    def _blocked_weight(weight: Tensor, *layout: Any) -> Tensor:
        """The blocked weight of ``layers.Packed`` is as large as the plain one."""
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


# --- the stages of a generation, on real tensors as well as on empty ones ---

New = Callable[..., Tensor]
Call = Callable[[Any, New, "int | None"], Any]
# Which network runs in which stage, in order of execution.
STAGES = {
    "image_encoder": "image_encoder",
    "vae_encode": "vae",
    "unet_batched": "unet",
    "unet_sequential": "unet",
    "decode_parity": "vae",
    "decode_exact": "vae",
}


def stage_calls(configs: Configs, settings: GenerationSettings) -> dict[str, Call]:
    """What each stage computes: called with its network, a maker of tensors (``torch.empty``) and a decode chunk.

    Args:
        configs: the architecture.
        settings: with height, width and number of frames.
    """
    videos, frames, scale = settings.num_videos_per_prompt, settings.num_frames, configs.vae.scale_factor
    assert frames and settings.height and settings.width
    pixels, size = (settings.height, settings.width), (settings.height // scale, settings.width // scale)
    guided = max(settings.min_guidance_scale, settings.max_guidance_scale) > 1
    batch = videos * (2 if guided else 1)

    def predict(cfg: str) -> Call:
        def call(unet: UNet, new: New, chunk: int | None) -> Tensor:
            token, ids = new(batch, 1, configs.image_encoder.projection_dim), new(batch, 3)
            sample = new(batch, frames, unet.config.in_channels, *size)
            return predict_noise(
                unet, sample, new(1), unet.condition(token, ids, frames), cfg=cfg if guided else "batched"
            )

        return call

    def decode(exact: bool) -> Call:
        def call(vae: VAE, new: New, chunk: int | None) -> Tensor:
            decoded = decode_latents(vae, new(videos, frames, vae.config.latent_channels, *size), chunk, exact)
            return decoded.to(torch.promote_types(decoded.dtype, torch.float32))

        return call

    return {
        "image_encoder": lambda tower, new, chunk: tower(new(1, 3, *(tower.config.image_size,) * 2)),
        "vae_encode": lambda vae, new, chunk: vae.encode(new(1, 3, *pixels)),
        "unet_batched": predict("batched"),
        "unet_sequential": predict("sequential"),
        "decode_parity": decode(exact=False),
        "decode_exact": decode(exact=True),
    }


@dataclass(frozen=True)
class Stage:
    """Memory of one stage.

    Attributes:
        name: a key of ``STAGES``.
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
        offload: each network is on the device only while it runs.
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
    """The memory of one generation, stage by stage.

    Args:
        configs: the architecture.
        settings: with height, width and number of frames.
        device: where it would run; any accelerator is simulated alike.
    """

    def __init__(self, configs: Configs, settings: GenerationSettings, device: str | torch.device = "cuda"):
        self.configs, self.settings = configs, settings
        self._place = "cpu" if torch.device(device).type == "cpu" else "meta"
        self._mode: AbstractContextManager[Any] = FakeTensorMode() if self._place == "cpu" else nullcontext()
        self._networks: dict[tuple[str, torch.dtype], tuple[nn.Module, int]] = {}
        self._stages: dict[tuple[str, int | None], Stage] = {}

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each network at rest."""
        return {name: self._network(name, self.settings.torch_dtype)[1] for name in NETWORKS}

    def stage(self, name: str, chunk: int | None = None) -> Stage:
        """One stage; ``chunk`` is for the decodes, by default what ``decode_chunk_size=None`` gives."""
        dtype, frames = self.settings.torch_dtype, self.settings.num_frames or 1
        if name == "vae_encode":
            dtype = self.configs.vae.encoder_dtype(dtype)
        if name.startswith("decode"):
            chunk = min(chunk or (2 if name == "decode_exact" else frames), frames)
        else:
            chunk = None
        if (name, chunk) not in self._stages:
            network, weights = self._network(STAGES[name], dtype)
            call = stage_calls(self.configs, self.settings)[name]
            activations = self._run(lambda new: call(network, new, chunk), dtype).peak
            self._stages[name, chunk] = Stage(name, chunk, weights, activations)
        return self._stages[name, chunk]

    def flops(self, name: str, chunk: int | None = None) -> int:
        """Multiplications and additions of a stage's products, convolutions and attention."""
        network, _ = self._network(STAGES[name], self.settings.torch_dtype)
        call = stage_calls(self.configs, self.settings)[name]
        with FlopCounterMode(display=False) as counter:
            self._run(lambda new: call(network, new, chunk), self.settings.torch_dtype)
        return counter.get_total_flops()

    def peak(self, stage: Stage, offload: bool) -> int:
        """Bytes on the device in a stage: with the other networks' weights unless they are offloaded."""
        network = STAGES[stage.name]
        others = 0 if offload else sum(size for name, size in self.weights.items() if name != network)
        return stage.peak + others

    def option(self, cfg: str, offload: bool, decode: str, budget: float) -> Option:
        """The largest decode chunk within a budget in bytes, if any."""
        names = ("image_encoder", "vae_encode", f"unet_{cfg}")
        peak = max(self.peak(self.stage(name), offload) for name in names)

        def decode_peak(chunk: int) -> int:
            return self.peak(self.stage(f"decode_{decode}", chunk), offload)

        # Memory grows with the chunk, so that as many sizes fit as the largest one that does.
        chunk = bisect.bisect_right(range(1, (self.settings.num_frames or 1) + 1), budget, key=decode_peak)
        peak = max(peak, decode_peak(chunk or 1))
        return Option(cfg, offload, decode, chunk or None, peak, peak <= budget)

    def options(self, budget: float) -> list[Option]:
        """Every way to run it, in the order to try them: exact first, then with the least transfers and passes."""
        ways = itertools.product(("exact", "parity"), (False, True), ("batched", "sequential"))
        return [self.option(cfg, offload, decode, budget) for decode, offload, cfg in ways]

    def _run(self, function: Callable[[New], Any], dtype: torch.dtype) -> LiveStorages:
        """Call a function with a maker of empty tensors, and count."""
        new = functools.partial(torch.empty, dtype=dtype, device=self._place)
        fused = nullcontext() if self._place == "cpu" or dtype == torch.float64 else _FusedAttention()
        with self._mode, fused, torch.no_grad(), LiveStorages() as live:
            function(new)
        return live

    def _network(self, name: str, dtype: torch.dtype) -> tuple[Any, int]:
        """A network without data, and the bytes that it and what its layers prepare of their weights would take."""
        if (name, dtype) not in self._networks:
            with torch.device("meta"):
                network = NETWORKS[name](getattr(self.configs, name))
            shapes = {key: value.shape for key, value in network.state_dict().items()}
            with self._mode:
                state = {key: torch.empty(shape, dtype=dtype, device=self._place) for key, shape in shapes.items()}
            network.load_state_dict(state, assign=True)
            network.eval().requires_grad_(False)
            side = 8 * self.configs.vae.scale_factor
            small = self.settings.replace(height=side, width=side, num_frames=2, num_videos_per_prompt=1)
            calls = [call for key, call in stage_calls(self.configs, small).items() if STAGES[key] == name]
            prepared = self._run(lambda new: [call(network, new, 1) for call in calls] and None, dtype).live
            own = sum(value.nbytes for value in state.values())
            self._networks[name, dtype] = network, own + prepared
        return self._networks[name, dtype]


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


def largest_chunk(configs: Configs, settings: GenerationSettings, device: str | torch.device) -> int:
    """The largest exact decode chunk whose activations fit what is free on a device now; at least 1."""
    simulation = _simulation(configs, settings.replace(seed=0), torch.device(device).type)
    chunks, budget = range(1, (settings.num_frames or 1) + 1), _USABLE * free_bytes(device)
    fit = bisect.bisect_right(chunks, budget, key=lambda chunk: simulation.stage("decode_exact", chunk).activations)
    return max(1, fit)


@functools.lru_cache(maxsize=4)
def _simulation(configs: Configs, settings: GenerationSettings, device: str) -> Simulation:
    """Kept, so that a sweep simulates once."""
    return Simulation(configs, settings, device)


# --- the command ---


@click.command()
@click.option(
    "--model",
    default="svd-xt",
    show_default=True,
    help=f"Whose architecture: {', '.join(ARCHITECTURES)}, embedded, a folder, or a name on the hub.",
)
@click.option("--device", default="cuda", show_default=True, help="Where it would run; it need not be here.")
@click.option(
    "--budget-gib",
    type=click.FloatRange(0, min_open=True),
    help="Say what fits this much device memory, a CUDA context (about half a GiB) not counted.",
)
@JSON
@settings_options
def memory(model: str, device: str, budget_gib: float | None, json_path: str | None, given: dict[str, Any]) -> None:
    """Tell the peak memory of every stage of a generation, without weights and without a GPU.

    With a budget: which ways to run it fit, each with its largest decode chunk, and exit code 1 when none does.
    """
    from rich.console import Console
    from rich.table import Table

    settings = GenerationSettings(**given)
    check_folder(json_path)
    check_device(device)
    configs = load_configs(model)
    settings = resolve_size(settings, configs.unet, configs.vae)
    simulation = Simulation(configs, settings, device)
    chunk = settings.decode_chunk_size
    stages = [simulation.stage(name, chunk if isinstance(chunk, int) else None) for name in STAGES]

    console = Console()
    size = f"{settings.num_frames} frames of {settings.width}x{settings.height}, {settings.dtype}"
    table = Table("stage", title=f"{model}: {size}; GiB", title_justify="left")
    for column in ("chunk", "weights", "activations", "peak", "beside all weights"):
        table.add_column(column, justify="right")
    for stage in stages:
        sizes = (stage.weights, stage.activations, stage.peak, simulation.peak(stage, offload=False))
        table.add_row(stage.name, str(stage.chunk or ""), *(f"{size / GIB:.2f}" for size in sizes))
    console.print(table)
    result: dict[str, Any] = {
        "model": model,
        "device": device,
        "settings": settings.model_dump(),
        "weights_gib": {name: size / GIB for name, size in simulation.weights.items()},
        "stages": [
            {
                "name": s.name,
                "decode_chunk_size": s.chunk,
                "weights_gib": s.weights / GIB,
                "activations_gib": s.activations / GIB,
                "peak_gib": s.peak / GIB,
                "peak_beside_all_weights_gib": simulation.peak(s, offload=False) / GIB,
            }
            for s in stages
        ],
    }
    best = None
    if budget_gib is not None:
        options = simulation.options(budget_gib * GIB)
        best = next((o for o in options if o.fits), None)
        table = Table("guidance", "offload", "decode", title=f"within {budget_gib:g} GiB", title_justify="left")
        for column in ("largest chunk", "peak GiB", "fits"):
            table.add_column(column, justify="right")
        for o in options:
            cells = (o.cfg, "yes" if o.offload else "no", o.decode, str(o.decode_chunk_size or "none"))
            table.add_row(*cells, f"{o.peak / GIB:.2f}", "yes" if o.fits else "no")
        console.print(table)
        if best:
            offload = ", component offload" if best.offload else ""
            click.echo(
                f"fits: {best.cfg} guidance{offload}, {best.decode} decode in chunks of {best.decode_chunk_size}: "
                f"{best.peak / GIB:.2f} GiB of {budget_gib:g}, weights included"
            )
        else:
            least = min(o.peak for o in options)
            click.echo(f"nothing fits {budget_gib:g} GiB: the least is {least / GIB:.2f} GiB")
        result |= {
            "budget_gib": budget_gib,
            "fits": best is not None,
            "decode_chunk_size": best and best.decode_chunk_size,
            "best": best and _option_dict(best),
            "options": [_option_dict(o) for o in options],
        }
    if json_path:
        write_json(json_path, result)
    sys.exit(1 if budget_gib is not None and best is None else 0)


def _option_dict(option: Option) -> dict[str, Any]:
    fields = asdict(option)
    return {**fields, "peak_gib": fields.pop("peak") / GIB}
