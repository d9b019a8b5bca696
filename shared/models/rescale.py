"""A VAE whose residual stream is scaled by a power of two, and whose output stays the same.

GroupNorm does not see the scale of what it reads, and everything that leaves the stream leaves it
through a GroupNorm. So what writes to the stream is multiplied by s and the eps of the norms that
read it by s * s: a VAE that overflows in fp16 then fits, and in fp32 not a bit of its output
changes. docs/fp16-vae.md has the argument and the measurements.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from shared.errors import UserError
from shared.models.fingerprint import fingerprint
from shared.storage.files import dump_json, load_record, publish
from shared.storage.tensors import tensor_chunks
from shared.storage.typed_json import typed

PEAK_LIMIT = 2.0**12  # 16 times below fp16's largest number: room for other pictures
RESCALE_FILE = "rescale.json"


@dataclass(frozen=True)
class Scales:
    """Powers of two by which the encoder's and the decoder's stream are multiplied."""

    encoder: float = 1.0
    decoder: float = 1.0


@dataclass
class StreamLayers:
    """Who has to do with the residual stream of an encoder or a decoder."""

    writers: list[nn.Conv2d | nn.Linear] = field(default_factory=list)  # only write to it
    mappers: list[nn.Conv2d] = field(default_factory=list)  # read it and write to it
    norms: list[nn.GroupNorm] = field(default_factory=list)  # read it


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm that computes in fp32 whatever it is given.

    In fp16, eps * s * s would be rounded to zero, and a flat picture divided by it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, in the input's dtype."""
        weight, bias = self.weight.float(), self.bias.float()
        normal = nn.functional.group_norm(input.float(), self.num_groups, weight, bias, self.eps)
        return normal.to(input.dtype)


def rescale_vae(vae: AutoencoderKL, encoder_scale: float, decoder_scale: float) -> AutoencoderKL:
    """Copy a VAE, its residual streams scaled by powers of two; in fp32 it computes the same bits.

    Scaling a scaled VAE multiplies the scales. The copy's `force_upcast` is off, so that diffusers'
    pipelines leave it in fp16. Raises UserError for a VAE that is not built as AutoencoderKL is.
    """
    former = scales_of(vae)
    scaled = copy.deepcopy(vae)
    for stack, scale in ((scaled.encoder, encoder_scale), (scaled.decoder, decoder_scale)):
        check_scale(scale)
        layers = stream_layers(stack)
        with torch.no_grad():
            for writer in layers.writers:
                writer.weight.mul_(scale)
            for part in [*layers.writers, *layers.mappers]:
                if part.bias is not None:
                    part.bias.mul_(scale)
    scales = Scales(former.encoder * encoder_scale, former.decoder * decoder_scale)
    _adjust_norms(scaled, encoder_scale, decoder_scale)
    scaled.rescale = scales
    scaled.register_to_config(force_upcast=False)
    return scaled


def scales_of(vae: AutoencoderKL) -> Scales:
    """Return how a VAE's streams are scaled; 1 and 1 for an ordinary one."""
    scales: Scales = vae.__dict__.get("rescale", Scales())
    return scales


def plain_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """Return the VAE as it was before it was rescaled, with the same weights bit for bit."""
    scales = scales_of(vae)
    return vae if scales == Scales() else rescale_vae(vae, 1 / scales.encoder, 1 / scales.decoder)


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """Return the fingerprint of the unscaled weights: VAEs that compute the same have the same."""
    return fingerprint(plain_vae(vae))


def calibrate(vae: AutoencoderKL, images: Tensor) -> Scales:
    """Scales that keep both streams below 2**12 for these pictures, `[N, 3, H, W]` in [-1, 1].

    The decoder is calibrated on the encoder's answer. Wants the VAE in fp32, since in fp16 the
    peak would be lost; raises UserError where the stream is not even finite there.
    """
    assert vae.dtype == torch.float32, vae.dtype
    with torch.inference_mode():
        images = images.to(vae.device)
        encoder = encoder_peak(vae, images)
        latents = vae.encode(images).latent_dist.mean
        decoder = stream_peak(vae.decoder, partial(vae.decode, latents))
    return Scales(scale_for(encoder), scale_for(decoder))


def encoder_peak(vae: AutoencoderKL, images: Tensor) -> float:
    """Return the largest magnitude in the encoder's stream; inf or nan where it is not finite."""
    return stream_peak(vae.encoder, partial(vae.encode, images))


def scale_for(peak: float) -> float:
    """Return the largest power of two, at most 1, that brings `peak` below 2**12."""
    if not math.isfinite(peak):
        raise UserError(
            "the VAE's activations are not finite in float32: its weights are damaged, "
            "or the calibration pictures are not in [-1, 1]"
        )
    scale = 1.0
    while peak * scale >= PEAK_LIMIT:
        scale /= 2
    return scale


@torch.inference_mode()
def stream_peak(stack: nn.Module, run: Callable[[], object]) -> float:
    """Measure the largest magnitude in the stream of `stack`, an encoder or decoder, in `run`."""
    layers = stream_layers(stack)
    seen: list[Tensor] = []

    def note(values: Tensor) -> None:
        seen.append(values.abs().amax())

    handles = [
        part.register_forward_hook(lambda _, __, output: note(output))
        for part in [*layers.writers, *layers.mappers]
    ] + [
        part.register_forward_pre_hook(lambda _, inputs: note(inputs[0]))
        for part in [*layers.mappers, *layers.norms]
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.stack(seen).amax())  # amax passes a nan on


def save_rescaled(vae: AutoencoderKL, folder: Path) -> None:
    """Write a diffusers folder and `rescale.json`, which `shared.models.vae.load_vae` reads.

    The eps of the norms is not part of the VAE's config, so diffusers alone would not restore it.
    """
    # First, so that scaled weights never lie there without their scales.
    stored = {**asdict(scales_of(vae)), "fingerprint": fingerprint(vae)}
    publish([dump_json(stored)], folder / RESCALE_FILE, folder)
    publish([vae.to_json_string().encode()], folder / "config.json", folder)
    weights = tensor_chunks(vae.state_dict(), {"format": "pt"})
    publish(weights, folder / "diffusion_pytorch_model.safetensors", folder)


def restore(vae: AutoencoderKL, file: Path) -> None:
    """Set a freshly loaded VAE's norms as its `rescale.json` says.

    Raises UserError where the file is damaged or belongs to other weights.
    """

    def build(stored: Mapping[str, Any]) -> tuple[Scales, str]:
        encoder, decoder = (typed(stored[name], float, name) for name in ("encoder", "decoder"))
        return Scales(encoder, decoder), typed(stored["fingerprint"], str, "fingerprint")

    scales, saved = load_record(file, build, "save the rescaled VAE again")
    if saved != fingerprint(vae):
        raise UserError(
            f"{file} belongs to other weights than those beside it; remove it if they are not "
            "rescaled, else save the rescaled VAE again"
        )
    check_scale(scales.encoder)
    check_scale(scales.decoder)
    _adjust_norms(vae, scales.encoder, scales.decoder)
    vae.rescale = scales


def check_scale(scale: float) -> None:
    """Raise UserError for anything but a power of two that fp32 can hold squared."""
    if not (2.0**-60 <= scale <= 2.0**60 and math.frexp(scale)[0] == 0.5):
        raise UserError(f"scale {scale} is not a power of two between 2**-60 and 2**60")


def _adjust_norms(vae: AutoencoderKL, encoder_scale: float, decoder_scale: float) -> None:
    for stack, scale in ((vae.encoder, encoder_scale), (vae.decoder, decoder_scale)):
        for norm in stream_layers(stack).norms:
            norm.eps *= scale * scale
            norm.__class__ = Float32GroupNorm  # the same parameters, another forward


def stream_layers(stack: nn.Module) -> StreamLayers:
    """Find all that writes, maps or reads the stream of an AutoencoderKL's encoder or decoder.

    Raises UserError at the first module of a class, or with a setting, that is not known to let
    the stream be scaled.
    """
    layers = StreamLayers()
    _collect(stack, layers)
    for part in [*layers.writers, *layers.mappers]:
        _expect(type(part) in (nn.Conv2d, nn.Linear), part, "where a convolution is expected")
    for norm in layers.norms:
        _expect(type(norm) in (nn.GroupNorm, Float32GroupNorm), norm, "where GroupNorm is expected")
        _expect(norm.affine, norm, "without weights")
    return layers


def _collect(module: Any, layers: StreamLayers) -> None:
    kind = type(module)
    if kind in (Encoder, Decoder):
        layers.writers.append(module.conv_in)
        blocks = module.down_blocks if kind is Encoder else module.up_blocks
        for block in [*blocks, module.mid_block]:
            _collect(block, layers)
        layers.norms.append(module.conv_norm_out)
    elif kind in (DownEncoderBlock2D, UpDecoderBlock2D, UNetMidBlock2D):
        for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
            for part in getattr(module, name, None) or ():
                if part is not None:  # the middle block of a VAE without attention
                    _collect(part, layers)
    elif kind is ResnetBlock2D:
        _expect(module.output_scale_factor == 1, module, "with output_scale_factor")
        _expect(module.time_emb_proj is None, module, "with a time embedding")
        _expect(not module.up and not module.down, module, "that resamples")
        layers.norms += [module.norm1, module.norm2]
        layers.writers += [module.conv1, module.conv2]  # conv1 writes what norm2 reads
        if module.conv_shortcut is not None:
            layers.mappers.append(module.conv_shortcut)
    elif kind is Attention:
        _expect(module.rescale_output_factor == 1, module, "with rescale_output_factor")
        _expect(module.residual_connection, module, "without residual connection")
        _expect(module.spatial_norm is None, module, "with a spatial norm")
        layers.norms.append(module.group_norm)
        layers.writers.append(module.to_out[0])
    elif kind in (Downsample2D, Upsample2D):
        _expect(module.norm is None, module, "with a norm")
        layers.mappers.append(module.conv)
    else:
        _expect(False, module, "which is not known here")


def _expect(condition: bool, module: nn.Module, what: str) -> None:
    if not condition:
        raise UserError(
            f"this VAE cannot be rescaled: it has a {type(module).__name__} {what}; "
            "use it in float32 (--vae-dtype float32)"
        )
