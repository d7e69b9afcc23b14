"""The architecture of the three networks: their ``config.json`` as typed, checked dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from svdlab.errors import SvdlabError

Config = TypeVar("Config")


def read_config(cls: type[Config], options: Mapping[str, Any], where: str, *, inert: Sequence[str] = ()) -> Config:
    """Make a config dataclass from a diffusers ``config.json``.

    Args:
        cls: the dataclass; lists in the JSON become tuples.
        options: the parsed JSON. Keys that start with ``_`` are bookkeeping (``_class_name``) and are left out.
        where: the file's name, for error messages.
        inert: option names that may be present and change nothing.

    Raises:
        SvdlabError: an option that svdlab does not implement, by name, or a value the config refuses.
    """
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    given = {k: v for k, v in options.items() if not k.startswith("_") and k not in inert}
    if unknown := sorted(set(given) - known):
        raise SvdlabError(f"{where}: option {unknown[0]!r} is not implemented; known: {', '.join(sorted(known))}")
    try:
        return cls(**{k: _tuples(v) for k, v in given.items()})
    except SvdlabError as error:
        raise SvdlabError(f"{where}: {error}") from None


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
        if not isinstance(width, int) or width < 1 or width % groups:
            raise SvdlabError(f"{name}: got {width}, allowed: positive multiples of {groups} (group norm)")


PLAIN_BLOCKS = ("DownBlockSpatioTemporal", "UpBlockSpatioTemporal")
ATTENTION_BLOCKS = ("CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")


@dataclass(frozen=True)
class UNetConfig:
    """``unet/config.json``, with the names and defaults of diffusers' ``UNetSpatioTemporalConditionModel``.

    Options given as one value hold for every level; ``transformer_layers_per_block`` may nest one more level, one
    depth a resnet.
    """

    sample_size: int | None = None
    in_channels: int = 8
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (ATTENTION_BLOCKS[0],) * 3 + (PLAIN_BLOCKS[0],)
    up_block_types: tuple[str, ...] = (PLAIN_BLOCKS[1],) + (ATTENTION_BLOCKS[1],) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 768
    layers_per_block: int | tuple[int, ...] = 2
    cross_attention_dim: int | tuple[int, ...] = 1024
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    num_attention_heads: int | tuple[int, ...] = (5, 10, 20, 20)
    num_frames: int = 25

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        check_groups("block_out_channels", self.block_out_channels)
        for name, known in (("down_block_types", 0), ("up_block_types", 1)):
            for block in per_level(name, getattr(self, name), levels):
                if block not in (allowed := (PLAIN_BLOCKS[known], ATTENTION_BLOCKS[known])):
                    raise SvdlabError(f"{name}: {block!r} is not implemented; allowed: {', '.join(allowed)}")
        heads = per_level("num_attention_heads", self.num_attention_heads, levels)
        for width, count in zip(self.block_out_channels, heads, strict=True):
            if width % count:
                raise SvdlabError(f"num_attention_heads: {count} does not divide block_out_channels' {width}")
        for name in ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block"):
            per_level(name, getattr(self, name), levels)
        if self.projection_class_embeddings_input_dim != 3 * self.addition_time_embed_dim:
            raise SvdlabError(
                f"projection_class_embeddings_input_dim: got {self.projection_class_embeddings_input_dim}, allowed: "
                f"{3 * self.addition_time_embed_dim} (three added time ids of addition_time_embed_dim each)"
            )


@dataclass(frozen=True)
class VAEConfig:
    """``vae/config.json``, with the names and defaults of diffusers' ``AutoencoderKLTemporalDecoder``."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True

    def __post_init__(self) -> None:
        check_groups("block_out_channels", self.block_out_channels)
        if len(self.down_block_types) != len(self.block_out_channels):
            raise SvdlabError(
                f"down_block_types has {len(self.down_block_types)} entries, block_out_channels has "
                f"{len(self.block_out_channels)}: they must agree"
            )
        for block in self.down_block_types:
            if block != "DownEncoderBlock2D":
                raise SvdlabError(f"down_block_types: {block!r} is not implemented; allowed: DownEncoderBlock2D")

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encoder_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the encoder runs in: the published one overflows in float16, and ``force_upcast`` says so."""
        return torch.float32 if dtype == torch.float16 and self.force_upcast else dtype


CLIP_ACTIVATIONS = ("gelu", "quick_gelu")


@dataclass(frozen=True)
class CLIPVisionConfig:
    """What the tower needs of ``image_encoder/config.json``; names and defaults of transformers' config."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in CLIP_ACTIVATIONS:
            raise SvdlabError(
                f"hidden_act: {self.hidden_act!r} is not implemented; allowed: {', '.join(CLIP_ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise SvdlabError(f"num_attention_heads: {self.num_attention_heads} does not divide {self.hidden_size}")


@dataclass(frozen=True)
class Configs:
    """The architecture of the three networks."""

    unet: UNetConfig
    vae: VAEConfig
    image_encoder: CLIPVisionConfig
