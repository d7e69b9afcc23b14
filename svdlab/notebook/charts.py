"""Charts whose values show under the pointer: Vega-Lite, made by Altair, in one visual language.

JupyterLab draws a specification itself, a report's page and a widget with the script that they carry. With scripts off
a page has a drawing made beforehand. Colours are Okabe and Ito's, which colour-blind readers can
tell apart; dashes and shapes differ as well.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from svdlab.lazy import left_out
from svdlab.notebook.controls import is_live
from svdlab.notebook.figures import DIFFUSERS, FIX_OFF, FLOOR, SVDLAB
from svdlab.notebook.scripts import joined, packed
from svdlab.svd.video import data_url

# A grammar of addresses, which jsonschema makes for a second and altair never asks for.
with left_out("rfc3987_syntax"):
    import altair as alt

if TYPE_CHECKING:
    from svdlab.parity.compare import Comparison, ProbeResult
    from svdlab.parity.diagnose import CatalogueRow
    from svdlab.parity.lab import Case, Chunk

# What JupyterLab and VS Code bring a renderer for; the charts use nothing that is newer.
VEGA_LITE = "application/vnd.vegalite.v5+json"
_DISTANCE = "distance from diffusers float64, relative to its norm"
_SCALARS = ("input.", "sigmas", "timesteps", "guidance_scale")
_OFF = (FIX_OFF, "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Sequence[int], ...] = ([], [6, 3], [2, 2], [8, 2, 2, 2])
# What the drawing's letters are measured by, and fonts of the same measure.
_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
# Of a page: its letters are small as they are, so that on a narrow screen it is scrolled, not made smaller.
STYLE = """
@media screen and (max-width: 40rem) {
  .svdlab-chart { overflow-x: auto; }
  .svdlab-chart :is(svg, img) { max-width: none !important; }
}
"""
_SHAPES = ("square", "diamond", "triangle-up", "cross")


@dataclass(frozen=True)
class Chart:
    """A chart and its text, for those who cannot see it.

    Attributes:
        spec: Vega-Lite, with its data.
        alt: what it shows.
    """

    spec: dict[str, Any]
    alt: str

    def to_svg(self) -> str:
        """The drawing, without a browser."""
        import vl_convert

        svg = vl_convert.vegalite_to_svg(self.spec)
        # A page carries many of them: what goes without saying goes, and what is there only to be pointed at.
        svg = svg.replace(f' font-family="{_FONT}"', "").replace(' opacity="1"', "")
        svg = svg.replace("<svg ", f'<svg font-family="{_FONT}" ', 1)
        svg = re.sub(r'<path[^>]* opacity="0"[^>]*/?>(</path>)?', "", svg)
        return re.sub(r"(?<=[ ,(\"A-Z-])\d+\.\d{3,}(?=[ ,)\"A-Z])", lambda number: f"{float(number[0]):.2f}", svg)

    def _repr_html_(self) -> str:
        """The drawing, and beside it the specification for a page that has the script."""
        src = data_url("image/svg+xml", self.to_svg().encode())
        return (
            f'<figure class="svdlab-chart" style="margin:0"><img style="max-width:100%;background:#fff" '
            f'alt="{escape(self.alt)}" src="{src}">'
            f'<script type="text/plain">{packed(self.spec)}</script></figure>'
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        shown = {VEGA_LITE: self.spec} if is_live() else {"text/html": self._repr_html_()}
        return {**shown, "text/plain": self.alt}


@functools.cache
def page_script() -> str:
    """What brings the charts of a page to life: Vega, which needs no network and evaluates no text as code."""
    return _with_vega("unpacked.js", "chart.js", "chart_page.js").replace("</script", "<\\/script")


@functools.cache
def _with_vega(*names: str) -> str:
    import vl_convert

    return str(vl_convert.javascript_bundle(joined(*names)))


class ChartWidget(anywidget.AnyWidget):
    """A chart over the probes in a notebook, drawn by the browser; a click on a probe is heard.

    Attributes:
        content: the chart's specification and its text; empty at first.
        chosen: the probe that is marked, where the specification has the parameter ``chosen``.
    """

    _esm = traitlets.Unicode().tag(sync=True)
    _css = joined("chart_widget.css")
    content = traitlets.Dict().tag(sync=True)
    chosen = traitlets.Unicode().tag(sync=True)

    @traitlets.default("_esm")
    def _bundled(self) -> str:
        return _with_vega("chart.js", "chart_widget.js")

    def show(self, chart: Chart) -> None:
        """Put a chart in the place of the one that is shown."""
        self.content = {"spec": chart.spec, "alt": chart.alt}

    def on_click(self, answer: Callable[[str], object]) -> None:
        """Call ``answer`` with the name of every probe that is clicked."""
        self.on_msg(lambda widget, message, buffers: answer(message["probe"]))


@dataclass(frozen=True)
class _Look:
    """How a line is drawn: colour, dash, the shape of its points or none, and its width."""

    colour: str
    dash: Sequence[int] = ()
    shape: str = ""
    width: float = 1.2


def plot_divergence(
    comparison: Comparison, fix_off: Comparison | None = None, fix_off_label: str = "fix off", inputs: bool = True
) -> Chart:
    """How far candidates are from the truth along the probes, with the noise floor and the parity tolerance.

    Args:
        comparison: svdlab's, of ``parity.compare``.
        fix_off: that of a candidate with a bug, against the same reference.
        fix_off_label: its name in the legend.
        inputs: whether to show the probes that only replay or count (``input.*``, sigmas, timesteps, guidance).

    Returns:
        A chart; the horizontal axis is the order of execution, the vertical one logarithmic.
    """
    there = {p.name for p in (fix_off or comparison).probes}  # a port may have written some tensors only
    probes = [p for p in _shown(comparison, inputs) if p.name in there]
    text = comparison.summary() if fix_off is None else f"{comparison.summary()}. {fix_off_label}: {fix_off.summary()}"
    candidates = {f"svdlab {comparison.dtype}": comparison}
    if fix_off is not None:
        candidates[fix_off_label] = fix_off
    return _made(_probe_chart(probes, candidates, max(700, 17 * len(probes)), _domain(probes, candidates)), text)


def plot_fix(case: Case, steps: bool = True) -> Chart:
    """The same with the fix on, off and as the reader has it, along the probes.

    Before there is a noise floor the distances are those from diffusers in the working dtype, and there is no band.

    Args:
        case: of ``Lab.case``.
        steps: whether to show, on the right, the latents along the denoising steps as well. Without them there is a
            parameter ``chosen``, the name of a probe to mark.
    """
    on, own, measured = case.on, {} if case.own is None else {"your code": case.own}, case.measured
    candidates = {f"svdlab {on.dtype}, fix on": on, f"fix off ({case.bug})": case.off, **own}
    probes = _shown(on, inputs=True)
    domain = _domain(probes, candidates, measured)
    title = _DISTANCE if measured else f"distance from diffusers {on.dtype}: no noise floor yet"
    found = ". ".join(f"{name}: {of.summary()}" for name, of in candidates.items())
    text = f"Distance from diffusers float64. {found}." if measured else f"{title}."
    left = _probe_chart(probes, candidates, 620, domain, title, measured)
    if not steps:
        rows = alt.Chart(alt.InlineData(values=[{"probe": p.name} for p in probes]))
        marked = rows.mark_rule(color=DIFFUSERS, strokeWidth=1).encode(x=alt.X("probe:N", sort=None))
        marked = marked.transform_filter("datum.probe === chosen")
        return _made((left + marked).add_params(alt.param(name="chosen", value="")), text)
    latents = [p for p in on.probes if p.name.startswith("latents.") and p.name != "latents.init"]
    right = _line_chart(
        _rows(latents, candidates, domain, measured),
        _looks(candidates, measured),
        alt.X("step:O", title="denoising step", axis=alt.Axis(labelAngle=0)),
        domain,
        170,
        "latents after each step",
        y_title=None,
        band=measured,
    )
    return _made(alt.hconcat(left.properties(title="every tensor"), right, spacing=10), text)


def plot_grid(
    values: Sequence[Any], on: Sequence[Comparison], off: Mapping[str, Sequence[Comparison]], x: str
) -> Chart:
    """The noise ratio of the frames against a setting, with the fix on and with each bug injected.

    Args:
        values: the setting's; anything that prints.
        on: a comparison for each value.
        off: by bug, a comparison for each value.
        x: the setting's name and unit.
    """
    threshold, least = on[0].threshold, 0.1
    lines = {**{f"fix off ({bug})": found for bug, found in off.items()}, "fix on": on}
    looks = {name: _off(i) for i, name in enumerate(lines)} | {"fix on": _Look(SVDLAB, shape="circle")}
    rows: list[dict[str, Any]] = [
        {"x": str(value), "line": name, "shown": _finite(max(ratio, least)), "noise ratio": _finite(ratio)}
        for name, found in lines.items()
        for value, ratio in zip(values, (c["frames"].ratio for c in found), strict=True)
    ]
    top = max([row["shown"] for row in rows if row["shown"]] + [threshold]) * 3
    at = alt.X("x:O", sort=None, title=x, axis=alt.Axis(labelAngle=0))
    band = _band(least, threshold, f"parity: at most {threshold:g}")
    chart = _line_chart(rows, looks, at, (least, top), 520, y_title="noise ratio of the frames", tips=["noise ratio"])
    return _made(alt.layer(band, chart), f"Noise ratio of the frames against {x}, fix on and off.")


def plot_curves(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    labels: tuple[str, str],
    *,
    log_x: bool = False,
    log_y: bool = False,
    band: tuple[float, float, str] | None = None,
) -> Chart:
    """What a formula gives, diffusers' (the first curve) and the bugs' (the others).

    Args:
        x: common to all curves.
        curves: by name.
        labels: of the axes, with units.
        log_x, log_y: logarithmic axes.
        band: a range of the vertical axis to shade, and what it is.
    """
    looks = {name: _Look(DIFFUSERS, shape="circle") if i == 0 else _off(i - 1) for i, name in enumerate(curves)}
    rows: list[dict[str, Any]] = [
        {"x": float(at), "line": name, "shown": float(y)}
        for name, ys in curves.items()
        for at, y in zip(x, ys, strict=True)
    ]
    across = alt.X("x:Q", title=labels[0], scale=alt.Scale(type="log" if log_x else "linear", nice=False))
    every = [row["shown"] for row in rows]
    # A small change shall look small.
    domain = (min(every) / 1.5, max(every) * 1.5) if log_y else (0, 1.1 * max(every)) if min(every) >= 0 else None
    chart: Any = _line_chart(rows, looks, across, domain, 520, y_title=labels[1].replace("\n", " "), log=log_y)
    if band:
        chart = alt.layer(_band(*band), chart)
    return _made(chart, f"{labels[1]} against {labels[0]}: {', '.join(curves)}.")


def plot_frames(on: Comparison, off: Comparison, bug: str) -> Chart:
    """How far each frame of the clip is from diffusers float64, with the fix on and off."""
    traces = {"reference": on.traces["reference"], "on": on.traces["candidate"], "off": off.traces["candidate"]}
    truth = on.traces["truth"]["frames"].double()
    norm = truth.flatten(2).norm(dim=2).mean(0)
    looks = {
        f"diffusers {on.dtype} (the noise floor)": _Look(DIFFUSERS, [6, 3]),
        "fix on": _Look(SVDLAB, shape="circle"),
        f"fix off ({bug})": _off(0),
    }
    distances = {
        line: ((traces[name]["frames"].double() - truth).flatten(2).norm(dim=2).mean(0) / norm).tolist()
        for line, name in zip(looks, traces, strict=True)
    }
    return _by_number(distances, looks, "frame", f"Distance of each frame from diffusers float64 ({bug}).")


def plot_chunks(chunks: Sequence[Chunk]) -> Chart:
    """How far frames decoded in chunks are from those decoded at once, for every chunk size.

    Args:
        chunks: of ``lab.every_chunk``.
    """
    looks = {
        "diffusers in chunks": _Look(DIFFUSERS, shape="diamond", width=4),
        "svdlab, the same chunks": _Look(FIX_OFF, [6, 3], "square"),
        "svdlab, exact": _Look(SVDLAB, shape="circle"),
        "diffusers at once (the noise floor)": _Look(FLOOR, [6, 3]),
    }
    names = ("diffusers", "parity", "exact", "floor")
    distances = {line: [c.distance[name] for c in chunks] for line, name in zip(looks, names, strict=True)}
    text = "Distance of the frames from diffusers float64 decoded at once, against the chunk size."
    return _by_number(distances, looks, "chunk size (frames)", text)


def plot_steps(comparison: Comparison) -> Chart:
    """How far every tensor of a denoising step is from the truth, over the steps.

    Args:
        comparison: svdlab's, of ``parity.compare``.
    """
    kinds = ("model_input", "noise_pred_uncond", "noise_pred_cond", "noise_pred", "latents")
    every = [p for p in comparison.probes if p.name.rpartition(".")[0] in kinds and p.name != "latents.init"]
    candidates = {f"svdlab {comparison.dtype}": comparison}
    domain, looks = _domain(every, candidates), _looks(candidates)
    at = alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0))
    charts = [
        _line_chart(
            _rows([p for p in every if p.name.rpartition(".")[0] == kind], candidates, domain),
            looks,
            at,
            domain,
            150,
            kind,
            y_title=_DISTANCE if kind == kinds[0] else None,
            band=True,
        )
        for kind in kinds
    ]
    return _made(
        alt.hconcat(*charts, spacing=10), f"Distance from diffusers float64 over the steps: {comparison.summary()}."
    )


def plot_catalogue(rows: Sequence[CatalogueRow]) -> Chart:
    """What two tests of a port say of every bug: each bug is a point, each test's threshold a line.

    Args:
        rows: of ``parity.diagnose.catalogue``.
    """
    from svdlab.parity.compare import MSE_BAR, THRESHOLD
    from svdlab.parity.diagnose import finding

    # Equal to the last bit, and not finite, have no place on a logarithmic axis: they are drawn at its ends.
    errors = [row.frames_mse for row in rows if 0 < row.frames_mse < math.inf] + [MSE_BAR]
    ratios = [row.ratio for row in rows if 0 < row.ratio < math.inf] + [THRESHOLD]
    (left, right), (low, high) = ((min(v) / 3, max(v) * 3) for v in (errors, ratios))
    missed, caught, neither = "missed by the mean squared error", "caught by it", "seen by neither"
    data: list[dict[str, Any]] = [
        {
            "bug": row.bug,
            "at": min(max(row.frames_mse, left), right) if row.frames_mse == row.frames_mse else right,
            "ratio": min(max(row.ratio, low), high),
            "frames MSE": f"{row.frames_mse:.1e}",
            "noise ratio": f"{row.ratio:.3g}",
            "first tensor above 4": row.first_divergence or "none",
            "group": caught if not row.passes_mse_bar else missed if row.ratio > THRESHOLD else neither,
        }
        for row in rows
    ]
    count = {group: sum(row["group"] == group for row in data) for group in (missed, caught, neither)}
    data = [{**row, "group": f"{count[row['group']]} {row['group']}"} for row in data]
    groups = [f"{n} {group}" for group, n in count.items()]
    x = alt.X(
        "at:Q",
        title="mean squared error of the frames, in [-1, 1]",
        scale=_log(left, right),
        axis=_decades(left, right),
    )
    y = alt.Y("ratio:Q", title="largest noise ratio of all tensors", scale=_log(low, high), axis=_decades(low, high))
    points = (
        alt.Chart(alt.InlineData(values=data))
        .mark_point(filled=True, size=70, opacity=0.9)
        .encode(
            x=x,
            y=y,
            color=_scale(alt.Color, "group:N", groups, [FIX_OFF, FLOOR, SVDLAB]),
            shape=_scale(alt.Shape, "group:N", groups, ["circle", "square", "triangle-up"]),
            tooltip=["bug:N", "noise ratio:N", "frames MSE:N", "first tensor above 4:N"],
        )
    )
    where = {"left": left, "bar": MSE_BAR, "low": THRESHOLD, "high": high}
    corner = alt.Chart(alt.InlineData(values=[where])).mark_rect(color=FIX_OFF, opacity=0.08)
    corner = corner.encode(x=alt.X("left:Q"), x2="bar:Q", y=alt.Y("low:Q"), y2="high:Q")
    bar = alt.Chart(alt.InlineData(values=[where])).mark_rule(color=DIFFUSERS, strokeDash=[4, 3], strokeWidth=1.5)
    texts = [
        (MSE_BAR, high, "the usual test: MSE < 1e-3 passes", DIFFUSERS, "right", -6, 12),
        # Where no point can be: frames that far apart are not within rounding.
        (MSE_BAR, THRESHOLD, f"parity: noise ratio at most {THRESHOLD:g}", "#00664f", "right", -6, 12),
    ]
    notes = [
        alt.Chart(alt.InlineData(values=[{"at": at, "ratio": r}]))
        .mark_text(text=text, color=colour, align=align, dx=dx, dy=dy, fontSize=12)
        .encode(x=alt.X("at:Q"), y=alt.Y("ratio:Q"))
        for at, r, text, colour, align, dx, dy in texts
    ]
    line = alt.Chart(alt.InlineData(values=[where])).mark_rule(color=SVDLAB, strokeDash=[4, 3], strokeWidth=1.5)
    layers = (corner, bar.encode(x="bar:Q"), line.encode(y="low:Q"), *notes, points)
    names = [row.bug for row in rows if row.passes_mse_bar and row.ratio > THRESHOLD]
    text = f"Noise ratio against mean squared error, one point per bug. {finding(rows)} Missed: {', '.join(names)}."
    return _made(alt.layer(*layers).properties(width=720, height=340), text)


def _shown(comparison: Comparison, inputs: bool) -> list[ProbeResult]:
    scalars = () if inputs else _SCALARS
    return [p for p in comparison.probes if not p.zero_reference and not p.name.startswith(scalars)]


def _probe_chart(
    probes: Sequence[ProbeResult],
    candidates: Mapping[str, Comparison],
    width: int,
    domain: tuple[float, float],
    title: str = _DISTANCE,
    floor: bool = True,
) -> alt.LayerChart:
    axis = alt.Axis(labelAngle=-90, labelFontSize=9, labelLimit=160, labelOverlap=False)
    at = alt.X("probe:N", sort=None, title=None, axis=axis)
    rows = _rows(probes, candidates, domain, floor)
    return _line_chart(rows, _looks(candidates, floor), at, domain, width, y_title=title, band=floor)


def _floors(of: Comparison) -> dict[str, float]:
    """The lines of the noise, and how many times the floor they are."""
    return {
        f"parity tolerance: {of.threshold:g} x floor": of.threshold,
        f"diffusers {of.dtype} (the noise floor)": 1.0,
    }


def _looks(candidates: Mapping[str, Comparison], floor: bool = True) -> dict[str, _Look]:
    """By line, from the lowest layer to the highest: the wider one lies below the narrower one."""
    own, *others = candidates
    tolerance, noise = _floors(candidates[own])
    below = {tolerance: _Look(FLOOR, [2, 2], width=1.5), noise: _Look(DIFFUSERS, [6, 3], width=1.5)} if floor else {}
    return {
        **below,
        own: _Look(SVDLAB, shape="circle", width=2.2),
        **{label: _off(i) for i, label in enumerate(others)},
    }


def _rows(
    probes: Sequence[ProbeResult], candidates: Mapping[str, Comparison], domain: tuple[float, float], floor: bool = True
) -> list[dict[str, Any]]:
    """A row per probe and line; a distance of zero is drawn at twice the axis's lower end."""
    zero = 2 * domain[0]
    noise = _floors(next(iter(candidates.values()))) if floor else {}
    rows = []
    for p in probes:
        step = p.name.rpartition(".")[2]
        lines = {line: times * p.floor for line, times in noise.items()}
        lines |= {label: of[p.name].divergence for label, of in candidates.items()}
        for line, distance in lines.items():
            value = _finite(distance)
            ratio = {"noise ratio": _finite(distance / p.floor)} if floor else {}
            rows.append(
                {
                    "probe": p.name,
                    "step": int(step) + 1 if step.isdigit() else None,
                    "line": line,
                    "distance": value,
                    **ratio,
                    "shown": _finite(max(distance, zero)),
                }
            )
    return rows


def _domain(
    probes: Sequence[ProbeResult], candidates: Mapping[str, Comparison], floor: bool = True
) -> tuple[float, float]:
    """The ends of the logarithmic axis: zero is drawn at twice the lower one, a decade below all other distances."""
    found = [of[p.name].divergence for of in candidates.values() for p in probes]
    if floor:
        noise = _floors(next(iter(candidates.values()))).values()
        found += [times * p.floor for p in probes for times in noise]
    finite = [d for d in found if 0 < d < math.inf] or [probes[0].floor]
    return 10 ** (math.floor(math.log10(min(finite))) - 1) / 2, max(finite) * 3


def _by_number(distances: Mapping[str, Sequence[float]], looks: Mapping[str, _Look], x: str, text: str) -> Chart:
    """Distances against 1, 2, 3, ..."""
    finite = [d for line in distances.values() for d in line if 0 < d < math.inf]
    zero = min(finite) / 10
    rows = [
        {"x": i, "line": line, "distance": _finite(d), "shown": _finite(max(d, zero))}
        for line, ds in distances.items()
        for i, d in enumerate(ds, start=1)
    ]
    at = alt.X("x:O", title=x, axis=alt.Axis(labelAngle=0))
    return _made(_line_chart(rows, looks, at, (zero / 2, max(finite) * 3), 520, tips=["distance"]), text)


def _line_chart(
    rows: Sequence[Mapping[str, Any]],
    looks: Mapping[str, _Look],
    x: alt.X,
    domain: tuple[float, float] | None,
    width: int,
    title: str = "",
    *,
    y_title: str | None = _DISTANCE,
    tips: Sequence[str] = ("probe", "distance", "noise ratio"),
    log: bool = True,
    band: bool = False,
) -> alt.LayerChart:
    """Lines with points, a legend above, and what each point is under the pointer.

    Args:
        rows: ``line``, ``shown`` (its height), the field of ``x``, and what ``tips`` name where a row has it.
        looks: by line, from the lowest to the highest.
        x: the horizontal axis.
        domain: the ends of the vertical axis; a logarithmic one says 0 at twice the lower end.
        width: in pixels.
        title: above.
        y_title: None: no axis, as it is the neighbour's.
        tips: fields to show beside the line's name.
        log: whether the vertical axis is logarithmic.
        band: shade what lies below the first line, the parity tolerance.
    """
    scale = _log(*domain) if log and domain else alt.Scale(domain=list(domain)) if domain else alt.Undefined
    axis = _decades(*domain, zero="distance" in rows[0]) if log and domain else alt.Axis()
    if y_title is None:
        axis = alt.Axis(labels=False, ticks=False, title=None)
    y = alt.Y("shown:Q", title=y_title, scale=scale, axis=axis)
    names = list(looks)
    colour = _scale(alt.Color, "line:N", names, [look.colour for look in looks.values()])
    there = set(rows[0]) if rows else set()
    fields = [alt.Tooltip("line:N", title="")] + [
        alt.Tooltip(f"{name}:{'N' if name == 'probe' else 'Q'}", **({} if name == "probe" else {"format": ".3~g"}))
        for name in (tips if any(tip in there for tip in tips) else ("shown",))
        if name in there or name == "shown"
    ]
    layers: list[Any] = []
    lines = {name: alt.Chart(alt.InlineData(values=[row for row in rows if row["line"] == name])) for name in names}
    if band and domain:
        area = lines[names[0]].mark_area(color=FLOOR, opacity=0.12)
        layers.append(area.encode(x=x, y=y, y2=alt.Y2Datum(domain[0])))
    for name, look in looks.items():
        given = lines[name].encode(x=x, y=y, color=colour, tooltip=fields)
        layers.append(given.mark_line(strokeWidth=look.width, strokeDash=list(look.dash) or [1, 0]))
        if look.shape:
            layers.append(given.mark_point(shape=look.shape, size=25 + 10 * look.width, filled=True, opacity=1))
        else:  # nothing to see, but to point at
            layers.append(given.mark_point(size=40, opacity=0, filled=True))
    chart = alt.layer(*layers).properties(width=width, height=250)
    return chart.properties(title=title) if title else chart


def _band(low: float, high: float, text: str) -> alt.LayerChart:
    """A shaded range of the vertical axis with its name."""
    at = alt.Chart(alt.InlineData(values=[{"low": low, "high": high}]))
    area = at.mark_rect(color=FLOOR, opacity=0.12).encode(y=alt.Y("low:Q"), y2="high:Q")
    name = at.mark_text(text=text, align="left", dx=4, dy=8, x=0, fontSize=11, color="#444").encode(y=alt.Y("high:Q"))
    return alt.layer(area, name)


def _off(i: int) -> _Look:
    """The line of the i-th bug."""
    return _Look(_OFF[i % len(_OFF)], _DASHES[i % len(_DASHES)], _SHAPES[i % len(_SHAPES)])


def _log(low: float, high: float) -> alt.Scale:
    return alt.Scale(type="log", domain=[low, high], nice=False, clamp=True)


def _decades(low: float, high: float, zero: bool = False) -> alt.Axis:
    """Ticks at about six powers of ten; with ``zero`` one at twice the lower end says 0."""
    first, last = math.ceil(math.log10(low) + zero), math.floor(math.log10(high))
    decades = [10.0**k for k in range(last, first - 1, -max(1, (last - first) // 5))]
    said = "replace(format(datum.value, '.0e'), '+', '')"
    if zero:
        decades, said = [*decades, 2 * low], f"datum.value < {2.01 * low!r} ? '0' : {said}"
    return alt.Axis(values=decades, labelExpr=said, labelOverlap=False)


def _scale(channel: Any, field: str, names: Sequence[str], values: Sequence[Any]) -> Any:
    legend = alt.Legend(title=None, orient="top", labelLimit=420, columns=2)
    return channel(field, scale=alt.Scale(domain=list(names), range=list(values)), legend=legend)


def _finite(value: float) -> float | None:
    """In six digits, which a page can carry. JSON holds no infinity: there a line has a gap."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _made(chart: Any, text: str) -> Chart:
    plain = {"background": "#ffffff", "view": {"stroke": None}, "font": _FONT, "aria": False}
    grey = {
        "labelColor": "#333",
        "titleColor": "#111",
        "titleFontWeight": "normal",
        "domainColor": "#666",
        "grid": False,
    }
    made = chart.configure(**plain).configure_axis(**grey).configure_title(anchor="start", fontSize=12)
    with alt.data_transformers.enable(consolidate_datasets=True):  # a line and its points share their rows
        spec = made.to_dict()
    spec["$schema"] = "https://vega.github.io/schema/vega-lite/v5.json"
    spec.pop("usermeta", None)
    return Chart(spec, text)
