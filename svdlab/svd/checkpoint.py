"""A checkpoint in diffusers' folder format to modules: every key and shape checked, safetensors only.

A folder holds ``model_index.json``, ``unet/``, ``vae/``, ``image_encoder/``, ``scheduler/`` and
``feature_extractor/``. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svdlab.errors import SvdlabError, short
from svdlab.reading import read_as, read_json
from svdlab.svd.architectures import ARCHITECTURES, SVD_SCHEDULER
from svdlab.svd.config import CLIPVisionConfig, Config, Configs, UNetConfig, VAEConfig, per_level, read_config
from svdlab.svd.image_encoder import CLIPVision
from svdlab.svd.kernels import use_kernels
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.unet import UNet
from svdlab.svd.vae import VAE

EMBEDDED = "embedded"
# Saved by old versions of transformers; a constant.
_INERT_KEYS = {"vision_model.embeddings.position_ids"}
_PIPELINE = "StableVideoDiffusionPipeline"
MODEL_INDEX: Mapping[str, Any] = {
    "_class_name": _PIPELINE,
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
}
_UNET_FILE, _CLIP_FILE = "diffusion_pytorch_model", "model"


Level = Annotated[float, Field(ge=-1e3, le=1e3)]
Spread = Annotated[float, Field(ge=1e-3, le=1e3)]


class ImageNormalization(Config):
    """CLIP's channel statistics, from ``feature_extractor/preprocessor_config.json``."""

    mean: tuple[Level, Level, Level] = Field(default=(0.48145466, 0.4578275, 0.40821073), alias="image_mean")
    std: tuple[Spread, Spread, Spread] = Field(default=(0.26862954, 0.26130258, 0.27577711), alias="image_std")


class _Index(BaseModel):
    """``*.safetensors.index.json``: which weight is in which file beside it."""

    model_config = ConfigDict(strict=True)

    weight_map: dict[str, str] = Field(min_length=1)


# Of the weights that a network may hold: what is cast to its dtype. Others would be cast, too, and be wrong.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Components:
    """Everything a pipeline is made of."""

    unet: UNet
    vae: VAE
    image_encoder: CLIPVision
    scheduler: EulerScheduler
    feature_extractor: ImageNormalization


def resolve_size(settings: GenerationSettings, unet: UNetConfig, vae: VAEConfig) -> GenerationSettings:
    """Fill in height, width and number of frames where the settings leave them to the checkpoint.

    Raises:
        SvdlabError: a size that the VAE cannot make.
    """
    factor = vae.scale_factor
    side = (unet.sample_size or 96) * factor
    # The published configs say 96, though the models were trained at 576x1024 (SVD paper, section 4).
    height, width = (576, 1024) if unet.sample_size == 96 else (side, side)
    resolved = settings.replace(
        height=settings.height or height,
        width=settings.width or width,
        num_frames=settings.num_frames or unet.num_frames,
    )
    for name in ("height", "width"):
        if (value := getattr(resolved, name)) % factor:
            raise SvdlabError(f"{name}: got {value}, allowed: multiples of {factor} (this checkpoint's VAE)")
    return resolved


def load_components(
    repo_or_folder: str | Path = EMBEDDED,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    revision: str | None = None,
) -> Components:
    """Load a checkpoint: ``"embedded"``, a local folder, or a name on the Hugging Face hub.

    Args:
        repo_or_folder: which checkpoint.
        dtype: of all weights.
        device: where they go.
        variant: ``"fp16"`` reads ``*.fp16.safetensors``.
        revision: branch, tag or commit on the hub.

    Raises:
        SvdlabError: no such checkpoint, an option svdlab does not implement, a missing, extra or misshapen weight, a
            damaged file. Configs of all components are checked before any weight is read.
    """
    folder = checkpoint_folder(repo_or_folder, variant, revision)
    scheduler = EulerScheduler.from_config(*_read_json(folder, "scheduler/scheduler_config.json"))
    configs = _read_configs(folder)
    statistics, where = _read_json(folder, "feature_extractor/preprocessor_config.json")
    normalization = _normalization(statistics, where)

    def load(module: type[nn.Module], config: Any, name: str, stem: str) -> Any:
        return _load(module, config, folder / name, stem, variant, dtype, torch.device(device))

    return Components(
        load(UNet, configs.unet, "unet", _UNET_FILE),
        load(VAE, configs.vae, "vae", _UNET_FILE),
        load(CLIPVision, configs.image_encoder, "image_encoder", _CLIP_FILE),
        scheduler,
        normalization,
    )


def load_configs(model: str | Path, revision: str | None = None) -> Configs:
    """The architecture of a checkpoint, without its weights.

    Args:
        model: a name of ``ARCHITECTURES``, "embedded", a folder, or a name on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        SvdlabError: as ``load_components``.
    """
    if str(model) in ARCHITECTURES:
        return ARCHITECTURES[str(model)]
    return _read_configs(checkpoint_folder(model, revision=revision, weights=False))


def _normalization(statistics: Mapping[str, Any], where: str) -> ImageNormalization:
    names = ("image_mean", "image_std")
    for name in names:
        if name not in statistics:
            raise SvdlabError(f"{where}: {name} is missing")
    return read_config(ImageNormalization, {name: statistics[name] for name in names}, where)


def _read_configs(folder: Path) -> Configs:
    index, where = _read_json(folder, "model_index.json")
    if (name := index.get("_class_name", _PIPELINE)) != _PIPELINE:
        raise SvdlabError(f"{where}: pipeline {short(name)} is not implemented; allowed: {_PIPELINE}")
    unet = _config(folder, "unet/config.json", UNetConfig)
    vae = _config(folder, "vae/config.json", VAEConfig)
    clip_options, clip_where = _read_json(folder, "image_encoder/config.json")
    known = {name: value for name, value in clip_options.items() if name in CLIPVisionConfig.model_fields}
    configs = Configs(unet, vae, read_config(CLIPVisionConfig, known, clip_where))
    check_together(str(folder), configs)
    return configs


def check_together(where: str, configs: Configs) -> None:
    """Whether the three networks are of one pipeline.

    Raises:
        SvdlabError: they are not; ``where`` they are from is in the error.
    """
    unet, vae, clip = configs.unet, configs.vae, configs.image_encoder
    if unet.in_channels != 2 * unet.out_channels or unet.out_channels != vae.latent_channels:
        raise SvdlabError(
            f"{where}: unet in_channels {unet.in_channels}, out_channels {unet.out_channels} and vae latent_channels "
            f"{vae.latent_channels} do not belong together (in = 2 * out, out = latent)"
        )
    contexts = per_level("cross_attention_dim", unet.cross_attention_dim, len(unet.block_out_channels))
    if set(contexts) != {clip.projection_dim}:
        raise SvdlabError(
            f"{where}: unet cross_attention_dim {short(unet.cross_attention_dim)} and image_encoder projection_dim "
            f"{clip.projection_dim} do not belong together (they are equal)"
        )


def checkpoint_folder(
    repo_or_folder: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    weights: bool = True,
    **hub: Any,
) -> Path:
    """The local folder of a checkpoint, downloaded from the hub (with its weights or without) when it is not one.

    Args:
        repo_or_folder, variant, revision: as for ``load_components``.
        weights: False leaves them out of a download.
        hub: further options of ``huggingface_hub.snapshot_download``.

    Raises:
        SvdlabError: neither a folder nor a repository that can be reached, or a folder that is no checkpoint.
    """
    if str(repo_or_folder) == EMBEDDED:
        return Path(__file__).parent.parent / "checkpoint"
    folder = Path(repo_or_folder).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(repo_or_folder)):
            raise SvdlabError(f"model: {str(repo_or_folder)!r} is no folder, allowed: a folder, owner/name, embedded")
        folder = _download(str(repo_or_folder), variant, weights, revision=revision, **hub)
    if not (folder / "model_index.json").is_file():
        raise SvdlabError(f"model: {folder} is no diffusers checkpoint: model_index.json is missing")
    return folder


def checkpoint_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Every file that loading a checkpoint reads: configs, then weights.

    Raises:
        SvdlabError: a component without weights.
    """
    stems = {"unet": _UNET_FILE, "vae": _UNET_FILE, "image_encoder": _CLIP_FILE}
    configs = [folder / name / "config.json" for name in stems]
    configs += [folder / "scheduler/scheduler_config.json", folder / "feature_extractor/preprocessor_config.json"]
    return configs + [file for name, stem in stems.items() for file in _weight_files(folder / name, stem, variant)]


def _download(repo: str, variant: str | None, weights: bool, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download

    suffix = f".{variant}" if variant else ""
    tensors = [f"*/*{suffix}.safetensors", f"*/*{suffix}-*.safetensors"] if weights else []
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*/*.json", *tensors], **hub))
    except Exception as error:  # the hub client raises a dozen types: no network, no such name, gated, bad token
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SvdlabError(f"model: {repo!r} is no folder and the hub did not give it: {reason}") from None


def _read_json(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    path = folder / name
    if not path.exists():
        raise SvdlabError(f"{path}: missing; a checkpoint needs it")
    options = read_json(path)
    if not isinstance(options, dict):
        raise SvdlabError(f"{path}: holds a {type(options).__name__}, allowed: a JSON object")
    return options, str(path)


def _config(folder: Path, name: str, cls: type[Any]) -> Any:
    options, where = _read_json(folder, name)
    return read_config(cls, options, where)


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The component's safetensors: one file, or the shards that an index names."""
    dotted = f".{variant}" if variant else ""
    single = folder / f"{stem}{dotted}.safetensors"
    if single.is_file():
        return [single]
    for index in (
        folder / f"{stem}.safetensors.index{dotted}.json",
        folder / f"{stem}{dotted}.safetensors.index.json",
    ):
        if index.is_file():
            names = sorted(set(read_as(_Index, index).weight_map.values()))
            if others := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
                raise SvdlabError(f"{index}: weight_map: got {short(others[0])}, allowed: *.safetensors beside it")
            return [folder / name for name in names]
    present = ", ".join(sorted(p.name for p in folder.glob("*") if p.suffix in {".safetensors", ".bin"})) or "nothing"
    raise SvdlabError(f"{single}: missing (there is {present}); svdlab reads safetensors only, never a pickle")


def _load(
    cls: type[nn.Module],
    config: Any,
    folder: Path,
    stem: str,
    variant: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    with torch.device("meta"):
        module = cls(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    files = _weight_files(folder, stem, variant)
    found: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, str] = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                if key in found:
                    raise SvdlabError(f"{path}: weight {short(key)} is in another file of {folder}, too")
                part = file.get_slice(key)
                found[key], kinds[key] = tuple(part.get_shape()), part.get_dtype()
    where = str(files[0] if len(files) == 1 else folder)
    if missing := sorted(wanted.keys() - found.keys()):
        raise SvdlabError(f"{where}: weight {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := sorted(found.keys() - wanted.keys() - _INERT_KEYS):
        raise SvdlabError(f"{where}: weight {short(extra[0])} has no place in this architecture ({len(extra)} in all)")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise SvdlabError(f"{where}: weight {key!r} has shape {short(found[key])}, the config wants {shape}")
        if kinds[key] not in _FLOATS:
            raise SvdlabError(f"{where}: weight {key!r} is {kinds[key]}, allowed: {', '.join(_FLOATS)}")
    state: dict[str, Tensor] = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in wanted.keys() & set(file.keys()):
                state[key] = file.get_tensor(key).to(device=device, dtype=dtype)
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
    return use_kernels(module if device.type == "cpu" else channels_last(module))


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safe_open`` whose failures, also those of reading, are one line that names the file.

    Raises:
        SvdlabError: no whole safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = str(error).encode("unicode_escape").decode()[:200]
        raise SvdlabError(f"{path}: not a readable safetensors file: {reason}") from None


def channels_last(module: nn.Module) -> nn.Module:
    """Lay convolution weights out as accelerators read them beside the one layout. (CPUs: ``kernels.packed``.)"""
    for parameter in module.parameters():
        if parameter.ndim in (4, 5):
            last = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=last)
    return module


def write_checkpoint(
    folder: str | Path,
    unet: UNet,
    vae: VAE,
    image_encoder: CLIPVision,
    *,
    scheduler: Mapping[str, Any] = {},  # noqa: B006 - read only
    feature_extractor: ImageNormalization | None = None,
    dtype: torch.dtype | None = torch.float32,
    variant: str | None = None,
) -> Path:
    """Write modules as a checkpoint in diffusers' folder format, which diffusers and svdlab load alike.

    Args:
        folder: made if needed.
        unet, vae, image_encoder: their weights and configs.
        scheduler: options over ``SVD_SCHEDULER``.
        feature_extractor: CLIP's statistics; None for the published ones.
        dtype: of the weights in the files; None for each network's own.
        variant: such as "fp16", in the names of the files with weights.
    """
    folder = Path(folder)
    models: tuple[tuple[str, Any, str, str | None], ...] = (
        ("unet", unet, _UNET_FILE, "UNetSpatioTemporalConditionModel"),
        ("vae", vae, _UNET_FILE, "AutoencoderKLTemporalDecoder"),
        ("image_encoder", image_encoder, _CLIP_FILE, None),
    )
    for name, model, stem, class_name in models:
        config: dict[str, Any] = model.config.model_dump()
        if class_name:
            config["_class_name"] = class_name
        else:
            config |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"]}
        _write_json(folder / name / "config.json", config)
        state = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
        dotted = f".{variant}" if variant else ""
        save_file(state, folder / name / f"{stem}{dotted}.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "scheduler/scheduler_config.json",
        {"_class_name": "EulerDiscreteScheduler", **SVD_SCHEDULER, **scheduler},
    )
    _write_json(
        folder / "feature_extractor/preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            **(feature_extractor or ImageNormalization()).model_dump(by_alias=True),
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
        },
    )
    _write_json(folder / "model_index.json", MODEL_INDEX)
    return folder


def _write_json(path: Path, options: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(options), indent=2) + "\n")
