"""Bundles: inputs, outputs and weights of one stage or module as plain files, which a port's own unit tests can load.

A reference's inputs are replayed through svdlab's plain network, in the reference's dtype, with a hook on what is asked
for. Tensors have the layouts of a trace, and what a module is given has the names of diffusers' forward functions:
``hidden_states``, ``temb`` (before its SiLU), ``encoder_hidden_states`` (the image embedding, zeros in the
unconditional half), ``res_hidden_states_tuple.N``. ``docs/bundles.md`` describes the files.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.files import check_new_folder, write_folder
from svdlab.parity import taps
from svdlab.parity.compare import IMPLAUSIBLE, bound
from svdlab.parity.replay import replay_inputs
from svdlab.parity.trace import Trace, dtype_name
from svdlab.svd import images
from svdlab.svd.kernels import plain
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import STAGE, Change, Stage
from svdlab.svd.unet import Conditioning

# Whole networks are the stages that run them.
NETWORK_STAGES: Mapping[str, str] = {
    "image_encoder": "image_embedding",
    "vae.encoder": "image_latents",
    "unet": "predict_noise",
    "vae.decoder": "decode",
}
_PREPROCESSING = ("resize_image", "clip_pixels")
# Arguments of stages and modules that have another name in a trace or in diffusers.
_TRACE_NAMES = {name: f"input.{name}" for name in ("source", "image", "noise", "clip_pixels")}
_MODULE_NAMES = {"x": "hidden_states", "z": "hidden_states", "pixels": "hidden_states", "emb": "temb"}
_MODULE_NAMES |= {"spatial": "x_spatial", "temporal": "x_temporal"}
_WEIGHTS = {
    "image_encoder": ("image_encoder", ("",)),
    "vae.encoder": ("vae", ("encoder.", "quant_conv.")),
    "vae.decoder": ("vae", ("decoder.",)),
    "unet": ("unet", ("",)),
}
_LAYOUTS = {
    5: "batch, frame, channel, height, width",
    4: "batch, channel, height, width",
    3: "batch, token, channel",
    2: "batch, channel",
}
_SPECIAL_LAYOUTS = {"guidance_scale": "frame", "sigmas": "step", "timesteps": "step", "positions": "frame, channel"}


class _Complete(Exception):  # noqa: N818 - it is no error
    """Leaves a run once everything is recorded."""


@dataclass
class Bundle:
    """What one stage or module was given, what it gave, and its weights.

    Attributes:
        name: a stage's, or a module's tap name without step.
        step: of the denoising loop; None for what runs once.
        inputs, outputs: by name, in the layouts of a trace.
        weights: by the checkpoint's keys, of the file of ``component`` ("unet", "vae", "image_encoder", or "").
        prefix: what the keys relative to the module leave out.
        settings: what else the result depends on, by name.
        calls: how often it ran in that step (chunks, videos); the first call is recorded.
    """

    name: str
    step: int | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    component: str = ""
    prefix: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    calls: int = 0

    def files(self, source: str) -> dict[str, bytes]:
        """The folder's files; ``source`` says in the README what they were made from."""
        files = {"inputs.safetensors": self.inputs, "outputs.safetensors": self.outputs}
        if self.weights:
            files["weights.safetensors"] = self.weights
        metadata = {"prefix": self.prefix} if self.prefix else None
        written = {
            name: save(
                {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
                metadata if name.startswith("weights") else None,
            )
            for name, tensors in files.items()
        }
        return {**written, "README.md": self.readme(source).encode()}

    def readme(self, source: str) -> str:
        """Every tensor with its shape, layout and dtype, and the settings that matter."""
        when = "" if self.step is None else f" at denoising step {self.step}"
        kind = "stage" if self.name in STAGE else "module"
        lines = [f"# {self.name}{when}", "", f"What this {kind} was given and what it gave. {source}", ""]
        if self.calls > 1:
            lines += [f"It ran {self.calls} times there (chunks or videos); this is the first.", ""]
        for title, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            lines += [f"## {title}.safetensors", ""]
            if not tensors:
                lines += ["Empty: it reads settings only.", ""]
                continue
            lines += ["| name | shape | layout | dtype |", "| --- | --- | --- | --- |"]
            for name, x in tensors.items():
                lines.append(f"| `{name}` | {_shape(x)} | {self._layout(name, x)} | {dtype_name(x.dtype)} |")
            lines.append("")
        if self.weights:
            lines += ["## weights.safetensors", "", f"Keys as in the checkpoint's `{self.component}` folder."]
            lines += [f"Relative to the module they begin after `{self.prefix}`.", ""] if self.prefix else [""]
            lines += ["| key | relative | shape | dtype |", "| --- | --- | --- | --- |"]
            for name, x in self.weights.items():
                relative = name.removeprefix(self.prefix)
                lines.append(f"| `{name}` | `{relative}` | {_shape(x)} | {dtype_name(x.dtype)} |")
            lines.append("")
        lines += ["## Settings", "", "| setting | value |", "| --- | --- |"]
        lines += [f"| `{name}` | {value} |" for name, value in self.settings.items()]
        return "\n".join(lines) + "\n"

    def _layout(self, name: str, x: Tensor) -> str:
        if taps.layout_of(self.name) == "positions" or name.endswith("time_pos_embed"):
            return _SPECIAL_LAYOUTS["positions"]
        if x.ndim < 2:
            return _SPECIAL_LAYOUTS.get(name, "scalar" if x.ndim == 0 else "")
        return _LAYOUTS.get(x.ndim, "")


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))}{',' * (x.ndim == 1)})"


def make_bundles(pipe: SVDPipeline, what: str, reference: Trace, step: int = 0) -> list[Bundle]:
    """Replay a reference's inputs and record one stage, or the modules that a pattern names.

    Args:
        pipe: the checkpoint that made the reference, in its dtype.
        what: a stage of ``svdlab.svd.stages``, a network (``unet``, ``vae.encoder``, ``vae.decoder``,
            ``image_encoder``), or a shell-style pattern of tapped modules.
        reference: whose inputs are replayed.
        step: at which denoising step, for what runs in every step.

    Raises:
        SvdlabError: no such stage or module, a step that is not run, a reference without the inputs, or one that
            another checkpoint made.
    """
    settings = pipe.resolve(reference.settings.replace(dtype=dtype_name(pipe.dtype), cfg="batched"))
    if not 0 <= step < settings.num_steps:
        raise SvdlabError(f"step: got {step}, allowed: 0 to {settings.num_steps - 1}")
    pipe = pipe.with_own_modules()
    for network in taps.MODELS:
        setattr(pipe, network, plain(getattr(pipe, network)))
    stage = STAGE.get(NETWORK_STAGES.get(what, what))
    recorder = _Recorder(settings, step)
    if stage is None:
        models = {name: getattr(pipe, name) for name in taps.MODELS}
        if not any(c in what for c in "*?[") and what not in dict(taps.modules(models)):
            allowed = f"a stage ({', '.join(STAGE)}), {', '.join(NETWORK_STAGES)}, or a module of docs/trace-format.md"
            raise SvdlabError(f"bundle: got {what!r}, allowed: {allowed}")
        recorder.watch_modules(pipe, taps.select(models, [what]))
    else:
        pipe = recorder.watch_stage(pipe, stage)
        if stage.name in _PREPROCESSING:
            reference.require(["input.source"], "to redo the preprocessing")
    recorder.watch_conditioning(pipe)
    preprocess = stage is not None and stage.name in _PREPROCESSING

    def check(name: str, tensor: Tensor) -> None:
        recorder.probe(name)
        if not name.startswith("input.") and name in reference:
            _check_same(reference, name, tensor)
        if recorder.complete:
            raise _Complete

    with torch.no_grad():
        try:
            inputs = replay_inputs(pipe, settings, reference, preprocess)
            if not preprocess:
                pipe.to_8bit(pipe.run(inputs, settings, probe=check))
        except _Complete:
            pass
    if not recorder.complete:
        missing = ", ".join(b.name for b in recorder.bundles.values() if not b.calls)
        raise SvdlabError(f"bundle: {missing} did not run in this generation")
    for bundle in recorder.bundles.values():
        bundle.settings = {**settings.model_dump(exclude={"seed", "dtype", "cfg"}), **bundle.settings}
    return list(recorder.bundles.values())


def _check_same(reference: Trace, name: str, tensor: Tensor) -> None:
    """Refuse a reference that these weights did not make: its bundle would be of another model."""
    right = reference[name].double()
    distance = float((tensor.detach().cpu().double() - right).norm() / right.norm().clamp_min(1e-30))
    limit = IMPLAUSIBLE[reference.dtype] * bound(name, reference.dtype)
    if not distance <= limit and right.norm() > 0:
        raise SvdlabError(
            f"{reference.label}: {name} is {distance:.2g} away from what this model gives, "
            f"allowed: {limit:.2g}; a bundle needs a right trace and the checkpoint that made it (--model)"
        )


class _Recorder:
    """Hooks that fill bundles."""

    def __init__(self, settings: GenerationSettings, step: int) -> None:
        self.settings, self.wanted, self.step = settings, step, 0
        self.bundles: dict[str, Bundle] = {}
        self.conditioning: dict[str, Tensor] = {}
        self.embeddings: dict[str, Tensor] = {}
        # A module may run several times; what comes after it says that it is done.
        self.complete = False

    def probe(self, name: str) -> None:
        """A probe was recorded: whatever was recorded before is complete."""
        if name.startswith("latents."):
            self.step = int(name.rsplit(".", 1)[1]) + 1
        self.complete = self.complete or all(b.calls for b in self.bundles.values())

    # Stages.

    def watch_stage(self, pipe: SVDPipeline, stage: Stage) -> SVDPipeline:
        """A pipeline that records one stage."""
        bundle = Bundle(stage.name, self.wanted if stage.per_step else None)
        self.bundles[stage.name] = bundle
        if stage.network:
            bundle.component, prefixes = _WEIGHTS[stage.network]
            state = getattr(pipe, bundle.component).state_dict()
            bundle.weights = {k: v for k, v in state.items() if k.startswith(prefixes)}
            bundle.settings |= _constants(getattr(pipe, bundle.component), prefixes)
        signature = inspect.signature(getattr(pipe, stage.name))

        def record(pipe: SVDPipeline, wrapped: Any, *arguments: Any) -> Any:
            result = wrapped(*arguments)
            if stage.per_step and self.step != self.wanted:
                return result
            bundle.calls += 1
            given = signature.bind(*arguments).arguments
            inputs, outputs = self._stage_inputs(stage, given), self._stage_outputs(pipe, stage, result)
            if stage.name in _PREPROCESSING and bundle.inputs:  # once for each image
                inputs = {k: torch.cat([bundle.inputs[k], v]) for k, v in inputs.items()}
                outputs = {k: torch.cat([bundle.outputs[k], v]) for k, v in outputs.items()}
            elif bundle.calls > 1:
                return result
            bundle.inputs, bundle.outputs = inputs, outputs
            bundle.settings |= {k: v for k, v in given.items() if isinstance(v, (bool, int, float))}
            bundle.settings |= _stage_constants(pipe, stage)
            if stage.name in _PREPROCESSING:
                bundle.calls, self.complete = 1, True
            else:
                self.complete = True
                raise _Complete
            return result

        return pipe.with_changes(Change(wrap={stage.name: record}))

    def _stage_inputs(self, stage: Stage, given: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, value in given.items():
            if isinstance(value, Conditioning):
                tensors |= self.conditioning
            elif name == "source":
                tensors["input.source"] = images.to_tensor(value)
            elif isinstance(value, Tensor):
                full = "input.latents" if (stage.name, name) == ("initial_latents", "latents") else name
                tensors[_TRACE_NAMES.get(full, full)] = value
        return tensors

    def _stage_outputs(self, pipe: SVDPipeline, stage: Stage, result: Any) -> dict[str, Tensor]:
        if isinstance(result, Conditioning):
            return {"add_embedding": result.added_time_embedding, **_tokens(pipe, result)}
        result = torch.as_tensor(result)
        if not result.is_floating_point():  # 8-bit levels, as a trace holds them
            result = result.float()
        if len(stage.writes) == 2:
            guided = max(self.settings.min_guidance_scale, self.settings.max_guidance_scale) > 1
            return dict(zip(stage.writes, result.chunk(2), strict=True)) if guided else {"noise_pred": result}
        return {stage.writes[0]: result}

    def watch_conditioning(self, pipe: SVDPipeline) -> None:
        """Keep what the UNet's conditioning is made of, and both parts of the time embedding."""
        unet, condition = pipe.unet, pipe.unet.condition

        def recorded(image_embeddings: Tensor, added_time_ids: Tensor, num_frames: int) -> Conditioning:
            self.conditioning = {"encoder_hidden_states": image_embeddings, "added_time_ids": added_time_ids}
            return condition(image_embeddings, added_time_ids, num_frames)

        unet.__dict__["condition"] = recorded
        for name in ("time_embedding", "add_embedding"):
            getattr(unet, name).register_forward_hook(partial(self._keep_embedding, name))

    def _keep_embedding(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.embeddings[name] = output

    # Modules.

    def watch_modules(self, pipe: SVDPipeline, modules: Mapping[str, nn.Module]) -> None:
        """Hooks on modules, by tap name."""
        for name, module in modules.items():
            component, path = name.split(".", 1)
            bundle = Bundle(name, self.wanted if taps.is_per_step(name) else None, component=component)
            bundle.prefix = f"{path}."
            self.bundles[name] = bundle
            module.register_forward_pre_hook(partial(self._before, bundle), with_kwargs=True)
            module.register_forward_hook(partial(self._after, bundle))

    def _due(self, bundle: Bundle) -> bool:
        return bundle.step is None or self.step == self.wanted

    def _before(self, bundle: Bundle, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._due(bundle) or bundle.calls:
            return
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear, nn.GroupNorm, nn.LayerNorm)):
            given: dict[str, Any] = {"hidden_states": args[0]}
        else:
            given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        inputs: dict[str, Tensor] = {}
        for argument, value in given.items():
            name = _MODULE_NAMES.get(argument, argument)
            if argument == "emb":
                # Modules here are given the SiLU of it, those of diffusers apply it themselves.
                if value is not None:
                    inputs["temb"] = self.embeddings["time_embedding"] + self.embeddings["add_embedding"]
            elif argument == "skips":
                for i, skip in enumerate(value[-len(module.resnets) :]):  # type: ignore[arg-type]
                    inputs[f"res_hidden_states_tuple.{i}"] = _channels_first(skip)
            elif argument in ("image_token", "conditioning"):
                inputs["encoder_hidden_states"] = self.conditioning["encoder_hidden_states"]
            elif argument == "size":
                bundle.settings["upsample_size"] = None if value is None else tuple(value)
            elif isinstance(value, Tensor):
                inputs[name] = _channels_first(value)
            else:
                raise SvdlabError(f"bundle: {bundle.name} is given {argument}, which is no tensor")
        bundle.inputs = {name: tensor.clone() for name, tensor in inputs.items()}

    def _after(self, bundle: Bundle, module: nn.Module, args: Any, output: Any) -> None:
        if not self._due(bundle):
            return
        bundle.calls += 1
        if bundle.calls > 1:
            return
        bundle.outputs = {"output": taps.from_svdlab(bundle.name, taps.first_tensor(output)).clone()}
        if isinstance(output, tuple):  # a down block, which also gives what the up blocks are given
            bundle.outputs |= {f"output_states.{i}": _channels_first(skip) for i, skip in enumerate(output[1])}
        bundle.weights = {f"{bundle.prefix}{key}": value for key, value in module.state_dict().items()}
        bundle.settings |= _constants(module, ("",))


def _channels_first(x: Tensor) -> Tensor:
    """Activations (B, F, H, W, C) in a trace's layout; others as they are."""
    return x.permute(0, 1, 4, 2, 3) if x.ndim == 5 else x


def _tokens(pipe: SVDPipeline, conditioning: Conditioning) -> dict[str, Tensor]:
    """What the UNet computes once for a generation, by the modules that give it."""
    paths = {module: path for path, module in pipe.unet.named_modules()}
    tensors: dict[str, Tensor] = {}
    for module, made in zip(pipe.unet.transformers(), conditioning.transformers, strict=True):
        path = paths[module]
        tensors[f"{path}.time_pos_embed"] = made.frame_positions.flatten(0, 3)
        for kind, tokens in (
            ("transformer_blocks", made.spatial_tokens),
            ("temporal_transformer_blocks", made.temporal_tokens),
        ):
            tensors |= {f"{path}.{kind}.{i}.attn2": token.flatten(1) for i, token in enumerate(tokens)}
    return tensors


def _stage_constants(pipe: SVDPipeline, stage: Stage) -> dict[str, Any]:
    """What a stage reads of the checkpoint's configuration."""
    if stage.name == "clip_pixels":
        normalization = pipe.feature_extractor
        return {"size": pipe.image_encoder.config.image_size, "mean": normalization.mean, "std": normalization.std}
    if stage.name == "decode":
        return {"scaling_factor": pipe.vae.config.scaling_factor}
    if stage.name == "sigmas":
        return {"sigma_min": pipe.scheduler.sigma_min, "sigma_max": pipe.scheduler.sigma_max, "rho": 7}
    return {}


def _constants(module: nn.Module, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """What is in no weight: eps, groups, heads, strides."""
    constants: dict[str, Any] = {}
    for path, child in module.named_modules():
        if not f"{path}.".startswith(prefixes):
            continue
        name = path or "module"
        if isinstance(child, nn.GroupNorm):
            over = "frame" if "Frame" in type(child).__name__ else "video"
            constants[name] = f"group norm of each {over}, {child.num_groups} groups, eps {child.eps:g}"
        elif isinstance(child, nn.LayerNorm):
            constants[name] = f"layer norm, eps {child.eps:g}"
        elif isinstance(heads := getattr(child, "heads", None), int):
            constants[name] = f"attention, {heads} heads"
        elif isinstance(child, nn.Conv2d) and child.stride != (1, 1):
            constants[name] = f"convolution, stride {child.stride[0]}, padding {child.padding[0]}"
    return constants


def write_bundles(bundles: Sequence[Bundle], folder: str | os.PathLike[str], source: str) -> list[Path]:
    """Write one bundle to a folder, or several to a folder each below it.

    Raises:
        SvdlabError: the folder is there already, or the one above it is not.
    """
    target = Path(folder)
    check_new_folder(target)
    if len(bundles) == 1:
        write_folder(target, bundles[0].files(source))
        return [target]
    target.mkdir()
    for bundle in bundles:
        write_folder(target / bundle.name, bundle.files(source))
    return [target / bundle.name for bundle in bundles]
