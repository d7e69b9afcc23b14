"""The three networks against diffusers' and transformers' with the same weights, judged by float64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from pieces import in_pieces
from torch import Tensor
from transformers import CLIPVisionConfig as HFCLIPVisionConfig
from transformers import CLIPVisionModelWithProjection

from svdlab.errors import SvdlabError
from svdlab.svd import VAE, CLIPVision, CLIPVisionConfig, UNet, UNetConfig, VAEConfig
from svdlab.svd.kernels import pieces, use_kernels
from svdlab.svd.random_checkpoint import TINY_CLIP, TINY_UNET, TINY_VAE, randomize_


def ratio(candidate: Tensor, reference: Tensor, truth: Tensor) -> float:
    """The noise ratio: the candidate's distance from the truth over the reference's."""
    eps = torch.finfo(reference.dtype).eps
    floor = max(float((reference - truth).norm() / truth.norm()), eps)
    return float((candidate - truth).norm() / truth.norm()) / floor


CROSS, PLAIN = "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"
UNETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "three levels, all different": dict(
        block_out_channels=(64, 32, 96),
        down_block_types=(PLAIN, CROSS, CROSS),
        up_block_types=(UP_CROSS, UP_PLAIN, UP_CROSS),
        num_attention_heads=(2, 4, 3),
        layers_per_block=(1, 2, 3),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=(32, 32, 32),
    ),
    "one level": dict(
        block_out_channels=(32,),
        down_block_types=(CROSS,),
        up_block_types=(UP_CROSS,),
        num_attention_heads=1,
    ),
    "depths nested by resnet": dict(transformer_layers_per_block=((2, 1), (1, 2)), layers_per_block=1),
    "no cross-attention but in the middle": dict(
        down_block_types=(PLAIN, PLAIN), up_block_types=(UP_PLAIN, UP_PLAIN), layers_per_block=2
    ),
}


def _unets(options: dict[str, Any], fast: bool = True) -> tuple[UNet, UNetSpatioTemporalConditionModel]:
    config = {**TINY_UNET, **options}
    reference = randomize_(UNetSpatioTemporalConditionModel(**config), seed=1).eval()
    own = UNet(UNetConfig(**config))
    own.load_state_dict(reference.state_dict(), strict=True)
    return use_kernels(own) if fast else own, reference


both = pytest.mark.parametrize("fast", [True, False], ids=["kernels", "plain"])


def _unet_inputs(batch: int, frames: int, size: tuple[int, int], channels: int = 32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(batch, frames, 8, *size, generator=generator)
    token = torch.randn(batch, 1, channels, generator=generator)
    return sample, torch.tensor(1.3), token, torch.tensor([[6.0, 127.0, 0.02]] * batch)


@both
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 12)])
@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_diffusers(name: str, size: tuple[int, int], fast: bool) -> None:
    own, reference = _unets(UNETS[name], fast)
    sample, timestep, token, ids = _unet_inputs(2, 5, size)
    result = own(sample, timestep, own.condition(token, ids, 5))
    expected = reference(sample, timestep, token, ids).sample
    truth = reference.double()(sample.double(), timestep, token.double(), ids.double()).sample
    assert ratio(result, expected, truth) <= 4


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unet_in_half_precision(dtype: torch.dtype, fast: bool) -> None:
    own, reference = _unets({}, fast)
    own, reference = own.to(dtype), reference.to(dtype)
    sample, timestep, token, ids = _unet_inputs(2, 4, (8, 8))
    sample, token, ids = sample.to(dtype), token.to(dtype), ids.to(dtype)
    result = own(sample, timestep, own.condition(token, ids, 4))
    expected = reference(sample, timestep, token, ids).sample
    truth = reference.double()(sample.double(), timestep, token.double(), ids.double()).sample
    assert ratio(result, expected, truth) <= 4


@pytest.mark.slow
def test_unet_at_full_size() -> None:
    """The published architecture, 1.52 billion parameters. The two models share their weights' memory."""
    with torch.device("meta"):
        own, reference = UNet(UNetConfig()), UNetSpatioTemporalConditionModel().eval()
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, parameter in reference.state_dict().items():
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        state[name] = torch.empty(parameter.shape).uniform_(-1.7 * scale, 1.7 * scale, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            state[name] += 1
    assert sum(p.numel() for p in state.values()) == 1_524_623_082
    reference.load_state_dict(state, assign=True)
    sample, timestep, token, ids = _unet_inputs(1, 2, (8, 8), channels=1024)
    truth = reference.double()(sample.double(), timestep, token.double(), ids.double()).sample
    expected = reference.float()(sample, timestep, token, ids).sample
    own.load_state_dict(reference.state_dict(), assign=True)
    assert ratio(own(sample, timestep, own.condition(token, ids, 2)), expected, truth) <= 4


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("numbers", [1, 3000, 6000])
def test_a_few_frames_at_a_time_give_the_same(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of real sizes are worked on in pieces, which no small test would reach."""
    own, reference = _unets(UNETS["three levels, all different"])
    sample, timestep, token, ids = _unet_inputs(2, 5, (7, 9))
    sample[1], token[1], ids[1] = 2 * sample[0], -token[0], ids[0] + 1  # two videos that differ in all they are told
    expected = reference(sample, timestep, token, ids).sample
    truth = reference.double()(sample.double(), timestep, token.double(), ids.double()).sample
    monkeypatch.setitem(pieces.NUMBERS, "cpu", numbers)
    calls: list[int] = []
    own.down_blocks[1].attentions[0].transformer_blocks[0].ff.register_forward_hook(
        lambda module, args, output: calls.append(output.shape[1])
    )
    assert ratio(own(sample, timestep, own.condition(token, ids, 5)), expected, truth) <= 4
    assert len(calls) > 1 and sum(calls) == 10, "in pieces, and every frame of both videos"


@both
def test_the_unet_is_one_graph_to_torch_compile(fast: bool) -> None:
    """``fullgraph`` raises at the first graph break. With kernels, too, the compiler is given the plain layers."""
    own, _ = _unets({}, fast)
    sample, timestep, token, ids = _unet_inputs(2, 4, (8, 8))
    conditioning = own.condition(token, ids, 4)
    compiled = torch.compile(own, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(sample, timestep, conditioning), own(sample, timestep, conditioning))


def test_several_context_tokens_are_refused() -> None:
    own, _ = _unets({})
    with pytest.raises(SvdlabError, match=r"image_embeddings: got shape \(1, 2, 32\), allowed: \(batch, 1, channels\)"):
        own.condition(torch.zeros(1, 2, 32), torch.zeros(1, 3), 4)


def test_the_collapsed_cross_attention_sees_the_token() -> None:
    own, _ = _unets({})
    sample, timestep, token, ids = _unet_inputs(1, 3, (8, 8))
    with_token = own(sample, timestep, own.condition(token, ids, 3))
    without = own(sample, timestep, own.condition(torch.zeros_like(token), ids, 3))
    assert (with_token - without).norm() > 1e-2 * with_token.norm()


@both
def test_gradients_flow_to_every_parameter_that_runs(fast: bool) -> None:
    own, _ = _unets({}, fast)
    sample, timestep, token, ids = _unet_inputs(1, 3, (8, 8))
    with torch.enable_grad():
        own(sample, timestep, own.condition(token, ids, 3)).square().mean().backward()
    still = {name for name, p in own.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(".norm2." in n or ".attn2.to_q." in n or ".attn2.to_k." in n for n in still), still


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(block_out_channels=(30, 64)), "block_out_channels: got 30, allowed: positive multiples of 32"),
        (dict(num_attention_heads=(3, 4)), "num_attention_heads: 3 does not divide block_out_channels' 32"),
        (dict(layers_per_block=(1, 2, 3)), "layers_per_block has 3 entries, block_out_channels has 2"),
        (dict(down_block_types=("DownBlock3D", PLAIN)), "down_block_types: 'DownBlock3D' is not implemented"),
        (
            dict(projection_class_embeddings_input_dim=95),
            "projection_class_embeddings_input_dim: got 95, allowed: 96",
        ),
    ],
)
def test_unet_config_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdlabError, match=message):
        UNetConfig(**{**TINY_UNET, **options})


VAES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "one resnet a level": dict(layers_per_block=1),
    "three resnets a level": dict(layers_per_block=3),
    "two levels": dict(block_out_channels=(64, 32), down_block_types=("DownEncoderBlock2D",) * 2),
}


def _vaes(options: dict[str, Any], fast: bool = True) -> tuple[VAE, AutoencoderKLTemporalDecoder]:
    config = {**TINY_VAE, **options}
    reference = randomize_(AutoencoderKLTemporalDecoder(**config), seed=4).eval()
    own = VAE(VAEConfig(**config))
    own.load_state_dict(reference.state_dict(), strict=True)
    return use_kernels(own) if fast else own, reference


@both
@pytest.mark.parametrize("name", VAES)
def test_vae_equals_diffusers(name: str, fast: bool) -> None:
    own, reference = _vaes(VAES[name], fast)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    latents = torch.randn(2, 5, 4, 4, 6, generator=generator)
    mean, std = own.encode(images).latent_dist
    posterior = reference.encode(images).latent_dist
    frames = reference.decode(latents.flatten(0, 1), 5).sample.unflatten(0, (2, 5))
    true_posterior = reference.double().encode(images.double()).latent_dist
    true_frames = reference.decode(latents.double().flatten(0, 1), 5).sample.unflatten(0, (2, 5))
    assert ratio(mean, posterior.mean, true_posterior.mean) <= 4
    assert ratio(std, posterior.std, true_posterior.std) <= 4
    for chunk in (None, 1, 2, 3):
        assert ratio(own.decode_videos(latents, chunk), frames, true_frames) <= 4


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    frames=st.integers(1, 9),
    chunk=st.integers(1, 10),
    videos=st.integers(1, 2),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    numbers=st.sampled_from([1, 500, 5000, 2**20]),
    roomy=st.sampled_from([(), ("cpu",)]),
    seed=st.integers(0, 999),
)
def test_exact_decode_does_not_depend_on_the_chunk(
    frames: int, chunk: int, videos: int, height: int, width: int, numbers: int, roomy: tuple[str, ...], seed: int
) -> None:
    own, _ = _shared_vaes()
    latents = torch.randn(videos, frames, 4, height, width, generator=torch.Generator().manual_seed(seed))
    whole, truth = own.decode_videos(latents), _shared_vaes(torch.float64)[0].decode_videos(latents.double())
    with in_pieces(numbers, roomy):
        assert ratio(own.decode_videos(latents, chunk), whole, truth) <= 4


_SHARED: dict[torch.dtype, tuple[VAE, AutoencoderKLTemporalDecoder]] = {}


def _shared_vaes(dtype: torch.dtype = torch.float32) -> tuple[VAE, AutoencoderKLTemporalDecoder]:
    if dtype not in _SHARED:
        # Few levels: all kinds of layers, and few pixels to take apart.
        own, reference = _vaes(dict(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2))
        _SHARED[dtype] = own.to(dtype), reference.to(dtype)
    return _SHARED[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(videos=st.integers(1, 2), height=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 999))
def test_fourteen_frames_in_every_chunk_size(
    dtype: torch.dtype, videos: int, height: int, width: int, seed: int
) -> None:
    """Also shows that diffusers' own chunking does depend on the chunk, by far more than rounding."""
    # Of a single pixel a norm sees two numbers a group, and rounding comes out at any size, whatever the chunk.
    assume(height * width > 1)
    latents = torch.randn(videos, 14, 4, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    own, reference = _shared_vaes(dtype)
    whole = torch.stack([reference.decode(video, 14).sample for video in latents])
    in_twos = torch.stack([torch.cat([reference.decode(c, 2).sample for c in video.split(2)]) for video in latents])
    truth = _shared_vaes(torch.float64)[0].decode_videos(latents.double())
    theirs = ratio(in_twos, whole, truth)
    for chunk in (1, 2, 3, 5, 8, 14):
        with in_pieces(2000):
            found = ratio(own.decode_videos(latents, chunk), whole, truth)
        note(f"chunk {chunk}: noise ratio {found:.2f}; diffusers, chunks of 2 against 14: {theirs:.0f}")
        assert found <= 4
    assert theirs > 20 or dtype == torch.bfloat16, "in bfloat16 rounding hides the cuts of the smallest clips"


def test_vae_decoder_trains() -> None:
    own, _ = _vaes({})
    with torch.enable_grad():
        own.decode_videos(torch.randn(1, 3, 4, 2, 2)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in own.decoder.parameters())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_equals_transformers(activation: str) -> None:
    config = {**TINY_CLIP, "hidden_act": activation}
    reference = randomize_(CLIPVisionModelWithProjection(HFCLIPVisionConfig(**config)), seed=7).eval()
    own = use_kernels(CLIPVision(CLIPVisionConfig(**config)))
    own.load_state_dict(reference.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(8))
    result, expected = own(pixels).image_embeds, reference(pixels).image_embeds
    assert ratio(result, expected, reference.double()(pixels.double()).image_embeds) <= 4


def test_clip_and_vae_configs_are_checked() -> None:
    with pytest.raises(SvdlabError, match="hidden_act: 'relu' is not implemented; allowed: gelu, quick_gelu"):
        CLIPVisionConfig(hidden_act="relu")
    with pytest.raises(SvdlabError, match="down_block_types: 'AttnDownEncoderBlock2D' is not implemented"):
        VAEConfig(down_block_types=("AttnDownEncoderBlock2D",))
    with pytest.raises(SvdlabError, match="down_block_types has 1 entries, block_out_channels has 2"):
        VAEConfig(block_out_channels=(32, 64))
