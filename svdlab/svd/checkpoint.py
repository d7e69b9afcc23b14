"""A checkpoint to modules: every key and shape checked, safetensors only.

A folder in diffusers' format holds ``model_index.json``, ``unet/``, ``vae/``, ``image_encoder/``, ``scheduler/`` and
``feature_extractor/``; ``single_file`` reads what holds all weights in one. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svdlab.errors import SvdlabError, short
from svdlab.files import atomic_path
from svdlab.reading import read_as, read_json
from svdlab.svd.architectures import ARCHITECTURES, SVD_SCHEDULER
from svdlab.svd.config import CLIPVisionConfig, Config, Configs, UNetConfig, VAEConfig, per_level, read_config
from svdlab.svd.image_encoder import CLIPVision
from svdlab.svd.kernels import use_kernels
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.single_file import FLOATS, Options, SingleFile
from svdlab.svd.unet import UNet
from svdlab.svd.vae import VAE
from svdlab.svd.workloads import NETWORKS
from svdlab.tensors import Entry, Kind, TensorFile, Tensors, check_entries

EMBEDDED = "embedded"
_HUB_FILE = re.compile(
    r"(?:https://huggingface\.co/(?=[^/]+/[^/]+/(?:blob|resolve)/))?(?P<repo>[\w.-]+/[\w.-]+)/"
    r"(?:(?:blob|resolve)/(?P<revision>[\w.-]+)/)?(?P<file>(?:[\w.-]+/)*[\w.-]+\.safetensors)"
)
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
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "image_encoder": "model"}


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
_FLOATS = (*FLOATS, "F8_E4M3", "F8_E5M2")


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
    num_frames = settings.num_frames or unet.num_frames
    if num_frames is None:
        raise SvdlabError(
            "num_frames: got none, and the single file does not say it; allowed: 14 for SVD, 25 for SVD-XT"
        )
    resolved = settings.replace(height=settings.height or height, width=settings.width or width, num_frames=num_frames)
    for name in ("height", "width"):
        if (value := getattr(resolved, name)) % factor:
            raise SvdlabError(f"{name}: got {value}, allowed: multiples of {factor} (this checkpoint's VAE)")
    return resolved


class Folder:
    """A checkpoint in diffusers' folder format, open: every option, name, shape and dtype checked, no weight read.

    Args:
        path: the folder.
        variant: "fp16" is of ``*.fp16.safetensors``.

    Attributes:
        configs: of the three networks.
        scheduler: what ``scheduler_config.json`` holds.
        feature_extractor: what ``preprocessor_config.json`` holds of image_mean and image_std.
        weights: of each network.

    Raises:
        SvdlabError: an option svdlab does not implement, a missing, extra or misshapen weight, a damaged file.
    """

    def __init__(self, path: Path, variant: str | None = None):
        self.configs = _read_configs(path)
        self.scheduler, where = _read_json(path, "scheduler/scheduler_config.json")
        EulerScheduler.from_config(self.scheduler, where)
        held, where = _read_json(path, "feature_extractor/preprocessor_config.json")
        self.feature_extractor = _normalization(held, where).model_dump(by_alias=True, mode="json")
        self.weights = open_weights(path, variant)
        for name, make in NETWORKS.items():
            with torch.device("meta"):
                shapes = {key: tuple(t.shape) for key, t in make(getattr(self.configs, name)).state_dict().items()}
            check_entries(str(path / name), self.weights[name].entries, shapes, _INERT_KEYS, FLOATS)


def load_components(
    checkpoint: str | Path = EMBEDDED,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    revision: str | None = None,
) -> Components:
    """Load a checkpoint.

    Args:
        checkpoint: as ``checkpoint_path`` takes it.
        dtype: of all weights.
        device: where they go.
        variant: ``"fp16"`` reads ``*.fp16.safetensors``.
        revision: branch, tag or commit on the hub.

    Raises:
        SvdlabError: no such checkpoint, an option svdlab does not implement, a missing, extra or misshapen weight, a
            damaged file. Configs of all components are checked before any weight is read.
    """
    path = checkpoint_path(checkpoint, variant, revision)
    if path.is_file():
        return load_single_file(path, dtype, device)
    scheduler = EulerScheduler.from_config(*_read_json(path, "scheduler/scheduler_config.json"))
    configs = _read_configs(path)
    normalization = _normalization(*_read_json(path, "feature_extractor/preprocessor_config.json"))
    networks: dict[str, Any] = {
        name: _load(NETWORKS[name], getattr(configs, name), path / name, stem, variant, dtype, torch.device(device))
        for name, stem in _STEMS.items()
    }
    return Components(**networks, scheduler=scheduler, feature_extractor=normalization)


def load_single_file(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    options: Options = MappingProxyType({}),
) -> Components:
    """Load a checkpoint in one file, weight by weight: there is no second copy of it in memory.

    Args:
        path: the file.
        dtype: of all weights.
        device: where they go.
        options: what its weights do not say, see ``single_file.SingleFile``.

    Raises:
        SvdlabError: as ``SingleFile``; options that do not belong together.
    """
    file, device = SingleFile(path, options), torch.device(device)
    check_together(str(path), file.configs)
    scheduler = EulerScheduler.from_config(file.scheduler, f"{path}: scheduler")
    normalization = read_config(ImageNormalization, file.feature_extractor, f"{path}: feature_extractor")
    networks: dict[str, Any] = {}
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            module = make(getattr(file.configs, name))
        weights = file.weights[name]
        state = {}
        for key, entry in weights.entries.items():
            # Where only shapes are asked for, gigabytes need not be read.
            weight = torch.empty(entry.shape, device="meta") if device.type == "meta" else weights.read(key)
            state[key] = weight.to(device=device, dtype=dtype)
        networks[name] = _for_inference(module, state, device)
    return Components(**networks, scheduler=scheduler, feature_extractor=normalization)


def load_configs(model: str | Path, revision: str | None = None) -> Configs:
    """The architecture of a checkpoint, without its weights.

    Args:
        model: a name of ``ARCHITECTURES``, or what ``checkpoint_path`` takes.
        revision: branch, tag or commit on the hub.

    Raises:
        SvdlabError: as ``load_components``.
    """
    if str(model) in ARCHITECTURES:
        return ARCHITECTURES[str(model)]
    path = checkpoint_path(model, revision=revision, weights=False)
    return SingleFile(path).configs if path.is_file() else _read_configs(path)


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


def checkpoint_path(
    checkpoint: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    weights: bool = True,
    **hub: Any,
) -> Path:
    """Where a checkpoint is on this machine, downloaded from the hub when it is not.

    Args:
        checkpoint: "embedded"; a folder in diffusers' format or its name on the hub, owner/name; a single file in the
            original naming, or its name on the hub, owner/name/FILE.safetensors or
            https://huggingface.co/owner/name/resolve/main/FILE.safetensors.
        variant: of a folder's files.
        revision: branch, tag or commit on the hub, over the one in an address.
        weights: False leaves them out of a folder's download.
        hub: further options of ``huggingface_hub.snapshot_download`` and ``hf_hub_download``.

    Returns:
        A folder, or a single file.

    Raises:
        SvdlabError: neither on this machine nor to be had from the hub, a folder that is no checkpoint, a variant of a
            single file, or a revision of the embedded checkpoint.
    """
    if str(checkpoint) == EMBEDDED:
        if revision is not None:
            raise SvdlabError(
                f"revision: got {short(revision)}, allowed: none with {EMBEDDED}, which is not on the hub"
            )
        return Path(__file__).parent.parent / "checkpoint"
    path = Path(checkpoint).expanduser()
    if not path.is_dir() and not path.is_file():
        if match := _HUB_FILE.fullmatch(str(checkpoint)):
            path = _download_file(match["repo"], match["file"], revision=revision or match["revision"], **hub)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
            path = _download(str(checkpoint), variant, weights, revision=revision, **hub)
        else:
            raise SvdlabError(
                f"model: {str(checkpoint)!r} is no folder, allowed: a folder, owner/name, {EMBEDDED}, a single file, "
                "owner/name/FILE.safetensors"
            )
    if path.is_file() and variant is not None:
        raise SvdlabError(f"variant: got {short(variant)} with the single file {path}, allowed: only with a folder")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise SvdlabError(f"model: {path} is no diffusers checkpoint: model_index.json is missing")
    return path


def checkpoint_files(path: Path, variant: str | None = None) -> list[Path]:
    """Every file that loading a checkpoint reads: configs, then weights; or the single file.

    Raises:
        SvdlabError: a component without weights.
    """
    if path.is_file():
        return [path]
    configs = [path / name / "config.json" for name in _STEMS]
    configs += [path / "scheduler/scheduler_config.json", path / "feature_extractor/preprocessor_config.json"]
    return configs + [file for name in _STEMS for file in _weight_files(path / name, _STEMS[name], variant)]


def open_weights(path: Path, variant: str | None = None) -> Mapping[str, Tensors]:
    """The weights of each network as stored, by their names in a folder, whether it is a folder or a single file.

    Raises:
        SvdlabError: a network without weights, or a file that is no whole safetensors file.
    """
    if path.is_file():
        return SingleFile(path).weights
    return {name: _Shards(path / name, _weight_files(path / name, stem, variant)) for name, stem in _STEMS.items()}


class _Shards:
    """A network's weights in a folder: ``tensors.Tensors``."""

    def __init__(self, folder: Path, files: Sequence[Path]):
        self._holders: dict[str, TensorFile] = {}
        for path in files:
            file = TensorFile(path)
            if twice := sorted(self._holders.keys() & file.entries.keys()):
                raise SvdlabError(f"{path}: weight {short(twice[0])} is in another file of {folder}, too")
            self._holders |= dict.fromkeys(file.entries, file)
        self.entries: Mapping[str, Entry] = {name: file.entries[name] for name, file in self._holders.items()}

    def read(self, name: str) -> Tensor:
        return self._holders[name].read(name)

    def parts(self, name: str) -> Iterator[bytes]:
        return self._holders[name].parts(name)


def _download_file(repo: str, file: str, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub(f"{repo}/{file}", "file"):
        return Path(hf_hub_download(repo, file, **hub))


def _download(repo: str, variant: str | None, weights: bool, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download

    suffix = f".{variant}" if variant else ""
    tensors = [f"*/*{suffix}.safetensors", f"*/*{suffix}-*.safetensors"] if weights else []
    with _hub(repo, "folder"):
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*/*.json", *tensors], **hub))


@contextmanager
def _hub(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client raises a dozen types: no network, no such name, gated, bad token
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SvdlabError(f"model: {name!r} is no {kind} and the hub did not give it: {reason}") from None


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
    make: Callable[[Any], nn.Module],
    config: Any,
    folder: Path,
    stem: str,
    variant: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    with torch.device("meta"):
        module = make(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    files = _weight_files(folder, stem, variant)
    found: dict[str, Kind] = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                if key in found:
                    raise SvdlabError(f"{path}: weight {short(key)} is in another file of {folder}, too")
                part = file.get_slice(key)
                found[key] = Kind(part.get_dtype(), tuple(part.get_shape()))
    where = str(files[0] if len(files) == 1 else folder)
    check_entries(where, found, wanted, _INERT_KEYS, _FLOATS)
    state: dict[str, Tensor] = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in wanted.keys() & set(file.keys()):
                state[key] = file.get_tensor(key).to(device=device, dtype=dtype)
    return _for_inference(module, state, device)


def _for_inference(module: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
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
    models: dict[str, Any] = {"unet": unet, "vae": vae, "image_encoder": image_encoder}
    configs = Configs(**{name: model.config for name, model in models.items()})
    statistics = (feature_extractor or ImageNormalization()).model_dump(by_alias=True)
    write_configs(folder, configs, {**SVD_SCHEDULER, **scheduler}, statistics)
    for name, model in models.items():
        state = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
        with atomic_path(weights_path(folder, name, variant)) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
    return folder


def weights_path(folder: Path, network: str, variant: str | None = None) -> Path:
    """Where a network's weights are in a folder, if they are in one file."""
    return folder / network / f"{_STEMS[network]}{f'.{variant}' if variant else ''}.safetensors"


def write_configs(
    folder: Path, configs: Configs, scheduler: Mapping[str, Any], feature_extractor: Mapping[str, Any]
) -> None:
    """Write all of a checkpoint in diffusers' folder format but the weights.

    Args:
        folder: made if needed.
        configs: of the networks.
        scheduler, feature_extractor: as ``Folder`` has them.
    """
    classes: dict[str, dict[str, Any]] = {
        "unet": {"_class_name": "UNetSpatioTemporalConditionModel"},
        "vae": {"_class_name": "AutoencoderKLTemporalDecoder"},
        "image_encoder": {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"]},
    }
    for name, about_class in classes.items():
        _write_json(folder / name / "config.json", {**getattr(configs, name).model_dump(), **about_class})
    _write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler", **scheduler})
    _write_json(
        folder / "feature_extractor/preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            **feature_extractor,
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
        },
    )
    _write_json(folder / "model_index.json", MODEL_INDEX)


def _write_json(path: Path, options: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(options), indent=2) + "\n")
