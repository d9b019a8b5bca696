"""A VAE with a scaled residual stream: the same bits in fp32, and in fp16 numbers at all."""

import json
import re
import shutil

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from shared.errors import UserError
from shared.models.fingerprint import fingerprint
from shared.models.rescale import (
    Float32GroupNorm,
    Scales,
    calibrate,
    rescale_vae,
    save_rescaled,
    scale_for,
    scales_of,
    vae_fingerprint,
)
from shared.models.vae import load_vae
from tests.support.sources import TINY_SD

WRITES = re.compile(r"conv_in|\.conv1|\.conv2|to_out\.0")
MAPS = re.compile(r"conv_shortcut\.bias|samplers\.0\.conv\.bias")


def make_loud(vae, factor):
    """Multiply the streams by `factor`, by the names of the weights and without touching eps."""
    for name, weight in vae.state_dict().items():
        if WRITES.search(name) or MAPS.search(name):
            weight.mul_(factor)
    return vae


def full_width(**config):
    """The architecture of SD 1.5's and SDXL's VAE with random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        **config,
    ).requires_grad_(False)


def pictures(count=1, side=64):
    noise = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, size=side, mode="bicubic").clamp(0, 1) * 2 - 1


@torch.inference_mode()
def both_ways(vae, images, latents=None):
    """The encoder's moments, and the decoder's picture of `latents` (else of their mean)."""
    moments = vae.encode(images.to(vae.dtype)).latent_dist.parameters
    latents = moments.chunk(2, 1)[0] if latents is None else latents
    return moments, vae.decode(latents.to(vae.dtype)).sample


def distance(ours, right):
    return float((ours.float() - right).norm() / right.norm())


def tamed_in_fp16(vae, images):
    """Assert what the module promises of a loud VAE; returns its scales and two distances."""
    right, picture = both_ways(vae, images)
    mean = right.chunk(2, 1)[0]
    scales = calibrate(vae, images)
    tamed = rescale_vae(vae, scales.encoder, scales.decoder)
    for ours, theirs in zip(both_ways(tamed, images), (right, picture), strict=True):
        assert torch.equal(ours, theirs)
    plain = rescale_vae(vae, 1.0, 1.0).half()  # with fp32 norms, so that they are not to blame
    for broken in both_ways(plain, images, mean):
        assert not broken.isfinite().any()
    moments, decoded = both_ways(tamed.half(), images, mean)
    assert moments.isfinite().all()
    found = distance(moments.chunk(2, 1)[0], mean), distance(decoded, picture)
    assert max(found) < 0.01, found
    return scales, found


@pytest.fixture(scope="module")
def tiny():
    return load_vae(str(TINY_SD))


@pytest.fixture
def loud():
    return make_loud(load_vae(str(TINY_SD)), 3170.0)


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 1), (2, 7), (10, 3), (20, 20), (55, 40)])
def test_fp32_output_keeps_every_bit(tiny, encoder, decoder):
    scaled = rescale_vae(tiny, 2.0**-encoder, 2.0**-decoder)
    for ours, right in zip(both_ways(scaled, pictures()), both_ways(tiny, pictures()), strict=True):
        assert torch.equal(ours, right)
    if encoder > 1:
        assert not torch.equal(scaled.encoder.conv_in.weight, tiny.encoder.conv_in.weight)
        assert not torch.equal(scaled.decoder.conv_in.weight, tiny.decoder.conv_in.weight)


def test_a_vae_that_overflows_in_fp16_works_after_it(loud):
    scales, _ = tamed_in_fp16(loud, pictures(2))
    assert scales.encoder < 1
    assert scales.decoder < 1


def test_plain_diffusers_fp16_is_not_finite_either(loud):
    moments, _ = both_ways(loud.half(), pictures())
    assert not moments.isfinite().any()


def test_the_scale_is_the_largest_that_brings_the_stream_below_4096(loud):
    scales = calibrate(loud, pictures(2))
    peaks = []
    scaled = rescale_vae(loud, scales.encoder, scales.decoder)
    for name, module in scaled.encoder.named_modules():
        if isinstance(module, ResnetBlock2D) or name.endswith((".conv1", ".conv2", "conv_in")):
            module.register_forward_hook(lambda _, __, out: peaks.append(float(out.abs().max())))
    both_ways(scaled, pictures(2))
    assert 2**11 <= max(peaks) < 2**12
    assert [scale_for(peak) for peak in (1.0, 4095.9, 4096.0, 2.0**20)] == [1, 1, 0.5, 2.0**-9]
    with pytest.raises(UserError, match="not finite in float32"):
        scale_for(float("nan"))


def test_a_vae_that_fits_is_left_as_it_is(tiny):
    assert calibrate(tiny, pictures(2)) == Scales(1.0, 1.0)


def test_norms_of_a_flat_picture_survive_fp16():
    """eps * s * s is below fp16's smallest number; the answer is the bias, not 0/0."""
    norm = Float32GroupNorm(2, 4, eps=1e-6 * 2.0**-20).half()
    norm.bias.data[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    answer = norm(torch.full((1, 4, 8, 8), 0.1, dtype=torch.float16))
    assert answer.dtype == torch.float16
    assert answer.amax((0, 2, 3)).tolist() == answer.amin((0, 2, 3)).tolist() == [1, 2, 3, 4]


def test_the_original_is_untouched_and_recognised(tiny):
    before = fingerprint(tiny)
    scaled = rescale_vae(tiny, 2.0**-9, 2.0**-7)
    assert fingerprint(tiny) == before == vae_fingerprint(scaled)
    assert fingerprint(scaled) != before
    again = rescale_vae(scaled, 2.0, 2.0)
    assert scales_of(again) == Scales(2.0**-8, 2.0**-6)
    assert vae_fingerprint(again) == before
    assert tiny.config.force_upcast
    assert (
        not scaled.config.force_upcast
    )  # else diffusers' pipelines would run it in fp32 after all


def test_saved_and_loaded_it_is_equal(loud, tmp_path):
    scaled = rescale_vae(loud, 2.0**-6, 2.0**-9)
    save_rescaled(scaled, tmp_path / "model" / "vae")
    assert json.loads((tmp_path / "model/vae/rescale.json").read_text())["encoder"] == 2.0**-6
    right = both_ways(scaled, pictures())
    half = both_ways(scaled.half(), pictures())
    for source in (tmp_path / "model" / "vae", tmp_path / "model"):
        loaded = load_vae(str(source))
        assert scales_of(loaded) == Scales(2.0**-6, 2.0**-9)
        assert {m.eps for m in loaded.decoder.modules() if isinstance(m, nn.GroupNorm)} == {
            1e-6 * 2.0**-18
        }
        for ours, theirs in zip(both_ways(loaded, pictures()), right, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(both_ways(loaded.half(), pictures()), half, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("damage", ["{}", "[1]", "not json", '{"encoder": 0.3}', "other weights"])
def test_a_rescale_json_that_does_not_belong_there(tiny, tmp_path, damage):
    save_rescaled(rescale_vae(tiny, 0.5, 0.5), tmp_path / "vae")
    if damage == "other weights":
        tiny.save_pretrained(tmp_path / "vae")
    else:
        (tmp_path / "vae" / "rescale.json").write_text(damage)
    with pytest.raises(UserError, match=r"rescale\.json"):
        load_vae(str(tmp_path / "vae"))


class OwnBlock(ResnetBlock2D):
    """A class that the walk has never seen, however alike."""


def own_class(vae):
    vae.encoder.down_blocks[1].resnets[0].__class__ = OwnBlock


def own_convolution(vae):
    vae.decoder.mid_block.resnets[1].conv2 = nn.Sequential(vae.decoder.mid_block.resnets[1].conv2)


def sampler_norm(vae):
    vae.encoder.down_blocks[0].downsamplers[0].norm = nn.LayerNorm(8)


def output_scale(vae):
    vae.decoder.up_blocks[2].resnets[0].output_scale_factor = 1.5


def no_residual(vae):
    vae.encoder.mid_block.attentions[0].residual_connection = False


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (own_class, "OwnBlock"),
        (own_convolution, "Sequential"),
        (sampler_norm, "Downsample2D with a norm"),
        (output_scale, "output_scale_factor"),
        (no_residual, "residual connection"),
    ],
)
def test_what_it_does_not_know_it_refuses(spoil, named):
    vae = load_vae(str(TINY_SD))
    spoil(vae)
    with pytest.raises(UserError, match=named) as caught:
        rescale_vae(vae, 0.5, 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.5, 2.0**-80, float("nan")])
def test_only_powers_of_two(tiny, scale):
    with pytest.raises(UserError, match="power of two"):
        rescale_vae(tiny, 1.0, scale)


def test_without_attention_and_quant_convolutions():
    """As SD3's and Flux's VAEs are built."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).requires_grad_(False)
    scaled = rescale_vae(vae, 2.0**-8, 2.0**-8)
    for ours, right in zip(both_ways(scaled, pictures()), both_ways(vae, pictures()), strict=True):
        assert torch.equal(ours, right)


def test_a_vae_on_the_hub_without_a_model_around_it(tiny, tmp_path, monkeypatch):
    """The layout of the hub's own cache, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--their-vae"
    save_rescaled(rescale_vae(tiny, 0.25, 0.5), repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    loaded = load_vae("someone/their-vae")
    assert scales_of(loaded) == Scales(0.25, 0.5)
    assert vae_fingerprint(loaded) == fingerprint(tiny)
    with pytest.raises(UserError, match="no VAE can be read from 'someone/else'"):
        load_vae("someone/else")


def test_a_folder_with_another_network_is_no_vae(tmp_path):
    shutil.copytree(TINY_SD / "unet", tmp_path / "unet")
    with pytest.raises(UserError, match="UNet2DConditionModel, not an AutoencoderKL"):
        load_vae(str(tmp_path / "unet"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "factor"),
    [({}, 3e4), ({"force_upcast": True, "scaling_factor": 0.13025, "sample_size": 1024}, 3e5)],
    ids=["sd15", "sdxl"],
)
def test_full_width(config, factor):
    scales, _ = tamed_in_fp16(make_loud(full_width(**config), factor), pictures(side=16))
    assert scales.encoder < 1
    assert scales.decoder < 1
