"""Relations between a wrong tensor and the right one: each is found, and none is named that is not there."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from svdlab.errors import SvdlabError
from svdlab.parity.relations import Relation, axes_of, relate

AXES = ("batch", "frame", "channel", "height", "width")
SHAPE = (2, 6, 8, 10, 10)
FLOOR = 2e-7


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _rounded(x: Tensor, seed: int = 99) -> Tensor:
    """In float32 with the rounding noise of a few operations."""
    return (x.double() * (1 + 1.2e-7 * _randn(*x.shape, seed=seed).double())).float()


def _relate(change: Callable[[Tensor], Tensor], shape: tuple[int, ...] = SHAPE, **more: int) -> Relation | None:
    right = _randn(*shape) + 0.3
    return relate(_rounded(change(right)), right, FLOOR, AXES, **more)


def _set(x: Tensor, where: tuple[object, ...], value: Tensor | float) -> Tensor:
    x = x.clone()
    x[where] = value
    return x


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    images = x.reshape(-1, 1, *x.shape[-2:])
    return functional.conv2d(images, kernel[None, None], padding="same").reshape(x.shape)


_GAUSS = torch.tensor([0.25, 0.5, 0.25])
_KERNEL = torch.outer(_GAUSS, _GAUSS)
_ORDER = torch.tensor([2, 0, 1, 5, 3, 4, 7, 6])
_NOISE = _randn(*SHAPE, seed=5)

CASES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "zero": (lambda x: x * 0, "zero", "all zeros"),
    "constant": (lambda x: x * 0 + 3, "constant", "3 everywhere"),
    "sign": (lambda x: -x, "sign", "the right tensor with its sign changed"),
    "factor": (lambda x: 2.5 * x, "factor", "2.5 times the right tensor"),
    "VAE's factor": (lambda x: 0.18215 * x, "factor", "0.1822 times"),
    "offset": (lambda x: x - 0.5, "offset", "the right tensor minus 0.5"),
    "affine": (lambda x: 0.5 * x + 0.5, "affine", "0.5 times the right tensor plus 0.5"),
    "flip": (lambda x: x.flip(-1), "flip", "columns in reverse order"),
    "BGR": (lambda x: x.flip(2), "flip", "channels in reverse order"),
    "rot180": (lambda x: x.flip(-1, -2), "rotation", "180"),
    "rot90": (lambda x: x.rot90(1, (-2, -1)), "rotation", "90"),
    "transposed": (lambda x: x.transpose(-1, -2), "transposition", "height and width transposed"),
    "frames and channels in memory": (
        lambda x: x.transpose(1, 2).reshape(x.shape),
        "memory_order",
        "written with channel before frame, read with frame before channel",
    ),
    "batch and frames in memory": (
        lambda x: x.reshape(6, 2, 8, 10, 10).transpose(0, 1),
        "memory_order",
        "written with batch before frame, read with frame before batch",
    ),
    "channels last": (lambda x: x.movedim(2, -1).reshape(x.shape), "memory_order", "channels last"),
    "read channels last": (
        lambda x: x.reshape(2, 6, 10, 10, 8).movedim(-1, 2),
        "memory_order",
        "written with channels first, read with channels last",
    ),
    "batch halves": (lambda x: x.roll(1, 0), "flip", "batch items in reverse order"),
    "channel halves": (lambda x: x.roll(4, 2), "halves", "the two halves of the channels exchanged"),
    "channels rolled": (lambda x: x.roll(3, 2), "shift", "channels shifted around by 3"),
    "frames rolled": (lambda x: x.roll(-1, 1), "shift", "frames shifted around by -1"),
    "columns rolled": (lambda x: x.roll(2, -1), "shift", "columns shifted around by 2"),
    "rows and columns rolled": (lambda x: x.roll((1, -2), (-2, -1)), "shift", "by 1 rows and -2 columns"),
    "channels permuted": (lambda x: x[:, :, _ORDER], "permutation", "channels permuted: 2, 0, 1, 5, 3, 4, 7, 6"),
    "two frames": (lambda x: x[:, [0, 1, 4, 3, 2, 5]], "permutation", "frames 2 and 4 exchanged"),
    "interleaved": (
        lambda x: x.unflatten(2, (2, 4)).transpose(2, 3).flatten(2, 3),
        "interleaving",
        "(4 2) in place of (2 4)",
    ),
    "one frame late": (
        lambda x: torch.cat([x[:, :1] * 0, x[:, :-1]], 1),
        "shift",
        "frames shifted by 1: index 1 holds what belongs at 0 (edge left out)",
    ),
    "offset per channel": (
        lambda x: x + torch.arange(8.0).view(8, 1, 1),
        "axis_offset",
        "an offset (0, 1, 2, 3, 4, 5, 6, 7) for each channel",
    ),
    "factor per frame": (
        lambda x: x * torch.arange(1.0, 7).view(6, 1, 1, 1),
        "axis_factor",
        "a factor (1, 2, 3, 4, 5, 6) for each frame",
    ),
    "offset per batch item and channel": (
        lambda x: x + _randn(2, 1, 8, 1, 1, seed=3),
        "axis_offset",
        "for each batch item and channel",
    ),
    "affine per channel": (
        lambda x: x * _randn(8, 1, 1, seed=3) + _randn(8, 1, 1, seed=4),
        "axis_affine",
        "for each channel",
    ),
    "offset per pixel": (lambda x: x + _randn(10, 10, seed=3), "axis_offset", "for each row and column"),
    "blur": (
        lambda x: _blur(x, _KERNEL),
        "filter",
        "3 x 3 weights that sum to 1, which move it by 0 rows and 0 columns",
    ),
    "half a pixel": (
        lambda x: _blur(x, torch.tensor([[0, 0, 0], [0, 0.5, 0.5], [0, 0, 0]])),
        "filter",
        "0 rows and -0.5 columns and blur it",
    ),
    "temporal blur": (
        lambda x: 0.25 * x.roll(1, 1) + 0.5 * x + 0.25 * x.roll(-1, 1),
        "filter",
        "over frames by 3 weights",
    ),
    "one frame": (
        lambda x: _set(x, (slice(None), 3), _NOISE[:, 3]),
        "part",
        "wrong only in frame 3 (right elsewhere to within rounding)",
    ),
    "one channel of a frame": (
        lambda x: _set(x, (slice(None), 3, 2), _NOISE[:, 3, 2]),
        "part",
        "wrong only in channel 2, frame 3 (right",
    ),
    "first half of the batch": (lambda x: _set(x, (0,), _NOISE[0]), "part", "the first half of the batch items"),
    "last row": (lambda x: _set(x, (..., 9, slice(None)), _NOISE[..., 9, :]), "part", "in row 9 (the last)"),
    "border": (
        lambda x: _set(_NOISE, (..., slice(1, 9), slice(1, 9)), x[..., 1:9, 1:9]),
        "border",
        "wrong only in a border of 1 pixel (right",
    ),
    "padded on one side": (
        lambda x: _set(_NOISE, (..., slice(0, 8), slice(0, 9)), x[..., 0:8, 0:9]),
        "border",
        "2 pixels at the bottom, 1 pixels at the right",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_is_found(case: str) -> None:
    change, kind, text = CASES[case]
    relation = _relate(change)
    assert relation is not None
    assert (relation.kind, relation.exact) == (kind, True), relation
    assert text in relation.text
    assert relation.ratio <= 4 and relation.share > 0.99


def test_batch_halves_are_guidance_halves() -> None:
    relation = _relate(lambda x: x.roll(2, 0), (4, 3, 4, 6, 6))
    assert relation is not None and relation.exact
    assert relation.text == "the two halves of the batch items exchanged (of guidance, where both are in it)"


def test_heads() -> None:
    order = [1, 3, 0, 2]
    relation = _relate(lambda x: x.unflatten(2, (4, 2))[:, :, order].flatten(2, 3), heads=4)
    assert relation is not None and relation.exact
    assert (relation.kind, relation.text) == ("heads", "heads permuted: 1, 3, 0, 2")


@pytest.mark.parametrize("size", [96, 97])
def test_non_square_pictures_transposed_in_memory(size: int) -> None:
    right = _randn(1, 3, 64, size)
    found = right.transpose(-1, -2).reshape(right.shape)
    relation = relate(found, right, FLOOR, ("batch", "channel", "height", "width"))
    assert relation is not None and relation.exact and relation.kind == "memory_order"


def test_halves_of_a_vector() -> None:
    """Sinusoids with sine and cosine exchanged."""
    angles = _randn(160).exp()
    right = torch.cat([angles.cos(), angles.sin()])[None]
    relation = relate(right.roll(160, 1), right, FLOOR, ("batch", "channel"))
    assert relation is not None and relation.exact and relation.kind == "halves"


def test_equal_is_no_relation() -> None:
    assert _relate(lambda x: x) is None


def test_what_cannot_be_told_is_refused() -> None:
    right = _randn(*SHAPE)
    tiny = torch.tensor([[6.0, 127.0, 0.02]])
    assert relate(tiny * 2, tiny, FLOOR, ("batch", "channel")) is None
    constant = torch.full(SHAPE, 3.0) + 1e-8 * right
    assert relate(constant * 2, constant, FLOOR, AXES) is None
    one_value = torch.zeros(SHAPE)
    one_value[0, 0, 0, 0, 0] = 1
    assert relate(one_value * 2, one_value, FLOOR, AXES) is None
    for bad in (float("nan"), float("inf")):
        assert relate(_set(right, (0, 0, 0, 0, 0), bad), right, FLOOR, AXES) is None
        assert relate(right * 2, _set(right, (0, 0, 0, 0, 0), bad), FLOOR, AXES) is None
    assert relate(right[:1], right, FLOOR, AXES) is None
    with pytest.raises(ValueError, match="axes"):
        relate(right * 2, right, FLOOR, AXES[:4])
    with pytest.raises(ValueError, match="floor"):
        relate(right * 2, right, 0.0, AXES)


def test_constants_fit_groups_of_two_levels_or_of_one_and_prove_nothing() -> None:
    pattern = (_randn(2, 6, 1, 10, 10) > 0).float()
    for seed in range(5):
        a, b, c, d = (_randn(8, 1, 1, seed=4 * seed + i) for i in range(4))
        for found, right in ((pattern * a + b, pattern * c + d), (a.expand(SHAPE), b.expand(SHAPE))):
            relation = relate(_rounded(found), _rounded(right, 1), FLOOR, AXES)
            assert relation is None or not relation.exact, relation


def test_an_error_without_an_edge_is_no_part() -> None:
    """Channels whose errors grow from below the floor to above it."""
    noise = _randn(*SHAPE, seed=7) * torch.logspace(0, 2, 8).view(8, 1, 1)
    right = _randn(*SHAPE)
    relation = relate(right + 1e-4 * noise, right, 3e-4, AXES)
    assert relation is None or not relation.exact, relation
    grown = _randn(2, 6, 64, 10, 10, seed=7) * (1e-6 + (_randn(64, 1, 1, seed=1) > 0.7))
    right = _randn(2, 6, 64, 10, 10)
    assert relate(right + grown, right, FLOOR, AXES) is None


def test_channels_that_are_alike_have_no_order() -> None:
    right = _randn(2, 6, 1, 10, 10).expand(SHAPE).clone()
    right[:, :, 0] = _randn(2, 6, 10, 10, seed=1)
    found = right[:, :, [3, 1, 2, 0, 4, 5, 6, 7]]
    relation = relate(found, right, FLOOR, AXES)
    assert relation is None or relation.kind != "permutation"


def test_a_frame_shown_twice_is_no_order() -> None:
    relation = _relate(lambda x: x[:, [0, 1, 2, 2, 4, 5]])
    assert relation is not None and relation.exact
    assert relation.text == "wrong only in frame 3 (right elsewhere to within rounding)"
    relation = _relate(lambda x: x[:, [5, 3, 2, 2, 0, 1]])
    assert relation is None or relation.kind != "permutation"


@pytest.mark.parametrize(("floors", "exact"), [(2, True), (6, False)])
def test_exact_is_within_four_floors(floors: float, exact: bool) -> None:
    right, noise = _randn(*SHAPE).double(), _randn(*SHAPE, seed=1).double()
    predicted = 2.5 * right
    found = predicted + floors * 1e-5 * predicted.norm() / noise.norm() * noise
    relation = relate(found, right, 1e-5, AXES)
    assert relation is not None and relation.kind == "factor" and relation.exact == exact
    assert relation.ratio == pytest.approx(floors, rel=1e-3)


def test_what_a_large_offset_hides_is_not_claimed() -> None:
    """Rounding at 100 explains what is left, and yet a sixteenth of what was found is something else."""
    right, noise = _randn(*SHAPE).double(), _randn(*SHAPE, seed=1).double()
    found = 100 + 1e-4 * (right + 0.25 * noise)
    relation = relate(found, right, 1e-7, AXES)
    assert relation is None or not relation.exact


def test_part_of_a_relation_is_not_exact() -> None:
    """Wrong in one channel, and noise everywhere."""
    noise = _randn(*SHAPE, seed=7)
    for scale in (2, -1, 0):
        relation = _relate(
            lambda x, scale=scale: _set(x, (slice(None), slice(None), 1), scale * x[:, :, 1]) + 1e-3 * noise
        )
        assert relation is not None and not relation.exact
        assert relation.text.endswith("(partly: explains more than 99.99 % of the squared error)")
        assert relation.ratio > 100
    relation = _relate(lambda x: 2.5 * x + 0.2 * noise)
    assert relation is not None and not relation.exact and relation.kind == "factor"
    assert 0.9 < relation.share < 0.99 and f"{100 * relation.share:.4g} %" in relation.text
    assert _relate(lambda x: 1.5 * x + noise) is None


_FUZZED = (
    ((2, 4, 4, 6, 6), AXES),
    ((1, 2, 3, 5, 4), AXES),
    ((2, 2, 2, 2, 2), AXES),
    ((2, 4, 4, 4, 4), AXES),
    ((1, 8, 4, 8, 8), AXES),
    ((1, 3, 12, 12), ("batch", "channel", "height", "width")),
    ((2, 64), ("batch", "channel")),
    ((25,), ("step",)),
    ((8, 16), ("frame", "channel")),
    ((2, 17, 24), ("batch", "token", "channel")),
)


def _kind_of_tensor(shape: tuple[int, ...], kind: int, seed: int) -> Tensor:
    """Noise, heavy tails, smooth, sparse, of low rank, a ramp, with an offset, or with few levels."""
    x = _randn(*shape, seed=seed).double()
    if kind == 1:
        return x**5
    if kind == 2:
        for dim in range(x.ndim):
            x = x.cumsum(dim)
        return x
    if kind == 3:
        return x * (x > 1)
    if kind == 4:
        for dim, size in enumerate(shape):
            x = (x if dim else 1) * _randn(size, seed=seed + dim).double().view([-1] + [1] * (len(shape) - dim - 1))
        return x.expand(shape).clone()
    if kind == 5:
        return x + 30
    if kind == 6:
        return x.round()
    return x


@pytest.mark.parametrize("floor", [1e-7, 3e-4, 1e-2])
def test_no_relation_between_unrelated_tensors(floor: float) -> None:
    """Also between tensors of few degrees of freedom, and small errors of all sizes that have no pattern."""
    named = []
    for seed in range(200):
        shape, axes = _FUZZED[seed % len(_FUZZED)]
        right = _kind_of_tensor(shape, seed // len(_FUZZED) % 7, 3 * seed)
        heads = 4 if "channel" in axes and shape[axes.index("channel")] % 4 == 0 else None
        other = _kind_of_tensor(shape, (seed // 50 + seed // len(_FUZZED)) % 7, 3 * seed + 1)
        noise = _randn(*shape, seed=3 * seed + 2).double()
        for strength in (None, 4.1, 5, 8, 30, 1e3):
            found = other if strength is None else right + strength * floor * right.norm() / noise.norm() * noise
            relation = relate(found, right, floor, axes, heads)
            if relation is not None and relation.exact:
                named.append((seed, shape, strength, relation))
    assert not named, named[:5]


def test_a_step_from_the_floor() -> None:
    """An error of a few floors that is a relation is named, one that is noise is not."""
    right = _randn(*SHAPE).double()
    found = right * (1 + 20e-7) + 0.5e-7 * _randn(*SHAPE, seed=1)
    relation = relate(found, right, 1e-7, AXES)
    assert relation is not None and relation.exact and relation.kind == "factor"


@pytest.mark.parametrize(("shape", "limit"), [((1, 8, 4, 56, 56), 0.5), ((2, 25, 64, 56, 56), 5.0)])
def test_time(shape: tuple[int, ...], limit: float) -> None:
    """The slowest: nothing fits, so all is tried."""
    right, found = _randn(*shape), _randn(*shape, seed=1)
    relate(found[..., :8, :8], right[..., :8, :8], FLOOR, AXES)
    seconds = []
    for _ in range(2):  # the machine may be doing something else meanwhile
        start = time.process_time()
        assert relate(found, right, FLOOR, AXES, heads=2) is None
        seconds.append(time.process_time() - start)
        if seconds[-1] < limit:
            return
    assert min(seconds) < limit


def test_axes_of_names() -> None:
    images = ("batch", "channel", "height", "width")
    expected = {
        "input.image": images,
        "input.clip_pixels": images,
        "input.latents": AXES,
        "image_embeddings": ("batch", "token", "channel"),
        "image_latents": images,
        "added_time_ids": ("batch", "channel"),
        "sigmas": ("step",),
        "guidance_scale": ("batch", "frame"),
        "model_input.003": AXES,
        "model_input": AXES,
        "frames": AXES,
        "unet.conv_in.000": AXES,
        "unet.conv_in": AXES,
        "unet.time_embedding.001": ("batch", "channel"),
        "unet.mid_block.attentions.0.time_pos_embed": ("frame", "channel"),
        "vae.decoder.conv_out": AXES,
        "image_encoder.vision_model.encoder.layers.0.mlp": ("batch", "token", "channel"),
        "image_encoder.vision_model.post_layernorm": ("batch", "channel"),
        "image_encoder.vision_model.embeddings.patch_embedding": images,
    }
    for name, axes in expected.items():
        assert axes_of(name) == axes, name
    with pytest.raises(SvdlabError, match="nonsense"):
        axes_of("nonsense")
