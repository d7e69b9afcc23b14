"""The figures of ``docs/performance.md``: what ``svdlab bench`` and ``svdlab memory`` say, and nothing else.

Run ``svdlab bench --json bench.json`` on a quiet machine, then ``python docs/make_performance.py bench.json``; further
files replace the cases that they hold, too. It writes ``docs/performance.png`` and what stands between the markers of
``docs/performance.md``; without a file, what ``svdlab memory`` says and no more. ``--gpu gpu.json`` puts in what
``docs/measure_gpu.py`` measured, ``--frontier frontier.json`` what ``svdlab frontier`` did, ``--cpu one.json --cpu
two.json`` the ratios of ``svdlab bench`` on one kind of CPU after another, and beside other work, ``--profile
profile.json`` where ``svdlab bench --profile`` saw the time go.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from svdlab.bench.frontier import Row, frontier_table
from svdlab.bench.tables import case_table, growth_table, profile_table
from svdlab.bench.timing import DIFFUSERS, SVDLAB
from svdlab.notebook.figures import plot_bench
from svdlab.svd.architectures import ARCHITECTURES
from svdlab.svd.memory import Simulation
from svdlab.svd.settings import GIB, RESERVE_GIB, GenerationSettings
from svdlab.svd.workloads import WORKLOADS
from svdlab.tables import Column, Table

PAGE = Path(__file__).with_name("performance.md")


def put(text: str, name: str, content: str) -> str:
    """The page with new content between a pair of markers."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    assert len(re.findall(pattern, text, re.DOTALL)) == 1, f"{PAGE} has no markers for {name}"
    return re.sub(pattern, lambda found: f"{found[1]}{content}{found[2]}", text, flags=re.DOTALL)


def memory_tables() -> str:
    """What ``svdlab memory`` says of 14 frames of 1024x576 in float16, for cards of several sizes."""
    settings = GenerationSettings(height=576, width=1024, num_frames=14, dtype="float16")
    simulation = Simulation(ARCHITECTURES["svd"], settings)
    rows = []
    for name in WORKLOADS:
        f = simulation.footprint(name)
        rows.append([f.name, str(f.chunk or ""), *(f"{n / GIB:.2f}" for n in (f.weights, f.activations, f.peak))])
    numbers = (Column(name, "right") for name in ("chunk", "weights GiB", "activations GiB", "peak GiB"))
    stages = Table([Column("stage"), *numbers], rows)
    rows = []
    for budget in (6, 8, 12, 16, 24):
        best = next((o for o in simulation.options((budget - RESERVE_GIB) * GIB) if o.fits), None)
        if best is None:
            rows.append([str(budget), "nothing fits"])
        else:
            cells = (best.cfg, "yes" if best.offload else "no", best.decode, str(best.decode_chunk_size))
            rows.append([str(budget), *cells, f"{best.peak / GIB:.2f}"])
    columns = ("GiB", "guidance", "offload", "decode", Column("largest chunk", "right"), Column("peak GiB", "right"))
    return f"{stages.to_markdown()}\n{Table(columns, rows).to_markdown()}"


def main() -> None:
    """Fill the page in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="*", type=Path, help="JSON of svdlab bench")
    parser.add_argument("--gpu", type=Path, help="JSON of docs/measure_gpu.py")
    parser.add_argument("--frontier", type=Path, help="JSON of svdlab frontier")
    parser.add_argument("--profile", type=Path, help="JSON of svdlab bench --profile")
    parser.add_argument("--cpu", action="append", type=Path, help="JSON of svdlab bench, repeatable")
    given = parser.parse_args()
    PAGE.write_text(put(PAGE.read_text(), "memory", memory_tables()))
    if given.bench:
        put_timings(*(json.loads(path.read_text()) for path in given.bench))
    if given.gpu:
        PAGE.write_text(put(PAGE.read_text(), "gpu", gpu_tables(json.loads(given.gpu.read_text()))))
    if given.frontier:
        PAGE.write_text(put(PAGE.read_text(), "frontier", frontier_text(json.loads(given.frontier.read_text()))))
    if given.profile:
        PAGE.write_text(put(PAGE.read_text(), "profile", profile_text(json.loads(given.profile.read_text()))))
    if given.cpu:
        PAGE.write_text(put(PAGE.read_text(), "cpus", cpu_table(json.loads(path.read_text()) for path in given.cpu)))


def machine_text(found: dict[str, Any]) -> str:
    """What a measurement ran on."""
    return ", ".join(f"{name} {value}" for name, value in found["machine"].items())


def frontier_text(found: dict[str, Any]) -> str:
    """What ``svdlab frontier`` measured: the machine, and its table."""
    rows = [
        Row(**{**row, "psnr": math.inf if row["psnr"] is None else row["psnr"]})  # JSON has no infinity
        for row in found["rows"]
    ]
    table = frontier_table(rows).to_markdown()
    return f"Measured on: {machine_text(found)}; {found['images']} first frames.\n\n{table}"


def profile_text(found: dict[str, Any]) -> str:
    """Where the time goes, and what would be left of the ratio if all but products and convolutions took none."""
    lines = []
    for case in found["cases"]:
        sums = {name: sum(kinds.values()) for name, kinds in case["profile_s"].items()}
        own = case["profile_s"][SVDLAB]
        bound = sums[DIFFUSERS] / (own["convolutions"] + own["linear layers"])
        lines.append(
            f"{case['name']}, {case['dtype']}: {sums[DIFFUSERS] / sums[SVDLAB]:.2f} times as fast by these sums; "
            f"{bound:.2f} if nothing but convolutions and linear layers took time in svdlab."
        )
    table = profile_table(found).to_markdown()
    return (
        f"Measured on: {machine_text(found)}. Milliseconds, medians of the runs:\n\n{table}\n" + "\n".join(lines) + "\n"
    )


def cpu_table(files: Iterable[dict[str, Any]]) -> str:
    """A row for every case of every file: how many times as long diffusers takes there."""
    rows = []
    for found in files:
        machine = found["machine"]
        where = [machine["model"], machine["instruction_set"], str(machine["threads"]), str(found.get("beside") or "")]
        for case, row in zip(found["cases"], case_table(found).rows, strict=True):
            rows.append([*where, f"{found['matrix_peak_gflops'][case['dtype']]:.0f}", *row[:6]])
    numbers = (Column(name, "right") for name in ("svdlab s", "diffusers s", "ratio"))
    peak = Column("peak GEMM, GFLOP/s", "right")
    return Table(
        ("CPU", "instructions", "threads", "beside", peak, "case", "dtype", "size", *numbers), rows
    ).to_markdown()


def gpu_tables(found: dict[str, Any]) -> str:
    """What ``docs/measure_gpu.py`` found: the machine, then a table for each part that did not fail."""
    parts = found["parts"]
    tables = []
    if "parity" in parts:
        rows = [[row["dtype"], row["verdict"], f"{row['ratio']:.2f}", row["at"]] for row in parts["parity"]]
        columns = ("parity, embedded checkpoint", "verdict", Column("worst noise ratio", "right"), "at")
        tables.append(Table(columns, rows))
    if "full_size_parity" in parts:
        rows = [[row["dtype"], f"{row['floor']:.2g}", f"{row['ratio']:.2f}"] for row in parts["full_size_parity"]]
        numbers = (Column("diffusers' rounding", "right"), Column("noise ratio", "right"))
        tables.append(Table(("parity, published UNet, random weights", *numbers), rows))
    cases = [case for name in ("generation", "generation_compiled", "step") for case in parts.get(name, ())]
    if cases:
        tables.append(case_table({"cases": cases}))
    if "generation" in parts:
        names = ("simulated_peak_gib", "svdlab_peak_gib", "diffusers_peak_gib")
        rows = [[str(row["num_frames"]), *(f"{row[name]:.2f}" for name in names)] for row in parts["generation"]]
        numbers = (Column(name, "right") for name in ("simulated", "svdlab", "diffusers"))
        tables.append(Table(("GiB beside the weights, frames", *numbers), rows))
    if "kernels" in parts:
        rows = [[row["name"], str(row["kernels"])] for row in parts["kernels"]]
        tables.append(Table(("one denoising step", Column("kernels launched", "right")), rows))
    failed = f"Failed: {', '.join(found['errors'])}.\n\n" if found["errors"] else ""
    return f"Measured on: {machine_text(found)}.\n\n{failed}" + "\n".join(table.to_markdown() for table in tables)


def put_timings(found: dict[str, Any], *more: dict[str, Any]) -> None:
    """What ``svdlab bench`` says, where later files replace the cases of the first one."""
    newer = {(case["name"], case["dtype"]): case for other in more for case in other["cases"]}
    found["cases"] = [newer.get((case["name"], case["dtype"]), case) for case in found["cases"]]
    peaks = ", ".join(f"{peak:.0f} GFLOP/s in {dtype}" for dtype, peak in found["matrix_peak_gflops"].items())
    text = put(PAGE.read_text(), "machine", f"Measured on: {machine_text(found)}. Peak GEMM throughput: {peaks}.\n")
    figure = f"![Ratios, share of peak GEMM throughput, and growth]({PAGE.with_suffix('.png').name})"
    text = put(text, "cases", f"{case_table(found).to_markdown()}\n{figure}\n")
    PAGE.write_text(put(text, "growth", growth_table(found).to_markdown() if found["growth"] else "Not measured.\n"))
    plot_bench(found).savefig(PAGE.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
