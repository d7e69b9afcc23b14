"""What of diffusers' pipeline svdlab has under the same names, and what it refuses: nothing is ignored in silence."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableVideoDiffusionPipeline
from PIL import Image

from svdlab.errors import SvdlabError
from svdlab.parity.candidate import capture
from svdlab.svd.components import COMPONENTS, NETWORKS
from svdlab.svd.interface import CALLBACK_TENSORS
from svdlab.svd.overrides import OVERRIDABLE
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings

SIZE: dict[str, Any] = dict(height=32, width=40, num_frames=3, num_inference_steps=2)
CALL: dict[str, Any] = {**SIZE, "output_type": "pt"}
LATENT: dict[str, Any] = {**SIZE, "output_type": "latent", "num_inference_steps": 1}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    pipe = StableVideoDiffusionPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(reference: Any) -> SVDPipeline:
    """svdlab's on diffusers' own components."""
    pipe = SVDPipeline(**reference.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def small(photo: Image.Image) -> Image.Image:
    return photo.resize((64, 48))


# --- diffusers' frames ---


@pytest.mark.parametrize(
    ("count", "change"),
    [
        (1, dict(num_videos_per_prompt=2, decode_chunk_size=2)),
        (2, dict(decode_chunk_size=4)),
        (2, dict(num_videos_per_prompt=2, num_inference_steps=1)),
    ],
    ids=["a chunk holds two clips", "a chunk is longer than a clip", "two images, two videos each"],
)
def test_diffusers_frames_where_svdlab_mends_it(
    pipe: SVDPipeline, reference: Any, small: Image.Image, count: int, change: dict[str, Any]
) -> None:
    pictures = [small, small.transpose(Image.Transpose.ROTATE_180)][:count]
    options = {**CALL, **change}
    theirs = reference(pictures, generator=seeded(), **options).frames
    same = SVDPipeline(**pipe.components, compat="diffusers")
    torch.testing.assert_close(
        same(pictures, generator=seeded(), progress=False, **options).frames, theirs, atol=2e-4, rtol=0
    )
    mended = pipe(pictures, generator=seeded(), **options).frames
    assert (mended - theirs).abs().max() > 1e-2, "the case would show nothing"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "image: got ndarray"),
        ([torch.zeros(3, 8, 8)], "image: got a list of Tensor"),
        (torch.full((1, 3, 8, 8), -0.5), "image: got negative values"),
    ],
)
def test_what_diffusers_misreads_is_refused_with_compat(pipe: SVDPipeline, image: Any, message: str) -> None:
    same = SVDPipeline(**pipe.components, compat="diffusers")
    with pytest.raises(
        SvdlabError, match=f'{message}, allowed with compat="diffusers": PIL images, a tensor in .0, 1.'
    ):
        same(image, **LATENT)
    assert pipe(image, **LATENT).frames.isfinite().all()


def test_an_unknown_compat_is_refused(pipe: SVDPipeline) -> None:
    with pytest.raises(SvdlabError, match="compat: got 'comfy', allowed: none, diffusers"):
        SVDPipeline(**pipe.components, compat="comfy")


def test_compat_stays_with_bugs_and_own_modules(pipe: SVDPipeline, small: Image.Image) -> None:
    same = SVDPipeline(**pipe.components, compat="diffusers")
    latents = torch.randn(2, 3, 4, 4, 5, generator=seeded())
    settings = GenerationSettings(**SIZE, decode_chunk_size=2)
    expected, mended = same.decode(latents, settings), pipe.decode(latents, settings)
    for variant in (same.with_bugs("fps_not_decremented"), same.with_own_modules(), copy.copy(same)):
        assert torch.equal(variant.decode(latents, settings), expected) and not torch.equal(expected, mended)
    other = copy.copy(same)
    other.vae = copy.deepcopy(pipe.vae)
    other.vae.decoder.conv_in.bias.data += 1
    assert not torch.equal(other.decode(latents, settings), expected), "the copy's own network runs"
    own = same.with_stage(decode=lambda latents, settings: latents)
    assert own.decode(latents, settings) is latents


def test_the_table_names_everything() -> None:
    table = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
    options = inspect.signature(SVDPipeline.from_pretrained).parameters
    named = {n for n in options if n not in ("repo_or_folder", "components", "device", "low_cpu_mem_usage", "compat")}
    for name in (*CALLBACK_TENSORS, *OVERRIDABLE, *COMPONENTS, *named):
        assert name in table, name


# --- components ---


def test_components_of_diffusers_share_their_weights(reference: Any, pipe: SVDPipeline, small: Image.Image) -> None:
    theirs = reference(small, generator=seeded(), **CALL)
    torch.testing.assert_close(pipe(small, generator=seeded(), **CALL).frames, theirs.frames, atol=2e-4, rtol=0)
    assert list(pipe.components) == list(COMPONENTS) and set(pipe.components) == set(reference.components)
    for name in NETWORKS:
        mine, given = (dict(getattr(p, name).named_parameters()) for p in (pipe, reference))
        assert all(mine[key].data_ptr() == given[key].data_ptr() for key in given)
    again = SVDPipeline(**pipe.components)
    assert again.unet is pipe.unet and again.scheduler == pipe.scheduler


def test_a_component_can_be_set(pipe: SVDPipeline, reference: Any) -> None:
    other = copy.copy(pipe)
    other.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, sigma_max=80.0)
    assert other.scheduler.sigma_max == 80.0 and pipe.scheduler.sigma_max == 700.0
    other.register_modules(vae=reference.vae)
    assert type(other.vae) is type(pipe.vae) and other.vae is not pipe.vae
    for config in (pipe.scheduler.config, reference.scheduler.config):
        made = EulerDiscreteScheduler.from_config(config)
        made.set_timesteps(4)
        torch.testing.assert_close(made.sigmas, pipe.sigmas(GenerationSettings(num_inference_steps=4)))


def hooked(network: Any) -> Any:
    other = copy.deepcopy(network)
    other.conv_in.register_forward_hook(lambda *_: None)
    return other


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("scheduler", lambda p: DPMSolverMultistepScheduler, "scheduler: got <class"),
        ("scheduler", lambda p: None, "scheduler: got None"),
        ("unet", lambda p: p.vae, "unet: AutoencoderKLTemporalDecoder: option"),
        ("unet", lambda p: torch.nn.Linear(2, 2), "unet: got 'Linear'"),
        ("unet", lambda p: hooked(p.unet), "unet: UNetSpatioTemporalConditionModel has hooks on conv_in"),
        ("unet", lambda p: torch.compile(p.unet), "unet: UNetSpatioTemporalConditionModel is compiled"),
        ("feature_extractor", lambda p: object(), "feature_extractor: got <object"),
    ],
)
def test_a_component_that_would_lose_something_is_refused(
    pipe: SVDPipeline, reference: Any, name: str, make: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(SvdlabError, match=message) as error:
        setattr(copy.copy(pipe), name, make(reference))
    assert "\n" not in str(error.value)


def test_a_compiled_network_of_its_own_is_taken(pipe: SVDPipeline) -> None:
    compiled = torch.compile(pipe.unet)
    assert SVDPipeline(**{**pipe.components, "unet": compiled}).unet is compiled


def test_networks_in_diffusers_form(pipe: SVDPipeline, reference: Any) -> None:
    generator = seeded(5)
    pixels, images = torch.randn(2, 3, 224, 224, generator=generator), torch.rand(2, 3, 32, 40, generator=generator)
    close = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        pipe.image_encoder(pixel_values=pixels).image_embeds, reference.image_encoder(pixels).image_embeds, **close
    )
    own, theirs = pipe.vae.encode(images).latent_dist, reference.vae.encode(images).latent_dist
    torch.testing.assert_close(own.mode(), theirs.mode(), **close)
    torch.testing.assert_close(own.sample(seeded()), theirs.sample(seeded()), **close)
    assert torch.equal(pipe.vae.encode(images, return_dict=False)[0].mean, own.mean)
    latents = torch.randn(4, 4, 4, 5, generator=generator)
    frames = pipe.vae.decode(latents, num_frames=2)
    torch.testing.assert_close(frames.sample, reference.vae.decode(latents, num_frames=2).sample, **close)
    with pytest.raises(SvdlabError, match=r"z: got shape \(4, 4, 4, 5\), allowed: \(videos \* 3, latent, h, w\)"):
        pipe.vae.decode(latents, num_frames=3)
    given = torch.randn(2, 3, 8, 4, 5, generator=generator), torch.tensor(1.6)
    conditions = dict(
        encoder_hidden_states=torch.randn(2, 1, pipe.image_encoder.config["projection_dim"], generator=generator),
        added_time_ids=torch.tensor([[6.0, 127.0, 0.02]]).repeat(2, 1),
    )
    expected = reference.unet(*given, **conditions).sample
    torch.testing.assert_close(pipe.unet(*given, **conditions).sample, expected, **close)
    torch.testing.assert_close(pipe.unet(*given, *conditions.values(), return_dict=False)[0], expected, **close)
    with pytest.raises(SvdlabError, match="added_time_ids: got none"):
        pipe.unet(*given, conditions["encoder_hidden_states"])


def test_configs_are_read_by_name_too(pipe: SVDPipeline, reference: Any) -> None:
    for name in NETWORKS:
        own, theirs = getattr(pipe, name).config, getattr(reference, name).config
        theirs = theirs.to_dict() if name == "image_encoder" else theirs
        shared = [option for option in own if option in theirs]
        assert len(shared) == len(own.keys()), "the names are diffusers'"
        assert {option: own[option] for option in shared} == dict(own) == dict(own.items())
        as_lists = [list(v) if isinstance(v := theirs[option], tuple) else v for option in shared]
        assert [list(v) if isinstance(v := own.get(option), tuple) else v for option in shared] == as_lists
        assert "nonsense" not in own and own.get("nonsense", 3) == 3
        with pytest.raises(KeyError):
            own["nonsense"]


# --- the table ---

# Every attribute: what it is asked, and what it answers.
ATTRIBUTES: list[tuple[str, Callable[[Any], Any], Any]] = [
    ("vae_scale_factor", lambda p: p.vae_scale_factor, 8),
    ("config", lambda p: p.config["unet"][1], "UNetSpatioTemporalConditionModel"),
    ("scheduler.config", lambda p: (p.scheduler.config.sigma_max, p.scheduler.config["sigma_max"]), (700.0, 700.0)),
    ("unet.dtype", lambda p: p.unet.dtype, torch.float32),
    ("vae.dtype", lambda p: p.vae.dtype, torch.float32),
    ("image_encoder.dtype", lambda p: p.image_encoder.dtype, torch.float32),
    ("unet.device", lambda p: p.unet.device, torch.device("cpu")),
    ("device", lambda p: p.device, torch.device("cpu")),
    ("dtype", lambda p: p.dtype, torch.float32),
    ("unet.config", lambda p: (p.unet.config["in_channels"], p.unet.config.in_channels), (8, 8)),
    ("vae.config", lambda p: p.vae.config.scaling_factor, 0.18215),
    ("model_cpu_offload_seq", lambda p: p.model_cpu_offload_seq, "image_encoder->unet->vae"),
    ("_optional_components", lambda p: p._optional_components, []),
    ("_execution_device", lambda p: p._execution_device, torch.device("cpu")),
]


@pytest.mark.parametrize(("ask", "answer"), [row[1:] for row in ATTRIBUTES], ids=[row[0] for row in ATTRIBUTES])
def test_attributes(pipe: SVDPipeline, ask: Callable[[Any], Any], answer: Any) -> None:
    assert ask(pipe) == answer


def test_of_the_last_call(pipe: SVDPipeline, reference: Any, small: Image.Image) -> None:
    fresh = SVDPipeline(**pipe.components)
    for name in ("num_timesteps", "guidance_scale", "do_classifier_free_guidance"):
        with pytest.raises(AttributeError, match="not been called"):
            getattr(fresh, name)
    fresh(small, progress=False, **LATENT, num_videos_per_prompt=2), reference(small, **LATENT, num_videos_per_prompt=2)
    assert fresh.num_timesteps == reference.num_timesteps == 1
    torch.testing.assert_close(fresh.guidance_scale, reference.guidance_scale)
    assert fresh.do_classifier_free_guidance is True
    with pytest.raises(SvdlabError, match="_guidance_scale: cannot be set"):
        fresh._guidance_scale = 0.0


def test_the_output_is_read_as_diffusers_is(pipe: SVDPipeline, small: Image.Image) -> None:
    output = pipe(small, generator=seeded(), **LATENT)
    assert output[0] is output["frames"] is output.to_tuple()[0] is output.frames and dict(output) == {
        "frames": output.frames
    }
    with pytest.raises(IndexError):
        output[1]


SWITCHES = [
    (lambda p: p.enable_attention_slicing("max"), "enable_attention_slicing has no effect"),
    (lambda p: p.enable_xformers_memory_efficient_attention(), "enable_xformers_memory_efficient_attention has no eff"),
    (lambda p: p.unet.enable_forward_chunking(chunk_size=1, dim=1), "enable_forward_chunking has no effect"),
]


@pytest.mark.parametrize(("switch", "message"), SWITCHES, ids=[message.split()[0] for _, message in SWITCHES])
def test_switches_say_that_they_change_nothing(pipe: SVDPipeline, switch: Callable[[Any], Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        switch(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.disable_attention_slicing(), pipe.disable_xformers_memory_efficient_attention()
        pipe.unet.disable_forward_chunking()


def test_a_progress_bar_as_configured(pipe: SVDPipeline, small: Image.Image, capsys: Any) -> None:
    other = copy.copy(pipe)
    other.set_progress_bar_config(desc="steps of mine")
    other(small, **LATENT)
    assert "steps of mine: 100%" in capsys.readouterr().err
    other(small, progress=False, **LATENT), pipe(small, **LATENT)
    assert not capsys.readouterr().err


def test_to_takes_what_diffusers_does(pipe: SVDPipeline) -> None:
    other = SVDPipeline(**copy.deepcopy(pipe.components))
    for cast, dtype in (
        (lambda: other.to(torch_dtype=torch.float16), torch.float16),
        (lambda: other.to(dtype=torch.float64, silence_dtype_warnings=True), torch.float64),
        (lambda: other.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda: other.to(torch.float32), torch.float32),
        (lambda: other.to(torch_device="cpu"), torch.float32),
    ):
        assert cast() is other
        assert {getattr(other, name).dtype for name in NETWORKS} == {dtype}


NUMBERS: list[dict[str, Any]] = [
    dict(motion_bucket_id=100.0, fps=np.float64(6)),
    dict(motion_bucket_id=np.int64(100), fps=np.int32(6), height=np.int64(32)),
    dict(motion_bucket_id=torch.tensor(100), fps=torch.tensor(6.0), num_frames=3.0),
]


@pytest.mark.parametrize("given", NUMBERS, ids=["float", "numpy", "torch"])
def test_numbers_of_any_kind(pipe: SVDPipeline, small: Image.Image, given: dict[str, Any]) -> None:
    expected = pipe(small, generator=seeded(), **{**LATENT, "motion_bucket_id": 100, "fps": 6}).frames
    assert torch.equal(pipe(small, generator=seeded(), **{**LATENT, **given}).frames, expected)


def test_a_fraction_of_a_frame_rate(pipe: SVDPipeline, reference: Any, small: Image.Image) -> None:
    options = {**LATENT, "fps": 6.5, "motion_bucket_id": 80.5}
    own, theirs = (p(small, generator=seeded(), **options).frames for p in (pipe, reference))
    torch.testing.assert_close(own, theirs, atol=2e-3, rtol=1e-4)
    seen: dict[str, torch.Tensor] = {}
    pipe(small, probe=seen.__setitem__, **options)
    assert seen["added_time_ids"].tolist() == [[5.5, 80.5, pytest.approx(0.02)]]
    with pytest.raises(SvdlabError, match="fps: got 0.5, allowed: integer >= 1, <= 1000 or finite number >= 1"):
        pipe(small, **{**LATENT, "fps": 0.5})


def test_a_tensor_in_minus_one_to_one(pipe: SVDPipeline) -> None:
    pixels = torch.rand(1, 3, 32, 40, generator=seeded(6))
    own = [pipe(image, generator=seeded(), **LATENT).frames for image in (pixels, pixels * 2 - 1)]
    torch.testing.assert_close(*own, atol=2e-3, rtol=1e-4)


# --- callbacks and overrides ---


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "not guided"])
def test_a_callback_gets_every_tensor_that_diffusers_offers(
    pipe: SVDPipeline, reference: Any, small: Image.Image, guided: bool
) -> None:
    names = [name for name in CALLBACK_TENSORS if guided or not name.startswith("noise_pred_")]
    seen: list[dict[str, torch.Tensor]] = []

    def callback(p: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(dict(tensors))
        return tensors

    options = {**LATENT, "max_guidance_scale": 3.0 if guided else 1.0, "callback_on_step_end_tensor_inputs": names}
    same = SVDPipeline(**pipe.components, compat="diffusers")
    for p in (same, reference):
        p.set_progress_bar_config(disable=True)
        p(small, generator=seeded(), callback_on_step_end=callback, **options)
    own, theirs = seen
    assert list(own) == list(theirs) == names
    for name in names:
        assert own[name].shape == theirs[name].shape, name
        torch.testing.assert_close(own[name], theirs[name], atol=2e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(callback_on_step_end_tensor_inputs=["prompt_embeds"]), "got 'prompt_embeds', allowed: latents, noise_"),
        (dict(callback_on_step_end_tensor_inputs=["noise_pred_cond"], max_guidance_scale=1.0), "guidance above 1 only"),
        (dict(callback_on_step_end=lambda *_: 3), "callback_on_step_end: returned int, allowed: a dict, or None"),
    ],
)
def test_callbacks_that_cannot_be(pipe: SVDPipeline, small: Image.Image, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdlabError, match=message):
        pipe(small, **{**LATENT, **change})


# Overrides of diffusers' methods, for its pipeline and for svdlab's alike.
OVERRIDES: dict[str, Callable[..., Any]] = {
    "_encode_image": lambda original, *args: 2 * original(*args),
    "_encode_vae_image": lambda original, *args, **options: 0.5 * original(*args, **options),
    "_get_add_time_ids": lambda original, fps, bucket, *args: original(fps, bucket + 60, *args),
    "prepare_latents": lambda original, *args: 0.7 * original(*args),
    "decode_latents": lambda original, latents, *args: original(latents.flip(1), *args),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_what_a_subclass_overrides_is_asked(pipe: SVDPipeline, reference: Any, small: Image.Image, name: str) -> None:
    frames = []
    for made in (pipe, reference):
        base = type(made)

        def override(self: Any, *args: Any, base: Any = base, **options: Any) -> Any:
            return OVERRIDES[name](partial(getattr(base, name), self), *args, **options)

        changed = type("Changed", (base,), {name: override})(**made.components)
        changed.set_progress_bar_config(disable=True)
        frames.append(changed(small, generator=seeded(), num_videos_per_prompt=2, **CALL).frames)
    torch.testing.assert_close(*frames, atol=2e-4, rtol=0)
    plain = pipe(small, generator=seeded(), num_videos_per_prompt=2, **CALL).frames
    assert (frames[0] - plain).abs().max() > 1e-3, "the override would show nothing"


def test_a_method_set_on_the_object_is_asked(pipe: SVDPipeline, small: Image.Image) -> None:
    other = copy.copy(pipe)
    other.decode_latents = lambda latents, num_frames, chunk: torch.zeros(len(latents), 3, num_frames, 32, 40)
    assert (other(small, **CALL).frames == 0.5).all()
    assert (other.generate(small, GenerationSettings(**SIZE), progress=False)[0].frames == 128).all()
    with pytest.raises(SvdlabError, match="decode_latents: overridden, allowed: calling the pipeline, or its generate"):
        capture(other, small, GenerationSettings(**SIZE))


def test_overrides_that_cannot_be_honoured_are_refused(pipe: SVDPipeline, small: Image.Image) -> None:
    class Negative(SVDPipeline):
        def _encode_image(self, *args: Any) -> torch.Tensor:
            return super()._encode_image(*args) + 1

    class Fixed(SVDPipeline):
        @property
        def do_classifier_free_guidance(self) -> bool:
            return False

    class Strict(SVDPipeline):
        def check_inputs(self, image: Any, height: int, width: int) -> None:
            raise RuntimeError(f"{width} x {height}")

    for kind, error, message in (
        (Negative, SvdlabError, "_encode_image: its unconditional half is not zero"),
        (Fixed, SvdlabError, "do_classifier_free_guidance: overridden, allowed in a subclass"),
        (Strict, RuntimeError, "40 x 32"),
    ):
        with pytest.raises(error, match=message):
            kind(**pipe.components)(small, progress=False, **LATENT)


# --- loading and saving ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_safetensors=False), "use_safetensors: got False, allowed: True"),
        (dict(device_map="balanced"), "device_map: got 'balanced', allowed: one device"),
        (dict(device_map={"unet": 0}), "device_map: got {'unet': 0}, allowed: one device"),
        (dict(quantization_config=1), "from_pretrained: 'quantization_config' is not implemented"),
        (dict(custom_pipeline="x"), "from_pretrained: 'custom_pipeline' is not implemented"),
        (dict(torch_dtype={"text_encoder": torch.float16}), "dtype: got 'text_encoder', allowed: vae"),
        (dict(compat="comfy"), "compat: got 'comfy'"),
    ],
)
def test_options_of_loading_that_are_refused(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdlabError, match=message):
        SVDPipeline.from_pretrained(tiny, **options)


def test_options_of_loading(tiny: Path, pipe: SVDPipeline, small: Image.Image) -> None:
    made = SVDPipeline.from_pretrained(
        tiny,
        torch_dtype={"default": torch.float32, "vae": torch.float64, "image_encoder": torch.bfloat16},
        unet=pipe.unet,
        scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config),
        use_safetensors=True,
        low_cpu_mem_usage=True,
        local_files_only=True,
        cache_dir=tiny,
        token="secret",
        device_map="cpu",
        compat="diffusers",
    )
    assert made.unet is pipe.unet and made.compat == "diffusers"
    assert [made.vae.dtype, made.image_encoder.dtype] == [torch.float64, torch.bfloat16]
    frames = made(small, generator=seeded(), progress=False, **CALL).frames
    assert frames.isfinite().all() and (frames - pipe(small, generator=seeded(), **CALL).frames).abs().max() < 0.1


def test_what_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **o: (asked.append({"repo": repo, **o}), tiny)[1]
    )
    hub: dict[str, Any] = dict(cache_dir="c", token="t", local_files_only=True, force_download=True, revision="r")
    SVDPipeline.from_pretrained("owner/name", **hub)
    assert asked[0].items() >= {"repo": "owner/name", **hub}.items()


def test_saved_as_it_is(pipe: SVDPipeline, small: Image.Image, tmp_path: Path) -> None:
    half = SVDPipeline(**copy.deepcopy(pipe.components)).to(torch.float16)
    half.scheduler = half.scheduler.replace(sigma_max=80.0)
    half.feature_extractor = half.feature_extractor.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    with pytest.warns(UserWarning, match="safe_serialization=False has no effect"):
        half.save_pretrained(tmp_path, safe_serialization=False, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = SVDPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16, variant="fp16")
    assert again.scheduler == half.scheduler and again.feature_extractor.mean == (0.5, 0.5, 0.5)
    for name in NETWORKS:
        state = getattr(half, name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in getattr(again, name).state_dict().items())
    theirs = StableVideoDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16, variant="fp16")
    assert theirs.scheduler.config.sigma_max == 80.0 and tuple(theirs.feature_extractor.image_mean) == (0.5,) * 3


def test_offload_that_is_not_implemented(pipe: SVDPipeline) -> None:
    with pytest.raises(SvdlabError, match="enable_sequential_cpu_offload: not implemented, allowed: enable_model_cpu"):
        pipe.enable_sequential_cpu_offload()


# --- weights edited while they are in use ---


def test_edited_weights_are_in_the_next_frames(pipe: SVDPipeline, small: Image.Image) -> None:
    """Edits that raise no version: as of ``EMAModel.copy_to``, of merged adapters, of fused optimizers."""
    other = SVDPipeline(**copy.deepcopy(pipe.components))
    before = other(small, generator=seeded(), progress=False, **LATENT).frames
    for parameter in other.unet.conv_in.parameters():
        parameter.data.mul_(1.5)
    after = other(small, generator=seeded(), progress=False, **LATENT).frames
    fresh = SVDPipeline(**copy.deepcopy(other.components))
    assert torch.equal(after, fresh(small, generator=seeded(), progress=False, **LATENT).frames)
    assert (after - before).abs().max() > 1e-2


def test_inference_mode(tiny: Path, pipe: SVDPipeline, small: Image.Image) -> None:
    """With half precision the VAE's encoder is cast inside of it; on a CPU, float32 runs on packed weights."""
    for dtype in (torch.float32, torch.float16):
        with torch.inference_mode():
            inside = SVDPipeline.from_pretrained(tiny, dtype=dtype)
            frames = inside(small, generator=seeded(), progress=False, **LATENT).frames
        outside = SVDPipeline(**copy.deepcopy(pipe.components)).to(dtype)
        assert torch.equal(outside(small, generator=seeded(), progress=False, **LATENT).frames, frames)
