"""svdlab against diffusers in one process, in turns, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from svdlab.bench import CASES
from svdlab.bench.profile import profiles
from svdlab.bench.timing import (
    COMPILED,
    DIFFUSERS,
    SVDLAB,
    SVDLAB_COMPILED,
    Calls,
    CaseResult,
    Timing,
    alternate,
    busy,
    gemm_throughput,
    in_own_process,
    machine,
    power_law_exponent,
)
from svdlab.samples import sample_picture
from svdlab.svd import CLIPVisionConfig, UNetConfig, VAEConfig
from svdlab.svd.architectures import ARCHITECTURES, SVD_SCHEDULER
from svdlab.svd.checkpoint import Configs, ImageNormalization, channels_last, resolve_size
from svdlab.svd.kernels import plain, use_kernels
from svdlab.svd.memory import Simulation
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import TINY_CLIP, TINY_UNET, TINY_VAE, randomize_
from svdlab.svd.sampler import EulerScheduler, named_sigmas
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import decode_latents, predict_noise
from svdlab.svd.workloads import NETWORKS, WORKLOADS, decoder_input, unet_inputs


@dataclass(frozen=True)
class Plan:
    """What is timed, and at which sizes.

    Attributes:
        configs: the architecture of the networks.
        sizes: settings of the cases, by name.
        growth: numbers of frames and sides in pixels; one axis grows while the other stays in the middle.
        pairs: how often each implementation is timed.
        cases: those that are run by default.
    """

    configs: Configs
    sizes: Mapping[str, Mapping[str, int]]
    growth: Mapping[str, Sequence[int]]
    pairs: int
    cases: Sequence[str] = CASES

    @classmethod
    def for_device(cls, kind: str) -> Plan:
        """The published networks; "cuda" gets the published size, on "cpu" two cores shall be done within the hour."""
        if kind == "cuda":
            full = {"height": 576, "width": 1024, "num_frames": 14}
            sizes = dict.fromkeys(("unet", "decode", "full-generation"), full)
            return cls(ARCHITECTURES["svd"], sizes, {"frames": (4, 8, 16), "side": (256, 384, 576)}, pairs=10)
        small = {"height": 192, "width": 192, "num_frames": 7}
        sizes = {"unet": {"height": 320, "width": 320, "num_frames": 7}, "decode": small, "full-generation": small}
        growth = {"frames": (2, 4, 8), "side": (96, 128, 192)}
        return cls(ARCHITECTURES["svd"], sizes, growth, pairs=3, cases=CASES[:-1])

    @classmethod
    def quick(cls) -> Plan:
        """Tiny networks and sizes: runs everything, measures nothing."""
        configs = Configs(UNetConfig(**TINY_UNET), VAEConfig(**TINY_VAE), CLIPVisionConfig(**TINY_CLIP))
        tiny = {"height": 64, "width": 64, "num_frames": 3}
        sizes: dict[str, dict[str, int]] = dict.fromkeys(("unet", "decode"), tiny)
        sizes |= dict.fromkeys(("generation", "full-generation"), {**tiny, "num_inference_steps": 2})
        return cls(configs, sizes, {"frames": (2, 4), "side": (64, 96)}, pairs=2)


# svdlab's call and diffusers', each a function of its network, so that a compiled one gets the same.
Work = tuple[Callable[[Any], Any], Callable[[Any], Any]]


class Bench:
    """Everything of one ``svdlab bench``: networks are made once, on weights that both implementations share.

    Args:
        plan: what is timed.
        model: the checkpoint of the whole generation.
        device: where.
        pairs: how often each implementation is timed.
        compile: whether to time both under torch.compile, too.
        profile: whether to run each as often once more, and tell where the time goes.
        given: settings that override a case's own.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        plan: Plan,
        model: str,
        device: str,
        *,
        pairs: int,
        compile: bool,
        profile: bool = False,
        given: Mapping[str, Any],
        progress: bool = True,
    ):
        self.plan, self.configs, self.model, self.device = plan, plan.configs, model, device
        self.pairs, self.compile, self.profile = pairs, compile, profile
        self.given, self.progress = dict(given), progress
        self._kept: tuple[tuple[str, str], tuple[Any, Any]] | None = None

    def run_all(
        self, cases: Sequence[str], dtypes: Sequence[str], quick: bool = False, beside: int = 0
    ) -> dict[str, Any]:
        """Time cases in every dtype: the JSON of ``svdlab bench``.

        Args:
            cases: names in ``CASES``.
            dtypes: names of torch's dtypes.
            quick: do without a process of its own for each case, and measure the limit briefly.
            beside: how many processes compute beside both; the limit is measured without them.
        """
        call: Callable[..., Any] = (lambda function, *args: function(*args)) if quick else in_own_process
        results: list[CaseResult] = []
        growth: list[dict[str, Any]] = []
        peaks = dict.fromkeys(dtypes, 0.0)
        for dtype in dtypes:
            for case in sorted(cases, key=CASES.index):
                # The best of several moments: a busy one says nothing about the limit.
                peaks[dtype] = max(peaks[dtype], gemm_throughput(getattr(torch, dtype), self.device, quick))
                with busy(beside):
                    if case == "growth":
                        growth += call(self.grow, dtype)
                    else:
                        results.append(call(self.run, case, dtype))
        return {
            "machine": machine(self.device),
            "beside": beside,
            "matrix_peak_gflops": {dtype: peak / 1e9 for dtype, peak in peaks.items()},
            "cases": [r.to_dict(peaks[r.dtype]) for r in results],
            "growth": growth,
        }

    def settings(self, case: str, dtype: str, **changes: Any) -> GenerationSettings:
        """A case's settings: its own size, then what was given, then the changes."""
        guidance = {"min_guidance_scale": 1.0, "max_guidance_scale": 3.0}  # a step is timed with it
        given = {**self.plan.sizes.get(case, {}), **self.given, "dtype": dtype, **guidance, **changes}
        settings = GenerationSettings(**given)
        return resolve_size(settings, self.configs.unet, self.configs.vae)

    def run(self, case: str, dtype: str) -> CaseResult:
        """Time one case, other than "growth", in one dtype."""
        settings, flops, calls = self.work(case, dtype)
        size = {"height": settings.height or 0, "width": settings.width or 0, "num_frames": settings.num_frames or 0}
        if case == "clip":
            size = {"height": self.configs.image_encoder.image_size, "width": self.configs.image_encoder.image_size}
            size["num_frames"] = settings.num_videos_per_prompt
        if "generation" in case:
            size["num_inference_steps"] = settings.num_inference_steps
        timings, kinds = self._time(case, dtype, calls), {}
        if self.profile:
            with torch.no_grad():
                kinds = profiles(calls, self.pairs, self.device)
        return CaseResult(case, dtype, size, flops, timings, kinds)

    def work(self, case: str, dtype: str, **changes: Any) -> tuple[GenerationSettings, int, Calls]:
        """What is timed in a case other than "growth": its settings, svdlab's FLOP, every implementation's call.

        Args:
            case, dtype: which.
            changes: settings that differ from the case's own.
        """
        if "generation" in case:
            return self._generation(case, dtype)
        settings = self.settings(case, dtype, **changes)
        workload, calls = self._workload(case, settings)
        return settings, Simulation(self.configs, settings, "cuda").flops(workload), calls

    def grow(self, dtype: str) -> list[dict[str, Any]]:
        """How the seconds of a UNet step grow with frames and with pixels: the exponents of a power law."""
        found = []
        frames, sides = self.plan.growth["frames"], self.plan.growth["side"]
        middle = frames[len(frames) // 2], sides[len(sides) // 2]
        for axis, points in (("frames", [(f, middle[1]) for f in frames]), ("pixels", [(middle[0], s) for s in sides])):
            results = []
            for number, side in points:
                _, flops, calls = self.work("unet", dtype, num_frames=number, height=side, width=side)
                timings = self._time(f"{number} frames of {side}x{side}", dtype, calls)
                results.append((number if axis == "frames" else side * side, flops, timings))
            x = [r[0] for r in results]
            row: dict[str, Any] = {"axis": axis, "dtype": dtype, "frames": [p[0] for p in points], "values": x}
            row |= {"side": [p[1] for p in points], "flop_exponent": power_law_exponent(x, [r[1] for r in results])}
            for name in results[0][2]:
                row[f"{name}_s"] = [r[2][name].median for r in results]
                row[f"{name}_exponent"] = power_law_exponent(x, row[f"{name}_s"])
            found.append(row)
        return found

    def _time(self, case: str, dtype: str, calls: Calls) -> dict[str, Timing]:
        total = len(calls) * (self.pairs + 1)
        bar = tqdm(total=total, desc=f"{case} {dtype}", unit="run", disable=not self.progress)
        with bar, torch.no_grad():
            return alternate(calls, self.pairs, self.device, bar.update)

    def networks(self, name: str, dtype: str) -> tuple[Any, Any]:
        """svdlab's and diffusers' network on the same random weights; one at a time, for a full-size one is large."""
        from svdlab.parity.reference import diffusers_network

        if self._kept is None or self._kept[0] != (name, dtype):
            self._kept = None
            with torch.device("meta"):
                empty = NETWORKS[name](getattr(self.configs, name))
            own = randomize_(empty.to_empty(device="cpu"), seed=0).to(self.device, getattr(torch, dtype))
            own.eval().requires_grad_(False)
            reference = diffusers_network(name, own)
            own = use_kernels(own if self.device == "cpu" else channels_last(own))
            self._kept = (name, dtype), (own, reference)
        return self._kept[1]

    def _workload(self, case: str, settings: GenerationSettings) -> tuple[str, Calls]:
        """The workload that a case is, and one network's work in both implementations, on equal inputs."""
        name = {"unet": f"unet_{settings.cfg}", "decode": f"decode_{settings.decode}", "clip": "image_encoder"}[case]
        own, reference = self.networks(WORKLOADS[name], settings.dtype)
        with torch.no_grad():
            work = {"unet": self._unet, "decode": self._decode, "clip": self._clip}[case](own, settings)
        own_call, reference_call = work
        calls: Calls = {SVDLAB: lambda: own_call(own), DIFFUSERS: lambda: reference_call(reference)}
        if self.compile:
            compiled = compiled_vae(reference) if case == "decode" else torch.compile(reference)
            calls[COMPILED] = lambda: reference_call(compiled)
            if case != "decode":  # the exact decode is no one graph
                own_compiled = torch.compile(plain(own))
                calls[SVDLAB_COMPILED] = lambda: own_call(own_compiled)
        return name, calls

    def _unet(self, own: Any, settings: GenerationSettings) -> Work:
        """One denoising step; what svdlab computes once per generation, it does before."""
        inputs = unet_inputs(self.configs, settings, self._maker(settings))
        conditioning = own.condition(inputs.image_embeddings, inputs.added_time_ids, settings.num_frames)
        return (
            lambda unet: predict_noise(unet, inputs.sample, inputs.timestep, conditioning, settings.cfg),
            lambda reference: reference(*inputs).sample,
        )

    def _decode(self, own: Any, settings: GenerationSettings) -> Work:
        frames, chunk = settings.num_frames, settings.decode_chunk_size
        assert frames and chunk != "auto"
        latents = decoder_input(self.configs, settings, self._maker(settings))
        exact = settings.decode == "exact"
        parts = latents.flatten(0, 1).split(frames if exact else chunk or frames)
        return (
            lambda vae: decode_latents(vae, latents, chunk, exact),
            lambda reference: [reference.decode(part, len(part)).sample for part in parts],
        )

    def _clip(self, own: Any, settings: GenerationSettings) -> Work:
        pixels = self._maker(settings)(settings.num_videos_per_prompt, 3, *(own.config.image_size,) * 2)
        return lambda tower: tower(pixels).image_embeds, lambda reference: reference(pixels).image_embeds

    def _maker(self, settings: GenerationSettings) -> Callable[..., Tensor]:
        """Makes random tensors of a shape; both implementations get the same ones."""
        generator = torch.Generator().manual_seed(settings.seed)
        return lambda *shape: torch.randn(shape, generator=generator).to(self.device, settings.torch_dtype)

    def _generation(self, case: str, dtype: str) -> tuple[GenerationSettings, int, Calls]:
        """A whole generation: of the checkpoint, or of the full-size networks with random weights."""
        from svdlab.parity.reference import diffusers_network, diffusers_pipeline

        settings = GenerationSettings(**{**self.plan.sizes.get(case, {}), **self.given, "dtype": dtype})
        if case == "generation":
            pipe = SVDPipeline.from_pretrained(self.model, dtype=settings.torch_dtype, device=self.device)
            references = {name: diffusers_network(name, getattr(pipe, name)) for name in NETWORKS}
        else:
            pairs = {name: self.networks(name, dtype) for name in NETWORKS}
            scheduler = EulerScheduler.from_config(SVD_SCHEDULER)
            own = {name: pair[0] for name, pair in pairs.items()}
            pipe = SVDPipeline(**own, scheduler=scheduler, feature_extractor=ImageNormalization())
            references = {name: pair[1] for name, pair in pairs.items()}
        settings = pipe.resolve(settings)
        image = sample_picture(self.model)

        def options() -> dict[str, Any]:
            known = settings.model_dump(exclude={"seed", "dtype", "decode", "cfg", "schedule"})
            known["sigmas"] = named_sigmas(settings)
            return {**known, "generator": torch.Generator().manual_seed(settings.seed), "output_type": "pt"}

        def run(own: SVDPipeline) -> Any:
            return own(image, **options(), decode=settings.decode, cfg=settings.cfg, progress=False)

        theirs = diffusers_pipeline(**references, scheduler=pipe.scheduler)
        calls: Calls = {SVDLAB: lambda: run(pipe), DIFFUSERS: lambda: theirs(image, **options())}
        if self.compile:
            compiled: dict[str, Any] = {
                name: torch.compile(network) for name, network in references.items() if name != "vae"
            }
            faster = diffusers_pipeline(**compiled, vae=compiled_vae(references["vae"]), scheduler=pipe.scheduler)
            calls[COMPILED] = lambda: faster(image, **options())
            unet: Any = torch.compile(plain(pipe.unet))
            own_compiled = SVDPipeline(**{**pipe.components, "unet": unet})
            calls[SVDLAB_COMPILED] = lambda: run(own_compiled)
        simulation, steps = Simulation(pipe.configs, settings, "cuda"), settings.num_inference_steps
        once = sum(simulation.flops(name) for name in ("image_encoder", "vae_encode", "decode_exact"))
        return settings, once + steps * simulation.flops("unet_batched"), calls


def compiled_vae(vae: Any) -> Any:
    """The same VAE, its decoder under torch.compile; ``vae`` itself stays as it is."""
    other = copy.copy(vae)
    other._modules = {**vae._modules, "decoder": torch.compile(vae.decoder)}
    return other
