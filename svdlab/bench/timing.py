"""Timing implementations in turns, and what the machine itself can reach."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils import benchmark

from svdlab.svd.memory import measured_peak
from svdlab.svd.settings import GIB

SVDLAB, DIFFUSERS, COMPILED, SVDLAB_COMPILED = "svdlab", "diffusers", "compiled", "svdlab_compiled"
Calls = dict[str, Callable[[], Any]]


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
        flops: of the plain network.
        timings: by implementation; the runs of one index followed each other.
        kinds: median seconds by kind of operation, by implementation; empty if no profile was asked for.
    """

    name: str
    dtype: str
    size: dict[str, int]
    flops: int
    timings: dict[str, Timing]
    kinds: dict[str, dict[str, float]] = field(default_factory=dict)

    def ratios(self, other: str) -> list[float]:
        """How many times as long as svdlab another implementation took, pair by pair."""
        pairs = zip(self.timings[other].seconds, self.timings[SVDLAB].seconds, strict=True)
        return [theirs / own for theirs, own in pairs]

    def to_dict(self, peak_flops: float) -> dict[str, Any]:
        """For JSON: medians and ranges in seconds, ratios, and the share of the peak GEMM throughput.

        Args:
            peak_flops: FLOP/s of ``gemm_throughput`` in this dtype.
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
        if self.kinds:
            result["profile_s"] = self.kinds
        return {**result, "floor_s": self.flops / peak_flops}


def alternate(calls: Calls, pairs: int, device: str, on_run: Callable[[], Any] = lambda: None) -> dict[str, Timing]:
    """Time implementations in turns, and measure the memory of each.

    Args:
        calls: what to run, by implementation.
        pairs: how often each is timed, after a run that warms it up and measures its memory.
        device: where they run.
        on_run: called after every run.
    """
    peaks: dict[str, int] = {}
    for name, call in calls.items():
        if name in (COMPILED, SVDLAB_COMPILED):
            call()  # what the compiler itself takes is not the network's
        peaks[name] = measured_peak(call, device)
        on_run()
    seconds = in_turns(calls, pairs, on_run)
    return {name: Timing(seconds[name], peaks[name]) for name in calls}


def in_turns(calls: Calls, pairs: int, on_run: Callable[[], Any] = lambda: None) -> dict[str, tuple[float, ...]]:
    """Seconds of what has run before, in turns: whatever else the machine does falls on all of them alike.

    Args:
        calls: what to run, by name.
        pairs: how often each.
        on_run: called after every run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(pairs):
        # The second place may be the better one: each gets it in turn.
        for name in list(calls) if i % 2 == 0 else reversed(list(calls)):
            seconds[name].append(timeit.Timer(calls[name], timer=benchmark.timer).timeit(1))
            on_run()
    return {name: tuple(found) for name, found in seconds.items()}


def gemm_throughput(dtype: torch.dtype, device: str, quick: bool = False) -> float:
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


def power_law_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The p of the power law y = c * x^p that lies closest in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


T = TypeVar("T")


def in_own_process(function: Callable[..., T], *args: Any) -> T:
    """Call in a process of its own.

    A case's time depends on what its process did before: the C library keeps freed memory or gives it back by what it
    has met, and fresh pages have made diffusers' decode 1.5 times as slow.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """That many processes that do nothing but compute, until it is left."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def machine(device: str) -> dict[str, str | int]:
    """What a timing depends on: the GPU, or the CPU's model and the instruction set that torch uses; versions."""
    about: dict[str, str | int] = {"device": f"{platform.machine()} CPU"}
    if torch.device(device).type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
    else:
        about |= {"model": _cpu_model(), "instruction_set": torch.backends.cpu.get_cpu_capability()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {**about, "threads": torch.get_num_threads(), **versions}


def _cpu_model() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
