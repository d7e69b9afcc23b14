"""svdlab against diffusers in one process, in turns, on the same weights: ``svdlab bench``."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, TypeVar

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import benchmark
from tqdm import tqdm

from svdlab.cli.options import DEVICE, JSON, MODEL, check_device, settings_options
from svdlab.errors import SvdlabError
from svdlab.files import atomic_path, check_folder, write_json
from svdlab.samples import sample_picture
from svdlab.svd import CLIPVisionConfig, UNetConfig, VAEConfig
from svdlab.svd.checkpoint import (
    ARCHITECTURES,
    SVD_SCHEDULER,
    TINY_CLIP,
    TINY_UNET,
    TINY_VAE,
    Components,
    Configs,
    ImageNormalization,
    channels_last,
    randomize_,
    resolve_size,
)
from svdlab.svd.memory import GIB, NETWORKS, STAGES, Simulation, measured_peak
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import decode_latents, predict_noise

SVDLAB, DIFFUSERS, COMPILED, SVDLAB_COMPILED = "svdlab", "diffusers", "compiled", "svdlab_compiled"
CASES = ("unet", "growth", "decode", "clip", "generation", "full-generation")
# Sizes of a case on CPUs, where two cores shall be done within the hour; accelerators take the published size.
_CPU_SIZES: dict[str, dict[str, int]] = {
    "unet": {"height": 320, "width": 320, "num_frames": 7},
    "decode": {"height": 192, "width": 192, "num_frames": 7},
    "full-generation": {"height": 192, "width": 192, "num_frames": 7},
}
_FULL_SIZE = {"height": 576, "width": 1024, "num_frames": 14}
_QUICK_SIZE = {"height": 64, "width": 64, "num_frames": 3}
# One axis grows while the other stays: numbers of frames, and sides in pixels.
_GROWTH: dict[str, Sequence[int]] = {"frames": (2, 4, 8), "side": (96, 128, 192)}
_CUDA_GROWTH: dict[str, Sequence[int]] = {"frames": (4, 8, 16), "side": (256, 384, 576)}
_QUICK_GROWTH: dict[str, Sequence[int]] = {"frames": (2, 4), "side": (64, 96)}


@dataclass(frozen=True)
class Timing:
    """One implementation in one case.

    Attributes:
        seconds: of every run.
        peak: bytes at the peak of a run, weights not counted; what the layers prepare of them is.
    """

    seconds: tuple[float, ...]
    peak: int

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class CaseResult:
    """One case in one dtype.

    Attributes:
        name, dtype: which.
        size: height, width, frames, and steps of a generation.
        flops: of svdlab's run.
        timings: by implementation; the runs of one index followed each other.
    """

    name: str
    dtype: str
    size: dict[str, int]
    flops: int
    timings: dict[str, Timing]

    def ratios(self, other: str) -> list[float]:
        """How many times as long as svdlab another implementation took, pair by pair."""
        pairs = zip(self.timings[other].seconds, self.timings[SVDLAB].seconds, strict=True)
        return [theirs / own for theirs, own in pairs]

    def to_dict(self, peak_flops: float) -> dict[str, Any]:
        """For JSON: medians and ranges in seconds, ratios, FLOP/s beside the machine's own peak.

        Args:
            peak_flops: what the machine's largest products reach in this dtype, in FLOP/s.
        """
        result: dict[str, Any] = {"name": self.name, "dtype": self.dtype, **self.size}
        for name, timing in self.timings.items():
            result[f"{name}_s"] = timing.median
            result[f"{name}_range_s"] = [min(timing.seconds), max(timing.seconds)]
            result[f"{name}_peak_gib"] = timing.peak / GIB
            result[f"{name}_of_matrix_peak"] = self.flops / timing.median / peak_flops
        for name in self.timings.keys() - {SVDLAB}:
            ratios = self.ratios(name)
            prefix = "" if name == DIFFUSERS else f"{name}_"
            result[f"{prefix}ratio"] = statistics.median(ratios)
            result[f"{prefix}ratio_range"] = [min(ratios), max(ratios)]
        result |= {"pairs": len(self.timings[SVDLAB].seconds), "tflop": self.flops / 1e12}
        return {**result, "floor_s": self.flops / peak_flops}


def alternate(calls: Mapping[str, Callable[[], Any]], pairs: int, device: str, bar: Any = None) -> dict[str, Timing]:
    """Time implementations in turns: whatever else the machine does falls on all of them alike.

    Args:
        calls: what to run, by implementation.
        pairs: how often each is timed, after a run that warms it up and measures its memory.
        device: where they run.
        bar: advanced by one for every run.
    """
    peaks: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        if name in (COMPILED, SVDLAB_COMPILED):
            call()  # what the compiler itself takes is not the network's
        peaks[name] = measured_peak(call, device)
        _advance(bar)
    for i in range(pairs):
        # The second place may be the better one: each gets it in turn.
        for name in list(calls) if i % 2 == 0 else reversed(list(calls)):
            seconds[name].append(timeit.Timer(calls[name], timer=benchmark.timer).timeit(1))
            _advance(bar)
    return {name: Timing(tuple(seconds[name]), peaks[name]) for name in calls}


def _advance(bar: Any) -> None:
    if bar is not None:
        bar.update()


def matrix_peak(dtype: torch.dtype, device: str, quick: bool = False) -> float:
    """FLOP/s of the fastest of a few large products and convolutions: what no network on this machine exceeds."""
    n = 512 if quick else 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    images = torch.randn(4, 256, n // 32, n // 32, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    kernels = (torch.randn(256, 256, k, k, dtype=dtype, device=device) for k in (1, 3))
    pixels = 4 * (n // 32) ** 2
    tries: list[tuple[int, Callable[[], Any]]] = [(2 * n**3, lambda: torch.mm(a, b))]
    for kernel in kernels:
        weight = kernel.to(memory_format=torch.channels_last)
        flops = 2 * pixels * weight.numel()
        tries.append((flops, lambda w=weight: F.conv2d(images, w, padding=w.shape[-1] // 2)))  # type: ignore[misc]
    best = 0.0
    for flops, call in tries:
        timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        best = max(best, flops / min(timer.blocked_autorange(min_run_time=0.1 if quick else 1.0).times))
    return best


T = TypeVar("T")


def apart(function: Callable[..., T], *args: Any) -> T:
    """Call in a process of its own.

    A case's time depends on what its process did before: the C library keeps freed memory or gives it back by what it
    has seen, and fresh pages have made diffusers' decode 1.5 times as slow.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


Calls = dict[str, Callable[[], Any]]
# svdlab's call and diffusers', each a function of its network, so that a compiled one gets the same.
Work = tuple[Callable[[Any], Any], Callable[[Any], Any]]


class Bench:
    """Everything of one ``svdlab bench``: networks are made once, on weights that both implementations share.

    Args:
        configs: the architecture whose networks are timed.
        model: the checkpoint of the whole generation.
        device: where.
        pairs: how often each implementation is timed.
        compile: whether to time both under torch.compile, too.
        given: settings that override a case's own.
        sizes: of the cases, by name.
        growth: numbers of frames and sides.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        configs: Configs,
        model: str,
        device: str,
        *,
        pairs: int,
        compile: bool,
        given: Mapping[str, Any],
        sizes: Mapping[str, Mapping[str, int]],
        growth: Mapping[str, Sequence[int]],
        progress: bool = True,
    ):
        self.configs, self.model, self.device = configs, model, device
        self.pairs, self.compile, self.given = pairs, compile, dict(given)
        self.sizes, self.growth_sizes, self.progress = sizes, growth, progress
        self._kept: tuple[tuple[str, str], tuple[Any, Any]] | None = None

    def settings(self, case: str, dtype: str, **changes: Any) -> GenerationSettings:
        """A case's settings: its own size, then what was given, then the changes."""
        guidance = {"min_guidance_scale": 1.0, "max_guidance_scale": 3.0}  # a step is timed with it
        given = {**self.sizes.get(case, {}), **self.given, "dtype": dtype, **guidance, **changes}
        settings = GenerationSettings(**given)
        return resolve_size(settings, self.configs.unet, self.configs.vae)

    def run(self, case: str, dtype: str) -> CaseResult:
        """Time one case, other than "growth", in one dtype."""
        if case in ("generation", "full-generation"):
            settings, flops, calls = self._generation(case, dtype)
        else:
            settings = self.settings(case, dtype)
            stage, calls = self._stage(case, settings)
            flops = Simulation(self.configs, settings, "cuda").flops(stage)
        size = {"height": settings.height or 0, "width": settings.width or 0, "num_frames": settings.num_frames or 0}
        if case == "clip":
            size = {"height": self.configs.image_encoder.image_size, "width": self.configs.image_encoder.image_size}
            size["num_frames"] = settings.num_videos_per_prompt
        if "generation" in case:
            size["num_inference_steps"] = settings.num_inference_steps
        return CaseResult(case, dtype, size, flops, self._time(case, dtype, calls))

    def grow(self, dtype: str) -> list[dict[str, Any]]:
        """How the seconds of a UNet step grow with frames and with pixels: the exponents of a power law."""
        found = []
        frames, sides = self.growth_sizes["frames"], self.growth_sizes["side"]
        middle = frames[len(frames) // 2], sides[len(sides) // 2]
        for axis, points in (("frames", [(f, middle[1]) for f in frames]), ("pixels", [(middle[0], s) for s in sides])):
            results = []
            for number, side in points:
                settings = self.settings("unet", dtype, num_frames=number, height=side, width=side)
                _, calls = self._stage("unet", settings)
                flops = Simulation(self.configs, settings, "cuda").flops("unet_batched")
                timings = self._time(f"{number} frames of {side}x{side}", dtype, calls)
                results.append((number if axis == "frames" else side * side, flops, timings))
            x = [r[0] for r in results]
            row: dict[str, Any] = {"axis": axis, "dtype": dtype, "frames": [p[0] for p in points], "values": x}
            row |= {"side": [p[1] for p in points], "flop_exponent": exponent(x, [r[1] for r in results])}
            for name in results[0][2]:
                row[f"{name}_s"] = [r[2][name].median for r in results]
                row[f"{name}_exponent"] = exponent(x, row[f"{name}_s"])
            found.append(row)
        return found

    def _time(self, case: str, dtype: str, calls: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        total = len(calls) * (self.pairs + 1)
        bar = tqdm(total=total, desc=f"{case} {dtype}", unit="run", disable=not self.progress)
        with bar, torch.no_grad():
            return alternate(calls, self.pairs, self.device, bar)

    def _network(self, name: str, dtype: str) -> tuple[Any, Any]:
        """svdlab's and diffusers' network on the same random weights; one at a time, for a full-size one is large."""
        from svdlab.parity.reference import diffusers_network

        if self._kept is None or self._kept[0] != (name, dtype):
            self._kept = None
            with torch.device("meta"):
                empty = NETWORKS[name](getattr(self.configs, name))
            own = randomize_(empty.to_empty(device="cpu"), seed=0).to(self.device, getattr(torch, dtype))
            own.eval().requires_grad_(False)
            twin = diffusers_network(name, own)
            self._kept = (name, dtype), (own if self.device == "cpu" else channels_last(own), twin)
        return self._kept[1]

    def _stage(self, case: str, settings: GenerationSettings) -> tuple[str, Calls]:
        """The stage that a case is, and one network's work in both implementations, on equal inputs."""
        stage = {"unet": f"unet_{settings.cfg}", "decode": f"decode_{settings.decode}", "clip": "image_encoder"}[case]
        own, twin = self._network(STAGES[stage], settings.dtype)
        with torch.no_grad():
            work = {"unet": self._unet, "decode": self._decode, "clip": self._clip}[case](own, settings)
        own_call, twin_call = work
        calls = {SVDLAB: lambda: own_call(own), DIFFUSERS: lambda: twin_call(twin)}
        if self.compile:
            compiled = compiled_vae(twin) if case == "decode" else torch.compile(twin)
            calls[COMPILED] = lambda: twin_call(compiled)
            if case != "decode":  # the exact decode is no one graph
                own_compiled = torch.compile(own)
                calls[SVDLAB_COMPILED] = lambda: own_call(own_compiled)
        return stage, calls

    def _unet(self, own: Any, settings: GenerationSettings) -> Work:
        """One denoising step; what svdlab computes once a generation, it does before."""
        frames, scale = settings.num_frames, self.configs.vae.scale_factor
        assert frames and settings.height and settings.width
        batch, size = 2 * settings.num_videos_per_prompt, (settings.height // scale, settings.width // scale)
        sample = self._new(settings, batch, frames, own.config.in_channels, *size)
        token = self._new(settings, batch, 1, self.configs.image_encoder.projection_dim)
        ids, time = self._new(settings, batch, 3), torch.tensor(1.0, device=self.device)
        conditioning = own.condition(token, ids, frames)
        return (
            lambda unet: predict_noise(unet, sample, time, conditioning, settings.cfg),
            lambda twin: twin(sample, time, token, ids).sample,
        )

    def _decode(self, own: Any, settings: GenerationSettings) -> Work:
        frames, scale, chunk = settings.num_frames, self.configs.vae.scale_factor, settings.decode_chunk_size
        assert frames and settings.height and settings.width and chunk != "auto"
        size = (settings.height // scale, settings.width // scale)
        latents = self._new(settings, settings.num_videos_per_prompt, frames, own.config.latent_channels, *size)
        exact = settings.decode == "exact"
        parts = latents.flatten(0, 1).split(frames if exact else chunk or frames)
        return (
            lambda vae: decode_latents(vae, latents, chunk, exact),
            lambda twin: [twin.decode(part, len(part)).sample for part in parts],
        )

    def _clip(self, own: Any, settings: GenerationSettings) -> Work:
        pixels = self._new(settings, settings.num_videos_per_prompt, 3, *(own.config.image_size,) * 2)
        return lambda tower: tower(pixels), lambda twin: twin(pixels).image_embeds

    def _new(self, settings: GenerationSettings, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(settings.seed)
        return torch.randn(shape, generator=generator).to(self.device, settings.torch_dtype)

    def _generation(self, case: str, dtype: str) -> tuple[GenerationSettings, int, Calls]:
        """A whole generation: of the checkpoint, or of the full-size networks with random weights."""
        from svdlab.parity.reference import diffusers_network, diffusers_pipeline

        settings = GenerationSettings(**{**self.sizes.get(case, {}), **self.given, "dtype": dtype})
        if case == "generation":
            pipe = SVDPipeline.from_pretrained(self.model, dtype=settings.torch_dtype, device=self.device)
            twins = {name: diffusers_network(name, getattr(pipe, name)) for name in NETWORKS}
        else:
            pairs = {name: self._network(name, dtype) for name in NETWORKS}
            scheduler = EulerScheduler.from_config(SVD_SCHEDULER)
            own = {name: pair[0] for name, pair in pairs.items()}
            pipe = SVDPipeline(Components(**own, scheduler=scheduler, feature_extractor=ImageNormalization()))
            twins = {name: pair[1] for name, pair in pairs.items()}
        settings = pipe.resolve(settings)
        image = sample_picture(self.model)

        def options() -> dict[str, Any]:
            known = settings.model_dump(exclude={"seed", "dtype", "decode", "cfg"})
            return {**known, "generator": torch.Generator().manual_seed(settings.seed), "output_type": "pt"}

        def run(own: SVDPipeline) -> Any:
            return own(image, **options(), decode=settings.decode, cfg=settings.cfg, progress=False)

        theirs = diffusers_pipeline(**twins, scheduler=pipe.scheduler)
        calls: Calls = {SVDLAB: lambda: run(pipe), DIFFUSERS: lambda: theirs(image, **options())}
        if self.compile:
            compiled: dict[str, Any] = {name: torch.compile(twin) for name, twin in twins.items() if name != "vae"}
            faster = diffusers_pipeline(**compiled, vae=compiled_vae(twins["vae"]), scheduler=pipe.scheduler)
            calls[COMPILED] = lambda: faster(image, **options())
            unet: Any = torch.compile(pipe.unet)
            own_compiled = SVDPipeline(replace(pipe.components, unet=unet))
            calls[SVDLAB_COMPILED] = lambda: run(own_compiled)
        simulation, steps = Simulation(pipe.configs, settings, "cuda"), settings.num_inference_steps
        once = sum(simulation.flops(name) for name in ("image_encoder", "vae_encode", "decode_exact"))
        return settings, once + steps * simulation.flops("unet_batched"), calls


def compiled_vae(vae: Any) -> Any:
    """The same VAE, its decoder under torch.compile; ``vae`` itself stays as it is."""
    other = copy.copy(vae)
    other._modules = {**vae._modules, "decoder": torch.compile(vae.decoder)}
    return other


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The p of the power law y = c * x^p that lies closest in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# --- the command ---


@click.command()
@click.option(
    "--case", "cases", type=click.Choice(CASES), multiple=True, help="Which; default: all that fit the device."
)
@click.option(
    "--pairs", type=click.IntRange(1), help="Timed runs of each implementation. [default: 3 on CPUs, else 10]"
)
@click.option("--compile", is_flag=True, help="Time both under torch.compile, too (of svdlab's decode nothing).")
@click.option("--quick", is_flag=True, help="Tiny networks and sizes: tries the command in a minute, measures nothing.")
@click.option("--plot", "plot_path", metavar="FILE", help="Draw the result: .png, .svg or .pdf.")
@MODEL
@DEVICE
@JSON
@settings_options
def bench(
    cases: Sequence[str],
    pairs: int | None,
    compile: bool,
    quick: bool,
    plot_path: str | None,
    model: str,
    device: str,
    json_path: str | None,
    given: dict[str, Any],
) -> None:
    """Time svdlab against diffusers, in turns in one process, and tell how far both are from the machine's limit.

    Each case has a process of its own. The networks are of full size with random weights; "generation" runs --model.
    Without --dtype: float32 and bfloat16 on CPUs, float16 on CUDA. "full-generation" runs by default on CUDA alone:
    14 frames of 1024x576 in 25 steps. On two quiet CPU cores expect half an hour and 16 GiB; height, width and number
    of frames change the sizes.
    """
    from rich.console import Console

    GenerationSettings(**given)
    check_device(device)
    for path in (json_path, plot_path):
        check_folder(path)
    if plot_path and not plot_path.endswith((".png", ".svg", ".pdf")):
        raise SvdlabError(f"--plot: got {plot_path!r}, allowed: .png, .svg, .pdf")
    if given.get("decode_chunk_size") == "auto":
        raise SvdlabError("decode_chunk_size: got 'auto', allowed here: integer >= 1 (the same work on every machine)")
    cuda = torch.device(device).type == "cuda"
    if not cuda and torch.device(device).type != "cpu":
        raise SvdlabError(f"--device: got {device!r}, allowed here: cpu, cuda")
    if cuda and not torch.cuda.is_available():
        raise SvdlabError(f"--device: got {device!r}, but torch sees no CUDA device here")
    chosen = list(cases) or [c for c in CASES if cuda or quick or c != "full-generation"]
    dtypes = [given["dtype"]] if "dtype" in given else ["float16"] if cuda else ["float32", "bfloat16"]
    sizes: dict[str, dict[str, int]] = dict.fromkeys(_CPU_SIZES, _FULL_SIZE) if cuda else _CPU_SIZES
    growth = _CUDA_GROWTH if cuda else _GROWTH
    configs = ARCHITECTURES["svd"]
    if quick:
        configs = Configs(UNetConfig(**TINY_UNET), VAEConfig(**TINY_VAE), CLIPVisionConfig(**TINY_CLIP))
        sizes, growth = dict.fromkeys([*_CPU_SIZES, "generation"], _QUICK_SIZE), _QUICK_GROWTH
        given = {"num_inference_steps": 2, **given}
    runner = Bench(
        configs,
        model,
        device,
        pairs=pairs or (2 if quick else 10 if cuda else 3),
        compile=compile,
        given=given,
        sizes=sizes,
        growth=growth,
    )
    call: Callable[..., Any] = (lambda function, *args: function(*args)) if quick else apart
    results: list[CaseResult] = []
    grown: list[dict[str, Any]] = []
    peaks: dict[str, float] = {}
    for dtype in dtypes:
        for case in sorted(chosen, key=CASES.index):
            # The best of several moments: a busy one says nothing about the limit.
            peaks[dtype] = max(peaks.get(dtype, 0.0), matrix_peak(getattr(torch, dtype), device, quick))
            if case == "growth":
                grown += call(runner.grow, dtype)
            else:
                results.append(call(runner.run, case, dtype))
    found = {
        "quick": quick,
        "machine": _machine(device),
        "matrix_peak_gflops": {dtype: peak / 1e9 for dtype, peak in peaks.items()},
        "cases": [r.to_dict(peaks[r.dtype]) for r in results],
        "growth": grown,
    }
    console = Console()
    console.width = max(console.width, 150)
    for table in tables(found):
        console.print(table)
    if json_path:
        write_json(json_path, found)
    if plot_path:
        from svdlab.notebook.figures import plot_bench

        with atomic_path(plot_path) as temporary:
            plot_bench(found).savefig(temporary, dpi=144)


def _machine(device: str) -> dict[str, str | int]:
    on_cuda = torch.device(device).type == "cuda"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    name = torch.cuda.get_device_name(device) if on_cuda else f"{platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads(), **versions}


def tables(found: Mapping[str, Any]) -> list[Any]:
    """A benchmark's JSON as tables: the cases, then the growth."""
    from rich.box import SIMPLE
    from rich.table import Table

    machine = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    peaks = ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in found["matrix_peak_gflops"].items())
    cases = Table(box=SIMPLE, title=f"{machine}\nmatrix peak, GFLOP/s: {peaks}", title_justify="left")
    for name in CASE_COLUMNS:
        cases.add_column(name, no_wrap=True, justify="left" if name in CASE_COLUMNS[:3] else "right")
    for row in case_rows(found):
        cases.add_row(*row)
    growth = Table(box=SIMPLE, title="cost of a UNet step: exponents of a power law", title_justify="left")
    for name in GROWTH_COLUMNS:
        growth.add_column(name, justify="left" if name in GROWTH_COLUMNS[:3] else "right")
    for row in growth_rows(found):
        growth.add_row(*row)
    return [table for table in (cases, growth) if table.row_count]


CASE_COLUMNS = ("case", "dtype", "size", "svdlab s", "diffusers s", "ratio", "of matrix peak", "peak GiB", "compiled")
GROWTH_COLUMNS = ("grows", "dtype", "values", "svdlab", "diffusers", "FLOP")


def case_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells of ``CASE_COLUMNS``: medians, and ratios with their smallest and largest; svdlab / diffusers.

    "compiled" is how many times svdlab's time the compiled networks take.
    """
    rows = []
    for case in found["cases"]:
        steps = f", {case['num_inference_steps']} steps" if "num_inference_steps" in case else ""
        size = f"{case['num_frames']} x {case['width']}x{case['height']}{steps}"
        both = [f"{case[f'{name}_of_matrix_peak']:.0%}" for name in (SVDLAB, DIFFUSERS)]
        memory = [f"{case[f'{name}_peak_gib']:.2f}" for name in (SVDLAB, DIFFUSERS)]
        compiled = " / ".join(
            f"{case[f'{name}_ratio']:.2f}" for name in (SVDLAB_COMPILED, COMPILED) if f"{name}_ratio" in case
        )
        seconds = [f"{case[f'{name}_s']:.3g}" for name in (SVDLAB, DIFFUSERS)]
        rows.append(
            [case["name"], case["dtype"], size, *seconds, _ratio(case), " / ".join(both), " / ".join(memory), compiled]
        )
    return rows


def _ratio(case: Mapping[str, Any]) -> str:
    low, high = case["ratio_range"]
    return f"{case['ratio']:.2f} ({low:.2f}-{high:.2f})"


def growth_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells of ``GROWTH_COLUMNS``."""
    rows = []
    for row in found["growth"]:
        exponents = [f"{row[f'{name}_exponent']:.2f}" for name in (SVDLAB, DIFFUSERS, "flop")]
        rows.append([row["axis"], row["dtype"], ", ".join(str(v) for v in row["values"]), *exponents])
    return rows
