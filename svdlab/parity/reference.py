"""diffusers' own pipeline as the reference: loaded from the same folder, observed, replayed, never changed.

This is the only module that imports diffusers. What is observed goes through forward hooks, the step callback and
wrappers on the pipeline object (``parity.recorder``); all of it is gone when a capture ends, however it ends.

What stays float32 in a float64 run of diffusers 0.42: the sinusoids
(``embeddings.py:get_timestep_embedding``), sigmas and timesteps and the Euler step's sample
(``scheduling_euler_discrete.py:set_timesteps, step``), and the decoded frames
(``pipeline_stable_video_diffusion.py:decode_latents``). Each is one rounding at 6e-8 relative, below what the
networks themselves lose in float32, but it bounds what "float64" can tell apart: see ``compare.resolution``.
The preprocessing is float32, too (``image_processor.py:pil_to_numpy``); a float64 run that replays another
trace records it in float64, from a float64 image, and gives its networks the replayed pixels.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError, about, requires
from svdlab.parity import taps as tapping
from svdlab.parity.digests import checkpoint_digest
from svdlab.parity.recorder import Recorder
from svdlab.parity.replay import inputs_to_replay, replay_images, source_images
from svdlab.parity.scheduling import repeated_draws, traced_label
from svdlab.parity.trace import Trace, dtype_name
from svdlab.parity.writer import TraceWriter, version_of, versions_of_run
from svdlab.svd.checkpoint import ImageNormalization, load_components
from svdlab.svd.config import VAEConfig
from svdlab.svd.images import to_rgb
from svdlab.svd.sampler import EulerScheduler, named_sigmas
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.workloads import NETWORKS

# The folder of a small decoder, in a checkpoint that has one.
SMALL_DECODER = "small_decoder"
# That it decodes: 4 frames of 576x1024 take about 1 GiB in 64 channels.
_FRAMES_AT_A_TIME = 4


def load_diffusers(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    weights_dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> Any:
    """Load ``StableVideoDiffusionPipeline`` from a checkpoint folder in diffusers' layout (or a hub name).

    Of a single file, which diffusers cannot load, its networks get the weights that svdlab read: no second copy of
    them is made, in memory or on the disk.

    Args:
        folder: the folder, or a single file.
        dtype: what the networks run in.
        device: where.
        weights_dtype: round the weights to this first. The truth for a float16 run is float64 arithmetic on
            the float16 weights: rounding the weights is part of the checkpoint, not of the arithmetic.
        variant: file name variant ("fp16").

    Raises:
        SvdlabError: diffusers is not installed, or it cannot read the folder.
    """
    requires("diffusers", "transformers")
    if os.path.isfile(folder):
        made = load_components(os.fspath(folder), weights_dtype or dtype, variant=variant)
        networks = {name: diffusers_network(name, getattr(made, name)) for name in NETWORKS}
        pipe = diffusers_pipeline(**networks, scheduler=made.scheduler, feature_extractor=made.feature_extractor)
        return cast_diffusers(pipe, dtype, device)
    try:
        with _quiet():
            from diffusers import StableVideoDiffusionPipeline

            pipe = StableVideoDiffusionPipeline.from_pretrained(
                os.fspath(folder), torch_dtype=weights_dtype or dtype, variant=variant, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise SvdlabError(
            f"{folder}: diffusers cannot load it ({reason[0] if reason else type(error).__name__})"
        ) from None
    for model in (pipe.unet, pipe.vae, pipe.image_encoder):
        model.eval().requires_grad_(False)
    return cast_diffusers(pipe, dtype, device)


def diffusers_network(name: str, network: nn.Module) -> Any:
    """diffusers' network (for the image encoder transformers') on the weight tensors of one of svdlab's.

    Args:
        name: "unet", "vae" or "image_encoder".
        network: svdlab's; its weights are shared, not copied.
    """
    with _quiet():
        from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        options = network.config.model_dump()  # type: ignore[union-attr, operator]
        with torch.device("meta"):
            if name == "unet":
                reference: Any = UNetSpatioTemporalConditionModel(**options)
            elif name == "vae":
                reference = AutoencoderKLTemporalDecoder(**options)
            else:
                reference = CLIPVisionModelWithProjection(CLIPVisionConfig(**options))
        state = network.state_dict()
        reference.load_state_dict(state, strict=True, assign=True)
        for module in reference.modules():
            if "position_ids" in module._buffers:  # no part of a checkpoint: made again
                positions = torch.arange(module._buffers["position_ids"].shape[-1])[None]
                module._buffers["position_ids"] = positions.to(next(iter(state.values())).device)
    return reference.eval().requires_grad_(False)


def diffusers_pipeline(
    unet: nn.Module,
    vae: nn.Module,
    image_encoder: nn.Module,
    scheduler: EulerScheduler,
    feature_extractor: ImageNormalization = ImageNormalization(),  # noqa: B008 - frozen
) -> Any:
    """diffusers' pipeline around its networks and svdlab's settings."""
    with _quiet():
        from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
        from transformers import CLIPImageProcessor

        statistics = {name: list(value) for name, value in feature_extractor.model_dump(by_alias=True).items()}
        pipe = StableVideoDiffusionPipeline(
            vae,
            image_encoder,
            unet,
            EulerDiscreteScheduler.from_config(scheduler.model_dump()),
            CLIPImageProcessor(**statistics),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dpm_solver(scheduler: EulerScheduler) -> Any:
    """DPM-Solver++ (2M) over the same noise levels with the same preconditioning, for ``SVDPipeline.scheduler``.

    Source: Lu et al. 2022, arXiv 2211.01095; diffusers ``scheduling_edm_dpmsolver_multistep.py``.
    """
    with _quiet():
        from diffusers import EDMDPMSolverMultistepScheduler

        levels = {"sigma_min": scheduler.sigma_min, "sigma_max": scheduler.sigma_max}
        return EDMDPMSolverMultistepScheduler(**levels, sigma_data=1.0, prediction_type="v_prediction")


def tiny_autoencoder(**options: Any) -> Any:
    """diffusers' ``AutoencoderTiny``, untrained: per frame, convolutions alone, no attention and no norms.

    Source: Ollin Boer Bohan's TAESD, https://github.com/madebyollin/taesd; diffusers ``autoencoder_tiny.py``.
    """
    with _quiet():
        from diffusers import AutoencoderTiny

        return AutoencoderTiny(**options)


def small_decoder(
    model: str | os.PathLike[str], vae: VAEConfig, device: str | torch.device = "cpu"
) -> Callable[[Tensor, GenerationSettings], Tensor]:
    """The stage ``decode`` by an ``AutoencoderTiny`` in the VAE's place, in float32: each frame by itself.

    Args:
        model: its folder or its name on the hub, such as ``madebyollin/taesd``.
        vae: whose latents it is to decode, times their scaling factor.
        device: where.

    Raises:
        SvdlabError: there is none, or it is one for other latents.
    """
    with _quiet():
        from diffusers import AutoencoderTiny

        try:
            tiny, found = AutoencoderTiny.from_pretrained(os.fspath(model), output_loading_info=True)
            if found["missing_keys"]:
                raise ValueError(f"its file lacks {min(found['missing_keys'])}")
            tiny = tiny.to(device).eval().requires_grad_(False)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            why = str(error).strip().splitlines()[0]
            raise SvdlabError(f"small decoder: {model}: not an AutoencoderTiny of diffusers: {why}") from None
    factor = tiny.config.upsampling_scaling_factor ** (len(tiny.config.decoder_block_out_channels) - 1)
    got, wanted = (tiny.config.latent_channels, factor), (vae.latent_channels, vae.scale_factor)
    if got != wanted:
        raise SvdlabError(f"small decoder: {model}: got (latent channels, pixels per latent) {got}, allowed: {wanted}")

    @torch.no_grad()
    def decode(latents: Tensor, settings: GenerationSettings) -> Tensor:
        frames = [tiny.decode(some).sample for some in latents.float().flatten(0, 1).split(_FRAMES_AT_A_TIME)]
        return torch.cat(frames).unflatten(0, latents.shape[:2])

    return decode


def cast_diffusers(pipe: Any, dtype: torch.dtype, device: str | torch.device | None = None) -> Any:
    """Move a diffusers pipeline's networks to another dtype (and device) in place, without its warnings."""
    with _quiet():
        for model in (pipe.unet, pipe.vae, pipe.image_encoder):
            model.to(device=device or model.device, dtype=dtype)
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no progress bars of other libraries; only what is ours is on the terminal."""
    # transformers sets its level when it is first imported, and then warns that torchvision is not there.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        try:  # both set their loggers' levels when they are imported
            import diffusers.utils.logging as diffusers_logging
            import transformers.utils.logging as transformers_logging
        except ImportError:
            yield
            return
        for name in ("diffusers", "transformers"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        for module in (diffusers_logging, transformers_logging):
            if module.is_progress_bar_enabled():
                module.disable_progress_bar()
                stack.callback(module.enable_progress_bar)
        yield


def resolve(pipe: Any, settings: GenerationSettings) -> GenerationSettings:
    """Fill height, width and number of frames from a diffusers pipeline's configuration, and its dtype."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) or size is None else size
    if size == 96:  # as svdlab: the published configs say 96, the models were trained at 576x1024
        height, width = 576 // pipe.vae_scale_factor, 1024 // pipe.vae_scale_factor
    filled: dict[str, Any] = {"dtype": dtype_name(pipe.unet.dtype)}
    for field, own, factor in (
        ("height", height, pipe.vae_scale_factor),
        ("width", width, pipe.vae_scale_factor),
        ("num_frames", pipe.unet.config.num_frames, 1),
    ):
        if getattr(settings, field) is None:
            if own is None:
                raise SvdlabError(f"{field}: got none and the checkpoint's config has none, allowed: a number")
            filled[field] = int(own) * factor
    return settings.replace(**filled)


def _check_supported(settings: GenerationSettings) -> None:
    """Refuse what diffusers itself fails at, before it does so with a shape error in the first step."""
    low, high = settings.min_guidance_scale, settings.max_guidance_scale
    ramp = torch.linspace(low, high, settings.num_frames or 1)
    if (high > 1) != bool(ramp.max() > 1):
        raise SvdlabError(
            f"max_guidance_scale: diffusers fails at a ramp from {low:g} to {high:g} over "
            f"{settings.num_frames} frame(s), "
            "allowed in the reference: both ends of the ramp that is used above 1, or both at most 1"
        )


def capture_diffusers(
    pipe: Any,
    image: Any = None,
    settings: GenerationSettings | None = None,
    *,
    replay: Trace | None = None,
    preprocess: bool = False,
    taps: Sequence[str] = (),
    until: str | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    perturb: int | None = None,
    implementation: str = "diffusers",
    checkpoint: str | os.PathLike[str] | None = None,
    optional: bool = False,
) -> Trace:
    """Run a diffusers ``StableVideoDiffusionPipeline`` and record every tensor of ``docs/trace-format.md``.

    Args:
        pipe: the pipeline; its dtype is the trace's. The same pipeline can be captured any number of times.
        image: a PIL image or a list of them; not needed with ``replay``.
        settings: None means ``replay``'s.
        replay: a trace whose random draws and image are used instead of the seed and ``image``. The truth is
            a float64 pipeline that replays the working dtype's trace.
        preprocess: redo the preprocessing from the replayed source image instead of replaying its results.
        taps: shell-style patterns of module names (``unet.down_blocks.*``), see ``svdlab.parity.taps``.
        until: stop after this probe.
        path: stream to this file instead of keeping the tensors in memory.
        progress: show a bar over the denoising steps.
        perturb: a seed: move every input and every layer's output by one unit in the last place, up or down
            at random. How far the result moves is what rounding alone can do (``compare``'s floor without a
            truth).
        implementation: what the trace calls it.
        checkpoint: the folder that the pipeline was loaded from: its digest goes into the trace, and ``compare``
            refuses a truth or a rerun of another one.
        optional: record the optional probes, too: ``latents.init``, ``denoised.NNN`` and ``frames_8bit``.

    Raises:
        SvdlabError: a setting at which diffusers fails, no image and nothing to replay, a replay that lacks
            an input or has another shape, a pattern that names no module.
    """
    settings = resolve(pipe, settings or (replay.settings if replay is not None else GenerationSettings()))
    _check_supported(settings)
    sigmas, scheduler = named_sigmas(settings), traced_label(pipe.scheduler, settings)
    tensors = {} if replay is None else inputs_to_replay(replay, preprocess)
    if image is None:
        if replay is None:
            raise SvdlabError("image: got none, allowed: a PIL image, or a trace to replay")
        image = replay_images(tensors, settings)
    images = _pil_list(image)
    models = {"image_encoder": pipe.image_encoder, "vae": pipe.vae, "unet": pipe.unet}
    chosen = tapping.select(models, taps)
    writer = TraceWriter(
        settings,
        implementation,
        implementation_version=version_of("diffusers"),
        dtype=settings.dtype,
        digests={} if checkpoint is None else {"checkpoint": checkpoint_digest(checkpoint)},
        versions=versions_of_run(),
        scheduler=scheduler,
        path=path,
        until=until,
    )
    with writer, ExitStack() as stack, torch.no_grad():
        bar = stack.enter_context(
            tqdm(total=settings.num_steps, desc=f"{implementation} {settings.dtype}", disable=not progress)
        )
        recorder = Recorder(pipe, settings, tensors, writer, stack, perturb, optional)
        for name, module in chosen.items():
            recorder.tap(name, module)
        stack.enter_context(_quiet())
        stack.enter_context(repeated_draws(pipe.scheduler, settings.seed))
        recorder.source(images)
        pipe(
            images,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.num_inference_steps if sigmas is None else None,
            sigmas=sigmas,
            min_guidance_scale=settings.min_guidance_scale,
            max_guidance_scale=settings.max_guidance_scale,
            fps=settings.fps,
            motion_bucket_id=settings.motion_bucket_id,
            noise_aug_strength=settings.noise_aug_strength,
            decode_chunk_size=_chunk(settings),
            num_videos_per_prompt=settings.num_videos_per_prompt,
            generator=torch.Generator("cpu").manual_seed(settings.seed),
            output_type="pt",
            callback_on_step_end=recorder.step_end(bar),
            callback_on_step_end_tensor_inputs=["noise_pred", "latents"],
        )
    return writer.trace


def _chunk(settings: GenerationSettings) -> int | None:
    chunk = settings.decode_chunk_size
    return chunk if settings.decode == "parity" and isinstance(chunk, int) else None


def _pil_list(image: Any) -> list[Any]:
    from PIL import Image as pil

    if isinstance(image, Tensor):
        return list(source_images(image if image.ndim == 4 else image[None]))
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images or not all(isinstance(i, pil.Image) for i in images):
        raise SvdlabError(f"image: got {type(image).__name__}, allowed: a PIL image or a list of them")
    if len({i.size for i in images}) > 1:
        raise SvdlabError(
            f"image: sizes {sorted({i.size for i in images})}, allowed in diffusers: one size for all images"
        )
    with about("image"):
        return [to_rgb(i) for i in images]
