"""The figures of ``docs/performance.md``: what ``svdlab bench`` and ``svdlab memory`` say, and nothing else.

Run ``svdlab bench --json bench.json`` on a quiet machine, then ``python docs/make_performance.py bench.json``; further
files replace the cases that they hold, too. It writes ``docs/performance.png`` and what stands between the markers of
``docs/performance.md``.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from svdlab.bench.cases import CASE_COLUMNS, GROWTH_COLUMNS, case_rows, growth_rows
from svdlab.notebook.figures import plot_bench
from svdlab.svd.architectures import ARCHITECTURES
from svdlab.svd.memory import GIB, STAGES, Simulation
from svdlab.svd.settings import GenerationSettings

PAGE = Path(__file__).with_name("performance.md")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(text: str, name: str, content: str) -> str:
    """The page with new content between a pair of markers."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    assert len(re.findall(pattern, text, re.DOTALL)) == 1, f"{PAGE} has no markers for {name}"
    return re.sub(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)


def memory_tables() -> str:
    """What ``svdlab memory`` says of 14 frames of 1024x576 in float16, for cards of several sizes."""
    settings = GenerationSettings(height=576, width=1024, num_frames=14, dtype="float16")
    simulation = Simulation(ARCHITECTURES["svd"], settings)
    stages = [simulation.stage(name) for name in STAGES]
    rows = [
        [s.name, str(s.chunk or ""), *(f"{size / GIB:.2f}" for size in (s.weights, s.activations, s.peak))]
        for s in stages
    ]
    found = table(("stage", "chunk", "weights GiB", "activations GiB", "peak GiB"), rows)
    rows = []
    for budget in (6, 8, 12, 16, 24):
        best = next((o for o in simulation.options(budget * GIB) if o.fits), None)
        if best is None:
            rows.append([str(budget), "nothing fits", "", "", "", ""])
        else:
            cells = (best.cfg, "yes" if best.offload else "no", best.decode, str(best.decode_chunk_size))
            rows.append([str(budget), *cells, f"{best.peak / GIB:.2f}"])
    return f"{found}\n\n{table(('GiB', 'guidance', 'offload', 'decode', 'largest chunk', 'peak GiB'), rows)}"


def main() -> None:
    """Fill the page in."""
    found, *more = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    newer = {(case["name"], case["dtype"]): case for other in more for case in other["cases"]}
    found["cases"] = [newer.get((case["name"], case["dtype"]), case) for case in found["cases"]]
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    peaks = ", ".join(f"{peak:.0f} GFLOP/s in {dtype}" for dtype, peak in found["matrix_peak_gflops"].items())
    text = put(PAGE.read_text(), "machine", f"Measured on: {machine}. Matrix peak: {peaks}.")
    figure = f"![Ratios, distance from the matrix peak, and growth]({PAGE.with_suffix('.png').name})"
    text = put(text, "cases", f"{table(CASE_COLUMNS, case_rows(found))}\n\n{figure}")
    text = put(text, "growth", table(GROWTH_COLUMNS, growth_rows(found)) if found["growth"] else "Not measured.")
    PAGE.write_text(put(text, "memory", memory_tables()))
    plot_bench(found).savefig(PAGE.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
