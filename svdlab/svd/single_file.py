"""A checkpoint in one file, in the naming of the code that the model was trained with: the rules to a folder and back.

``svd.safetensors``, ``svd_xt.safetensors`` and ``svd_xt_1_1.safetensors`` are such files. Source of the names:
Stability-AI/generative-models, ``configs/inference/svd.yaml`` and the modules that it names (``VideoUNet``,
``VideoDecoder``, ``FrozenOpenCLIPImageEmbedder``); of the folder's: diffusers and transformers.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from svdlab.errors import SvdlabError, about, short
from svdlab.reading import parse
from svdlab.svd.architectures import ARCHITECTURES, SVD_SCHEDULER
from svdlab.svd.config import (
    ATTENTION_BLOCKS,
    CONFIGS,
    PLAIN_BLOCKS,
    Configs,
    per_level,
    read_config,
)
from svdlab.svd.workloads import NETWORKS
from svdlab.tensors import Entry, Kind, TensorFile, Tensors, bytes_of, check_entries, write_tensors

# What a weight may be stored in.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Form:
    """How a weight lies in the single file.

    Attributes:
        read: the folder's weight from the file's.
        write: the file's weight from the folder's, of which several may make one.
        part: which one of several.
    """

    read: Callable[[Tensor], Tensor]
    write: Callable[[Sequence[Tensor]], Tensor]
    part: int = 0


def _third(n: int) -> Form:
    return Form(lambda held: held.chunk(3)[n].clone(), lambda parts: torch.cat(list(parts)), n)


SAME = Form(lambda held: held, lambda parts: parts[0])
# A linear layer as a convolution of one pixel; its bias is the same.
CONVOLUTION = Form(
    lambda held: held.reshape(held.shape[:2]),
    lambda parts: parts[0][..., None, None] if parts[0].ndim == 2 else parts[0],
)
TRANSPOSED = Form(lambda held: held.T.contiguous(), lambda parts: parts[0].T.contiguous())
# Of the one product that makes queries, keys and values.
QUERY, KEY, VALUE = map(_third, range(3))


@dataclass(frozen=True)
class Rule:
    """Where a module's or a weight's name begins like ``folder`` in a folder, it begins like ``file`` in a single file.

    Attributes:
        folder: the beginning of a name; ``{level}``, ``{n}`` stand for numbers, ``{leaf}`` for weight or bias.
        file: the same with numbers of the file: see ``_numbers``.
        inside: rules for what follows; without any, it is the same.
        form: of the weights.
    """

    folder: str
    file: str
    inside: tuple[Rule, ...] = ()
    form: Form = SAME


def _alike(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, name) for name in names)


RESNET = (
    Rule("norm1", "in_layers.0"),
    Rule("conv1", "in_layers.2"),
    Rule("time_emb_proj", "emb_layers.1"),
    Rule("norm2", "out_layers.0"),
    Rule("conv2", "out_layers.3"),
    Rule("conv_shortcut", "skip_connection"),
)
UNET_RESNET = (
    Rule("spatial_res_block", "", RESNET),
    Rule("temporal_res_block", "time_stack", RESNET),
    *_alike("time_mixer"),
)
TRANSFORMER = (
    Rule("temporal_transformer_blocks", "time_stack"),
    Rule("time_pos_embed.linear_1", "time_pos_embed.0"),
    Rule("time_pos_embed.linear_2", "time_pos_embed.2"),
    *_alike("norm", "proj_in", "transformer_blocks", "time_mixer", "proj_out"),
)
VAE_RESNET = (*_alike("norm1", "conv1", "norm2", "conv2"), Rule("conv_shortcut", "nin_shortcut"))
DECODER_RESNET = (
    Rule("spatial_res_block", "", VAE_RESNET),
    Rule("temporal_res_block", "time_stack", RESNET),
    Rule("time_mixer", ""),
)
VAE_ATTENTION = (
    Rule("group_norm", "norm"),
    Rule("to_q", "q", form=CONVOLUTION),
    Rule("to_k", "k", form=CONVOLUTION),
    Rule("to_v", "v", form=CONVOLUTION),
    Rule("to_out.0", "proj_out", form=CONVOLUTION),
)
CLIP_LAYER = (
    Rule("layer_norm1", "ln_1"),
    Rule("layer_norm2", "ln_2"),
    Rule("mlp.fc1", "mlp.c_fc"),
    Rule("mlp.fc2", "mlp.c_proj"),
    Rule("self_attn.q_proj.{leaf}", "attn.in_proj_{leaf}", form=QUERY),
    Rule("self_attn.k_proj.{leaf}", "attn.in_proj_{leaf}", form=KEY),
    Rule("self_attn.v_proj.{leaf}", "attn.in_proj_{leaf}", form=VALUE),
    Rule("self_attn.out_proj", "attn.out_proj"),
)

_UNET, _CLIP = "model.diffusion_model", "conditioner.embedders.0.open_clip.model"
# What encodes the image is a VAE of the conditioner's; what decodes the latents is of the first stage.
_CONDITIONER, _FIRST_STAGE = "conditioner.embedders.3.encoder", "first_stage_model"
_ENCODER, _DECODER = f"{_CONDITIONER}.encoder", f"{_FIRST_STAGE}.decoder"

RULES: Mapping[str, tuple[Rule, ...]] = {
    "unet": (
        Rule("conv_in", f"{_UNET}.input_blocks.0.0"),
        Rule("time_embedding.linear_1", f"{_UNET}.time_embed.0"),
        Rule("time_embedding.linear_2", f"{_UNET}.time_embed.2"),
        Rule("add_embedding.linear_1", f"{_UNET}.label_emb.0.0"),
        Rule("add_embedding.linear_2", f"{_UNET}.label_emb.0.2"),
        Rule("down_blocks.{level}.resnets.{n}", f"{_UNET}.input_blocks.{{down}}.0", UNET_RESNET),
        Rule("down_blocks.{level}.attentions.{n}", f"{_UNET}.input_blocks.{{down}}.1", TRANSFORMER),
        Rule("down_blocks.{level}.downsamplers.0.conv", f"{_UNET}.input_blocks.{{down_end}}.0.op"),
        Rule("mid_block.resnets.{n}", f"{_UNET}.middle_block.{{twice}}", UNET_RESNET),
        Rule("mid_block.attentions.0", f"{_UNET}.middle_block.1", TRANSFORMER),
        Rule("up_blocks.{level}.resnets.{n}", f"{_UNET}.output_blocks.{{up}}.0", UNET_RESNET),
        Rule("up_blocks.{level}.attentions.{n}", f"{_UNET}.output_blocks.{{up}}.1", TRANSFORMER),
        Rule("up_blocks.{level}.upsamplers.0.conv", f"{_UNET}.output_blocks.{{up_end}}.{{behind}}.conv"),
        Rule("conv_norm_out", f"{_UNET}.out.0"),
        Rule("conv_out", f"{_UNET}.out.2"),
    ),
    "vae": (
        Rule("encoder.conv_in", f"{_ENCODER}.conv_in"),
        Rule("encoder.down_blocks.{level}.resnets.{n}", f"{_ENCODER}.down.{{level}}.block.{{n}}", VAE_RESNET),
        Rule("encoder.down_blocks.{level}.downsamplers.0.conv", f"{_ENCODER}.down.{{level}}.downsample.conv"),
        Rule("encoder.mid_block.resnets.{n}", f"{_ENCODER}.mid.block_{{next}}", VAE_RESNET),
        Rule("encoder.mid_block.attentions.0", f"{_ENCODER}.mid.attn_1", VAE_ATTENTION),
        Rule("encoder.conv_norm_out", f"{_ENCODER}.norm_out"),
        Rule("encoder.conv_out", f"{_ENCODER}.conv_out"),
        Rule("quant_conv", f"{_CONDITIONER}.quant_conv"),
        Rule("decoder.conv_in", f"{_DECODER}.conv_in"),
        Rule("decoder.mid_block.resnets.{n}", f"{_DECODER}.mid.block_{{next}}", DECODER_RESNET),
        Rule("decoder.mid_block.attentions.0", f"{_DECODER}.mid.attn_1", VAE_ATTENTION),
        Rule("decoder.up_blocks.{level}.resnets.{n}", f"{_DECODER}.up.{{reversed}}.block.{{n}}", DECODER_RESNET),
        Rule("decoder.up_blocks.{level}.upsamplers.0.conv", f"{_DECODER}.up.{{reversed}}.upsample.conv"),
        Rule("decoder.conv_norm_out", f"{_DECODER}.norm_out"),
        Rule("decoder.conv_out", f"{_DECODER}.conv_out"),
        Rule("decoder.time_conv_out", f"{_DECODER}.conv_out.time_mix_conv"),
    ),
    "image_encoder": (
        Rule("vision_model.embeddings.class_embedding", f"{_CLIP}.visual.class_embedding"),
        Rule("vision_model.embeddings.patch_embedding", f"{_CLIP}.visual.conv1"),
        Rule("vision_model.embeddings.position_embedding.weight", f"{_CLIP}.visual.positional_embedding"),
        Rule("vision_model.pre_layrnorm", f"{_CLIP}.visual.ln_pre"),
        Rule("vision_model.encoder.layers.{n}", f"{_CLIP}.visual.transformer.resblocks.{{n}}", CLIP_LAYER),
        Rule("vision_model.post_layernorm", f"{_CLIP}.visual.ln_post"),
        Rule("visual_projection.weight", f"{_CLIP}.visual.proj", form=TRANSPOSED),
    ),
}

# What a file holds and sampling does not read: the rest of CLIP's text tower, and of the VAEs the halves that do not
# run: the first stage's encoder, which is the conditioner's once more, and the conditioner's decoder, of images.
_TEXT_TOWER = frozenset(
    f"{_CLIP}.{name}"
    for name in (
        *("ln_final.weight", "ln_final.bias", "logit_scale"),
        *("positional_embedding", "text_projection", "token_embedding.weight"),
    )
)
_IMAGE_DECODER = re.compile(rf"{re.escape(_DECODER)}\.(?!.*(?:time_stack|time_mix_conv|mix_factor))(.*)")
_POST_QUANT = frozenset(f"{_CONDITIONER}.post_quant_conv.{leaf}" for leaf in ("weight", "bias"))

# What ``config.json`` says and no shape does, with the published models' values; None is not known from these.
_PUBLISHED = ARCHITECTURES["svd"]
UNSAID: Mapping[str, Mapping[str, Any]] = {
    "unet": {"num_frames": None, "num_attention_heads": None, "sample_size": _PUBLISHED.unet.sample_size},
    "vae": _PUBLISHED.vae.model_dump(include={"scaling_factor", "force_upcast", "sample_size"}),
    "image_encoder": {
        **{"num_attention_heads": None, "image_size": None},
        **_PUBLISHED.image_encoder.model_dump(include={"hidden_act", "layer_norm_eps"}),
    },
    "scheduler": SVD_SCHEDULER,
    "feature_extractor": {"image_mean": None, "image_std": None},
}
# The models of 14 and of 25 frames have the same shapes: where no option says the number, the published name does.
PUBLISHED_FRAMES: Mapping[str, int] = {"svd": 14, "svd_xt": 25, "svd_xt_1_1": 25}
_METADATA_KEY = "svdlab.config"

Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Layout:
    """Which weight of a folder is where in a single file, for one architecture.

    Attributes:
        places: for every network the name in the file and the form, by name in the folder.
        parts: the network, and the names in the folder of what one weight of the file is made of, by name in the file.
        shapes: of every weight that the networks read, by name in the file.
        copies: names at which a weight is written once more, by its own name in the file.
        unused: names that a file may hold and no network reads.
    """

    places: Mapping[str, Mapping[str, tuple[str, Form]]]
    parts: Mapping[str, tuple[str, list[str]]]
    shapes: Mapping[str, tuple[int, ...]]
    copies: Mapping[str, str]
    unused: frozenset[str]


@lru_cache(maxsize=2)
def layout_of(configs: Configs) -> Layout:
    """Apply the rules to an architecture.

    Raises:
        SvdlabError: one that the naming of the single file has no names for.
    """
    if configs.vae.layers_per_block != 2:
        raise SvdlabError(
            f"vae layers_per_block: got {configs.vae.layers_per_block}, allowed in a single file: 2, which is how many "
            "resnets its naming has in a VAE's middle block"
        )
    places: dict[str, dict[str, tuple[str, Form]]] = {}
    parts: dict[str, tuple[str, list[str]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for network, make in NETWORKS.items():
        config = getattr(configs, network)
        with torch.device("meta"):
            weights = make(config).state_dict()
        numbers = _numbers(network, config)
        here = places[network] = {name: _place(RULES[network], name, numbers) for name in weights}
        for name in sorted(here, key=lambda name: here[name][1].part):
            parts.setdefault(here[name][0], (network, []))[1].append(name)
        for key, form in here.values():
            shapes[key] = tuple(form.write([weights[name] for name in parts[key][1]]).shape)
    copies = {key: key.replace(_CONDITIONER, _FIRST_STAGE) for key in shapes if key.startswith(f"{_ENCODER}.")}
    image_decoder = {f"{_CONDITIONER}.decoder.{m[1]}" for key in shapes if (m := _IMAGE_DECODER.fullmatch(key))}
    return Layout(places, parts, shapes, copies, _TEXT_TOWER | _POST_QUANT | image_decoder | {*copies.values()})


Numbers = Callable[[int, int], Mapping[str, int]]


def _numbers(network: str, config: Any) -> Numbers:
    """The numbers that stand in the file's names, from a level and a number in the folder's.

    Blocks are counted through all levels: ``down`` and ``up`` are a resnet's, ``down_end`` and ``up_end`` a level's
    last; ``behind`` is the place in its block behind the resnet and the transformer, if there is one. The VAE counts
    its decoder's levels from the frames, ``reversed``, and its middle resnets from 1, ``next``; the UNet has a
    transformer between its two, ``twice``.
    """
    levels = len(config.block_out_channels) if network != "image_encoder" else 0
    layers = per_level("layers_per_block", config.layers_per_block, levels) if network == "unet" else ()
    # A level's way down ends with a downsampler, which is a block of its own; its way up has one resnet more.
    down = [1 + sum(layers[:level]) + level for level in range(levels + 1)] if layers else []
    up = [sum(layers[levels - level :]) + level for level in range(levels + 1)] if layers else []

    def numbers(level: int, n: int) -> Mapping[str, int]:
        made = {"level": level, "n": n, "twice": 2 * n, "next": n + 1, "reversed": levels - 1 - level}
        if network == "unet":
            made |= {"down": down[level] + n, "down_end": down[level + 1] - 1}
            made |= {"up": up[level] + n, "up_end": up[level + 1] - 1}
            made["behind"] = 1 + (config.up_block_types[level] == ATTENTION_BLOCKS[1])
        return made

    return numbers


@cache
def _pattern(beginning: str) -> re.Pattern[str]:
    """Of names that begin so."""
    pattern = re.escape(beginning).replace(r"\{leaf\}", "(?P<leaf>weight|bias)")
    return re.compile(re.sub(r"\\\{(level|n)\\\}", r"(?P<\1>[0-9]+)", pattern) + r"(?:\.|$)")


def _place(rules: Sequence[Rule], name: str, numbers: Numbers) -> tuple[str, Form]:
    for rule in rules:
        if match := _pattern(rule.folder).match(name):
            found = match.groupdict()
            level, n = (int(found.get(key) or 0) for key in ("level", "n"))
            begins = rule.file.format(**{**numbers(level, n), "leaf": found.get("leaf")})
            rest, form = name[match.end() :], rule.form
            if rule.inside:
                rest, form = _place(rule.inside, rest, numbers)
            return ".".join(part for part in (begins, rest) if part), form
    raise AssertionError(f"no rule for {name}")  # a network that has changed and its rules have not


class SingleFile:
    """A checkpoint in one file, open: every name, shape and dtype in it checked, no weight read.

    Args:
        path: the file; its name matters only for the number of frames, where nothing else says it.
        options: what the weights do not say (``UNSAID``), by component, over what ``svdlab convert`` wrote into the
            file, over the published values.

    Attributes:
        configs: of the three networks; ``num_frames`` is None where nothing says it.
        scheduler: what ``scheduler_config.json`` holds.
        feature_extractor: what ``preprocessor_config.json`` holds of image_mean and image_std; empty for CLIP's own.
        weights: of each network, by their names in a folder.
        unused: names in the file that no network reads.

    Raises:
        SvdlabError: no whole safetensors file; a weight that is missing, has no place, another shape, or is no float;
            an option that the weights do say, or one that nothing says.
    """

    def __init__(self, path: Path, options: Options = MappingProxyType({})):
        file, where = TensorFile(path), str(path)
        with about(f"{where}: {_METADATA_KEY}"):
            written = _checked_options(parse(file.metadata.get(_METADATA_KEY, "{}"), "metadata"))
        with about(where):
            given = _checked_options(options)
        known = {"unet": {"num_frames": PUBLISHED_FRAMES.get(path.stem)}}
        said: dict[str, dict[str, Any]] = {}
        for name, published in UNSAID.items():
            # A schedule that was written is whole: what it leaves out is not the published value.
            least = {} if name == "scheduler" and written.get(name) else published
            layers = (least, known.get(name, {}), written.get(name, {}), given.get(name, {}))
            said[name] = {key: value for layer in layers for key, value in layer.items() if value is not None}
        self.scheduler, self.feature_extractor = said["scheduler"], said["feature_extractor"]
        with about(where):
            self.configs = _configs(file.entries, said)
            layout = layout_of(self.configs)
        check_entries(where, file.entries, layout.shapes, layout.unused, FLOATS)
        self.weights = {name: _NetworkWeights(file, places, layout) for name, places in layout.places.items()}
        self.unused = sorted(file.entries.keys() - layout.shapes.keys())


class _NetworkWeights:
    """One network's weights in a single file, by their names in a folder: ``tensors.Tensors``."""

    def __init__(self, file: TensorFile, places: Mapping[str, tuple[str, Form]], layout: Layout):
        self._file, self._places = file, places
        self.entries: dict[str, Entry] = {}
        for name, (key, form) in places.items():
            held = torch.empty(layout.shapes[key], device="meta")
            self.entries[name] = Kind(file.entries[key].dtype, tuple(form.read(held).shape))

    def read(self, name: str) -> Tensor:
        key, form = self._places[name]
        return form.read(self._file.read(key))

    def parts(self, name: str) -> Iterator[memoryview]:
        yield bytes_of(self.read(name))


def _checked_options(options: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(options, Mapping):
        raise SvdlabError(f"got {short(options)}, allowed: an object")
    for name, given in options.items():
        if name not in UNSAID:
            raise SvdlabError(f"got the component {short(name)}, allowed: {', '.join(UNSAID)}")
        if not isinstance(given, Mapping):
            raise SvdlabError(f"{name}: got {short(given)}, allowed: an object")
        for option in given:
            # The scheduler's are checked where it is made.
            if option not in UNSAID[name] and name != "scheduler":
                raise SvdlabError(f"{name}: got {short(option)}, allowed: {', '.join(UNSAID[name])}")
    return {name: dict(given) for name, given in options.items()}


def unsaid_options(configs: Configs, scheduler: Mapping[str, Any], feature_extractor: Mapping[str, Any]) -> Options:
    """The options of a checkpoint that its weights do not say."""
    held = {name: getattr(configs, name).model_dump(mode="json", include={*UNSAID[name]}) for name in NETWORKS}
    return {**held, "scheduler": dict(scheduler), "feature_extractor": dict(feature_extractor)}


def _configs(entries: Mapping[str, Entry], said: Options) -> Configs:
    """The architecture, from the weights' shapes and from what they do not say."""
    if not any(key.startswith(f"{_UNET}.") for key in entries):
        raise SvdlabError(f"is no SVD in one file: none of its {len(entries)} tensors is named {_UNET}.*")
    made = {name: read(_Shapes(entries)) for name, read in _READERS.items()}
    unet, clip = made["unet"], made["image_encoder"]
    if "num_attention_heads" not in said["unet"]:
        unet["num_attention_heads"] = tuple(_heads("unet", channels, 64) for channels in unet["block_out_channels"])
    if "num_attention_heads" not in said["image_encoder"]:
        clip["num_attention_heads"] = _heads("image_encoder", clip["hidden_size"], 80)
    unet["num_frames"] = None
    read: dict[str, Any] = {name: read_config(CONFIGS[name], {**made[name], **said[name]}, name) for name in NETWORKS}
    return Configs(**read)


def _heads(network: str, channels: int, width: int) -> int:
    """As many heads as the published width of one makes."""
    if channels % width:
        raise SvdlabError(
            f"{network}: num_attention_heads: no shape says it, and the published {width} channels a head do not "
            f"divide {channels}; allowed: svdlab convert FILE --out OTHER --set {network}.num_attention_heads=..., or "
            f"from_single_file(FILE, {network}={{'num_attention_heads': ...}})"
        )
    return channels // width


class _Shapes:
    """Shapes by name, of which one that is missing or has another number of axes is refused."""

    def __init__(self, entries: Mapping[str, Entry]):
        self._entries = entries

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __call__(self, key: str, axes: int) -> tuple[int, ...]:
        if key not in self._entries:
            raise SvdlabError(f"weight {key!r} is missing")
        if len(shape := self._entries[key].shape) != axes:
            raise SvdlabError(f"weight {key!r} has shape {short(shape)}, allowed: {axes} axes")
        return shape

    def count(self, key: str) -> int:
        """How many names there are with 0, 1, 2... in the place of a star."""
        return next(n for n in itertools.count() if key.replace("*", str(n)) not in self)


def _unet_options(shapes: _Shapes) -> dict[str, Any]:
    blocks, norm, depth = f"{_UNET}.input_blocks", "1.norm.weight", "1.transformer_blocks.*.norm1.weight"
    levels: list[list[int]] = [[]]  # the resnets' blocks
    for n in itertools.count(1):
        if f"{blocks}.{n}.0.op.weight" in shapes:
            levels.append([])
        elif f"{blocks}.{n}.0.in_layers.0.weight" in shapes:
            levels[-1].append(n)
        else:
            break
    if not all(levels):
        raise SvdlabError(f"{blocks}: got a level without a resnet, allowed: levels of 1 or more")
    layers = [len(level) for level in levels]
    down = [f"{blocks}.{level[0]}" for level in levels]
    up = [f"{_UNET}.output_blocks.{sum(layers[n + 1 :]) + len(layers) - 1 - n}" for n in range(len(layers))]
    middle = f"{_UNET}.middle_block"
    # A level without a transformer has no depth of its own; the lowest one's is the middle block's.
    depths = [max(shapes.count(f"{block}.{depth}") for block in pair) or 1 for pair in zip(down, up, strict=True)]
    depths[-1] = shapes.count(f"{middle}.{depth}") or 1
    time_ids = shapes(f"{_UNET}.label_emb.0.0.weight", 2)[1]
    return {
        "in_channels": shapes(f"{blocks}.0.0.weight", 4)[1],
        "out_channels": shapes(f"{_UNET}.out.2.weight", 4)[0],
        "down_block_types": tuple(_BLOCKS[f"{block}.{norm}" in shapes][0] for block in down),
        "up_block_types": tuple(_BLOCKS[f"{block}.{norm}" in shapes][1] for block in reversed(up)),
        "block_out_channels": tuple(shapes(f"{block}.0.out_layers.3.weight", 4)[0] for block in down),
        "addition_time_embed_dim": time_ids // 3,
        "projection_class_embeddings_input_dim": time_ids,
        "layers_per_block": _one(layers),
        "cross_attention_dim": shapes(f"{middle}.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "transformer_layers_per_block": _one(depths),
    }


def _one(values: Sequence[int]) -> int | tuple[int, ...]:
    """One value where every level has the same, as the published config says it."""
    return values[0] if len(set(values)) == 1 else tuple(values)


_BLOCKS = {False: PLAIN_BLOCKS, True: ATTENTION_BLOCKS}


def _vae_options(shapes: _Shapes) -> dict[str, Any]:
    level = f"{_ENCODER}.down.*.block.0.conv2.weight"
    widths = [shapes(level.replace("*", str(n)), 4)[0] for n in range(shapes.count(level))]
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "layers_per_block": shapes.count(f"{_ENCODER}.down.0.block.*.conv2.weight"),
        "latent_channels": shapes(f"{_DECODER}.conv_in.weight", 4)[1],
    }


def _clip_options(shapes: _Shapes) -> dict[str, Any]:
    visual = f"{_CLIP}.visual"
    hidden, projection = shapes(f"{visual}.proj", 2)
    tokens, patch = shapes(f"{visual}.positional_embedding", 2)[0], shapes(f"{visual}.conv1.weight", 4)[-1]
    return {
        "hidden_size": hidden,
        "intermediate_size": shapes(f"{visual}.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "projection_dim": projection,
        "num_hidden_layers": shapes.count(f"{visual}.transformer.resblocks.*.ln_1.weight"),
        "image_size": math.isqrt(max(tokens - 1, 0)) * patch,
        "patch_size": patch,
    }


_READERS = {"unet": _unet_options, "vae": _vae_options, "image_encoder": _clip_options}


def write_single_file(
    path: str | os.PathLike[str], weights: Mapping[str, Tensors], configs: Configs, options: Options
) -> None:
    """Write a checkpoint's weights as one file, one at a time, each as it is stored.

    Args:
        path: of the file; ``files.atomic_path`` makes it whole or not at all.
        weights: of each network, checked, by their names in a folder.
        configs: of the networks.
        options: ``unsaid_options``, which go into the file's metadata.

    Raises:
        SvdlabError: an architecture that the file's naming has no names for, or queries, keys and values of several
            dtypes, which are one weight in it.
        OSError: the disk is full.
    """
    layout = layout_of(configs)
    entries = {key: Kind(_dtype(key, *layout.parts[key], weights), shape) for key, shape in layout.shapes.items()}
    if layout_of(_configs(entries, options)).shapes != layout.shapes:
        depths = short(configs.unet.transformer_layers_per_block)
        raise SvdlabError(f"unet transformer_layers_per_block: got {depths}, allowed in a single file: one for a level")
    sources = {**{key: key for key in entries}, **{copy: key for key, copy in layout.copies.items()}}

    def read(key: str) -> Tensor:
        network, names = layout.parts[sources[key]]
        _, form = layout.places[network][names[0]]
        return form.write([weights[network].read(name) for name in names])

    metadata = {"format": "pt", _METADATA_KEY: json.dumps(options)}
    write_tensors(path, {key: entries[source] for key, source in sources.items()}, read, metadata)


def _dtype(key: str, network: str, names: Sequence[str], weights: Mapping[str, Tensors]) -> str:
    found = {weights[network].entries[name].dtype for name in names}
    if len(found) > 1:
        raise SvdlabError(
            f"{network}: {', '.join(names)}: got {', '.join(sorted(found))}, allowed: one dtype, as {key}"
        )
    return found.pop()
