"""Pixels to latents, in batches of a fixed shape.

A batch always has the recorded number of pictures, the last one padded: a convolution's summation
order depends on the batch size, and with it half a percent of the fp16 values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from shared.cache.identity import VaeIdentity
from shared.errors import UserError
from shared.models.family import downscale_of
from shared.models.fingerprint import fingerprint
from shared.models.rescale import encoder_peak, plain_vae, rescale_vae, scale_for
from shared.models.vae import load_vae

LOGVAR_RANGE = (-30.0, 20.0)  # what diffusers clamps to
POSTERIOR_MATTERS = 0.01  # of the latents' own spread
MOST_DEVIATION = 0.02  # of fp16 latents from those in fp32; a few tenths of a percent are usual


@dataclass(frozen=True)
class Started:
    """A batch that the device may still be working on."""

    images: Tensor  # on the device, `[N, 3, H, W]`
    moments: Tensor  # on the CPU, `[n, 2C, h, w]`; what padded the batch is left out
    finite: Tensor  # on the CPU, `[n]`: was the picture's every value?
    copied: torch.cuda.Event | None  # after which the two can be read


@dataclass(frozen=True)
class Posterior:
    """What the VAE says of a batch of pictures."""

    moments: NDArray[np.float32]  # mean and logvar, `[n, 2C, h, w]`
    retried: NDArray[np.bool_]  # `[n]`: was the picture encoded a second time, in float32?


class VaeEncoder:
    """A frozen AutoencoderKL that computes in float32, float16 or bfloat16.

    In float16 its stream is scaled (see `shared.models.rescale`): by the `rescale` that a cache has
    recorded, else by what `calibrate` finds. What is not finite even so is encoded again in fp32.
    """

    def __init__(
        self,
        source: str,
        device: torch.device,
        batch_size: int,
        dtype: str = "float32",
        rescale: float | None = None,
    ) -> None:
        # Unscaled whatever the source is, so that the scale that a cache records is the whole one.
        self.vae = plain_vae(load_vae(source)).to(device)
        self.source, self.device, self.batch_size, self.dtype = source, device, batch_size, dtype
        self.rescale: float | None = None
        self.working: AutoencoderKL | None = None
        if dtype != "float16":  # bfloat16 reaches as far as float32
            rescale = 1.0
        if rescale is not None:
            self.rescale_by(rescale)

    @property
    def channels(self) -> int:
        """C of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def downscale(self) -> int:
        """Pixels per latent, each way."""
        return downscale_of(self.vae.config)

    def identity(self) -> VaeIdentity:
        """Describe the encoder as a cache records it."""
        return vae_identity(self.vae, self.dtype, self.rescale)

    def rescale_by(self, scale: float) -> None:
        """Compute with the encoder's stream multiplied by a power of two."""
        self.rescale = scale
        if self.dtype == "float32":
            self.working = self.vae
        else:
            scaled = rescale_vae(self.vae, scale, 1.0)
            self.working = scaled.half() if self.dtype == "float16" else scaled.bfloat16()

    @torch.inference_mode()
    def calibrate(self, pixels: Sequence[NDArray[np.uint8]]) -> None:
        """Choose the scale by these pictures, unless there is one already.

        Raises UserError where float16 would cost the latents more than 2%.
        """
        if self.working is not None:
            return
        images = [self._images(torch.from_numpy(np.stack([picture]))) for picture in pixels]
        peaks = [encoder_peak(self.vae, image) for image in images]
        finite = [peak for peak in peaks if math.isfinite(peak)]  # one bad picture decides nothing
        self.rescale_by(scale_for(max(finite, default=math.inf)))
        found = sorted(self._deviation(image) for image in images)
        if (median := found[len(found) // 2]) > MOST_DEVIATION:
            raise UserError(
                f"{self.source}: in {self.dtype} the VAE's latents deviate by {median:.1%} from "
                f"those in float32, where {MOST_DEVIATION:.0%} is the most; "
                "pass --vae-dtype float32"
            )

    def _deviation(self, image: Tensor) -> float:
        """Relative L2 distance of the means from fp32's; infinite where they are not finite."""
        right = self._parameters(self.vae, image)[:, : self.channels]
        ours = self._parameters(self.working, image)[:, : self.channels]
        distance = float((ours - right).norm() / right.norm())
        return distance if math.isfinite(distance) else math.inf

    def encode(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Posterior mean and logvar `[n, 2C, h, w]` of up to `batch_size` pictures `[H, W, 3]`."""
        return self.finish(self.start(pixels)).moments

    @torch.inference_mode()
    def start(self, pixels: Sequence[NDArray[np.uint8]]) -> Started:
        """Start what `encode` does; a GPU works on it while this thread does something else."""
        assert 0 < len(pixels) <= self.batch_size
        assert self.working is not None, "calibrate first"
        cuda = self.device.type == "cuda"
        # Copies from and to pinned memory do not wait for the device.
        shape = (self.batch_size, *pixels[0].shape)
        batch = torch.zeros(shape, dtype=torch.uint8, pin_memory=cuda)
        np.stack(pixels, out=batch.numpy()[: len(pixels)])
        images = self._images(batch)
        parameters = self._parameters(self.working, images)[: len(pixels)]
        finite = parameters.isfinite().all(dim=(1, 2, 3)).to("cpu", non_blocking=cuda)
        moments = _clamped(parameters).to("cpu", non_blocking=cuda)
        copied = None
        if cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
        return Started(images, moments, finite, copied)

    @torch.inference_mode()
    def finish(self, started: Started) -> Posterior:
        """Wait until the device is done, and encode again in fp32 what is not finite."""
        if started.copied is not None:
            started.copied.synchronize()
        retried = ~started.finite.numpy()
        if self.working is self.vae:  # which was fp32
            retried[:] = False
        # One by one: a picture's second chance has the same shape whoever its neighbours are.
        for index in retried.nonzero()[0].tolist():
            again = self._parameters(self.vae, started.images[index : index + 1])
            started.moments[index] = _clamped(again)[0]
        return Posterior(started.moments.numpy(), retried)

    def _images(self, batch: Tensor) -> Tensor:
        """`[N, H, W, 3]` as `[N, 3, H, W]` in [-1, 1]."""
        images = batch.to(self.device, non_blocking=batch.is_pinned())
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def _parameters(self, vae: AutoencoderKL, images: Tensor) -> Tensor:
        """Mean and logvar in fp32, the logvar not yet clamped, so that its overflow shows."""
        parameters: Tensor = vae.encode(images.to(vae.dtype)).latent_dist.parameters
        return parameters.float()


def vae_identity(vae: AutoencoderKL, dtype: str, rescale: float | None) -> VaeIdentity:
    """Describe an unscaled VAE, and what it computes in, as a cache records it."""
    return VaeIdentity(
        fingerprint=fingerprint(vae),
        channels=int(vae.config.latent_channels),
        downscale=downscale_of(vae.config),
        scaling_factor=float(vae.config.scaling_factor),
        dtype=dtype,
        rescale=rescale,
        config={name: vae.config[name] for name in ("act_fn", "norm_num_groups")},
    )


def _clamped(parameters: Tensor) -> Tensor:
    """Clamp the logvar as diffusers does."""
    mean, logvar = parameters.chunk(2, dim=1)
    return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], 1)


def posterior_matters(moments: NDArray[np.float32]) -> bool:
    """Does the posterior's std exceed 1% of the spread of the means? moments `[N, 2C, h, w]`."""
    mean, logvar = np.split(moments.astype(np.float64), 2, axis=1)
    return bool(np.exp(0.5 * logvar).mean() > POSTERIOR_MATTERS * mean.std())
