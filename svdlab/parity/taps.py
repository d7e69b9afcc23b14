"""Inner taps: which modules' outputs a trace may hold beside the probes, and in which layout.

A tap is named by its module's checkpoint name: ``unet.down_blocks.0.resnets.0.003`` is that module's output
at denoising step 3. Only modules whose outputs mean the same in diffusers and in svdlab are tapped. Three
facts decide what a tap holds, whatever the implementation's own layout is:

- *activation*: (batch, frame, channel, height, width). The VAE encoder has one frame. Calls that treat a part
  of the batch or of the frames (guidance in two passes, a chunked decode) are joined, so that a trace does
  not depend on them.
- *vector*: (batch, channel), one embedding a video.
- *positions*: (frame, channel), the embedded frame numbers, the same for every video and every step.
- *tokens*: as the CLIP tower has them, (batch, token, channel) or (batch, channel).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from svdlab.errors import SvdlabError

MODELS = ("image_encoder", "vae", "unet")

_CONVS = r"norm1|conv1|norm2|conv2|conv_shortcut"
_RESNET = rf"resnets\.\d+(\.(spatial|temporal)_res_block(\.({_CONVS}))?)?"
_LINEARS = r"attn1\.to_[qkv]|attn1\.to_out\.0|ff(_in)?\.net\.[02]"
_TRANSFORMER = (
    r"attentions\.\d+(\.(norm|proj_in|proj_out|time_mixer"
    rf"|(temporal_)?transformer_blocks\.\d+(\.(norm_in|norm1|norm3|{_LINEARS}))?))?"
)
_SAMPLER = r"(down|up)samplers\.\d+"
_UNET_BLOCK = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)"
_VAE_ATTENTION = r"attentions\.\d+(\.(to_[qkv]|to_out\.0))?"

# (what the tap holds, names). The order matters only in that the first match counts.
_LAYOUTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (layout, re.compile(pattern))
    for layout, pattern in (
        ("activation", r"unet\.(conv_in|conv_norm_out|conv_out)"),
        ("activation", rf"unet\.{_UNET_BLOCK}(\.({_RESNET}|{_TRANSFORMER}|{_SAMPLER}))?"),
        ("vector", r"unet\.(time_embedding|add_embedding)"),
        ("vector", rf"unet\.{_UNET_BLOCK}\.resnets\.\d+\.(spatial|temporal)_res_block\.time_emb_proj"),
        ("positions", rf"unet\.{_UNET_BLOCK}\.attentions\.\d+\.time_pos_embed"),
        ("activation", r"vae\.(encoder|decoder)\.(conv_in|conv_norm_out|conv_out)|vae\.quant_conv"),
        (
            "activation",
            rf"vae\.encoder\.(down_blocks\.\d+|mid_block)(\.(resnets\.\d+(\.({_CONVS}))?|{_SAMPLER}))?",
        ),
        ("activation", rf"vae\.(encoder|decoder)\.mid_block\.{_VAE_ATTENTION}"),
        (
            "activation",
            rf"vae\.decoder\.(mid_block|up_blocks\.\d+)\.({_RESNET}|{_SAMPLER})|vae\.decoder\.time_conv_out",
        ),
        ("tokens", r"image_encoder\.visual_projection"),
        ("tokens", r"image_encoder\.vision_model\.(embeddings|pre_layrnorm|encoder|post_layernorm)"),
        ("tokens", r"image_encoder\.vision_model\.embeddings\.patch_embedding"),
        (
            "tokens",
            r"image_encoder\.vision_model\.encoder\.layers\.\d+"
            r"(\.(layer_norm1|layer_norm2|mlp|mlp\.fc1|mlp\.fc2|self_attn|self_attn\.(q|k|v|out)_proj))?",
        ),
    )
)
_ONCE = re.compile(r"unet\.add_embedding|.*\.time_pos_embed")
_INDEXED = re.compile(r"(?P<base>unet\..+)\.(?P<step>\d{3,})")


def layout_of(name: str) -> str | None:
    """What a tapped module's output is, by its name without step; None where it is no tap."""
    return next((layout for layout, pattern in _LAYOUTS if pattern.fullmatch(name)), None)


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


def modules(models: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every tapped module of ``image_encoder``, ``vae`` and ``unet`` under its tap name."""
    for model in MODELS:
        for path, module in models[model].named_modules():
            name = f"{model}.{path}"
            if layout_of(name):
                yield name, module


def select(models: dict[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
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
