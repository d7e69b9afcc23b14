"""The tensor inspector: every tensor of a comparison as heat maps of reference, candidate and their difference.

In a notebook it asks Python for one plane at a time, however large the tensors are. A page without a kernel shows the
tensors that it carries in the same way.
"""

from __future__ import annotations

import base64
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Literal

import anywidget
import matplotlib
import numpy as np
import torch
import traitlets
from torch import Tensor

from svdlab.errors import SvdlabError, short
from svdlab.notebook.controls import is_live
from svdlab.notebook.figures import DIFFUSERS, FIX_OFF, SVDLAB
from svdlab.notebook.scripts import joined
from svdlab.parity.compare import BLOCK, Comparison, ProbeResult, kind_of
from svdlab.parity.probes import execution_key, is_tap

Against = Literal["reference", "truth"]

# What a page needs to show the figure of ``Inspector.to_html``.
SCRIPT, STYLE = (joined(f"inspector.{kind}") for kind in ("js", "css"))
_BINS = 64  # of a histogram
_MAX_GAIN = 40  # as a power of two
_FEW = 16  # numbers that are a table and no curve
_LABELS = {"added_time_ids": ("fps - 1", "motion bucket", "noise strength")}
# What a plane's values are not: a colour that neither map has.
_NOT_FINITE = {"RdBu_r": "#f0e442", "cividis": "#cc79a7"}


class Inspector(anywidget.AnyWidget):
    """Look into any tensor of a comparison: pick one, move through its frames, channels and denoising steps.

    Args:
        comparison: of ``parity.compare``, with its traces.
        carried: the probes and taps that a page without a kernel carries (see ``to_html``).
        name: the candidate's; default: its implementation and dtype.

    Attributes:
        view: what is shown: the tensor's name, ``index`` (of all its axes but the plane's), the plane of the reference
            (or the truth) and of the candidate as they are, row by row in ``dtype``, and where in the whole tensor the
            squared error is.

    Raises:
        SvdlabError: a comparison that was kept without its traces.
    """

    _esm = SCRIPT
    _css = STYLE
    rows: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    look = traitlets.Dict().tag(sync=True)
    asked = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)

    def __init__(self, comparison: Comparison, carried: Sequence[str] | None = None, name: str | None = None):
        super().__init__()
        self._carried = carried
        self._turn = threading.RLock()  # a panel compares in another thread than the one that answers
        self._shown: tuple[str, list[int], Against] | None = None
        self.compare(comparison, name)
        self.observe(self._answer, "asked")

    def compare(self, comparison: Comparison, name: str | None = None) -> None:
        """Look into another comparison, at the same place of the same tensor if it has that.

        Args:
            comparison: of ``parity.compare``, with its traces.
            name: the candidate's; default: its implementation and dtype.

        Raises:
            SvdlabError: a comparison that was kept without its traces.
        """
        if not {"reference", "candidate"} <= set(comparison.traces):
            raise SvdlabError("comparison: it was kept without its traces, allowed: one of parity.compare")
        with self._turn, self.hold_sync():
            self.comparison = comparison
            self._tensors: dict[str, tuple[str, Tensor]] = {}
            self._facts: tuple[tuple[str, Against], dict[str, Any]] | None = None
            self.rows, self.look = _rows(comparison), _look(comparison, name)
            if self._shown is not None:
                try:
                    return self.show(*self._shown)
                except SvdlabError:  # it has no such tensor, index or truth
                    pass
            self.show(comparison.first_divergence or comparison.worst.name)

    def show(self, probe: str, index: Sequence[int] | None = None, against: Against = "reference") -> None:
        """Show one plane of a tensor.

        Args:
            probe: a probe or a tap that was compared.
            index: of every axis but the plane's, such as (batch, frame, channel); None: of the largest difference.
            against: what the candidate is compared with, the reference or the truth.

        Raises:
            SvdlabError: no such tensor or trace in the comparison, an index that the tensor does not have.
        """
        with self._turn:
            self._show(probe, index, against)

    def _show(self, probe: str, index: Sequence[int] | None, against: Against) -> None:
        self._check(probe)
        if against not in self.comparison.traces or against == "candidate":
            raise SvdlabError(f"against: got {short(against)}, allowed: {' or '.join(self.look['against'])}")
        facts = self._facts_of(probe, against)
        sizes = [size for _, size in facts["axes"]]
        found = facts["worst"] if index is None else list(index)
        if len(found) != len(sizes) or not all(0 <= i < size for i, size in zip(found, sizes, strict=True)):
            raise SvdlabError(f"index: got {short(list(found))}, allowed for {probe}: below {sizes}")
        one, other = (self._tensor(role, probe)[tuple(found)] for role in (against, "candidate"))
        self.view = {
            **facts,
            "index": found,
            "cell": facts["cell"] if index is None else None,
            "reference": _bytes(one, facts["dtype"]),
            "candidate": _bytes(other, facts["dtype"]),
        }
        self._shown = probe, found, against

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return super()._repr_mimebundle_(**kwargs) if is_live() else {"text/html": self.to_html(self._carried)}

    def to_html(self, probes: Sequence[str] | None = None, max_bytes: int = 2**19) -> str:
        """The same for a page without a kernel, with the values of some tensors, compared with the reference.

        Args:
            probes: those to carry; default: all, the smallest first.
            max_bytes: how much of the page they may take. What does not fit is left out, and the page says so.

        Returns:
            A figure that ``SCRIPT`` brings to life.

        Raises:
            SvdlabError: a tensor that is not in the comparison.
        """
        names = [row["name"] for row in self.rows]
        for probe in probes or ():
            self._check(probe)
        tensors, left = {}, max_bytes
        for probe in probes or sorted(
            names, key=lambda name: math.prod(self.comparison.traces["candidate"].shape(name))
        ):
            facts = self._facts_of(probe, "reference")
            values = {
                role: base64.b64encode(_bytes(self._tensor(role, probe), facts["dtype"])).decode()
                for role in ("reference", "candidate")
            }
            if (size := sum(map(len, values.values()))) <= left:
                tensors[probe], left = {**facts, **values}, left - size
        maps = {name: base64.b64encode(self.look[name]).decode() for name in ("diverging", "sequential")}
        data = {
            "rows": [{**row, "absent": row["name"] not in tensors} for row in self.rows],
            "look": {**self.look, **maps, "against": ["reference"]},
            "tensors": tensors,
        }
        absent = [name for name in names if name not in tensors]
        note = f"This page carries {len(tensors)} of {len(names)} tensors"
        note += f"; a notebook with a kernel shows {_listed(absent)}, too." if absent else "."
        return (
            f'<figure class="svdlab-inspector" data-inspector="{escape(json.dumps(data))}">'
            f"<p>With scripts on, reference, candidate and difference stand here as heat maps.</p></figure>"
            f"<p><small>{escape(note)}</small></p>"
        )

    def _check(self, probe: str) -> None:
        names = [row["name"] for row in self.rows]
        if probe not in names:
            raise SvdlabError(f"probe: got {short(probe)}, allowed: one of the comparison's, such as {names[0]}")

    def _answer(self, change: Mapping[str, Any]) -> None:
        try:  # "turn" tells a question from the same one before
            self.show(**{name: value for name, value in change["new"].items() if name != "turn"})
        except SvdlabError as error:
            self.view = {"error": str(error)}

    def _tensor(self, role: str, probe: str) -> Tensor:
        """A trace's tensor; the one that is shown is kept."""
        if role not in self._tensors or self._tensors[role][0] != probe:
            self._tensors[role] = probe, self.comparison.traces[role].raw(probe)
        return self._tensors[role][1]

    def _facts_of(self, probe: str, against: Against) -> dict[str, Any]:
        """What is said of the whole tensor; of the one that is shown it is known already."""
        if self._facts is None or self._facts[0] != (probe, against):
            one, other = self._tensor(against, probe), self._tensor("candidate", probe)
            facts = {
                "probe": probe,
                "against": against,
                "said": _said(self.comparison[probe]),
                **_facts(probe, one, other),
            }
            self._facts = (probe, against), facts
        return self._facts[1]


def _listed(names: Sequence[str]) -> str:
    """Names without their steps, a few of them."""
    kinds = list(dict.fromkeys(kind_of(name) if not is_tap(name) else name for name in names))
    return ", ".join(kinds[:12]) + (f" and {len(kinds) - 12} more" if len(kinds) > 12 else "")


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The list of tensors: its numbers, and the ratio as a part of the longest bar."""
    results = sorted([*comparison.probes, *comparison.modules], key=lambda result: execution_key(result.name))
    return [
        {
            "name": result.name,
            "ratio": "not finite"
            if result.non_finite
            else f"{result.ratio:.2f}"
            if result.ratio < 100
            else f"{result.ratio:.0e}",
            "divergence": "" if result.non_finite else f"{result.divergence:.1e}",
            "part": _part(result),
            "wrong": not result.ratio <= comparison.threshold,
            "absent": False,
        }
        for result in results
    ]


def _part(result: ProbeResult) -> float:
    """A ratio on a logarithmic scale from 0.1 to 1e8, in [0, 1]."""
    return min(1.0, max(0.02, (math.log10(max(result.ratio, 0.1)) + 1) / 9))


def _look(comparison: Comparison, name: str | None) -> dict[str, Any]:
    """Colours and names: those of ``figures``, and matplotlib's maps as 257 RGB colours."""
    traces = comparison.traces
    names = {role: f"{trace.implementation} {trace.dtype}" for role, trace in traces.items()}
    if name is not None:
        names["candidate"] = name
    elif names["candidate"] in (names["reference"], names.get("truth")):
        names["candidate"] = "candidate"
    colour = SVDLAB if comparison.verdict == "parity" else FIX_OFF
    return {
        "diverging": _colours("RdBu_r"),
        "sequential": _colours("cividis"),
        "colours": {"reference": DIFFUSERS, "candidate": colour, "difference": "currentColor"},
        "names": names,
        "against": [role for role in ("reference", "truth") if role in traces],
        "few": _FEW,
        "max_gain": _MAX_GAIN,
    }


def _colours(name: str) -> bytes:
    map_ = matplotlib.colormaps[name].resampled(256)
    colours = [*map_(range(256)), matplotlib.colors.to_rgba(_NOT_FINITE[name])]
    return np.round(np.array(colours)[:, :3] * 255).astype(np.uint8).tobytes()


def _said(result: ProbeResult) -> str:
    if result.non_finite:
        return f"{result.non_finite} of the candidate's values are NaN or infinite"
    return f"noise ratio {result.ratio:.3g}, divergence {result.divergence:.2g}, noise floor {result.floor:.2g}"


def _axes(probe: str, shape: Sequence[int]) -> tuple[list[str], list[str]]:
    """Names of a tensor's axes: those that have sliders, and those of the plane."""
    kind = kind_of(probe)
    # A tap's first axis, and a model input's, has the unconditional half first.
    batch = (
        "batch (unconditional first)"
        if kind == "model_input" or (is_tap(probe) and kind.startswith("unet"))
        else "batch"
    )
    if len(shape) > 3:
        return [batch, *["frame"] * (len(shape) == 5), "channel"], ["row", "column"]
    if len(shape) == 3:
        return [batch], ["token", "channel"]
    if len(shape) == 2:
        own = {"guidance_scale": "frame", "added_time_ids": "number"}.get(kind, "channel")
        positions = ".time_proj" in kind and ".attentions." in kind or kind.endswith(".time_pos_embed")
        return ["frame" if positions else batch], [own]
    return [], ["denoising step"]


def _bytes(tensor: Tensor, dtype: str) -> bytes:
    return tensor.detach().cpu().to(getattr(torch, dtype)).contiguous().numpy().tobytes()


def _facts(probe: str, one: Tensor, other: Tensor) -> dict[str, Any]:
    """What is said of a whole tensor: its axes, the range of its values, and where the squared error is.

    Args:
        probe: its name.
        one: the reference's; ``other`` the candidate's, of the same shape. Values that are not finite count nowhere.
    """
    leading, plane = _axes(probe, one.shape)
    sizes = list(one.shape[: len(leading)])
    rows, columns = (*one.shape[len(leading) :],) if len(plane) == 2 else (1, one.shape[-1])
    found = _Errors(one.reshape(-1, rows * columns), other.reshape(-1, rows * columns))
    worst = found.worst
    squared = found.squared.reshape(sizes)
    total = float(squared.sum())
    others = [tuple(i for i in range(len(sizes)) if i != axis) for axis in range(len(sizes))]
    labels = _LABELS.get(probe, [str(i) for i in range(columns)]) if rows == 1 and columns <= _FEW else []
    gain = math.floor(math.log2(found.limit / found.peak)) if found.peak and found.limit else 0
    return {
        "shape": list(one.shape),
        "axes": [list(axis) for axis in zip(leading, sizes, strict=True)],
        "rows": rows,
        "columns": columns,
        "flat": rows == 1,
        "along": plane[-1],
        "labels": list(labels),
        "dtype": "float64" if torch.float64 in (one.dtype, other.dtype) else "float32",
        "signed": found.low < 0,
        "high": found.limit or 1.0,
        "difference": found.peak,
        "gain": min(_MAX_GAIN, max(0, gain)),
        "worst": [int(i) for i in np.unravel_index(worst // (rows * columns), sizes)] if sizes else [],
        "cell": [worst % (rows * columns) // columns, worst % columns],
        "shares": [(squared.sum(other) / total).tolist() for other in others] if total else [],
        "histograms": found.histograms(),
    }


class _Errors:
    """Two tensors (planes, values) apart, in blocks, so that no float64 copy of a large one is made.

    Attributes:
        low: the smallest finite value of both; ``limit`` their largest finite magnitude.
        peak: the largest magnitude of the difference, ``worst`` its place in the flat tensor.
        squared: the squared error of every plane.
    """

    def __init__(self, one: Tensor, other: Tensor):
        self.one, self.other = one, other
        self.low, self.limit, self.peak, self.worst = 0.0, 0.0, 0.0, 0
        squared = []
        for start, a, b in self._blocks():
            both = torch.cat([a, b])
            both = both[both.isfinite()]
            if both.numel():
                self.low, self.limit = min(self.low, float(both.min())), max(self.limit, float(both.abs().max()))
            difference = (b - a).nan_to_num(0.0, 0.0, 0.0)
            squared.append(difference.square().sum(1).numpy())
            peak, at = difference.abs().flatten().max(0)
            if float(peak) > self.peak:
                self.peak, self.worst = float(peak), start + int(at)
        self.squared = np.concatenate(squared)

    def _blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The place of a block's first value, and the block of both in float64."""
        planes, values = self.one.shape
        size = max(1, BLOCK // values)
        for i in range(0, planes, size):
            a, b = (tensor[i : i + size].detach().cpu().double() for tensor in (self.one, self.other))
            yield i * values, a, b

    def histograms(self) -> dict[str, Any]:
        """Counts of both over one range, and of their difference from -peak to peak."""
        edge = {"low": self.low, "high": self.limit}
        counts = {name: np.zeros(_BINS, np.int64) for name in ("reference", "candidate", "difference")}
        for _, a, b in self._blocks():
            for name, values, (low, high) in (
                ("reference", a, (self.low, self.limit)),
                ("candidate", b, (self.low, self.limit)),
                ("difference", b - a, (-self.peak, self.peak)),
            ):
                finite = values[values.isfinite()].numpy()
                counts[name] += np.histogram(finite, _BINS, (low, high))[0]
        return {"edge": edge, **{name: count.tolist() for name, count in counts.items()}}
