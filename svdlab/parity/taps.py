"""Inner taps: which modules' outputs a trace may hold beside the probes, and in which layout.

A tap is named by its module's checkpoint name: ``unet.down_blocks.0.resnets.0.003`` is that module's output
at denoising step 3. Only modules whose outputs mean the same in diffusers and in svdlab are tapped. Three
facts decide what a tap holds, whatever the implementation's own layout is:

- *activation*: (batch, frame, channel, height, width). The VAE encoder has one frame. Calls that treat a part
  of the batch or of the frames (guidance in two passes, a chunked decode) are joined, so that a trace does
  not depend on them.
- *vector*: (batch, channel), one embedding per video; the sinusoids of ``added_time_ids`` are three rows a video.
- *positions*: (frame, channel), the frame numbers' sinusoids and what is made of them, the same for every video
  and every step.
- *tokens*: as the CLIP tower has them, (batch, token, channel) or (batch, channel).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

from torch import Tensor, nn

from svdlab.errors import SvdlabError

MODELS = ("image_encoder", "vae", "unet")

_CONVS = r"norm1|conv1|norm2|conv2|conv_shortcut"
_RESNET = rf"resnets\.[0-9]+(\.(spatial|temporal)_res_block(\.({_CONVS}))?)?"
_LINEARS = r"attn1\.to_[qkv]|attn1\.to_out\.0|ff(_in)?\.net\.[02]"
_TRANSFORMER = (
    r"attentions\.[0-9]+(\.(norm|proj_in|proj_out|time_mixer"
    rf"|(temporal_)?transformer_blocks\.[0-9]+(\.(norm_in|norm1|norm3|{_LINEARS}))?))?"
)
_SAMPLER = r"(down|up)samplers\.[0-9]+"
_UNET_BLOCK = r"(down_blocks\.[0-9]+|mid_block|up_blocks\.[0-9]+)"
_VAE_ATTENTION = r"attentions\.[0-9]+(\.(to_[qkv]|to_out\.0))?"

# (what the tap holds, names). The order matters only in that the first match counts.
_LAYOUTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (layout, re.compile(pattern))
    for layout, pattern in (
        ("activation", r"unet\.(conv_in|conv_norm_out|conv_out)"),
        ("activation", rf"unet\.{_UNET_BLOCK}(\.({_RESNET}|{_TRANSFORMER}|{_SAMPLER}))?"),
        ("vector", r"unet\.(time_embedding|time_proj|add_embedding|add_time_proj)"),
        ("vector", rf"unet\.{_UNET_BLOCK}\.resnets\.[0-9]+\.(spatial|temporal)_res_block\.time_emb_proj"),
        ("positions", rf"unet\.{_UNET_BLOCK}\.attentions\.[0-9]+\.time_(proj|pos_embed)"),
        ("activation", r"vae\.(encoder|decoder)\.(conv_in|conv_norm_out|conv_out)|vae\.quant_conv"),
        (
            "activation",
            rf"vae\.encoder\.(down_blocks\.[0-9]+|mid_block)(\.(resnets\.[0-9]+(\.({_CONVS}))?|{_SAMPLER}))?",
        ),
        ("activation", rf"vae\.(encoder|decoder)\.mid_block\.{_VAE_ATTENTION}"),
        (
            "activation",
            rf"vae\.decoder\.(mid_block|up_blocks\.[0-9]+)\.({_RESNET}|{_SAMPLER})|vae\.decoder\.time_conv_out",
        ),
        ("tokens", r"image_encoder\.visual_projection"),
        ("tokens", r"image_encoder\.vision_model\.(embeddings|pre_layrnorm|encoder|post_layernorm)"),
        ("tokens", r"image_encoder\.vision_model\.embeddings\.patch_embedding"),
        (
            "tokens",
            r"image_encoder\.vision_model\.encoder\.layers\.[0-9]+"
            r"(\.(layer_norm1|layer_norm2|mlp|mlp\.fc1|mlp\.fc2|self_attn|self_attn\.(q|k|v|out)_proj))?",
        ),
    )
)
_ONCE = re.compile(r"unet\.add_(embedding|time_proj)|.*\.attentions\.[0-9]+\.time_(proj|pos_embed)")
_INDEXED = re.compile(r"(?P<base>unet\..+)\.(?P<step>[0-9]{3}|[1-9][0-9]{3,8})")


@lru_cache(maxsize=8192)
def layout_of(name: str) -> str | None:
    """What a tapped module's output is, by its name without step; None where it is no tap."""
    return next((layout for layout, pattern in _LAYOUTS if pattern.fullmatch(name)), None)


def shape_of(name: str) -> tuple[int | str, ...] | None:
    """The shape of a tap without step: "F" for the number of frames, "*" for any size; None where any shape will do."""
    frames: int | str = 1 if name.startswith(("vae.encoder", "vae.quant")) else "F"
    shapes = {"activation": ("*", frames, "*", "*", "*"), "vector": ("*", "*"), "positions": ("F", "*")}
    return shapes.get(layout_of(name) or "")


def is_per_step(name: str) -> bool:
    """Whether the module runs at every denoising step: its tap carries the step's number."""
    return name.startswith("unet.") and not _ONCE.fullmatch(name)


def split(name: str) -> tuple[str, int | None] | None:
    """A tap's module name and step (None where the tap has none), or None where ``name`` is no tap."""
    if layout_of(name) and not is_per_step(name):
        return name, None
    match = _INDEXED.fullmatch(name)
    if match and layout_of(match["base"]) and is_per_step(match["base"]):
        return match["base"], int(match["step"])
    return None


def modules(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every tapped module of ``image_encoder``, ``vae`` and ``unet``, those that are given, under its tap name."""
    for model in (name for name in MODELS if name in models):
        for path, module in models[model].named_modules():
            name = f"{model}.{path}"
            if layout_of(name):
                yield name, module


def select(models: Mapping[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The tapped modules that any of the shell-style ``patterns`` names (``*`` matches dots, too).

    Raises:
        SvdlabError: a pattern that names no module.
    """
    tapped = dict(modules(models))
    chosen: set[str] = set()
    for pattern in patterns:
        names = {name for name in tapped if fnmatchcase(name, pattern)}
        if not names:
            near = get_close_matches(pattern, list(tapped), n=1, cutoff=0.0)
            raise SvdlabError(f"taps: {pattern!r} names no module, allowed: patterns such as {near[0]!r} or 'unet.*'")
        chosen |= names
    return {name: module for name, module in tapped.items() if name in chosen}


def first_tensor(output: object) -> Tensor:
    """A module's main output: the tensor itself, or the first one of a tuple or of a model-output mapping."""
    while not isinstance(output, Tensor):
        items: Iterable = output.values() if hasattr(output, "values") else output  # type: ignore[assignment]
        output = next(iter(items))
    return output


def from_svdlab(name: str, tensor: Tensor) -> Tensor:
    """svdlab's output of a tapped module in the layout of a trace; activations there have their channels last."""
    return tensor.permute(0, 1, 4, 2, 3) if layout_of(name) == "activation" else tensor


def from_diffusers(name: str, tensor: Tensor, frames: int, size: tuple[int, int] | None = None) -> Tensor:
    """diffusers' output of a tapped module in the layout of a trace.

    Args:
        name: the tap, without step.
        tensor: what the module returned, in one of diffusers' layouts.
        frames: that the module treats as one video.
        size: height and width, for modules inside :func:`attention_block`, which flattens them.
    """
    layout = layout_of(name)
    if layout == "vector":  # (B, C), (B, F, C), or (B*F, C) where diffusers repeats it over the frames
        if tensor.ndim == 3:
            return tensor[:, 0]
        return tensor[::frames] if name.endswith("time_emb_proj") else tensor
    if layout == "positions":  # repeated for every video
        return tensor[:frames]
    if layout == "tokens":
        return tensor
    if tensor.ndim == 5:  # (B, C, F, H, W)
        return tensor.permute(0, 2, 1, 3, 4)
    if tensor.ndim == 4:  # (B*F, C, H, W)
        return tensor.unflatten(0, (-1, frames))
    assert size is not None
    inside_temporal = "temporal_transformer_blocks" in name and not name.split(".")[-2] == "temporal_transformer_blocks"
    if inside_temporal:  # (B*H*W, F, C)
        return tensor.unflatten(0, (-1, *size)).permute(0, 3, 4, 1, 2)
    return tensor.unflatten(1, size).unflatten(0, (-1, frames)).permute(0, 1, 4, 2, 3)  # (B*F, H*W, C)


def attention_block(name: str) -> str | None:
    """The path of the transformer or attention block that a module lies in, which knows height and width."""
    parts = name.split(".")
    if "attentions" not in parts:
        return None
    return ".".join(parts[1 : parts.index("attentions") + 2])
