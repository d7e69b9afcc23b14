"""A benchmark's JSON as tables, for a terminal and for ``docs/performance.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svdlab.bench.timing import COMPILED, DIFFUSERS, SVDLAB, SVDLAB_COMPILED
from svdlab.tables import Column, Table


def case_table(found: Mapping[str, Any], title: str = "") -> Table:
    """One row per case: medians, and ratios with their smallest and largest; where two share a cell, svdlab's is first.

    "compiled" is how many times svdlab's time the compiled networks take.
    """
    numbers = ("svdlab s", "diffusers s", "ratio", "% of peak GEMM", "peak GiB", "compiled")
    rows = []
    for case in found["cases"]:
        steps = f", {case['num_inference_steps']} steps" if "num_inference_steps" in case else ""
        size = f"{case['num_frames']} x {case['width']}x{case['height']}{steps}"
        seconds = [f"{case[f'{name}_s']:.3g}" for name in (SVDLAB, DIFFUSERS)]
        low, high = case["ratio_range"]
        ratio = f"{case['ratio']:.2f} ({low:.2f}-{high:.2f})"
        shares = " / ".join(f"{case[f'{name}_of_matrix_peak']:.0%}" for name in (SVDLAB, DIFFUSERS))
        memory = " / ".join(f"{case[f'{name}_peak_gib']:.2f}" for name in (SVDLAB, DIFFUSERS))
        compiled = " / ".join(
            f"{case[f'{name}_ratio']:.2f}" for name in (SVDLAB_COMPILED, COMPILED) if f"{name}_ratio" in case
        )
        rows.append([case["name"], case["dtype"], size, *seconds, ratio, shares, memory, compiled])
    return Table(_columns(("case", "dtype", "size"), numbers), rows, title)


def profile_table(found: Mapping[str, Any], title: str = "") -> Table:
    """One row per profiled case and implementation: milliseconds by kind of operation, and their sum."""
    profiled = [case for case in found["cases"] if "profile_s" in case]
    kinds = list(profiled[0]["profile_s"][SVDLAB]) if profiled else []
    rows = []
    for case in profiled:
        for name, seconds in case["profile_s"].items():
            cells = (f"{1e3 * value:.3g}" for value in (*seconds.values(), sum(seconds.values())))
            rows.append([case["name"], case["dtype"], name.replace("_", " "), *cells])
    return Table(_columns(("case", "dtype", "of"), (*kinds, "sum, ms")), rows, title)


def growth_table(found: Mapping[str, Any], title: str = "") -> Table:
    """One row per axis: the exponents with which the seconds of a UNet step, and its FLOP, grow."""
    rows = []
    for row in found["growth"]:
        exponents = [f"{row[f'{name}_exponent']:.2f}" for name in (SVDLAB, DIFFUSERS, "flop")]
        rows.append([row["axis"], row["dtype"], ", ".join(str(v) for v in row["values"]), *exponents])
    return Table(_columns(("grows", "dtype", "values"), (SVDLAB, DIFFUSERS, "FLOP")), rows, title)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The cases, then the growth and the profiles, as far as they were measured; the machine is in the title."""
    machine = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    peaks = ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in found["matrix_peak_gflops"].items())
    beside = f"beside {found['beside']} busy processes\n" if found.get("beside") else ""
    cases = case_table(found, f"{machine}\n{beside}peak GEMM throughput, GFLOP/s: {peaks}")
    growth = growth_table(found, "cost of a UNet step: exponents of a power law")
    profiles = profile_table(found, "milliseconds by kind of operation, under the profiler; medians")
    return [table for table in (cases, growth, profiles) if table.rows]


def _columns(texts: Sequence[str], numbers: Sequence[str]) -> list[Column]:
    return [*map(Column, texts), *(Column(name, "right") for name in numbers)]
