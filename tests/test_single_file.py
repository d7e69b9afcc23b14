"""A checkpoint in one file: its names, what its weights do not say, every kind of damage, and the way back."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from PIL import Image
from safetensors.torch import load_file, save_file
from sparse import sparse_file
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.parity.digests import checkpoint_digest
from svdlab.parity.reference import load_diffusers
from svdlab.parity.weights import check_weights
from svdlab.svd.architectures import ARCHITECTURES, SVD_SCHEDULER
from svdlab.svd.checkpoint import checkpoint_path, load_components, load_configs
from svdlab.svd.convert import convert
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.single_file import RULES, SingleFile, layout_of
from svdlab.svd.workloads import NETWORKS
from svdlab.tensors import TensorFile

ATTENTION, PLAIN = "CrossAttn{}BlockSpatioTemporal", "{}BlockSpatioTemporal"
# The published shape but for its widths, and one with other depths at every level.
NARROW: dict[str, Any] = {
    "unet": {
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": (ATTENTION.format("Down"),) * 3 + (PLAIN.format("Down"),),
        "up_block_types": (PLAIN.format("Up"),) + (ATTENTION.format("Up"),) * 3,
        "layers_per_block": 2,
        "num_attention_heads": (1, 2, 2, 2),
    },
    "vae": {"block_out_channels": (32, 64, 64, 64), "scaling_factor": 0.25},
    "image_encoder": {"num_hidden_layers": 3},
}
OTHER_DEPTHS: dict[str, Any] = {
    "unet": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": (PLAIN.format("Down"), ATTENTION.format("Down"), ATTENTION.format("Down")),
        "up_block_types": (ATTENTION.format("Up"), PLAIN.format("Up"), ATTENTION.format("Up")),
        "layers_per_block": (1, 3, 2),
        "transformer_layers_per_block": (2, 1, 3),
        "num_attention_heads": (1, 2, 4),
        "num_frames": 3,
    },
    "vae": {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "force_upcast": False},
    "image_encoder": {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "quick_gelu", "image_size": 230},
    "scheduler": {"sigma_max": 500.0, "timestep_spacing": "trailing"},
}
QKV = "conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.0.attn.in_proj_weight"
CONV_IN = "model.diffusion_model.input_blocks.0.0.bias"


@pytest.fixture(scope="module")
def single(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in one file; read only."""
    return convert(tiny, tmp_path_factory.mktemp("single") / "tiny.safetensors").target


def edited(path: Path, target: Path, change: Callable[[dict[str, Tensor]], object], metadata: bool = True) -> Path:
    state = load_file(path)
    change(state)
    save_file(state, target, metadata=TensorFile(path).metadata if metadata else None)
    return target


@pytest.mark.parametrize("options", [{}, NARROW, OTHER_DEPTHS], ids=["tiny", "published shape", "other depths"])
def test_a_folder_a_single_file_and_a_folder_again_are_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "folder", **options)
    file = convert(folder, tmp_path / "one.safetensors").target
    again = convert(file, tmp_path / "again").target
    weights = sorted(path.relative_to(folder) for path in folder.glob("*/*.safetensors"))
    assert len(weights) == 3 and all((again / name).read_bytes() == (folder / name).read_bytes() for name in weights)
    one, two, three = (load_components(path) for path in (folder, file, again))
    for name in NETWORKS:
        config = getattr(one, name).config
        assert config == getattr(two, name).config == getattr(three, name).config
    assert one.scheduler == two.scheduler == three.scheduler
    assert one.feature_extractor == two.feature_extractor == three.feature_extractor


def test_a_single_file_is_the_folder_wherever_one_is_taken(
    tiny: Path, single: Path, photo: Image.Image, tmp_path: Path
) -> None:
    assert checkpoint_digest(single) == checkpoint_digest(tiny)
    assert check_weights(single, tiny).bad == []
    small = {"height": 32, "width": 32, "num_frames": 2, "num_inference_steps": 1, "output_type": "pt"}
    loaded = SVDPipeline.from_single_file(single), SVDPipeline.from_pretrained(single), load_diffusers(single)
    folder = SVDPipeline.from_pretrained(tiny), SVDPipeline.from_pretrained(tiny), load_diffusers(tiny)
    for one, other in zip(loaded, folder, strict=True):
        frames = [p(photo, generator=torch.Generator().manual_seed(0), **small).frames for p in (one, other)]
        assert torch.equal(*frames)


class Official:
    """Names and shapes of a published file, from the modules of the code that wrote it (generative-models 0ad7de9)."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def weight(self, name: str, *shape: int, bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = shape
        if bias:
            self.shapes[f"{name}.bias"] = shape[:1]

    def resnet(self, name: str, i: int, o: int, emb: int, *kernel: int) -> None:
        """``openaimodel.py:ResBlock``."""
        for shape in ((f"{name}.in_layers.0", i), (f"{name}.in_layers.2", o, i, *kernel), (f"{name}.out_layers.0", o)):
            self.weight(*shape)
        self.weight(f"{name}.out_layers.3", o, o, *kernel)
        if emb:
            self.weight(f"{name}.emb_layers.1", o, emb)
        if i != o:
            self.weight(f"{name}.skip_connection", o, i, 1, 1)

    def video_resnet(self, name: str, i: int, o: int, emb: int) -> None:
        """``video_model.py:VideoResBlock``."""
        self.resnet(name, i, o, emb, 3, 3)
        self.resnet(f"{name}.time_stack", o, o, emb, 3, 1, 1)
        self.shapes[f"{name}.time_mixer.mix_factor"] = (1,)

    def transformer(self, name: str, c: int, context: int) -> None:
        """``video_attention.py:SpatialVideoTransformer``."""
        for part in ("norm", "transformer_blocks.0.norm1", "transformer_blocks.0.norm2", "transformer_blocks.0.norm3"):
            self.weight(f"{name}.{part}", c)
        for part in ("norm_in", "norm1", "norm2", "norm3"):
            self.weight(f"{name}.time_stack.0.{part}", c)
        for block in (f"{name}.transformer_blocks.0", f"{name}.time_stack.0"):
            for attention, inputs in (("attn1", c), ("attn2", context)):
                self.weight(f"{block}.{attention}.to_q", c, c, bias=False)
                self.weight(f"{block}.{attention}.to_k", c, inputs, bias=False)
                self.weight(f"{block}.{attention}.to_v", c, inputs, bias=False)
                self.weight(f"{block}.{attention}.to_out.0", c, c)
        for layer in ("transformer_blocks.0.ff", "time_stack.0.ff", "time_stack.0.ff_in"):
            self.weight(f"{name}.{layer}.net.0.proj", 8 * c, c)
            self.weight(f"{name}.{layer}.net.2", c, 4 * c)
        self.weight(f"{name}.time_pos_embed.0", 4 * c, c)
        self.weight(f"{name}.time_pos_embed.2", c, 4 * c)
        self.weight(f"{name}.proj_in", c, c)
        self.weight(f"{name}.proj_out", c, c)
        self.shapes[f"{name}.time_mixer.mix_factor"] = (1,)

    def unet(self, name: str, widths: tuple[int, ...], context: int, time_ids: int) -> None:
        """``video_model.py:VideoUNet``, with two resnets a level and no transformer in the last one."""
        emb, c = 4 * widths[0], widths[0]
        for layer, inputs in (("time_embed", c), ("label_emb.0", time_ids)):
            self.weight(f"{name}.{layer}.0", emb, inputs)
            self.weight(f"{name}.{layer}.2", emb, emb)
        self.weight(f"{name}.input_blocks.0.0", c, 8, 3, 3)
        skips, last = [c], len(widths) - 1
        for level, width in enumerate(widths):
            for _ in range(2):
                block = f"{name}.input_blocks.{len(skips)}"
                self.video_resnet(f"{block}.0", c, width, emb)
                if level != last:
                    self.transformer(f"{block}.1", width, context)
                skips.append(c := width)
            if level != last:
                self.weight(f"{name}.input_blocks.{len(skips)}.0.op", c, c, 3, 3)
                skips.append(c)
        self.video_resnet(f"{name}.middle_block.0", c, c, emb)
        self.transformer(f"{name}.middle_block.1", c, context)
        self.video_resnet(f"{name}.middle_block.2", c, c, emb)
        for n in range(len(skips)):
            level = last - n // 3
            self.video_resnet(f"{name}.output_blocks.{n}.0", c + skips.pop(), c := widths[level], emb)
            if level != last:
                self.transformer(f"{name}.output_blocks.{n}.1", c, context)
            if level and n % 3 == 2:
                self.weight(f"{name}.output_blocks.{n}.{1 + (level != last)}.conv", c, c, 3, 3)
        self.weight(f"{name}.out.0", c)
        self.weight(f"{name}.out.2", 4, c, 3, 3)

    def vae_resnet(self, name: str, i: int, o: int, video: bool) -> None:
        """``diffusionmodules/model.py:ResnetBlock``, ``temporal_ae.py:VideoResBlock``."""
        for part, *shape in (("norm1", i), ("conv1", o, i, 3, 3), ("norm2", o), ("conv2", o, o, 3, 3)):
            self.weight(f"{name}.{part}", *shape)
        if i != o:
            self.weight(f"{name}.nin_shortcut", o, i, 1, 1)
        if video:
            self.resnet(f"{name}.time_stack", o, o, 0, 3, 1, 1)
            self.shapes[f"{name}.mix_factor"] = (1,)

    def vae_half(self, name: str, part: str, widths: tuple[int, ...], layers: int, outputs: int, video: bool) -> None:
        """``diffusionmodules/model.py:Encoder`` and ``Decoder``, ``temporal_ae.py:VideoDecoder``."""
        decodes = part == "up"
        order = list(range(len(widths)))[:: -1 if decodes else 1]
        c = widths[order[0]]
        self.weight(f"{name}.conv_in", c, 4 if decodes else 3, 3, 3)
        for n, level in enumerate(order):
            for block in range(layers):
                self.vae_resnet(f"{name}.{part}.{level}.block.{block}", c, c := widths[level], video)
            if n < len(order) - 1:
                self.weight(f"{name}.{part}.{level}.{part}sample.conv", c, c, 3, 3)
        self.weight(f"{name}.norm_out", c)
        self.weight(f"{name}.conv_out", outputs, c, 3, 3)
        for block in ("block_1", "block_2"):
            self.vae_resnet(f"{name}.mid.{block}", widths[-1], widths[-1], video)
        self.weight(f"{name}.mid.attn_1.norm", widths[-1])
        for layer in ("q", "k", "v", "proj_out"):
            self.weight(f"{name}.mid.attn_1.{layer}", widths[-1], widths[-1], 1, 1)
        if video:
            self.weight(f"{name}.conv_out.time_mix_conv", 3, 3, 3, 1, 1)

    def clip(self, name: str, width: int, mlp: int, layers: int, tokens: int, patch: int, out: int, words: int) -> None:
        """``open_clip/model.py:CLIP`` less the text tower's layers, which ``FrozenOpenCLIPImageEmbedder`` deletes."""
        visual = f"{name}.visual"
        self.shapes |= {f"{name}.logit_scale": (), f"{name}.positional_embedding": (77, out)}
        self.shapes |= {f"{name}.text_projection": (out, out), f"{name}.token_embedding.weight": (words, out)}
        self.shapes |= {f"{visual}.class_embedding": (width,), f"{visual}.positional_embedding": (tokens, width)}
        self.shapes |= {f"{visual}.proj": (width, out), f"{visual}.conv1.weight": (width, 3, patch, patch)}
        self.weight(f"{name}.ln_final", out)
        self.weight(f"{visual}.ln_pre", width)
        self.weight(f"{visual}.ln_post", width)
        for n in range(layers):
            block = f"{visual}.transformer.resblocks.{n}"
            self.weight(f"{block}.ln_1", width)
            self.weight(f"{block}.ln_2", width)
            self.shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            self.shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
            self.weight(f"{block}.attn.out_proj", width, width)
            self.weight(f"{block}.mlp.c_fc", mlp, width)
            self.weight(f"{block}.mlp.c_proj", width, mlp)


def official_shapes(
    unet: tuple[int, ...], context: int, time_ids: int, vae: tuple[int, ...], clip: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    made, conditioner = Official(), "conditioner.embedders.3.encoder"
    made.unet("model.diffusion_model", unet, context, time_ids)
    made.vae_half("first_stage_model.encoder", "down", vae, 2, 8, False)
    made.vae_half("first_stage_model.decoder", "up", vae, 3, 3, True)
    made.vae_half(f"{conditioner}.encoder", "down", vae, 2, 8, False)
    made.vae_half(f"{conditioner}.decoder", "up", vae, 3, 3, False)
    made.weight(f"{conditioner}.quant_conv", 8, 8, 1, 1)
    made.weight(f"{conditioner}.post_quant_conv", 4, 4, 1, 1)
    made.clip("conditioner.embedders.0.open_clip.model", *clip)
    return made.shapes


PUBLISHED = official_shapes(
    (320, 640, 1280, 1280), 1024, 768, (128, 256, 512, 512), (1280, 5120, 32, 257, 14, 1024, 49408)
)


@pytest.mark.parametrize(("name", "architecture"), [("svd", "svd"), ("svd_xt_1_1", "svd-xt")])
def test_every_weight_of_the_published_files_is_accounted_for(
    name: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorFile, "read", lambda self, name: pytest.fail("a weight was read"))
    path = sparse_file(tmp_path / f"{name}.safetensors", PUBLISHED)
    assert load_configs(path) == ARCHITECTURES[architecture]
    file = SingleFile(path)
    assert file.scheduler == SVD_SCHEDULER
    parts = ("open_clip.model.", "embedders.3.encoder.decoder.", "post_quant_conv", "first_stage_model.encoder.")
    assert all(any(part in key for part in parts) and ".visual." not in key for key in file.unused)
    assert layout_of(file.configs).shapes == {key: PUBLISHED[key] for key in PUBLISHED if key not in file.unused}
    # A sweep asks for the shapes before it loads any weight.
    assert SVDPipeline.from_single_file(path, device="meta").unet.conv_out.weight.shape == (4, 320, 3, 3)


# By their names in a folder and in a file, what another weight of the same shape could be taken for.
ALIKE = {
    "unet": {
        "down_blocks.1.resnets.1.spatial_res_block.norm1.bias": "input_blocks.5.0.in_layers.0.bias",
        "down_blocks.1.resnets.1.spatial_res_block.conv2.bias": "input_blocks.5.0.out_layers.3.bias",
        "down_blocks.1.resnets.1.temporal_res_block.conv1.bias": "input_blocks.5.0.time_stack.in_layers.2.bias",
        "down_blocks.2.attentions.0.temporal_transformer_blocks.0.norm1.bias": (
            "input_blocks.7.1.time_stack.0.norm1.bias"
        ),
        "mid_block.resnets.1.spatial_res_block.norm2.bias": "middle_block.2.out_layers.0.bias",
        "up_blocks.0.resnets.2.spatial_res_block.time_emb_proj.bias": "output_blocks.2.0.emb_layers.1.bias",
        "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight": (
            "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "add_embedding.linear_2.bias": "label_emb.0.2.bias",
    },
    "vae": {
        "encoder.down_blocks.3.resnets.1.norm1.bias": (
            "conditioner.embedders.3.encoder.encoder.down.3.block.1.norm1.bias"
        ),
        "encoder.mid_block.resnets.1.conv1.bias": "conditioner.embedders.3.encoder.encoder.mid.block_2.conv1.bias",
        "encoder.mid_block.attentions.0.to_k.bias": "conditioner.embedders.3.encoder.encoder.mid.attn_1.k.bias",
        "decoder.mid_block.attentions.0.to_v.bias": "first_stage_model.decoder.mid.attn_1.v.bias",
        "decoder.mid_block.attentions.0.to_out.0.bias": "first_stage_model.decoder.mid.attn_1.proj_out.bias",
        "decoder.up_blocks.0.resnets.2.temporal_res_block.norm2.bias": (
            "first_stage_model.decoder.up.3.block.2.time_stack.out_layers.0.bias"
        ),
        "decoder.up_blocks.1.upsamplers.0.conv.bias": "first_stage_model.decoder.up.2.upsample.conv.bias",
        "decoder.up_blocks.0.resnets.0.time_mixer.mix_factor": "first_stage_model.decoder.up.3.block.0.mix_factor",
    },
    "image_encoder": {
        "vision_model.pre_layrnorm.bias": "ln_pre.bias",
        "vision_model.encoder.layers.30.layer_norm2.bias": "transformer.resblocks.30.ln_2.bias",
        "vision_model.embeddings.class_embedding": "class_embedding",
    },
}
BELOW = {
    "unet": "model.diffusion_model.",
    "vae": "",
    "image_encoder": "conditioner.embedders.0.open_clip.model.visual.",
}


@pytest.mark.parametrize("network", ALIKE)
def test_weights_of_one_shape_are_told_apart(network: str) -> None:
    places = layout_of(ARCHITECTURES["svd"]).places[network]
    expected = {name: BELOW[network] + key for name, key in ALIKE[network].items()}
    assert {name: places[name][0] for name in expected} == expected


def test_clips_attention_is_that_of_the_module_that_the_file_was_written_from(single: Path) -> None:
    """open_clip uses torch's own, whose queries, keys and values are one weight."""
    state, attention = load_file(single), load_components(single).image_encoder.vision_model.encoder.layers[1].self_attn
    own = torch.nn.MultiheadAttention(64, attention.heads, batch_first=True)
    below = QKV.replace("resblocks.0", "resblocks.1").removesuffix("in_proj_weight")
    own.load_state_dict({key.removeprefix(below): weight for key, weight in state.items() if key.startswith(below)})
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(x), own(x, x, x, need_weights=False)[0])


def test_what_the_weights_do_not_say_is_the_published_or_what_is_given(single: Path, tmp_path: Path) -> None:
    bare = edited(single, tmp_path / "bare.safetensors", lambda state: None, metadata=False)
    with pytest.raises(SvdlabError, match="unet: num_attention_heads: no shape says it, and the published 64 channels"):
        SingleFile(bare)
    heads: dict[str, Any] = {"unet": {"num_attention_heads": (2, 4)}, "image_encoder": {"num_attention_heads": 4}}
    pipe = SVDPipeline.from_single_file(bare, **heads)
    assert pipe.vae.config.scaling_factor == 0.18215 and pipe.image_encoder.config.hidden_act == "gelu"
    with pytest.raises(SvdlabError, match="num_frames: got none, and the single file does not say it; allowed: 14"):
        pipe(Image.new("RGB", (32, 32)), height=32, width=32)
    with pytest.raises(SvdlabError, match="num_frames: its weights do not say it; allowed: 14"):
        convert(bare, tmp_path / "folder", options=heads)
    options = {**heads, "unet": {**heads["unet"], "num_frames": 9}, "scheduler": {"sigma_max": 80.0}}
    said = convert(bare, tmp_path / "said.safetensors", options=options).target
    again = SVDPipeline.from_single_file(said)
    assert (again.unet.config.num_frames, again.scheduler.sigma_max) == (9, 80.0)
    changed = SVDPipeline.from_single_file(said, unet={"num_frames": 5}, vae={"scaling_factor": 0.5})
    assert (changed.unet.config.num_frames, changed.vae.config.scaling_factor) == (5, 0.5)


def test_a_renamed_file_is_the_same_unless_its_name_alone_said_the_frames(single: Path, tmp_path: Path) -> None:
    """svd and svd_xt have the same shapes: without its name nobody knows which one it is."""
    renamed = Path(shutil.copy(single, tmp_path / "svd.safetensors.bak"))
    assert load_configs(renamed) == load_configs(single) and checkpoint_digest(renamed) == checkpoint_digest(single)
    published = sparse_file(tmp_path / "svd_xt.safetensors", PUBLISHED)
    assert load_configs(published).unet.num_frames == 25
    assert load_configs(published.rename(tmp_path / "mine.safetensors")).unet.num_frames is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision(single: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def narrow(state: dict[str, Tensor]) -> None:
        state.update({key: weight.to(dtype) for key, weight in state.items()})

    half = edited(single, tmp_path / "half.safetensors", narrow)
    folder = convert(half, tmp_path / "folder").target
    stored, whole = load_file(folder / "unet/diffusion_pytorch_model.safetensors"), load_components(single).unet
    assert all(weight.dtype == dtype for weight in stored.values())
    state = load_components(half).unet.state_dict()
    assert all(torch.equal(state[key], weight.to(dtype).float()) for key, weight in whole.state_dict().items())


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({new: state.pop(old)})


DAMAGES = {
    "renamed": (renamed(CONV_IN, f"{CONV_IN}s"), f"weight '{CONV_IN}' is missing (1 in all)"),
    "extra": (lambda s: s.update(extra=torch.zeros(1)), "weight 'extra' has no place in this architecture (1 in all)"),
    "in an unread part": (
        lambda s: s.update({"first_stage_model.encoder.x": torch.zeros(1)}),
        "weight 'first_stage_model.encoder.x' has no place",
    ),
    "misshapen": (lambda s: s.update({CONV_IN: torch.zeros(31)}), f"'{CONV_IN}' has shape (31,), the config wants (32"),
    "in two": (lambda s: s.update({QKV: s[QKV][:128].clone()}), "has shape (128, 64), the config wants (192, 64)"),
    "without axes": (lambda s: s.update({QKV: torch.zeros(())}), "has shape (), the config wants (192, 64)"),
    "another rank": (
        lambda s: s.update({"first_stage_model.decoder.conv_in.weight": torch.zeros(3)}),
        "weight 'first_stage_model.decoder.conv_in.weight' has shape (3,), allowed: 4 axes",
    ),
    "integers": (lambda s: s.update({CONV_IN: torch.zeros(32).int()}), f"weight '{CONV_IN}' is I32, allowed: F64, F32"),
    "nothing": (lambda s: s.clear(), "is no SVD in one file: none of its 0 tensors is named model.diffusion_model.*"),
    "one level without resnets": (
        lambda s: [s.pop(k) for k in list(s) if "input_blocks.1." in k or "input_blocks.2.0.in" in k],
        "allowed: levels of 1 or more",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_by_name(single: Path, tmp_path: Path, change: Callable, message: str) -> None:
    path = edited(single, tmp_path / "damaged.safetensors", change)
    with pytest.raises(SvdlabError) as error:
        SVDPipeline.from_pretrained(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_what_is_no_single_file(tiny: Path, single: Path, tmp_path: Path) -> None:
    cut = tmp_path / "svd.safetensors"
    cut.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(
        SvdlabError, match=r"svd.safetensors: not a whole safetensors file \(\d+ bytes of data, allowed"
    ):
        SVDPipeline.from_single_file(cut)
    cut.write_bytes(b"PK\x03\x04 a pickle in an archive")
    with pytest.raises(SvdlabError, match="svd.safetensors: not a whole safetensors file"):
        SVDPipeline.from_single_file(cut)
    with pytest.raises(SvdlabError, match="is no SVD in one file: none of its .* tensors is named model.diffusion_mod"):
        SVDPipeline.from_single_file(tiny / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(SvdlabError, match="is a folder, allowed: a single file; from_pretrained loads folders"):
        SVDPipeline.from_single_file(tiny)
    with pytest.raises(SvdlabError, match="variant: got 'fp16' with the single file"):
        SVDPipeline.from_pretrained(single, variant="fp16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"unet": {"in_channels": 4}},
            "unet: got 'in_channels', allowed: num_frames, num_attention_heads, sample_size",
        ),
        ({"unet": {"num_frames": 0}}, "unet: num_frames: got 0, allowed: greater than or equal to 1"),
        ({"unet": {"num_attention_heads": 5}}, "num_attention_heads: 5 does not divide block_out_channels' 32"),
        ({"image_encoder": {"hidden_act": "relu"}}, "hidden_act: 'relu' is not implemented; allowed: gelu, quick_gelu"),
        ({"image_encoder": {"image_size": 100}}, "positional_embedding' has shape (50, 64), the config wants (10, 64)"),
        ({"scheduler": {"foo": 1}}, "scheduler: option 'foo' is not implemented"),
        ({"feature_extractor": {"image_std": [1.0, 0.0, 1.0]}}, "image_std.1: got 0.0, allowed: greater"),
    ],
)
def test_an_option_that_is_not_allowed(single: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdlabError) as error:
        SVDPipeline.from_single_file(single, **options)
    assert str(error.value).startswith(f"{single}: ") and message in str(error.value)


@pytest.mark.parametrize("text", ["[", "[1]", '{"unet": 1}', '{"text": {}}', '{"vae": {"layers_per_block": 1}}'])
def test_metadata_of_another_kind_is_refused(single: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "crafted.safetensors"
    save_file(load_file(single), path, metadata={"svdlab.config": text})
    with pytest.raises(SvdlabError, match="crafted.safetensors: svdlab.config: .*(allowed|not JSON)"):
        SingleFile(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae": {"layers_per_block": 1}}, "vae layers_per_block: got 1, allowed in a single file: 2"),
        (
            {"unet": {"transformer_layers_per_block": ((1, 2), 1)}},
            "unet transformer_layers_per_block: got ((1, 2), 1), allowed in a single file: one for a level",
        ),
    ],
)
def test_what_a_single_file_has_no_names_for_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "folder", **options)
    with pytest.raises(SvdlabError) as error:
        convert(folder, tmp_path / "one.safetensors")
    assert str(error.value).startswith(f"{folder}: ") and message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_one_weight_is_in_memory_at_a_time(
    tiny: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    most = 0
    read = TensorFile.read

    def counted(self: TensorFile, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        held.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in held[-100:]))
        return tensor

    monkeypatch.setattr(TensorFile, "read", counted)
    convert(single, tmp_path / "folder")
    load_components(single, dtype=torch.float16)
    assert len(held) > 1000 and most <= 2  # the one before, until the next one is read
    convert(tiny, tmp_path / "one.safetensors")
    assert most <= 4  # queries, keys and values make one
    kept = load_components(single).image_encoder.state_dict().values()
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in kept)


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        (tmp_path / "file").touch()
        return str(tmp_path / "file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    checkpoint_path("a/b/svd.safetensors")
    checkpoint_path("https://huggingface.co/a/b/resolve/main/svd.safetensors")
    checkpoint_path("https://huggingface.co/a/b/blob/main/sub/svd.safetensors", revision="v2")
    assert asked == [
        ("a/b", "svd.safetensors", None),
        ("a/b", "svd.safetensors", "main"),
        ("a/b", "sub/svd.safetensors", "v2"),
    ]


def test_the_command(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def svdlab(*arguments: str | Path) -> tuple[int, str, str]:
        return run(capsys, monkeypatch, *map(str, arguments))

    file, folder, made = tmp_path / "one.safetensors", tmp_path / "folder", tmp_path / "made.json"
    code, out, _ = svdlab("convert", tiny, "--out", file, "--json", made)
    assert code == 0 and out.startswith(f"{file}: ") and json.loads(made.read_text())["unused"] == []
    code, out, _ = svdlab("convert", file, "--out", folder, "--set", "unet.num_frames=3")
    assert code == 0 and "that no network reads are left out" in out
    assert json.loads((folder / "unet/config.json").read_text())["num_frames"] == 3
    size = ("--height", "32", "--width", "32", "--num-inference-steps", "1")
    code, out, err = svdlab("parity", "--model", file, *size, "--num-frames", "2")
    assert code == 0 and "parity" in out, err
    other = tmp_path / "other.safetensors"
    for arguments, message in (
        ((file, "--out", folder), f"{folder}: is there already, allowed: a new folder"),
        ((file, "--out", file), "is an input, too"),
        ((tiny, "--out", other, "--json", other), "is given for two outputs"),
        ((tiny, "--out", tmp_path / "x", "--set", "unet.num_frames=3"), "allowed: only for a single file"),
        ((file, "--out", tmp_path / "x", "--set", "num_frames=3"), "--set: got 'num_frames=3', allowed: COMPONENT."),
        ((file, "--out", tmp_path / "x", "--set", "unet.num_frames={"), "--set unet.num_frames: not JSON"),
        ((file, "--out", tmp_path / "x", "--set", "unet.x=1"), "unet: got 'x', allowed: num_frames, "),
    ):
        code, _, err = svdlab("convert", *arguments)
        assert (code, message in err, err.count("\n")) == (2, True, 1), err


def test_the_page_has_every_rule() -> None:
    """docs/checkpoints.md: the n-th name on the left of a row is the n-th on the right."""
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    pairs = []
    for row in re.findall(r"^\| (.*`.*) \| (.*`.*) \|$", page, re.M):
        pairs += list(zip(*(re.findall(r"`([^`]+)`", side) for side in row), strict=False))
    letters = {"level": "L", "n": "N", "reversed": "M", "behind": "2"}
    letters |= dict.fromkeys(("down", "down_end", "up", "up_end"), "B")
    seen = 0
    for rule in (rule for network in RULES.values() for rule in network):
        middle = "mid_block" in rule.folder
        for n in (0, 1) if middle else ("N",):
            numbers = {**letters, "n": n, **({"twice": 2 * n, "next": n + 1} if middle else {})}  # type: ignore[operator]
            folder, file = rule.folder.format(**numbers), rule.file.format(**numbers)
            if folder.endswith("encoder.layers.N"):  # the page has its parts
                assert any(
                    a.startswith(f"{folder}.") and f"{file}.".endswith(b.partition("N.")[0] + "N.") for a, b in pairs
                )
                continue
            said = [b for a, b in pairs if f".{folder}".endswith(f".{a}")]
            assert any(f".{file}".endswith(f".{b}") for b in said), (folder, file, said)
            seen += 1
    assert seen > 35
