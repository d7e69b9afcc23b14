"""How a wrong tensor relates to the right one: what a diagnosis says of an error that no known bug explains.

A relation is a claim about the class of an error (a factor, transposed axes, a blur, wrong in one frame only), and it
is only made where the numbers leave no choice. It is *exact* when the tensor that it predicts is the one found to
within rounding, when it explains nearly all of the squared error and nearly all of what was found, and when it has far
fewer fitted parameters than the tensors have values. Tensors that are tiny, or (almost) constant, or that have only a
few values which differ, fit too much to prove anything: no relation is named for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from svdlab.errors import SvdlabError, short
from svdlab.parity import taps
from svdlab.parity.probes import EVERY_SHAPE, probe_of

# The largest multiple of the floor that rounding explains, as in ``compare.THRESHOLD``.
TOLERANCE = 4.0
# The share of the squared error that a relation explains to be named.
SHARE = 0.9
# An exact relation leaves at most this share of the variance of what was found.
UNEXPLAINED = 0.01
# Fewer values prove nothing; likewise for each constant of a fit, and for each slice that a permutation moves.
FEWEST = 16
# Different values of which a tensor, or the part to which a fit gives its own constants, has to have some.
LEVELS = 8
# Equations for each tap of a filter.
PER_TAP = 20
# Values on which candidates are tried before one is computed for the whole tensor.
TRIAL = 100_000
# Between a wrong part and the right rest: how many times larger its root mean square error is.
CONTRAST = 8.0
# Between the least wrong index of a wrong part and the worst one of the rest.
GAP = 4.0
# Indices of a part that are not next to each other.
SCATTERED = 4

_AXIS_OF: dict[int | str, str] = {
    dim: axis
    for axis, dims in {
        "batch": ("B", "V", "G"),
        "frame": ("F",),
        "channel": ("L", "2L", "D", 3),
        "height": ("H", "H0", "h"),
        "width": ("W", "W0", "w"),
        "step": ("S", "S+1"),
        "token": (1,),
    }.items()
    for dim in dims
}
_LAYOUTS = {
    "activation": ("batch", "frame", "channel", "height", "width"),
    "vector": ("batch", "channel"),
    "positions": ("frame", "channel"),
    "tokens": ("batch", "token", "channel"),
}
_ONE = {"batch": "batch item", "height": "row", "width": "column"}
_PIXELS = ("height", "width")


@dataclass(frozen=True)
class Relation:
    """What a wrong tensor is of the right one.

    Attributes:
        kind: "zero", "constant", "sign", "factor", "offset", "affine" (factor and offset), "flip", "rotation",
            "transposition", "memory_order", "shift", "halves", "heads", "interleaving", "permutation",
            "axis_offset", "axis_factor", "axis_affine", "filter", "part" (wrong in a part only) or "border".
        text: one sentence for people, without a full stop.
        residual: relative distance that is left between found and predicted.
        ratio: residual / floor.
        exact: rounding explains what is left.
        share: of the squared error that it explains, 0 to 1.
    """

    kind: str
    text: str
    residual: float
    ratio: float
    exact: bool
    share: float


def axes_of(name: str) -> tuple[str, ...]:
    """The axes of a probe or tap, with or without a step's number.

    They are "batch", "frame", "channel", "height", "width", "token" (of CLIP) and "step" (of a schedule).

    Raises:
        SvdlabError: neither a probe nor a tap.
    """
    if (probe := probe_of(name)) is not None or name in EVERY_SHAPE:
        axes: list[str] = []
        for dim in EVERY_SHAPE[probe[0] if probe else name]:
            # CLIP's square input has one name for both sides.
            axis = ("width" if "height" in axes else "height") if dim == "P" else _AXIS_OF[dim]
            axes.append(axis)
        return tuple(axes)
    tap = (taps.split(name) or (name, None))[0]
    layout = taps.layout_of(tap)
    if layout is None:
        raise SvdlabError(f"{short(name)}: neither a probe nor a tap of docs/trace-format.md")
    if tap.endswith(("visual_projection", "post_layernorm")):
        return "batch", "channel"
    if tap.endswith("patch_embedding"):
        return "batch", "channel", "height", "width"
    return _LAYOUTS[layout]


def relate(
    found: Tensor, right: Tensor, floor: float, axes: Sequence[str], heads: int | None = None
) -> Relation | None:
    """The simplest relation that holds to within rounding, or else the one that explains most of the error.

    Args:
        found: the wrong tensor.
        right: the right one, of the same shape.
        floor: the relative distance that rounding explains, above 0.
        axes: the tensor's axes, as ``axes_of`` gives them.
        heads: of attention, where the channels are heads times their width.

    Returns:
        None where the two are equal to within the floor, where no relation explains 90 % of the squared error, and
        where none can be told: other shapes, values that are not finite, tiny or almost constant tensors.

    Raises:
        ValueError: not one axis for each dimension, or a floor that is not positive.
    """
    if len(axes) != right.ndim:
        raise ValueError(f"{len(axes)} axes for a tensor of {right.ndim} dimensions")
    if floor <= 0:  # NaN where the stage's own tensors overflow: none can be told
        raise ValueError(f"floor: got {floor}, allowed: above 0")
    if found.shape != right.shape or right.numel() < FEWEST or not math.isfinite(floor):
        return None
    pair = _Pair(_wide(found), _wide(right), floor, tuple(axes))
    if not pair.tells():
        return None
    best: Relation | None = None
    for relation in _candidates(pair, heads):
        if relation is None:
            continue
        if relation.exact:
            return relation
        # A later one is less simple: it has to be better by more than its parameters.
        if relation.share >= SHARE and (best is None or 1 - relation.share < 0.5 * (1 - best.share)):
            best = relation
    if best is None:
        return None
    share = "more than 99.99 %" if best.share > 0.9999 else f"{100 * best.share:.4g} %"
    return replace(best, text=f"{best.text} (partly: explains {share} of the squared error)")


def _wide(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _square(x: Tensor) -> float:
    """The sum of squares."""
    flat = x.reshape(-1)
    return float(flat @ flat)


def _spread(x: Tensor) -> float:
    """The sum of squares about the mean."""
    return max(_square(x - x.mean()), 0.0)


def _levels(x: Tensor) -> int:
    """How many values differ by more than a thousandth of their spread."""
    spread = float(x.std())
    return len(((x - x.mean()) / (1e-3 * spread)).round().unique()) if spread > 0 else 1


@dataclass
class _Pair:
    """What was found and what is right, in float64."""

    found: Tensor
    right: Tensor
    floor: float
    axes: tuple[str, ...]

    def __post_init__(self) -> None:
        self.samples: dict[tuple[tuple[str, ...], int], tuple[Tensor, Tensor]] = {}
        self.error = self.found - self.right
        self.squared_error = _square(self.error)
        self.squared_right = _square(self.right)

    @cached_property
    def squares(self) -> tuple[Tensor, Tensor]:
        """Of the error and of the right tensor, value by value."""
        return self.error.square(), self.right.square()

    def tells(self) -> bool:
        """Whether they differ, and whether the right one has enough in it for a relation to mean something."""
        if not math.isfinite(self.squared_error) or not math.isfinite(self.squared_right):
            return False
        if self.squared_error <= (TOLERANCE * self.floor) ** 2 * self.squared_right:
            return False
        centred = self.right - self.right.mean()
        squares = centred.square()
        spread = float(squares.sum())
        if spread <= max(min(40 * self.floor, 0.5), 1e-6) ** 2 * self.squared_right:
            return False
        # How many values make the variance: one outlier among equal values is as little as one value.
        return spread**2 >= FEWEST * _square(squares) and _levels(_sample(self, ())[1]) >= LEVELS

    def dim(self, axis: str) -> int | None:
        """The dimension of an axis that has more than one index."""
        if axis not in self.axes:
            return None
        dim = self.axes.index(axis)
        return dim if self.right.shape[dim] > 1 else None

    def judge(
        self,
        kind: str,
        text: str,
        predicted: Tensor,
        parameters: int = 0,
        parts: tuple[Tensor, Tensor] | None = None,
        scales: bool = False,
        spread: float | None = None,
    ) -> Relation | None:
        """The relation if it explains what it must, given how many numbers were fitted.

        Args:
            kind, text: of the relation.
            predicted: what it says should have been found.
            parameters: fitted.
            parts: found and right where the relation speaks of a part only.
            scales: it multiplies, so that rounding is relative to what is predicted.
            spread: the squared variation of what was found that no constant of the fit explains by itself.
        """
        found, right = parts or (self.found, self.right)
        count = found.numel()
        if count < FEWEST * max(parameters, 1):
            return None
        left = _square(found - predicted)
        error = self.squared_error if parts is None else _square(found - right)
        if not math.isfinite(left) or error == 0:
            return None
        scale = _square(predicted) if scales else max(_square(right), _square(predicted))
        if scale == 0:
            return None
        corrected = left * count / (count - parameters)
        share = 1 - corrected / error
        # A factor of nearly zero is near to any small tensor: what was found has to be explained, too.
        spread = _spread(found) if spread is None else spread
        if share < SHARE or corrected > (1 - SHARE) * spread:
            return None
        residual = math.sqrt(corrected / scale)
        exact = residual <= TOLERANCE * self.floor and corrected <= UNEXPLAINED * spread
        return Relation(kind, text, residual, residual / self.floor, exact, share)


def _candidates(pair: _Pair, heads: int | None) -> Iterator[Relation | None]:
    """From simple to less simple."""
    yield from _constants(pair)
    yield from _rearranged(pair, heads)
    yield from _permuted(pair, heads)
    yield from _cut_shifts(pair)
    yield from _per_axis(pair)
    yield from _filters(pair)
    yield from _parts(pair)


# One factor, one offset.


def _constants(pair: _Pair) -> Iterator[Relation | None]:
    found, right = pair.found, pair.right
    size = _square(found)
    # Zeros and constants are rounded to themselves: no measured floor makes a small tensor one of them.
    limit = (TOLERANCE * min(pair.floor, 1e-6)) ** 2
    if size <= limit * pair.squared_right:
        residual = math.sqrt(size / pair.squared_right)
        yield Relation("zero", "all zeros", residual, residual / pair.floor, True, 1.0)
        return
    spread = _spread(found)
    if spread <= limit * size and spread <= UNEXPLAINED * _spread(right):
        residual = math.sqrt(spread / size)
        share = min(max(1 - spread / pair.squared_error, 0.0), 1.0)
        text = f"{_number(float(found.mean()))} everywhere"
        yield Relation("constant", text, residual, residual / pair.floor, True, share)
        return
    one, other = _sample(pair, ())
    if _promising(one, other, -other):
        yield pair.judge("sign", "the right tensor with its sign changed", -right, scales=True)
    dims = list(range(right.ndim))
    for kind, parameters, fit in (("factor", 1, _factors), ("offset", 1, _offsets), ("affine", 2, _affine)):
        if one.numel() < found.numel() and not _promising(one, other, fit(one, other, dims)[0]):
            continue
        predicted, constants = fit(found, right, dims)
        factor = f"{_number(float(constants['factor']))} times " if "factor" in constants else ""
        offset = f" {_plus(float(constants['offset']))}" if "offset" in constants else ""
        text = f"{factor}the right tensor{offset}"
        yield pair.judge(kind, text, predicted, parameters, scales=kind == "factor")


def _number(x: float) -> str:
    return f"{x:.4g}"


def _plus(x: float) -> str:
    return f"{'minus' if x < 0 else 'plus'} {_number(abs(x))}"


# The same values in other places.

_Move = Callable[[Tensor], Tensor]


def _rearranged(pair: _Pair, heads: int | None) -> Iterator[Relation | None]:
    """Moves that are known beforehand, or that have one number; values of the axes not involved are sampled first."""
    moves: list[tuple[str, str, tuple[str, ...], _Move]] = []
    present = [axis for axis in pair.axes if pair.dim(axis) is not None]
    for axis in present:
        moves.append(("flip", f"{_many(axis)} in reverse order", (axis,), _flip(pair, axis)))
    if all(axis in present for axis in _PIXELS):
        text = "turned by 180 degrees"
        h, w = pair.axes.index("height"), pair.axes.index("width")
        moves.append(("rotation", text, _PIXELS, _rot90(2, h, w)))
        if pair.right.shape[h] == pair.right.shape[w]:
            for turns, degrees in ((1, 90), (3, 270)):
                moves.append(("rotation", f"turned by {degrees} degrees", _PIXELS, _rot90(turns, h, w)))
    for one, other in combinations(present, 2):
        moves += _transpositions(pair, one, other)
    moves += _last_to_first(pair)
    for axis in present:
        size = pair.right.shape[pair.axes.index(axis)]
        moves += [
            (*_roll_text(axis, shift, size), (axis,), _roll(pair, (axis,), (shift,))) for shift in _rolls(pair, axis)
        ]
    if (dim := pair.dim("channel")) is not None:
        size = pair.right.shape[dim]
        pairs = [(a, size // a) for a in range(2, size) if size % a == 0 and size // a > 1]
        # With heads known, only they.
        pairs = [p for p in pairs if heads in p] if heads else pairs
        for a, b in pairs:
            text = f"channels interleaved otherwise: ({b} {a}) in place of ({a} {b})"
            moves.append(("interleaving", text, ("channel",), _interleave(dim, a, b)))
    for kind, text, axes, move in moves:
        yield _try(pair, kind, text, axes, move)
    # Together, where neither alone is it: costs two transforms, so last.
    if all(axis in present for axis in _PIXELS):
        for shifts in _rolls_2d(pair):
            text = f"shifted around by {shifts[0]} rows and {shifts[1]} columns"
            yield _try(pair, "shift", text, _PIXELS, _roll(pair, _PIXELS, shifts))


def _try(pair: _Pair, kind: str, text: str, axes: tuple[str, ...], move: _Move) -> Relation | None:
    """Judge a move on a sample first: as many values of the other axes as make ``TRIAL``."""
    found, right = _sample(pair, axes)
    if found.numel() < pair.found.numel() and not _promising(found, right, move(right)):
        return None
    return pair.judge(kind, text, move(pair.right))


def _promising(found: Tensor, right: Tensor, predicted: Tensor) -> bool:
    """Whether a sample leaves it open that a relation explains what ``judge`` asks for."""
    return _square(found - predicted) <= 0.3 * min(_square(found - right), _spread(found))


def _sample(pair: _Pair, keep: Sequence[str], limit: int = TRIAL) -> tuple[Tensor, Tensor]:
    """Both tensors with fewer indices along the axes that are not kept; the same indices in both."""
    if (tuple(keep), limit) in pair.samples:
        return pair.samples[tuple(keep), limit]
    found, right = pair.found, pair.right
    others = sorted((d for d, axis in enumerate(pair.axes) if axis not in keep), key=lambda d: -right.shape[d])
    for dim in others:
        size, excess = right.shape[dim], right.numel() / limit
        if excess <= 1:
            break
        keep_count = max(1, math.ceil(size / excess))
        indices = torch.linspace(0, size - 1, keep_count).round().long().unique()
        found, right = found.index_select(dim, indices), right.index_select(dim, indices)
    pair.samples[tuple(keep), limit] = found, right
    return found, right


def _many(axis: str) -> str:
    return f"{_ONE.get(axis, axis)}s"


def _flip(pair: _Pair, axis: str) -> _Move:
    dim = pair.axes.index(axis)
    return lambda x: x.flip(dim)


def _rot90(turns: int, h: int, w: int) -> _Move:
    return lambda x: torch.rot90(x, turns, (h, w))


def _roll(pair: _Pair, axes: Sequence[str], shifts: Sequence[int]) -> _Move:
    dims = tuple(pair.axes.index(axis) for axis in axes)
    return lambda x: torch.roll(x, tuple(shifts), dims)


def _interleave(dim: int, a: int, b: int) -> _Move:
    return lambda x: x.unflatten(dim, (a, b)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _transpositions(pair: _Pair, one: str, other: str) -> list[tuple[str, str, tuple[str, ...], _Move]]:
    """Two axes exchanged; where their sizes differ, the values as they lie in memory, read in the other order."""
    p, q = pair.axes.index(one), pair.axes.index(other)
    a, b = pair.right.shape[p], pair.right.shape[q]
    if a == b:
        return [("transposition", f"{one} and {other} transposed", (one, other), lambda x: x.transpose(p, q))]

    def written(x: Tensor) -> Tensor:
        return x.transpose(p, q).reshape(x.shape)

    def read(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[p], shape[q] = shape[q], shape[p]
        return x.reshape(shape).transpose(p, q)

    # Where the axes are next to each other, the rest can be sampled; else the memory of all axes between is mixed.
    axes = pair.axes[p : q + 1]
    return [
        ("memory_order", f"written with {other} before {one}, read with {one} before {other}", axes, written),
        ("memory_order", f"written with {one} before {other}, read with {other} before {one}", axes, read),
    ]


def _last_to_first(pair: _Pair) -> list[tuple[str, str, tuple[str, ...], _Move]]:
    """Channels-last values read as channels-first, and the reverse."""
    if pair.axes[-3:] != ("channel", *_PIXELS) or pair.dim("channel") is None:
        return []
    c, h, w = pair.right.shape[-3:]
    axes = ("channel", *_PIXELS)
    return [
        (
            "memory_order",
            "written with channels last, read with channels first",
            axes,
            lambda x: x.movedim(-3, -1).reshape(x.shape),
        ),
        (
            "memory_order",
            "written with channels first, read with channels last",
            axes,
            lambda x: x.reshape(*x.shape[:-3], h, w, c).movedim(-1, -3),
        ),
    ]


def _rolls(pair: _Pair, axis: str) -> list[int]:
    """The shift along an axis that correlates best, by the Fourier transform; none where it is no shift at all."""
    dim = pair.axes.index(axis)
    found, right = _sample(pair, (axis,))
    product = torch.fft.rfft(found, dim=dim) * torch.fft.rfft(right, dim=dim).conj()
    others = [d for d in range(found.ndim) if d != dim]
    summed = product.sum(others) if others else product
    shift = int(torch.fft.irfft(summed, n=found.shape[dim]).argmax())
    return [shift] if shift else []


def _rolls_2d(pair: _Pair) -> list[tuple[int, int]]:
    dims = tuple(pair.axes.index(axis) for axis in _PIXELS)
    found, right = _sample(pair, _PIXELS)
    size = tuple(found.shape[d] for d in dims)
    product = torch.fft.rfft2(found, dim=dims) * torch.fft.rfft2(right, dim=dims).conj()
    others = [d for d in range(found.ndim) if d not in dims]
    best = int(torch.fft.irfft2(product.sum(others) if others else product, s=size).argmax())
    dy, dx = divmod(best, size[1])
    return [(_signed(dy, size[0]), _signed(dx, size[1]))] if dy and dx else []


def _signed(shift: int, size: int) -> int:
    return shift - size if shift > size // 2 else shift


def _roll_text(axis: str, shift: int, size: int) -> tuple[str, str]:
    if 2 * shift == size:
        guidance = " (of guidance, where both are in it)" if axis == "batch" else ""
        return "halves", f"the two halves of the {_many(axis)} exchanged{guidance}"
    by = _signed(shift, size)
    return "shift", f"{_many(axis)} shifted around by {by}: index {by % size} holds what belongs at 0"


def _permuted(pair: _Pair, heads: int | None) -> Iterator[Relation | None]:
    """Any order of the indices of one axis, found by matching slices one to one."""
    channel = pair.dim("channel")
    if heads and channel is not None and heads > 1 and pair.right.shape[channel] % heads == 0:
        split = (heads, pair.right.shape[channel] // heads)
        one, other = _sample(pair, ("channel",))
        order = _matching(one.unflatten(channel, split), other.unflatten(channel, split), channel)
        if order is not None:
            moved = pair.right.unflatten(channel, split).index_select(channel, order).flatten(channel, channel + 1)
            yield pair.judge("heads", f"heads {_order_text(order)}", moved)
    for axis in pair.axes:
        if (dim := pair.dim(axis)) is None or pair.right.numel() < FEWEST * pair.right.shape[dim]:
            continue
        order = _matching(*_sample(pair, (axis,)), dim)
        if order is not None:
            predicted = pair.right.index_select(dim, order)
            yield pair.judge("permutation", f"{_many(axis)} {_order_text(order)}", predicted)


def _matching(found: Tensor, right: Tensor, dim: int) -> Tensor | None:
    """For each slice found the one right slice that is nearest: a permutation, or None where it is not plain."""
    size = right.shape[dim]
    if size > 4096:
        return None
    one, other = found.movedim(dim, 0).reshape(size, -1), right.movedim(dim, 0).reshape(size, -1)
    distances = (one.square().sum(1)[:, None] + other.square().sum(1)[None] - 2 * one @ other.T).clamp_min(0)
    nearest = distances.topk(2, dim=1, largest=False)
    order = nearest.indices[:, 0]
    if len(order.unique()) < size or bool((order == torch.arange(size)).all()):
        return None
    # Two right slices that are nearly the same could both be meant.
    plain = nearest.values[:, 1] > 4 * nearest.values[:, 0] + 1e-6 * other.square().sum(1).mean()
    return order if bool(plain.all()) else None


def _order_text(order: Tensor) -> str:
    places = order.tolist()
    moved = [i for i, place in enumerate(places) if place != i]
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]} exchanged"
    if places == list(range(len(places)))[::-1]:
        return "in reverse order"
    return f"permuted: {', '.join(map(str, places[:16]))}{', ...' if len(places) > 16 else ''}"


def _cut_shifts(pair: _Pair) -> Iterator[Relation | None]:
    """Shifts that do not come back in on the other side; the edge is left out."""
    for axis in ("frame", "token", "height", "width"):
        if (dim := pair.dim(axis)) is None:
            continue
        size = pair.right.shape[dim]
        sampled = _sample(pair, (axis,))
        for shift in (1, -1, 2, -2, 3, -3):
            length = size - abs(shift)
            if 2 * length < size or length < 2:
                continue
            start, source = max(shift, 0), max(-shift, 0)
            one, other = (x.narrow(dim, start, length) for x in sampled)
            if not _promising(one, other, sampled[1].narrow(dim, source, length)):
                continue
            found = pair.found.narrow(dim, start, length)
            parts = found, pair.right.narrow(dim, start, length)
            text = f"{_many(axis)} shifted by {shift}: index {start} holds what belongs at {source} (edge left out)"
            yield pair.judge("shift", text, pair.right.narrow(dim, source, length), parts=parts)


# A constant for each index of an axis.


def _per_axis(pair: _Pair) -> Iterator[Relation | None]:
    single = [(axis,) for axis in pair.axes if pair.dim(axis) is not None]
    leading = [axis for axis in pair.axes if axis not in _PIXELS and pair.dim(axis) is not None]
    # Constants below this are roundings.
    zero = pair.floor * math.sqrt(pair.squared_right / pair.right.numel())
    for axes in (*single, *combinations(leading, 2), *combinations(leading, 3), _PIXELS):
        if any(pair.dim(axis) is None for axis in axes):
            continue
        dims = [d for d, axis in enumerate(pair.axes) if axis not in axes]
        count = math.prod(pair.right.shape[d] for d in dims)
        groups = pair.right.numel() // count
        sampled = _sample(pair, axes, max(TRIAL, 2 * FEWEST * groups))
        for kind, each, fit in (
            ("axis_offset", 1, _offsets),
            ("axis_factor", 1, _factors),
            ("axis_affine", 2, _affine),
        ):
            if count < each * FEWEST or not dims:
                continue
            if sampled[0].numel() < pair.found.numel():
                tried, _ = fit(*sampled, dims)
                if not _promising(*sampled, tried):
                    continue
            if not _told_apart(pair, axes):
                break
            predicted, constants = fit(pair.found, pair.right, dims)
            text = _constants_text(axes, constants, zero)
            within = _square(pair.found - pair.found.mean(dims, keepdim=True))
            yield pair.judge(kind, text, predicted, each * groups, scales=kind == "axis_factor", spread=within)


def _told_apart(pair: _Pair, axes: Sequence[str]) -> bool:
    """Whether the right values of most groups take enough levels: two levels are fitted by any two constants."""
    kept = [pair.axes.index(axis) for axis in axes]
    rows = pair.right.movedim(kept, list(range(len(kept)))).flatten(0, len(kept) - 1).flatten(1)
    picked = rows[torch.linspace(0, len(rows) - 1, min(len(rows), 32)).long(), :4096]
    return sum(_levels(row) >= LEVELS for row in picked) > len(picked) / 2


def _offsets(found: Tensor, right: Tensor, dims: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """What is predicted with one offset for each group, and the offsets."""
    offset = (found - right).mean(dims, keepdim=True)
    return right + offset, {"offset": offset}


def _factors(found: Tensor, right: Tensor, dims: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    squares = right.square().sum(dims, keepdim=True)
    factor = (found * right).sum(dims, keepdim=True) / squares.where(squares > 0, 1)
    return factor * right, {"factor": factor}


def _affine(found: Tensor, right: Tensor, dims: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    mean_right = right.mean(dims, keepdim=True)
    centred = right - mean_right
    squares = centred.square().sum(dims, keepdim=True)
    # A group that hardly varies has no factor of its own.
    varies = squares > 1e-12 * right.square().sum(dims, keepdim=True)
    factor = torch.where(varies, (found * centred).sum(dims, keepdim=True) / squares.where(varies, 1), 1.0)
    offset = found.mean(dims, keepdim=True) - factor * mean_right
    return factor * right + offset, {"factor": factor, "offset": offset}


def _constants_text(axes: Sequence[str], constants: Mapping[str, Tensor], zero: float) -> str:
    one = " and ".join(_ONE.get(axis, axis) for axis in axes)
    parts = []
    for name, values in constants.items():
        flat = values.where(values.abs() > zero, 0).reshape(-1).tolist()
        if len(flat) <= 8:
            shown = ", ".join(map(_number, flat))
        else:
            shown = f"from {_number(min(flat))} to {_number(max(flat))}"
        parts.append(f"{'an' if name == 'offset' else 'a'} {name} ({shown})")
    return f"{' and '.join(parts)} for each {one}"


# Filters.


def _filters(pair: _Pair) -> Iterator[Relation | None]:
    """A small linear filter, the same everywhere, over height and width, or over frames; borders are left out."""
    for shape, axes in (
        ((3, 3), _PIXELS),
        ((1, 5), _PIXELS),
        ((5, 1), _PIXELS),
        ((5, 5), _PIXELS),
        ((1, 9), _PIXELS),
        ((9, 1), _PIXELS),
        ((7, 7), _PIXELS),
        ((3,), ("frame",)),
        ((5,), ("frame",)),
    ):
        if any(pair.dim(axis) is None for axis in axes):
            continue
        dims = [pair.axes.index(axis) for axis in axes]
        reach = [k // 2 for k in shape]
        if any(pair.right.shape[d] < 2 * r + 3 for d, r in zip(dims, reach, strict=True)):
            continue
        kernel = _fit(pair, axes, shape)
        if kernel is None:
            continue
        found, right = pair.found, pair.right
        for d, r in zip(dims, reach, strict=True):
            found, right = found.narrow(d, r, found.shape[d] - 2 * r), right.narrow(d, r, right.shape[d] - 2 * r)
        predicted = _filtered(pair.right, dims, kernel)
        yield pair.judge("filter", _filter_text(kernel, axes), predicted, kernel.numel(), parts=(found, right))


def _windows(x: Tensor, dims: Sequence[int], shape: Sequence[int]) -> Iterator[Tensor]:
    """The views of ``x`` that lie under each tap, in the kernel's order."""
    taps_of = [[]] if not shape else [[k] for k in range(shape[0])]
    for k in shape[1:]:
        taps_of = [[*before, i] for before in taps_of for i in range(k)]
    for place in taps_of:
        view = x
        for d, k, i in zip(dims, shape, place, strict=True):
            view = view.narrow(d, i, x.shape[d] - k + 1)
        yield view


def _fit(pair: _Pair, axes: Sequence[str], shape: tuple[int, ...]) -> Tensor | None:
    """The kernel by least squares on a sample; None where it is not determined or explains too little there."""
    dims = [pair.axes.index(axis) for axis in axes]
    found, right = _sample(pair, axes)
    for d, k in zip(dims, shape, strict=True):
        found = found.narrow(d, k // 2, found.shape[d] - k + 1)
    count, taps_count = found.numel(), math.prod(shape)
    if count < PER_TAP * taps_count:
        return None
    picked: Tensor | slice = slice(None)
    if count > 400 * taps_count:
        picked = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 400 * taps_count]
    target = found.reshape(-1)[picked]
    design = torch.stack([view.reshape(-1)[picked] for view in _windows(right, dims, shape)], 1)
    gram = design.T @ design
    eigenvalues = torch.linalg.eigvalsh(gram)
    # A tensor so smooth that its neighbours differ by rounding only does not determine a filter.
    if float(eigenvalues[0]) <= max((10 * pair.floor) ** 2, 1e-12) * float(eigenvalues[-1]):
        return None
    kernel = torch.linalg.solve(gram, design.T @ target)
    same = design[:, taps_count // 2]
    if not _promising(target, same, design @ kernel):
        return None
    return kernel.reshape(shape)


def _filtered(x: Tensor, dims: Sequence[int], kernel: Tensor) -> Tensor:
    if len(dims) == 2 and list(dims) == [x.ndim - 2, x.ndim - 1]:
        images = x.reshape(-1, 1, *x.shape[-2:])
        return functional.conv2d(images, kernel[None, None]).reshape(
            *x.shape[:-2], *(s - k + 1 for s, k in zip(x.shape[-2:], kernel.shape, strict=True))
        )
    predicted: Tensor | None = None
    for weight, view in zip(kernel.reshape(-1).tolist(), _windows(x, dims, kernel.shape), strict=True):
        predicted = view * weight if predicted is None else predicted.add_(view, alpha=weight)
    assert predicted is not None
    return predicted


def _filter_text(kernel: Tensor, axes: Sequence[str]) -> str:
    size = " x ".join(map(str, kernel.shape))
    gain = float(kernel.sum())
    where = "over frames" if axes == ("frame",) else "over height and width"
    text = f"the right tensor filtered {where} by {size} weights that sum to {_number(gain)}"
    if abs(gain) < 1e-3 * float(kernel.abs().sum()):
        return f"{text} (borders left out)"
    centres, spreads = [], []
    for d, axis in enumerate(axes):
        others = [e for e in range(kernel.ndim) if e != d]
        marginal = (kernel.sum(others) if others else kernel) / gain
        places = torch.arange(kernel.shape[d], dtype=kernel.dtype) - kernel.shape[d] // 2
        centre = float(marginal @ places)
        # The kernel looks to where the value comes from: the picture moves the other way.
        centres.append(f"{_number(round(-centre, 4) + 0.0)} {_many(axis)}")
        spreads.append(float(marginal @ (places - centre).square()))
    text += f", which move it by {' and '.join(centres)}"
    if float(kernel.max()) < 0.999 * gain and float(kernel.min()) > -0.001 * abs(gain):
        text += f" and blur it (standard deviation {', '.join(_number(math.sqrt(max(s, 0))) for s in spreads)})"
    return f"{text} (borders left out)"


# Right but for a part.


def _parts(pair: _Pair) -> Iterator[Relation | None]:
    """Wrong in a box or a border only, and right to within rounding in the rest."""
    yield _box(pair, pair.floor)
    yield _border(pair)
    # Nearly all of the error may still lie in one place.
    yield _box(pair, math.inf)


def _clean(pair: _Pair, keep: Sequence[int], floor: float) -> Tensor:
    """Which indices of the axes ``keep`` are right: within the tolerance of a floor, and far from the worst."""
    dims = [d for d in range(pair.right.ndim) if d not in keep]
    error, size = pair.squares
    if dims:
        error, size = error.mean(dims), size.mean(dims)
    size = size.clamp_min(pair.squared_right / pair.right.numel())
    clean = (error <= (TOLERANCE * floor) ** 2 * size) & (error <= error.max() / CONTRAST**2)
    # Errors that pass from small to large without a gap have no edge at which a part begins.
    if clean.any() and error[~clean].min() < GAP**2 * error[clean].max():
        return torch.zeros_like(clean)
    return clean


def _box(pair: _Pair, floor: float) -> Relation | None:
    """Where the wrong indices of each axis leave at least half of the tensor out."""
    outside = torch.zeros(pair.right.shape, dtype=torch.bool)
    said: list[str] = []
    fraction = 1.0
    for dim, axis in enumerate(pair.axes):
        size = pair.right.shape[dim]
        if size == 1:
            continue
        clean = _clean(pair, [dim], floor)
        wrong = [i for i, good in enumerate(clean.tolist()) if not good]
        if len(wrong) == size or not wrong:
            continue
        if len(wrong) > SCATTERED and wrong[-1] - wrong[0] >= len(wrong):
            continue
        fraction *= len(wrong) / size
        outside |= clean.view([size if d == dim else 1 for d in range(pair.right.ndim)])
        said.append(_indices_text(axis, wrong, size))
    if not said or fraction > 0.5:
        return None
    return _judge_part(pair, outside, "part", f"in {', '.join(reversed(said))}")


def _indices_text(axis: str, wrong: list[int], size: int) -> str:
    run = wrong == list(range(wrong[0], wrong[-1] + 1))
    if 2 * len(wrong) == size and run and wrong[0] in (0, size // 2):
        return f"the {'second' if wrong[0] else 'first'} half of the {_many(axis)}"
    if len(wrong) == 1:
        last = " (the last)" if wrong[0] == size - 1 else ""
        return f"{_ONE.get(axis, axis)} {wrong[0]}{last}"
    if run and len(wrong) > 2:
        return f"{_many(axis)} {wrong[0]} to {wrong[-1]} of {size}"
    return f"{_many(axis)} {', '.join(map(str, wrong[:8]))}{', ...' if len(wrong) > 8 else ''} of {size}"


def _border(pair: _Pair) -> Relation | None:
    """Where the right pixels are a rectangle."""
    h, w = pair.dim("height"), pair.dim("width")
    if h is None or w is None:
        return None
    clean = _clean(pair, [h, w], pair.floor)
    rows, columns = clean.any(1).nonzero().flatten(), clean.any(0).nonzero().flatten()
    if not len(rows):
        return None
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    inner = torch.zeros_like(clean)
    inner[top:bottom, left:right] = True
    if bool((inner != clean).any()) or int(clean.sum()) < max(FEWEST, clean.numel() / 4):
        return None
    widths = {"top": top, "bottom": len(clean) - bottom, "left": left, "right": clean.shape[1] - right}
    sizes = set(widths.values())
    if len(sizes) == 1:
        text = f"in a border of {top} pixel{'s' * (top > 1)}"
    else:
        text = f"in a border: {', '.join(f'{k} pixels at the {side}' for side, k in widths.items() if k)}"
    shape = [s if d in (h, w) else 1 for d, s in enumerate(pair.right.shape)]
    return _judge_part(pair, inner.view(shape).expand_as(pair.right), "border", text)


def _judge_part(pair: _Pair, outside: Tensor, kind: str, text: str) -> Relation | None:
    """Right outside, and clearly wrong inside."""
    count, total = int(outside.sum()), outside.numel()
    left = _square(pair.error[outside])
    scale = _square(pair.right[outside]) if count else 0.0
    inside = pair.squared_error - left
    if not count or count < FEWEST or inside <= 0:
        return None
    scale = max(scale, pair.squared_right * count / total)
    if left / count * CONTRAST**2 > inside / (total - count):
        return None
    share = 1 - left / pair.squared_error
    residual = math.sqrt(left / scale)
    exact = residual <= TOLERANCE * pair.floor and share >= SHARE
    text = f"wrong only {text} (right elsewhere to within rounding)" if exact else f"wrong mostly {text}"
    return Relation(kind, text, residual, residual / pair.floor, exact, share)
