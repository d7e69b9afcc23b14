"""The architecture of the three networks: their ``config.json`` as typed, bounded models."""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from svdlab.errors import SvdlabError, about, short
from svdlab.reading import Document, first_problem
from svdlab.svd.settings import MAX_FRAMES

if TYPE_CHECKING:
    import torch

# Far above any published network's, and so small that to lay out what they allow takes seconds.
_MAX_WIDTH, _MAX_LEVELS, _MAX_LAYERS, _MAX_TRANSFORMERS, _MAX_SIDE = 2**16, 8, 16, 512, 2**14

Width = Annotated[int, Field(ge=1, le=_MAX_WIDTH)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=_MAX_LEVELS)]
Layers = Annotated[int, Field(ge=1, le=_MAX_LAYERS)]
Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]


Checked = TypeVar("Checked", bound="Config")


class Options(dict[str, Any]):
    """A dict whose values are attributes, too, as in diffusers' configs (``configuration_utils.py:FrozenDict``)."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Config(Document):
    """Options of one part of a checkpoint, checked when made.

    Raises:
        SvdlabError: an option that is not known, or a value of another type or out of bounds, in one line.
    """

    def __init__(self, **options: Any):
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise SvdlabError(self._problem(error)) from None

    @classmethod
    def _problem(cls, error: ValidationError) -> str:
        """Where an option takes a value of several types, pydantic speaks of each; its description says it at once."""
        first = error.errors(include_url=False)[0]
        field = cls.model_fields.get(str(first["loc"][0])) if first["loc"] else None
        if field is None or field.description is None:
            return first_problem(error)
        return f"{first['loc'][0]}: got {short(first['input'])}, allowed: {field.description}"

    def replace(self: Checked, **changes: Any) -> Checked:
        """The same options with some changed, checked again."""
        return type(self)(**{**self.model_dump(), **changes})

    # Also by name, as diffusers' configs.
    def keys(self) -> KeysView[str]:
        """The options' names, as for ``dict(config)``."""
        return type(self).model_fields.keys()

    def items(self) -> list[tuple[str, Any]]:
        """The options' names and values."""
        return [(name, self[name]) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """An option's value, or ``default`` where there is no such option."""
        return self[name] if name in self else default

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(self.keys())


def read_config(cls: type[Checked], options: Mapping[str, Any], where: str, *, inert: Sequence[str] = ()) -> Checked:
    """Make a config from a diffusers ``config.json``.

    Args:
        cls: which one; lists in the JSON become tuples.
        options: the parsed JSON. Keys that start with ``_`` are bookkeeping (``_class_name``) and are left out.
        where: the file's name, for error messages.
        inert: option names that may be present and change nothing.

    Raises:
        SvdlabError: an option that svdlab does not implement, by name, or a value the config refuses.
    """
    given = {k: v for k, v in options.items() if not k.startswith("_") and k not in inert}
    known = {field.alias or name for name, field in cls.model_fields.items()}
    if unknown := sorted(given.keys() - known):
        raise SvdlabError(f"{where}: option {short(unknown[0])} is not implemented; known: {', '.join(sorted(known))}")
    with about(where):
        return cls(**{k: _tuples(v) for k, v in given.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def per_level(name: str, value: Any, levels: int) -> tuple[Any, ...]:
    """Spread an option that diffusers takes as one value or one value a level.

    Raises:
        SvdlabError: a sequence of another length than ``levels``.
    """
    if not isinstance(value, (tuple, list)):
        return (value,) * levels
    if len(value) != levels:
        raise SvdlabError(f"{name} has {len(value)} entries, block_out_channels has {levels}: they must agree")
    return tuple(value)


def check_groups(name: str, channels: Sequence[int], groups: int = 32) -> None:
    """Every normalised width must be a positive multiple of the number of groups.

    Raises:
        SvdlabError: one is not.
    """
    for width in channels:
        if width % groups:
            raise SvdlabError(f"{name}: got {width}, allowed: positive multiples of {groups} (group norm)")


def _of_levels(most: int, more: str = "") -> Any:
    return Field(description=f"an integer from 1 to {most}, or a list with one for each level{', ' * bool(more)}{more}")


PLAIN_BLOCKS = ("DownBlockSpatioTemporal", "UpBlockSpatioTemporal")
ATTENTION_BLOCKS = ("CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")


class UNetConfig(Config):
    """``unet/config.json``, with the names and defaults of diffusers' ``UNetSpatioTemporalConditionModel``.

    Options given as one value hold for every level; ``transformer_layers_per_block`` may nest one more level, one
    depth a resnet.
    """

    sample_size: Side | None = None
    in_channels: Width = 8
    out_channels: Width = 4
    down_block_types: tuple[str, ...] = (ATTENTION_BLOCKS[0],) * 3 + (PLAIN_BLOCKS[0],)
    up_block_types: tuple[str, ...] = (PLAIN_BLOCKS[1],) + (ATTENTION_BLOCKS[1],) * 3
    block_out_channels: Widths = (320, 640, 1280, 1280)
    addition_time_embed_dim: Annotated[Width, Field(multiple_of=2)] = 256
    projection_class_embeddings_input_dim: int = 768
    layers_per_block: Annotated[Layers | tuple[Layers, ...], _of_levels(_MAX_LAYERS)] = 2
    cross_attention_dim: Annotated[Width | tuple[Width, ...], _of_levels(_MAX_WIDTH)] = 1024
    transformer_layers_per_block: Annotated[
        Layers | tuple[Layers | tuple[Layers, ...], ...], _of_levels(_MAX_LAYERS, "or one for each resnet of each")
    ] = 1
    num_attention_heads: Annotated[Width | tuple[Width, ...], _of_levels(_MAX_WIDTH)] = (5, 10, 20, 20)
    # None where a single file does not say it: then whoever generates does.
    num_frames: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None = 25

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        levels = len(self.block_out_channels)
        check_groups("block_out_channels", self.block_out_channels)
        for name, known in (("down_block_types", 0), ("up_block_types", 1)):
            for block in per_level(name, getattr(self, name), levels):
                if block not in (allowed := (PLAIN_BLOCKS[known], ATTENTION_BLOCKS[known])):
                    raise SvdlabError(f"{name}: {short(block)} is not implemented; allowed: {', '.join(allowed)}")
        heads = per_level("num_attention_heads", self.num_attention_heads, levels)
        for width, count in zip(self.block_out_channels, heads, strict=True):
            if width % count:
                raise SvdlabError(f"num_attention_heads: {count} does not divide block_out_channels' {width}")
        per_level("cross_attention_dim", self.cross_attention_dim, levels)
        layers = per_level("layers_per_block", self.layers_per_block, levels)
        depths = per_level("transformer_layers_per_block", self.transformer_layers_per_block, levels)
        transformers = 0
        for count, depth in zip(layers, depths, strict=True):
            # A level's way up has one resnet more than its way down.
            if isinstance(depth, tuple) and len(depth) <= count:
                raise SvdlabError(
                    f"transformer_layers_per_block: got {len(depth)} depths for a level, allowed: at least "
                    f"{count + 1}, one more than layers_per_block"
                )
            transformers += sum(depth) if isinstance(depth, tuple) else depth * (2 * count + 1)
        if transformers > _MAX_TRANSFORMERS:
            raise SvdlabError(
                f"transformer_layers_per_block: makes {transformers} transformer layers with layers_per_block, "
                f"allowed: at most {_MAX_TRANSFORMERS}"
            )
        if self.projection_class_embeddings_input_dim != 3 * self.addition_time_embed_dim:
            raise SvdlabError(
                f"projection_class_embeddings_input_dim: got {self.projection_class_embeddings_input_dim}, allowed: "
                f"{3 * self.addition_time_embed_dim} (three added time ids of addition_time_embed_dim each)"
            )
        return self


class VAEConfig(Config):
    """``vae/config.json``, with the names and defaults of diffusers' ``AutoencoderKLTemporalDecoder``."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    block_out_channels: Widths = (64,)
    layers_per_block: Layers = 1
    latent_channels: Width = 4
    sample_size: Side = 32
    scaling_factor: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.18215
    force_upcast: bool = True

    @model_validator(mode="after")
    def _check(self) -> VAEConfig:
        check_groups("block_out_channels", self.block_out_channels)
        if len(self.down_block_types) != len(self.block_out_channels):
            raise SvdlabError(
                f"down_block_types has {len(self.down_block_types)} entries, block_out_channels has "
                f"{len(self.block_out_channels)}: they must agree"
            )
        for block in self.down_block_types:
            if block != "DownEncoderBlock2D":
                raise SvdlabError(f"down_block_types: {short(block)} is not implemented; allowed: DownEncoderBlock2D")
        return self

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encoder_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the encoder runs in: the published one overflows in float16, and ``force_upcast`` says so."""
        import torch  # here: --help needs the published architectures' names and no torch

        return torch.float32 if dtype == torch.float16 and self.force_upcast else dtype


CLIP_ACTIVATIONS = ("gelu", "quick_gelu")


class CLIPVisionConfig(Config):
    """What the tower needs of ``image_encoder/config.json``; names and defaults of transformers' config."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    projection_dim: Width = 512
    num_hidden_layers: Annotated[int, Field(ge=1, le=128)] = 12
    num_attention_heads: Width = 12
    num_channels: Literal[3] = 3
    image_size: Annotated[int, Field(ge=1, le=2048)] = 224
    patch_size: Annotated[int, Field(ge=1, le=2048)] = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5

    @model_validator(mode="after")
    def _check(self) -> CLIPVisionConfig:
        if self.hidden_act not in CLIP_ACTIVATIONS:
            raise SvdlabError(
                f"hidden_act: {short(self.hidden_act)} is not implemented; allowed: {', '.join(CLIP_ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise SvdlabError(f"num_attention_heads: {self.num_attention_heads} does not divide {self.hidden_size}")
        if self.patch_size > self.image_size:
            raise SvdlabError(f"patch_size: got {self.patch_size}, allowed: at most image_size, {self.image_size}")
        return self


@dataclass(frozen=True)
class Configs:
    """The architecture of the three networks."""

    unet: UNetConfig
    vae: VAEConfig
    image_encoder: CLIPVisionConfig


# What reads each network's ``config.json``.
CONFIGS: Mapping[str, type[Config]] = {"unet": UNetConfig, "vae": VAEConfig, "image_encoder": CLIPVisionConfig}
