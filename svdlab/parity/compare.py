"""The verdict: is a candidate as close to the truth as the reference is, and if not, where does it diverge first?

With r64 the reference in float64, r the reference in the working dtype and c the candidate, at every probe

    floor = max(|r - r64| / |r64|, resolution),  divergence = |c - r64| / |r64|,  ratio = divergence / floor

in the Euclidean norm, computed in float64. Parity is a ratio of at most 4, the parity tolerance, at every probe that
both traces have.

Without r64 the divergence is |c - r| / |r| and the floor is, with a model at hand, how far the reference
moves when its inputs and every layer's output are moved by one unit in the last place ("perturbed"); with two
bare files it is ``bound``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError, short
from svdlab.files import json_value
from svdlab.parity.probes import (
    CONDITIONING,
    EVERY_SHAPE,
    INPUTS,
    OPTIONAL_CONDITIONING,
    execution_key,
    is_optional,
    is_tap,
    probe_of,
)
from svdlab.parity.trace import DTYPES, Trace
from svdlab.parity.writer import versions_of_run
from svdlab.svd.images import to_unit
from svdlab.tables import Cell, Column, Style, Table

# The parity tolerance: the largest ratio that rounding explains.
THRESHOLD = 4.0
# The usual threshold elsewhere, on the mean squared error of the frames.
MSE_BAR = 1e-3
BLOCK = 2**22
# 8-bit levels in a unit of the frames, which go from -1 to 1.
LEVELS = 127.5
# A measured floor above this many times ``bound`` is no rounding. The worst that is: 72 in float32, two steps of a flat
# image without noise augmentation, whose group norms divide by almost nothing; 3 in the half dtypes, twelve steps.
IMPLAUSIBLE = {"float64": 160.0, "float32": 160.0, "float16": 8.0, "bfloat16": 8.0}

# Two bare files: what rounding does behind a network, in units of the dtype's eps (see ``bound``).
NETWORK_GROWTH = {"float64": 512.0, "float32": 512.0, "float16": 8.0, "bfloat16": 8.0}

Floor = Literal["truth", "perturbed", "bound"]

# What may differ between the settings of two traces without changing what the tensors mean.
_FREE = {"seed", "dtype", "cfg", "decode", "decode_chunk_size", "num_inference_steps"}


def resolution(dtype: str) -> float:
    """The smallest relative difference that counts in a dtype: its eps, and float32's for float64.

    diffusers computes its sinusoids, its Euler step and its frames in float32 whatever the networks run in,
    so that two float64 runs can differ by float32 roundings.
    """
    return torch.finfo(torch.float32 if dtype == "float64" else DTYPES[dtype]).eps


def bound(name: str, dtype: str) -> float:
    """The floor of two bare files: what rounding can be expected to do at a probe.

    ``resolution`` where nothing but a few scalar operations has run, ``NETWORK_GROWTH`` times that behind a
    network and at the CLIP pixels. It is a bound from the dtype and not a measurement. The constants: over
    random checkpoints, seeds and 2 to 25 steps (few steps are the worse: the first one's rounding at sigma
    700 is all that the second one sees) the measured floor stays below 4 times them in every dtype
    (``tests/test_compare.py`` holds them to it), so that the verdict's factor of 4 covers it. They are larger
    in float32, whose group norms and resize lose digits by cancellation, than in the half dtypes, whose
    kernels accumulate in float32. Not covered: a flat image without noise augmentation (72 in float32) and two steps of
    the embedded checkpoint (7.9), where two bare files may diverge by rounding alone. A bug that moves the result by
    less than 4 times the bound passes; a truth shows it.
    """
    if name == "frames_8bit":
        # A pixel changes its level with a probability of its error in levels; against grey.
        return math.sqrt(bound("frames", dtype) / LEVELS)
    probe = probe_of(name)
    scalar = probe is not None and any(probe[0] in kinds for kinds in (INPUTS, CONDITIONING, OPTIONAL_CONDITIONING))
    scalar = scalar and name not in ("input.clip_pixels", "image_embeddings", "image_latents")
    return resolution(dtype) * (1.0 if scalar else NETWORK_GROWTH[dtype])


@dataclass(frozen=True)
class ProbeResult:
    """One tensor's comparison.

    Attributes:
        name: probe or tap.
        divergence: the candidate's relative distance from the truth (from the reference where there is no
            truth).
        floor: the reference's own, at least ``resolution``; ``floor_from`` says how it was found.
        ratio: divergence / floor.
        max_abs: largest absolute difference between candidate and reference; ``mse`` their mean squared one.
        cosine: of the angle between candidate and reference; None when one of them is zero.
        psnr: of the frames in dB, in [0, 1] after clamping; None for other probes and for equal frames.
        zero_reference: the truth is all zeros, and distances are root mean squares instead of relative.
        non_finite: how many of the candidate's values are NaN or infinite. With any, divergence, ratio, ``max_abs`` and
            ``mse`` are infinite and the rest is None; ``to_dict`` has None for all of them.
        reference_max: the reference's largest magnitude.
    """

    name: str
    divergence: float
    floor: float
    ratio: float
    max_abs: float
    mse: float
    cosine: float | None
    psnr: float | None
    floor_from: Floor
    zero_reference: bool = False
    non_finite: int = 0
    reference_max: float = 0.0


@dataclass(frozen=True)
class Coverage:
    """How much of the reference was compared.

    Attributes:
        judged: kinds of probe, named without their steps, of which both traces have at least one.
        missing: kinds that only the reference has.
        complete: whether the candidate has every probe of the reference, at every step.
    """

    judged: list[str]
    missing: list[str]
    complete: bool


@dataclass
class Comparison:
    """What comparing two traces says; prints as a table in a terminal (rich) and in a notebook.

    Attributes:
        probes: every probe that both traces have, in execution order; ``modules`` likewise for inner taps.
        missing: probes of the reference, but for optional ones, that the candidate lacks; ``extra`` the reverse.
        floor_from: "truth", "perturbed" or "bound": how the floor was found.
        reference, candidate, truth: the traces' labels.
        traces: the traces themselves, where the caller may want to look closer.
    """

    probes: list[ProbeResult]
    modules: list[ProbeResult]
    missing: list[str]
    extra: list[str]
    floor_from: Floor
    dtype: str
    reference: str
    candidate: str
    truth: str | None = None
    threshold: float = THRESHOLD
    traces: dict[str, Trace] = field(default_factory=dict, repr=False)

    @property
    def verdict(self) -> Literal["parity", "divergence"]:
        """Over the probes; taps locate a divergence, they do not make one."""
        return "divergence" if self.first_divergence else "parity"

    @property
    def coverage(self) -> Coverage:
        """Which kinds of the reference's probes were compared; parity is said of these alone."""
        judged = {kind_of(p.name) for p in self.probes}
        every = judged | {kind_of(name) for name in self.missing}
        kinds = [kind for kind in EVERY_SHAPE if kind in every]
        missing = [kind for kind in kinds if kind not in judged]
        return Coverage([kind for kind in kinds if kind in judged], missing, not self.missing)

    @property
    def first_divergence(self) -> str | None:
        """The first probe, in execution order, whose ratio is above the threshold."""
        return next((p.name for p in self.probes if p.ratio > self.threshold), None)

    @property
    def first_non_finite(self) -> str | None:
        """The first probe or tap, in execution order, in which the candidate has NaN or infinity."""
        return next((r.name for r in self._ordered() if r.non_finite), None)

    @property
    def first_module(self) -> str | None:
        """The first diverging tap, where it runs before the first diverging probe: the module that does it.

        A tap that runs after that probe diverges because of what it was given, and names nothing.
        """
        tap = next((m.name for m in self.modules if m.ratio > self.threshold), None)
        first = self.first_divergence
        if tap is None or (first is not None and execution_key(first) < execution_key(tap)):
            return None
        return tap

    @property
    def worst(self) -> ProbeResult:
        """The probe with the largest ratio."""
        return max(self.probes, key=lambda p: p.ratio)

    @property
    def frames_mse(self) -> float | None:
        """Mean squared difference of the frames, the usual measure elsewhere; None without frames."""
        return next((p.mse for p in self.probes if p.name == "frames"), None)

    @property
    def passes_mse_bar(self) -> bool | None:
        """Whether the candidate meets the usual threshold, MSE < 1e-3 on the frames; None without frames."""
        return None if self.frames_mse is None else self.frames_mse < MSE_BAR

    def __getitem__(self, name: str) -> ProbeResult:
        """One probe's or tap's result by name."""
        for result in (*self.probes, *self.modules):
            if result.name == name:
                return result
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "verdict": self.verdict,
            "summary": self.summary(),
            "coverage": asdict(self.coverage),
            "first_divergence": self.first_divergence,
            "first_module": self.first_module,
            "first_non_finite": self.first_non_finite,
            "floor_from": self.floor_from,
            "threshold": self.threshold,
            "dtype": self.dtype,
            "reference": self.reference,
            "candidate": self.candidate,
            "truth": self.truth,
            "frames_mse": json_value(self.frames_mse),
            "passes_mse_bar": self.passes_mse_bar,
            "missing": self.missing,
            "extra": self.extra,
            "versions": {
                "compare": versions_of_run(),
                **{role: trace.versions for role, trace in self.traces.items()},
            },
            "digests": {role: trace.digests for role, trace in self.traces.items()},
            "probes": [json_value(asdict(p)) for p in self.probes],
            "modules": [json_value(asdict(m)) for m in self.modules],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def summary(self) -> str:
        """The answer in one line; parity over a part of the reference's probes says over which part."""
        worst, coverage = self.worst, self.coverage
        text: str = self.verdict
        if not coverage.complete:
            kinds = len(coverage.judged) + len(coverage.missing)
            lacks = _some(coverage.missing or self.missing)
            text += f" on {len(coverage.judged)} of {kinds} kinds of probe (partial: missing {lacks})"
        text += f": worst ratio {worst.ratio:.2f} at {worst.name}, {len(self.probes)} probes"
        if self.first_divergence:
            text = f"divergence: first at {self.first_divergence}, ratio {self[self.first_divergence].ratio:.3g}"
        if self.first_module:
            text += f", in module {self.first_module}"
        if self.first_non_finite:
            text += f"; {self.non_finite_text()}"
        if self.missing:
            text += f"; {len(self.missing)} probes missing in {self.candidate}: {_some(self.missing)}"
        return text

    def non_finite_text(self) -> str:
        results = list(self._ordered())
        at = next(i for i, r in enumerate(results) if r.non_finite)
        result = results[at]
        candidate = self.traces.get("candidate")
        size = "" if candidate is None else f" of {math.prod(candidate.shape(result.name))}"
        text = f"NaN or infinity first at {result.name}, {result.non_finite}{size} values"
        text += f", the {at} tensors compared before it are finite" if at else ", the first tensor compared"
        dtype = self.dtype if candidate is None else candidate.dtype
        limit = torch.finfo(DTYPES[dtype]).max
        return (
            text + f"; the reference's largest |value| there is {result.reference_max:.5g}, {dtype} holds {limit:.5g}"
        )

    def floor_text(self) -> str:
        """How the floor was found, in words."""
        growth = NETWORK_GROWTH[self.dtype]
        text = {
            "truth": f"the reference against the truth ({self.truth})",
            "perturbed": "the reference against itself, inputs and layers moved by a unit in the last place",
            "bound": f"not measured, a bound from the dtype: {growth:g} eps behind a network",
        }
        return f"floor: {text[self.floor_from]}"

    def table(self, every: bool = False) -> Table:
        """One row per tensor; unless ``every``, of a long run only the ends, the first divergence and the worst."""
        rows: list[list[str | Cell]] = []
        for result in self._results(every):
            if result is None:
                rows.append(["..."])
            else:
                style: Style = "bad" if result.ratio > self.threshold else ""
                rows.append([Cell(text, style) for text in _texts(result)])
        caption = f"{self.summary()}\n{self.floor_text()}"
        return Table(_COLUMNS, rows, title=self._title(), caption=caption)

    def __rich__(self) -> Table:
        return self.table()

    def _repr_html_(self) -> str:
        table = replace(self.table(), title="", caption="")
        return (
            f"<p>{escape(self._title())}<br><b>{escape(self.summary())}</b><br>{escape(self.floor_text())}</p>"
            f"{self._svg()}{table.to_html()}"
        )

    def _title(self) -> str:
        return f"{self.candidate} against {self.reference}"

    def _ordered(self) -> list[ProbeResult]:
        """Probes and taps in execution order."""
        return sorted([*self.probes, *self.modules], key=lambda r: execution_key(r.name))

    def _results(self, every: bool) -> Iterator[ProbeResult | None]:
        """The results in execution order, with None where some are left out."""
        results = self._ordered()
        shown = set(range(len(results)))
        if not every and len(results) > 48:
            marked = {self.first_divergence, self.first_module, self.first_non_finite, self.worst.name}
            marks = [i for i, result in enumerate(results) if result.name in marked]
            near = [i for m in marks for i in range(m - 2, m + 3)]
            shown = {*range(20), *range(len(results) - 6, len(results)), *near}
        gap = False
        for i, result in enumerate(results):
            if i in shown:
                yield result
            elif not gap:
                yield None
            gap = i not in shown

    def _svg(self) -> str:
        """Ratio along the probes as bars on a log axis, self-contained."""
        width, height, top = 640, 90, 6.0
        step = width / len(self.probes)
        bars = []
        for i, p in enumerate(self.probes):
            tall = height * min(max(math.log10(max(p.ratio, 1e-2)) + 2, 0.0), top) / top
            color = "#b00020" if p.ratio > self.threshold else "#4a7"
            tip = escape(f"{p.name}: ratio {p.ratio:.3g}")
            bars.append(
                f'<rect x="{i * step:.1f}" y="{height - tall:.1f}" '
                f'width="{max(step - 1, 0.5):.1f}" height="{tall:.1f}" '
                f'fill="{color}"><title>{tip}</title></rect>'
            )
        line = height * (1 - (math.log10(self.threshold) + 2) / top)
        return (
            f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-label="ratio at every probe, log scale; the line is {self.threshold:g}">{"".join(bars)}'
            f'<line x1="0" x2="{width}" y1="{line:.1f}" y2="{line:.1f}" '
            'stroke="#333" stroke-dasharray="4 3"/></svg>'
        )


_COLUMNS: tuple[str | Column, ...] = (
    "probe",
    *(Column(c, "right") for c in ("diverg.", "floor", "ratio", "max abs", "MSE", "cosine", "PSNR")),
)


def _texts(result: ProbeResult) -> list[str]:
    return [
        result.name,
        f"{result.divergence:.1e}",
        f"{result.floor:.1e}",
        f"{result.ratio:.2f}" if result.ratio < 1000 else f"{result.ratio:.0e}",
        f"{result.max_abs:.1e}",
        f"{result.mse:.1e}",
        "" if result.cosine is None else f"{result.cosine:.4f}",
        "" if result.psnr is None else f"{result.psnr:.1f}",
    ]


def kind_of(probe: str) -> str:
    """A probe's name without its step."""
    return (probe_of(probe) or (probe, None))[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_settings(one: Trace, other: Trace) -> None:
    """Two traces are of the same generation: every setting that changes what a tensor means agrees.

    Raises:
        SvdlabError: naming the candidate's file, the field and both values.
    """
    for name in type(one.settings).model_fields:
        a, b = getattr(one.settings, name), getattr(other.settings, name)
        if name not in _FREE and a != b:
            raise SvdlabError(f"{other.label}: settings: {name} is {b}, allowed: {a}, as in {one.label}")
    if one.scheduler and other.scheduler and one.scheduler != other.scheduler:
        raise SvdlabError(f"{other.label}: scheduler: {other.scheduler}, allowed: {one.scheduler}, as in {one.label}")
    for name, value in (("num_inference_steps", "num_steps"), ("decode_chunk_size", "effective_decode_chunk")):
        a, b = getattr(one.settings, value), getattr(other.settings, value)
        if a != b:
            raise SvdlabError(f"{other.label}: settings: {name} is {b}, allowed: {a}, as in {one.label}")


def compare(
    reference: Trace,
    candidate: Trace,
    truth: Trace | None = None,
    *,
    perturbed: Trace | None = None,
    threshold: float = THRESHOLD,
    progress: bool = False,
) -> Comparison:
    """Compare two traces probe by probe.

    Args:
        reference: of the working dtype.
        candidate: what is judged; it may hold only some probes, and NaN and infinity.
        truth: the reference in a wider dtype (float64), from the same inputs.
        perturbed: without a truth, the reference once more with everything moved by one unit in the last
            place (``reference.capture_diffusers(perturb=...)``).
        threshold: the parity tolerance, the largest ratio that is parity.
        progress: show a bar.

    Raises:
        SvdlabError: settings that differ, a tensor of another shape, NaN or infinity in the reference, the truth or
            the rerun, no probe in common, a truth that is not wider than the reference, that did not replay its
            inputs, that another implementation made, whose digests of checkpoint or inputs are others, or whose
            distance from it no rounding explains.
    """
    check_settings(reference, candidate)
    for other in (truth, perturbed):
        if other is not None:
            check_settings(reference, other)
            check_same_run(reference, other)
    if truth is not None and truth.dtype != "float64":
        wider = torch.finfo(DTYPES[truth.dtype]).eps < torch.finfo(DTYPES[reference.dtype]).eps
        if not wider:
            raise SvdlabError(f"{truth.label}: dtype {truth.dtype}, allowed as truth for {reference.dtype}: float64")
    common = sorted((n for n in reference if n in candidate), key=execution_key)
    probes = [n for n in common if not is_tap(n)]
    if not probes:
        raise SvdlabError(f"{candidate.label}: no probe in common with {reference.label}")
    order = sorted(reference.probes, key=execution_key)
    second, floor_from = (truth, "truth") if truth is not None else (perturbed, "perturbed" if perturbed else "bound")
    results = {
        name: _compare_one(name, reference, candidate, second, floor_from)  # type: ignore[arg-type]
        for name in tqdm(common, desc="compare", disable=not progress)
    }
    return Comparison(
        probes=[results[n] for n in probes],
        modules=[results[n] for n in common if is_tap(n)],
        missing=[n for n in order if n not in candidate and not is_optional(n)],
        extra=[n for n in candidate.probes if n not in reference],
        floor_from=floor_from,  # type: ignore[arg-type]
        dtype=reference.dtype,
        reference=reference.label,
        candidate=candidate.label,
        truth=None if truth is None else truth.label,
        threshold=threshold,
        traces={
            k: v for k, v in (("reference", reference), ("candidate", candidate), ("truth", truth)) if v is not None
        },
    )


_DIGEST_REASONS = {
    "checkpoint": "it was made with another checkpoint ('--model')",
    "inputs": "it was made from another image or other draws, allowed: a run that replays its inputs ('--inputs')",
}


def check_same_run(reference: Trace, other: Trace) -> None:
    """What measures the floor is the reference's own generation: the same code on the same random draws.

    Raises:
        SvdlabError: naming the file and what differs.
    """
    if other.implementation != reference.implementation:
        raise SvdlabError(
            f"{other.label}: implementation {short(other.implementation)}, allowed: "
            f"{short(reference.implementation)}, that of {reference.label}, whose floor it measures"
        )
    for name in ("input.noise", "input.latents"):
        if name not in reference or name not in other or other.shape(name) != reference.shape(name):
            continue  # a wrong shape is refused where tensors are compared
        r, o = reference[name].double(), other[name].double()
        if not float((o - r).norm()) <= THRESHOLD * resolution(reference.dtype) * float(r.norm()):
            raise SvdlabError(
                f"{other.label}: {name} is not that of {reference.label}, allowed: a run that replays its inputs "
                "('svdlab trace --inputs')"
            )
    for name, reason in _DIGEST_REASONS.items():
        a, b = reference.digests.get(name), other.digests.get(name)
        if a is not None and b is not None and a != b:
            raise SvdlabError(
                f"{other.label}: digests: {name} is {b[:12]}..., allowed: {a[:12]}..., as in {reference.label}; "
                f"{reason}"
            )


def _check_plausible(name: str, floor: float, reference: Trace, other: Trace) -> None:
    """Refuse a floor that no rounding explains: whoever diverges by as much would be at parity.

    Raises:
        SvdlabError: naming the file, the probe, the floor and what is allowed.
    """
    highest = IMPLAUSIBLE[reference.dtype] * bound(name, reference.dtype)
    if not floor <= highest:
        raise SvdlabError(
            f"{other.label}: {name} is {floor:.2g} away from {reference.label}, allowed: at most {highest:.2g}, what "
            f"{reference.dtype} rounding can do; another checkpoint, or reference and candidate exchanged?"
        )


def _compare_one(name: str, reference: Trace, candidate: Trace, second: Trace | None, floor_from: Floor) -> ProbeResult:
    if second is None or name not in second:
        second, floor_from = None, "bound"
    for trace in (candidate, second):
        if trace is not None and trace.shape(name) != reference.shape(name):
            raise SvdlabError(
                f"{trace.label}: {name}: shape {trace.shape(name)}, allowed: {reference.shape(name)}, "
                f"as in {reference.label}"
            )
    r, c = reference[name].reshape(-1), candidate.raw(name).reshape(-1)
    other = None if second is None else second[name].reshape(-1)
    # What the distances are measured from: the truth where there is one, else the reference.
    origin = other if floor_from == "truth" else None
    sums = torch.zeros(7, dtype=torch.float64)
    max_abs, clamped, reference_max, largest, non_finite = 0.0, 0.0, 0.0, 0.0, 0
    for start in range(0, r.numel(), BLOCK):
        part = slice(start, start + BLOCK)
        rb, cb = r[part].double(), c[part].double()
        ob = rb if origin is None else origin[part].double()
        fb = rb if other is None else other[part].double()
        finite = cb.isfinite()
        if not bool(finite.all()):
            non_finite += int((~finite).sum())
            cb = cb.where(finite, 0.0)
        difference = cb - rb
        sums += torch.stack(
            [
                ob.square().sum(),
                (cb - ob).square().sum(),
                (fb - rb).square().sum(),
                difference.square().sum(),
                rb.square().sum(),
                cb.square().sum(),
                (rb * cb).sum(),
            ]
        )
        max_abs = max(max_abs, float(difference.abs().max()))
        reference_max = max(reference_max, float(rb.abs().max()))
        largest = max(largest, float(ob.abs().max()))
        if name == "frames":
            clamped += float((to_unit(cb) - to_unit(rb)).square().sum())
    size, far, own, squared, rr, cc, rc = sums.tolist()
    small = 0 < largest and size < 1e-290  # where squares lose digits, or are 0 though the values are not
    if small or not sums.isfinite().all():
        files = ", ".join(trace.label for trace in (reference, candidate, second) if trace is not None)
        raise SvdlabError(
            f"{name}: values too {'small' if small else 'large'} to compare ({files}), allowed: squares that sum to "
            "1e-290 to 1e308, or zeros"
        )
    zero = size == 0.0
    scale = math.sqrt(r.numel()) if zero else math.sqrt(size)
    # The CLIP resize loses digits in its sampling positions, which no perturbation of its input shows.
    bounded = floor_from == "bound" or (floor_from == "perturbed" and name == "input.clip_pixels")
    lowest = bound(name, reference.dtype) if bounded else resolution(reference.dtype)
    if name == "frames_8bit":
        # Levels round to nothing or to one: no less than one of all values that falls to the other side, and without a
        # measurement as many as ``bound`` expects.
        lowest = max(1.0, LEVELS * lowest * math.sqrt(r.numel()) if bounded else 1.0) / scale
    floor = max(math.sqrt(own) / scale, lowest)
    if second is not None and not is_tap(name) and floor > lowest:  # what it measured is the floor
        _check_plausible(name, floor, reference, second)
    divergence = math.sqrt(far) / scale
    if non_finite:
        divergence = max_abs = squared = math.inf
        rr, clamped = 0.0, 0.0
    return ProbeResult(
        name=name,
        divergence=divergence,
        floor=floor,
        ratio=divergence / floor,
        max_abs=max_abs,
        mse=squared / r.numel(),
        cosine=None if rr == 0 or cc == 0 else rc / math.sqrt(rr) / math.sqrt(cc),
        psnr=10 * math.log10(r.numel() / clamped) if clamped else None,
        floor_from=floor_from,
        zero_reference=zero,
        non_finite=non_finite,
        reference_max=reference_max,
    )
