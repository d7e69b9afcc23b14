"""Where the time of a case goes: seconds by kind of operation, as torch's profiler sees them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Of an operator's name, the first that matches; what matches none is OTHER.
KINDS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "attention": re.compile(r"scaled_dot_product|flash|softmax|fmha"),
        "convolutions": re.compile(r"conv|cudnn.*(fprop|wgrad)|winograd"),
        "linear layers": re.compile(r"(?<!bi)(?<!tri)linear|mm_?$|matmul|gemm|cutlass"),
        "norms": re.compile(r"norm|var_mean|std_mean"),
        "copies": re.compile(r"copy|cat$|clone|reorder|memcpy|index|pad"),
        "elementwise": re.compile(
            r"add|sub|mul|div|silu|gelu|sigmoid|lerp|pow|sqrt|exp(?!and)|cos|sin|fill|zero|elementwise"
        ),
    }
)
OTHER = "other"


def profiles(calls: Mapping[str, Callable[[], Any]], runs: int, device: str) -> dict[str, dict[str, float]]:
    """Median seconds by kind of operation of each call, by its name; the calls run in turns.

    Args:
        calls: what has run before, by name.
        runs: how often each.
        device: where.
    """
    found = [{name: seconds_by_kind(call, device) for name, call in calls.items()} for _ in range(runs)]
    return {
        name: {kind: statistics.median(run[name][kind] for run in found) for kind in found[0][name]} for name in calls
    }


def seconds_by_kind(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds that one call spends in each kind of operation, itself and not what it calls.

    What Python does between the operators is not among them. The profiler takes time of its own for each operator, so
    that small ones seem slower than they are.

    Args:
        call: what to profile; it has run before.
        device: where it runs; on "cuda" the seconds are those of the device's kernels.

    Returns:
        The keys of ``KINDS``, then ``OTHER``.
    """
    cuda = torch.device(device).type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as run:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    found = dict.fromkeys((*KINDS, OTHER), 0.0)
    for event in run.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[kind_of(event.key)] += spent / 1e6
    return found


def kind_of(operator: str) -> str:
    """The kind of an operator or kernel, "aten::addmm" or a kernel's C++ name."""
    name = operator.rpartition("::")[2].lower() if operator.startswith(("aten", "mkldnn")) else operator.lower()
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), OTHER)
