"""The pipeline: parity at every probe over configs and settings, diffusers' own call signature, its failures mended."""

from __future__ import annotations

import inspect
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from svdlab.errors import SvdlabError
from svdlab.parity.three_way import three_way
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.settings import GenerationSettings

SMALL: dict[str, Any] = dict(height=32, width=40, num_frames=3, num_inference_steps=2, progress=False)
CROSS, PLAIN = "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"
THREE_LEVELS = dict(
    block_out_channels=(32, 64, 96),
    down_block_types=(CROSS, PLAIN, CROSS),
    up_block_types=(UP_CROSS, UP_CROSS, UP_PLAIN),
    num_attention_heads=(1, 2, 3),
    layers_per_block=(1, 2, 1),
    transformer_layers_per_block=(1, 1, 2),
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "three levels": dict(unet=THREE_LEVELS),
    "shallow VAE": dict(vae=dict(block_out_channels=(64, 32), down_block_types=("DownEncoderBlock2D",) * 2)),
    "quick gelu, trailing": dict(
        image_encoder=dict(hidden_act="quick_gelu"),
        scheduler=dict(timestep_spacing="trailing", sigma_max=80.0),
        vae=dict(scaling_factor=0.5, force_upcast=False),
    ),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tiny", {}),
    ("tiny", dict(num_frames=25, num_inference_steps=1)),
    ("tiny", dict(num_frames=1, min_guidance_scale=2.0)),
    ("tiny", dict(max_guidance_scale=1.0)),
    ("tiny", dict(min_guidance_scale=4.0, max_guidance_scale=1.5)),
    ("tiny", dict(sigmas=(300.0, 20.0, 1.0, 0.0))),
    ("tiny", dict(height=72, width=104, fps=30, motion_bucket_id=255, noise_aug_strength=0.5)),
    ("tiny", dict(decode_chunk_size=2, num_frames=5)),
    ("tiny", dict(dtype="float16")),
    ("tiny", dict(dtype="bfloat16")),
    ("three levels", dict(height=56, width=72)),
    ("three levels", dict(dtype="bfloat16", cfg="sequential")),
    ("shallow VAE", dict(height=24, width=40)),
    ("quick gelu, trailing", {}),
    ("quick gelu, trailing", dict(dtype="float16", num_videos_per_prompt=2)),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("architectures")
    return {name: write_random_checkpoint(root / name, seed=9, **options) for name, options in ARCHITECTURES.items()}


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(tiny)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> StableVideoDiffusionPipeline:
    pipe = StableVideoDiffusionPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("architecture", "change"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_every_probe_is_at_parity(
    checkpoints: dict[str, Path], photo: Image.Image, architecture: str, change: dict[str, Any]
) -> None:
    settings = GenerationSettings(**{**dict(height=32, width=40, num_frames=4, num_inference_steps=2), **change})
    comparison = three_way(checkpoints[architecture], photo, settings)
    assert comparison.verdict == "parity", comparison.summary()
    names = {p.name for p in comparison.probes}
    assert {"image_embeddings", "image_latents", "noise_pred.000", "frames"} <= names


def test_two_different_images(checkpoints: dict[str, Path], photo: Image.Image) -> None:
    """With two videos each, which diffusers mixes, in chunks that hold the end of one and the start of the next."""
    settings = GenerationSettings(
        height=32, width=40, num_frames=3, num_inference_steps=2, num_videos_per_prompt=2, decode_chunk_size=2
    )
    other = photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    comparison = three_way(checkpoints["tiny"], [photo, other], settings)
    assert comparison.verdict == "parity", comparison.summary()


def test_a_flat_image(checkpoints: dict[str, Path]) -> None:
    """Nothing but the borders varies: norms divide by almost nothing, and rounding shows if it shows anywhere."""
    settings = GenerationSettings(height=64, width=64, num_frames=3, num_inference_steps=2, noise_aug_strength=0.0)
    comparison = three_way(checkpoints["tiny"], Image.new("RGB", (256, 256), (40, 90, 200)), settings)
    assert comparison.verdict == "parity", comparison.summary()


# --- the call signature is diffusers' ---------------------------------------------


def test_arguments_names_order_and_defaults() -> None:
    own = inspect.signature(SVDPipeline.__call__).parameters
    theirs = inspect.signature(StableVideoDiffusionPipeline.__call__).parameters
    shared = [p for p in own.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in shared] == list(theirs)
    for parameter in shared[1:]:
        default = theirs[parameter.name].default
        assert parameter.default == (tuple(default) if isinstance(default, list) else default), parameter.name


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(pipe: SVDPipeline, reference: Any, photo: Image.Image, output_type: str) -> None:
    options = {k: v for k, v in SMALL.items() if k != "progress"}
    own = pipe(photo, generator=seeded(), output_type=output_type, progress=False, **options).frames
    theirs = reference(photo, generator=seeded(), output_type=output_type, **options).frames
    if output_type == "pil":
        assert [len(video) for video in own] == [len(video) for video in theirs] == [3]
        own, theirs = (np.stack([np.asarray(f).astype(float) for f in v[0]]) for v in (own, theirs))
        assert np.abs(own - theirs).max() <= 1
    else:
        assert type(own) is type(theirs) and own.shape == theirs.shape and own.dtype == theirs.dtype
        np.testing.assert_allclose(own, theirs, atol=2e-4 if output_type != "latent" else 2e-3)


def test_return_tuple_and_callback(pipe: SVDPipeline, photo: Image.Image) -> None:
    seen = []

    def callback(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        assert pipeline is pipe
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe(photo, output_type="latent", return_dict=False, callback_on_step_end=callback, **SMALL)
    assert latents.shape == (1, 3, 4, 4, 5), "as diffusers: the frames themselves, not a tuple of them"
    assert [step for step, _ in seen] == [0, 1] and not latents.any()


def test_one_generator_per_video_and_custom_latents(pipe: SVDPipeline, reference: Any, photo: Image.Image) -> None:
    options = {**{k: v for k, v in SMALL.items() if k != "progress"}, "output_type": "pt"}
    images = [photo, photo.rotate(90)]
    images = [i.resize((64, 64)) for i in images]
    own = pipe(images, generator=[seeded(1), seeded(2)], progress=False, **options).frames
    theirs = reference(images, generator=[seeded(1), seeded(2)], **options).frames
    torch.testing.assert_close(own, theirs, atol=2e-4, rtol=0)

    latents = torch.randn(1, 3, 4, 4, 5, generator=seeded(3))
    expected = reference(photo, generator=seeded(), latents=latents, **options).frames
    # diffusers does not cast custom latents; here any dtype is taken.
    given = pipe(photo, generator=seeded(), latents=latents.double(), progress=False, **options).frames
    torch.testing.assert_close(given, expected, atol=2e-4, rtol=0)


def test_kinds_of_images(pipe: SVDPipeline, photo: Image.Image) -> None:
    small = photo.resize((40, 32))
    array = np.asarray(small)
    expected = pipe(small, generator=seeded(), output_type="pt", **SMALL).frames
    floats = array.astype(np.float32) / 255
    kinds = {
        "list": [small],
        "rgba": small.convert("RGBA"),
        "uint8 array": array,
        "float array": floats,
        "batch of arrays": floats[None],
        "tensor": torch.from_numpy(floats).permute(2, 0, 1),
        "batch of tensors": torch.from_numpy(floats).permute(2, 0, 1)[None],
        "double tensor": torch.from_numpy(floats.astype(np.float64)).permute(2, 0, 1),
    }
    for kind, image in kinds.items():
        result = pipe(image, generator=seeded(), output_type="pt", **SMALL).frames
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0, msg=kind)


def test_images_of_different_sizes(pipe: SVDPipeline, photo: Image.Image) -> None:
    frames = pipe([photo, photo.resize((100, 80))], output_type="pt", **SMALL).frames
    assert frames.shape == (2, 3, 3, 32, 40)


# --- what diffusers gets wrong ---------------------------------------------


@pytest.mark.parametrize(
    "change", [dict(min_guidance_scale=3.0, max_guidance_scale=1.0), dict(num_frames=1)], ids=["falling", "one frame"]
)
def test_ramps_at_which_diffusers_fails(
    pipe: SVDPipeline, reference: Any, photo: Image.Image, change: dict[str, Any]
) -> None:
    options = {**SMALL, **change}
    with pytest.raises(RuntimeError):
        reference(photo, **{k: v for k, v in options.items() if k != "progress"})
    assert pipe(photo, output_type="pt", **options).frames.isfinite().all()


def test_a_falling_ramp_is_the_mirror_of_a_rising_one(pipe: SVDPipeline) -> None:
    settings = GenerationSettings(num_frames=5)
    rising = pipe.guidance_ramp(settings)
    falling = pipe.guidance_ramp(settings.replace(min_guidance_scale=3.0, max_guidance_scale=1.0))
    assert torch.equal(falling, rising.flip(0)) and rising.tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_a_large_tensor_is_resized_for_clip(pipe: SVDPipeline, photo: Image.Image) -> None:
    seen: dict[str, dict[str, torch.Tensor]] = {"pil": {}, "tensor": {}}
    tensor = torch.from_numpy(np.asarray(photo)).permute(2, 0, 1)
    for kind, image in (("pil", photo), ("tensor", tensor)):
        pipe(image, generator=seeded(), output_type="latent", probe=seen[kind].__setitem__, **SMALL)
    torch.testing.assert_close(seen["pil"]["image_embeddings"], seen["tensor"]["image_embeddings"])


@pytest.mark.parametrize("decode", ["parity", "exact"])
def test_two_videos_are_never_blended(pipe: SVDPipeline, photo: Image.Image, decode: str) -> None:
    """3 frames in chunks of 2: diffusers' second chunk holds the end of one video and the start of the next."""
    latents = torch.randn(2, 3, 4, 4, 5, generator=seeded(4))
    settings = GenerationSettings(height=32, width=40, num_frames=3, decode_chunk_size=2, decode=decode)
    both = pipe.decode(latents, settings)
    alone = torch.cat([pipe.decode(v[None], settings) for v in latents])
    assert torch.equal(both, alone)


def test_videos_of_one_image_share_its_conditioning(pipe: SVDPipeline, photo: Image.Image) -> None:
    """With two images and two videos each, diffusers pairs one image's embedding with the other's latents."""
    seen: dict[str, torch.Tensor] = {}
    images = [photo, photo.transpose(Image.Transpose.ROTATE_180)]
    pipe(images, num_videos_per_prompt=2, output_type="latent", probe=seen.__setitem__, **SMALL)
    for name in ("image_embeddings", "image_latents"):
        a, b, c, d = seen[name]
        assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)


# --- decoding and guidance ---------------------------------------------


def test_the_default_decode_is_exact(pipe: SVDPipeline) -> None:
    latents = torch.randn(1, 7, 4, 4, 4, generator=seeded(5))
    settings = GenerationSettings(height=32, width=32, num_frames=7)
    whole = pipe.decode(latents, settings.replace(decode_chunk_size=7))
    default = pipe.decode(latents, settings)
    exact = [pipe.decode(latents, settings.replace(decode="exact", decode_chunk_size=n)) for n in (None, 1, 2, 3, 7)]
    chunked = pipe.decode(latents, settings.replace(decode_chunk_size=2))
    for frames in (default, *exact):
        assert (frames - whole).abs().max() < 1e-4
    assert (chunked - whole).abs().max() > 1e-2


def test_batched_and_sequential_guidance_agree(pipe: SVDPipeline, photo: Image.Image) -> None:
    calls: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    recorded: dict[str, dict[str, torch.Tensor]] = {"batched": {}, "sequential": {}}
    for cfg, probes in recorded.items():
        pipe(photo, generator=seeded(), output_type="latent", cfg=cfg, probe=probes.__setitem__, **SMALL)
    handle.remove()
    assert calls == [2, 2, 1, 1, 1, 1]
    rounding = 0.0
    for name, batched in recorded["batched"].items():
        if name == "latents.000":  # a sum with noise times sigma_max, whose last place is left in all that follows
            rounding = torch.finfo(torch.float32).eps * 700
        difference = (batched - recorded["sequential"][name]).abs().max()
        assert difference <= 1e-5 * batched.abs().max() + rounding, name


def test_without_guidance_sequential_is_one_pass(pipe: SVDPipeline, photo: Image.Image) -> None:
    plain = GenerationSettings(
        height=32, width=32, num_frames=2, num_inference_steps=1, min_guidance_scale=1.0, max_guidance_scale=1.0
    )
    one, two = (pipe.generate(photo, plain.replace(cfg=cfg), progress=False) for cfg in ("batched", "sequential"))
    assert (one[0].frames == two[0].frames).all()


def test_a_seed_repeats_a_generation(pipe: SVDPipeline, photo: Image.Image) -> None:
    settings = GenerationSettings(height=32, width=40, num_frames=3, num_inference_steps=2, seed=11)
    first, again = (pipe.generate(photo, settings, progress=False)[0].frames for _ in range(2))
    other = pipe.generate(photo, settings.replace(seed=12), progress=False)[0].frames
    assert (first == again).all() and (first != other).any()


def test_native_size() -> None:
    """The published configs say sample_size 96 and mean 576x1024; others mean what they say."""
    pipe = SVDPipeline.from_pretrained()
    config = pipe.unet.config
    resolved = pipe.resolve(GenerationSettings())
    assert (resolved.height, resolved.width) == (config.sample_size * 8,) * 2
    assert resolved.num_frames == config.num_frames


# --- bad input, refused before any work ---------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(height=60), "height: got 60, allowed: integer >= 8, <= 16384, a multiple of 8"),
        (dict(num_frames=0), "num_frames: got 0, allowed: integer >= 1"),
        (dict(num_inference_steps=0), "num_inference_steps: got 0"),
        (dict(fps=0), "fps: got 0, allowed: integer >= 1"),
        (dict(max_guidance_scale=float("nan")), "max_guidance_scale: got nan"),
        (
            dict(sigmas=[1.0, 2.0]),
            "sigmas: got .1.0, 2.0., allowed: 2 to 1001 falling numbers from 1e-06 to 10000, the last may be 0",
        ),
        # What later code could not hold: a video's rate, float32's range, a step between two sigmas, a picture's side.
        (dict(fps=2**31), "fps: got 2147483648, allowed: integer >= 1, <= 1000"),
        (dict(noise_aug_strength=1e39), r"noise_aug_strength: got 1e\+39, allowed: finite number >= 0, <= 100"),
        (dict(min_guidance_scale=101.0), "min_guidance_scale: got 101.0, allowed: finite number >= 0, <= 100"),
        (dict(max_guidance_scale=1e39), r"max_guidance_scale: got 1e\+39, allowed: finite number >= 0, <= 100"),
        (dict(sigmas=[1e-320, 0.0]), "sigmas: got .1e-320, 0.0., allowed"),
        (dict(sigmas=[1e39, 0.0]), "sigmas: got .1e.39, 0.0., allowed"),
        (dict(sigmas=[1.0, 1.0 - 1e-12]), "sigmas: got .1.0, 0.9999"),
        (dict(sigmas=[]), "sigmas: got .., allowed"),
        (dict(height=80_000), "height: got 80000, allowed: integer >= 8, <= 16384"),
        (dict(num_inference_steps=10**8), "num_inference_steps: got 100000000, allowed: integer >= 1, <= 1000"),
        (dict(num_frames=10**9), "num_frames: got 1000000000, allowed: integer >= 1, <= 10000"),
        (dict(decode_chunk_size=0), "decode_chunk_size: got 0"),
        (dict(decode="fast"), "decode: got 'fast', allowed: parity, exact"),
        (dict(output_type="gif"), "output_type: got 'gif', allowed: pil, np, pt, latent"),
        (dict(callback_on_step_end_tensor_inputs=["sigma"]), "callback_on_step_end_tensor_inputs: got"),
        (dict(latents=torch.zeros(1, 2, 4, 4, 5)), r"latents: got shape \(1, 2, 4, 4, 5\), allowed: \(1, 3, 4, 4, 5\)"),
        (dict(generator=[torch.Generator()] * 3), "generator: got a list of 3, allowed: one, or one per video"),
    ],
)
def test_bad_arguments(pipe: SVDPipeline, photo: Image.Image, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdlabError, match=message) as error:
        pipe(photo, **{**SMALL, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bounds_of_the_settings_hold_a_clip(photo: Image.Image, dtype: str) -> None:
    pipe = SVDPipeline.from_pretrained(dtype=getattr(torch, dtype))
    most: dict[str, Any] = dict(min_guidance_scale=100.0, max_guidance_scale=100.0, noise_aug_strength=100.0, fps=1000)
    most |= dict(height=32, width=32, num_frames=2, motion_bucket_id=1023, sigmas=(1e4, 5.0, 1e-6, 0.0))
    (clip,) = pipe.generate(photo, GenerationSettings(**most, dtype=dtype))
    assert clip.frames.std() > 10 and len(clip.to_mp4()) > 0, "a NaN is black"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "settings: JSON nested deeper than 32 levels"),
        ('{"fps": ' + "1" * 5000 + "}", "settings: JSON with a number of over 400 digits"),
        ('{"fps": NaN}', "settings: got the number 'NaN'"),
        ("[7]", "settings: got a list, allowed: a JSON object"),
        ('{"' + "x" * 100_000 + '": 1}', "no such setting"),
        ('{"dtype": "' + "x" * 100_000 + '"}', "dtype: got 'xxx"),
        ('{"sigmas": [' + "1," * 100_000 + "0]}", "sigmas: got "),
    ],
)
def test_settings_in_bad_json(text: str, message: str) -> None:
    with pytest.raises(SvdlabError) as error:
        GenerationSettings.from_json(text)
    assert message in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("photo.png", "image: got str, allowed: a PIL image"),
        ([], "image: got an empty list"),
        (np.full((8, 8, 3), np.nan, dtype=np.float32), "image: got NaN or infinity"),
        (np.full((8, 8, 3), 7.0), r"image: got values in \[7, 7\], allowed: values in \[0, 1\] or \[-1, 1\]"),
        (np.zeros((8, 8)), r"image: got a ndarray of shape \(8, 8\)"),
        (torch.zeros(1, 4, 8, 8), r"image: got a Tensor of shape \(1, 4, 8, 8\)"),
        (torch.zeros(3, 0, 8), "image: got no pixels"),
    ],
)
def test_bad_images(pipe: SVDPipeline, image: Any, message: str) -> None:
    with pytest.raises(SvdlabError, match=message):
        pipe(image, **SMALL)


def test_settings_of_another_dtype_than_the_weights(pipe: SVDPipeline, photo: Image.Image) -> None:
    with pytest.raises(SvdlabError, match="dtype: got bfloat16, allowed: torch.float32"):
        pipe.generate(photo, GenerationSettings(dtype="bfloat16"))


FORKED = """
import multiprocessing, torch
from svdlab import GenerationSettings, SVDPipeline
from svdlab.samples import sample_picture

torch.set_num_threads(2)
pipe = SVDPipeline.from_pretrained("embedded")
settings = GenerationSettings(num_frames=2, num_inference_steps=1)
generate = lambda: pipe.generate(sample_picture("embedded"), settings, progress=False)
generate()
child = multiprocessing.get_context("fork").Process(target=generate)
child.start()
child.join({seconds})
child.kill()
child.join()
raise SystemExit(child.exitcode)
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_its_parents_threads() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED.format(seconds=60)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
