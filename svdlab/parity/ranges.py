"""How far a trace's tensors are from the limits of narrow dtypes: where a port in float16 would overflow.

A trace in float32 or float64 answers it before anything is ported; in one of float16 what overflowed is lost. The
tensors of a trace are what modules and stages give: attention scores and sums inside a module may be larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svdlab.parity.probes import execution_key
from svdlab.parity.trace import Trace
from svdlab.tables import Cell, Column, Style, Table

LIMITS: Mapping[str, float] = {
    name: torch.finfo(dtype).max
    for name, dtype in {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float8_e4m3": torch.float8_e4m3fn,
        "float8_e5m2": torch.float8_e5m2,
    }.items()
}
# Below this a float16 loses digits.
SMALLEST = torch.finfo(torch.float16).smallest_normal
MARKED = 3
# float32 whatever the networks run in: listed, but neither marked nor counted.
_SCHEDULE = ("sigmas", "timesteps")


@dataclass(frozen=True)
class Range:
    """One tensor's magnitudes.

    Attributes:
        name: probe or tap.
        largest: the largest magnitude; ``smallest`` the smallest one that is not zero, 0 where all are.
        headroom: by dtype, its limit over ``largest``: below 1 it overflows. None where all values are zero.
        subnormal: the share of the values that are not zero and lie below float16's smallest normal number.
    """

    name: str
    largest: float
    smallest: float
    headroom: dict[str, float | None]
    subnormal: float


def range_of(name: str, tensor: Tensor) -> Range:
    """The magnitudes of one tensor; its values are finite."""
    # The widest of the narrow dtypes' limits and float64's own fit into float64 only.
    size = tensor.detach().abs().flatten().to(torch.float64)
    nonzero = size[size > 0]
    largest = float(size.max()) if len(size) else 0.0
    return Range(
        name,
        largest,
        float(nonzero.min()) if len(nonzero) else 0.0,
        {dtype: limit / largest if largest else None for dtype, limit in LIMITS.items()},
        float((nonzero < SMALLEST).double().mean()) if len(nonzero) else 0.0,
    )


@dataclass(frozen=True)
class Ranges:
    """The magnitudes of a trace's tensors, in execution order; prints as a table.

    Attributes:
        tensors: one for each probe and tap.
        trace: the trace's label; ``dtype`` what its networks ran in.
    """

    tensors: tuple[Range, ...]
    trace: str
    dtype: str

    @property
    def counted(self) -> list[Range]:
        """All but the schedule, which stays in float32; the schedule where there is nothing else."""
        return [r for r in self.tensors if r.name not in _SCHEDULE] or list(self.tensors)

    @property
    def tightest(self) -> Range:
        """The tensor nearest to float16's limit."""
        return max(self.counted, key=lambda r: r.largest)

    def overflowing(self, dtype: str) -> list[str]:
        """The tensors that do not fit a dtype of ``LIMITS``."""
        return [r.name for r in self.counted if r.largest > LIMITS[dtype]]

    def summary(self) -> str:
        """The answer in one line."""
        tight = self.tightest
        factor = tight.headroom["float16"]
        if factor is None:
            return "all tensors are zero"
        text = f"nearest to float16's limit: {tight.name}, {tight.largest:.4g}, "
        if factor >= 1:
            return f"{text}a factor of {factor:.4g} below {LIMITS['float16']:g}"
        over = self.overflowing("float16")
        return (
            f"{text}above {LIMITS['float16']:g}; {len(over)} of {len(self.tensors)} tensors overflow, first {over[0]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "trace": self.trace,
            "dtype": self.dtype,
            "limits": dict(LIMITS),
            "nearest": self.tightest.name,
            "overflow": {dtype: self.overflowing(dtype) for dtype in LIMITS},
            "tensors": [asdict(r) for r in self.tensors],
        }

    def table(self, every: bool = False) -> Table:
        """One row per tensor, those nearest to float16's limit marked; of a long trace only the ends and the marked."""
        marked = {r.name for r in sorted(self.counted, key=lambda r: -r.largest)[:MARKED] if r.largest}
        rows: list[list[str | Cell]] = []
        for result in self._shown(every, marked):
            if result is None:
                rows.append(["..."])
                continue
            style: Style = "marked" if result.name in marked else ""
            factors = [_factor(f) for f in result.headroom.values()]
            share = f"{result.subnormal:.1%}" if result.subnormal else ""
            cells = [Cell(text, style) for text in (result.name, f"{result.largest:.3g}", *factors, share)]
            for i, factor in enumerate(result.headroom.values()):
                if factor is not None and factor < 1:
                    cells[2 + i] = cells[2 + i]._replace(style="bad")
            rows.append([*cells])
        caption = (
            f"{self.summary()}\nfactors: the dtype's limit over the largest magnitude, below 1 it overflows; "
            f"small: values below float16's smallest normal number, {SMALLEST:.2g}. Sums and attention scores inside a "
            "module are not in a trace and may be larger."
        )
        return Table(_COLUMNS, rows, title=f"{self.trace}, made in {self.dtype}", caption=caption)

    def _shown(self, every: bool, marked: set[str]) -> Iterator[Range | None]:
        """With None where some are left out."""
        count, gap = len(self.tensors), False
        for i, result in enumerate(self.tensors):
            shown = every or count <= 48 or i < 20 or i >= count - 6 or result.name in marked
            if shown:
                yield result
            elif not gap:
                yield None
            gap = not shown


_COLUMNS: tuple[str | Column, ...] = (
    "tensor",
    *(Column(c, "right") for c in ("largest", "float16", "bfloat16", "e4m3", "e5m2", "small")),
)


def _factor(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.3g}" if factor < 1e4 else f"{factor:.0e}"


def ranges(trace: Trace, progress: bool = False) -> Ranges:
    """The magnitudes of every probe and tap of a trace, one tensor in memory at a time.

    Raises:
        SvdlabError: a tensor with values that are not finite.
    """
    names = sorted(trace.order, key=execution_key)
    bar = tqdm(names, desc="ranges", disable=not progress or len(names) < 48)
    return Ranges(tuple(range_of(name, trace[name]) for name in bar), trace.label, trace.dtype)
