"""A checkpoint in diffusers' folder format to modules: every key and shape checked, safetensors only.

A folder holds ``model_index.json``, ``unet/``, ``vae/``, ``image_encoder/``, ``scheduler/`` and
``feature_extractor/``. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.svd.architectures import ARCHITECTURES, SVD_SCHEDULER
from svdlab.svd.config import CLIPVisionConfig, Configs, UNetConfig, VAEConfig, read_config
from svdlab.svd.image_encoder import CLIPVision
from svdlab.svd.kernels import use_kernels
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.unet import UNet
from svdlab.svd.vae import VAE

EMBEDDED = "embedded"
# Saved by old versions of transformers; a constant.
_INERT_KEYS = {"vision_model.embeddings.position_ids"}
_UNET_FILE, _CLIP_FILE = "diffusion_pytorch_model", "model"


@dataclass(frozen=True)
class ImageNormalization:
    """CLIP's channel statistics, from ``feature_extractor/preprocessor_config.json``: three values each."""

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


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
    try:
        normalization = ImageNormalization(tuple(statistics["image_mean"]), tuple(statistics["image_std"]))
    except KeyError as error:
        raise SvdlabError(f"{where}: {error} is missing") from None

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


def _read_configs(folder: Path) -> Configs:
    unet = _config(folder, "unet/config.json", UNetConfig)
    vae = _config(folder, "vae/config.json", VAEConfig)
    clip_options, clip_where = _read_json(folder, "image_encoder/config.json")
    known = {f.name for f in fields(CLIPVisionConfig)}
    clip = read_config(CLIPVisionConfig, {k: v for k, v in clip_options.items() if k in known}, clip_where)
    if unet.in_channels != 2 * unet.out_channels or unet.out_channels != vae.latent_channels:
        raise SvdlabError(
            f"{folder}: unet in_channels {unet.in_channels}, out_channels {unet.out_channels} and vae latent_channels "
            f"{vae.latent_channels} do not belong together (in = 2 * out, out = latent)"
        )
    return Configs(unet, vae, clip)


def checkpoint_folder(
    repo_or_folder: str | Path, variant: str | None = None, revision: str | None = None, weights: bool = True
) -> Path:
    """The local folder of a checkpoint, downloaded from the hub (with its weights or without) when it is not one.

    Raises:
        SvdlabError: neither a folder nor a repository that can be reached, or a folder that is no checkpoint.
    """
    if str(repo_or_folder) == EMBEDDED:
        return Path(__file__).parent.parent / "checkpoint"
    folder = Path(repo_or_folder).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(repo_or_folder)):
            raise SvdlabError(f"model: {str(repo_or_folder)!r} is no folder, allowed: a folder, owner/name, embedded")
        folder = _download(str(repo_or_folder), variant, revision, weights)
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


def _download(repo: str, variant: str | None, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    suffix = f".{variant}" if variant else ""
    tensors = [f"*/*{suffix}.safetensors", f"*/*{suffix}-*.safetensors"] if weights else []
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=["*.json", "*/*.json", *tensors]))
    except Exception as error:  # the hub client raises a dozen types: no network, no such name, gated, bad token
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SvdlabError(f"model: {repo!r} is no folder and the hub did not give it: {reason}") from None


def _read_json(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    path = folder / name
    try:
        options = json.loads(path.read_text())
    except FileNotFoundError:
        raise SvdlabError(f"{path}: missing; a checkpoint needs it") from None
    except (ValueError, OSError) as error:
        raise SvdlabError(f"{path}: not readable as JSON: {str(error).splitlines()[0]}") from None
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
            options, where = _read_json(folder, index.name)
            names = sorted(set(options.get("weight_map", {}).values()))
            if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
                raise SvdlabError(f"{where}: weight_map must name the shards beside it")
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
    for path in files:
        with _open(path) as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    where = str(files[0] if len(files) == 1 else folder)
    if missing := sorted(wanted.keys() - found.keys()):
        raise SvdlabError(f"{where}: weight {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := sorted(found.keys() - wanted.keys() - _INERT_KEYS):
        raise SvdlabError(f"{where}: weight {extra[0]!r} has no place in this architecture ({len(extra)} in all)")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise SvdlabError(f"{where}: weight {key!r} has shape {found[key]}, the config wants {shape}")
    state: dict[str, Tensor] = {}
    for path in files:
        with _open(path) as file:
            for key in wanted.keys() & set(file.keys()):
                state[key] = file.get_tensor(key).to(device=device, dtype=dtype)
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
    return use_kernels(module if device.type == "cpu" else channels_last(module))


class _open:  # noqa: N801 - used as a function
    """``safe_open`` whose failures are one line that names the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Any:
        try:
            self.file = safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise SvdlabError(f"{self.path}: not a readable safetensors file: {str(error).splitlines()[0]}") from None
        return self.file.__enter__()

    def __exit__(self, *exception: object) -> None:
        self.file.__exit__(*exception)


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
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write modules as a checkpoint in diffusers' folder format, which diffusers and svdlab load alike.

    Args:
        folder: made if needed.
        unet, vae, image_encoder: their weights and configs.
        scheduler: options over ``SVD_SCHEDULER``.
        dtype: of the weights in the files.
    """
    folder = Path(folder)
    models: tuple[tuple[str, Any, str, str | None], ...] = (
        ("unet", unet, _UNET_FILE, "UNetSpatioTemporalConditionModel"),
        ("vae", vae, _UNET_FILE, "AutoencoderKLTemporalDecoder"),
        ("image_encoder", image_encoder, _CLIP_FILE, None),
    )
    for name, model, stem, class_name in models:
        config: dict[str, Any] = asdict(model.config)
        if class_name:
            config["_class_name"] = class_name
        else:
            config |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"]}
        _write_json(folder / name / "config.json", config)
        state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "scheduler/scheduler_config.json",
        {"_class_name": "EulerDiscreteScheduler", **SVD_SCHEDULER, **scheduler},
    )
    normalization = ImageNormalization()
    _write_json(
        folder / "feature_extractor/preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "image_mean": normalization.mean,
            "image_std": normalization.std,
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
        },
    )
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableVideoDiffusionPipeline",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
            "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
        },
    )
    return folder


def _write_json(path: Path, options: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options, indent=2) + "\n")
