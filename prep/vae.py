"""Pixels to latents, in batches of a fixed shape.

A batch always has the recorded number of pictures, the last one padded: a convolution's summation
order depends on the batch size, and with it half a percent of the fp16 values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.fingerprint import fingerprint
from shared.rescale import encoder_peak, plain_vae, rescale_vae, scale_for
from shared.vae import load_vae

LOGVAR_RANGE = (-30.0, 20.0)  # what diffusers clamps to
POSTERIOR_MATTERS = 0.01  # of the latents' own spread
MOST_DEVIATION = 0.02  # of fp16 latents from those in fp32; a few tenths of a percent are usual


class VaeEncoder:
    """A frozen AutoencoderKL that computes in float32, float16 or bfloat16.

    In float16 its stream is scaled (see `shared.rescale`): by the `rescale` that a cache has
    recorded, else by what `calibrate` finds. What is not finite even so is encoded again in fp32;
    `retried` tells which pictures of the last batch those were.
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
        self.retried: list[bool] = []
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
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def identity(self) -> dict[str, object]:
        """What the cache records of this encoder."""
        return {
            "fingerprint": fingerprint(self.vae),
            "channels": self.channels,
            "downscale": self.downscale,
            "scaling_factor": float(self.vae.config.scaling_factor),
            "dtype": self.dtype,
            "rescale": self.rescale,
        }

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
        images = [self._images(np.stack([picture])) for picture in pixels]
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

    @torch.inference_mode()
    def encode(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Posterior mean and logvar `[N, 2C, h, w]` of up to `batch_size` pictures `[H, W, 3]`."""
        assert 0 < len(pixels) <= self.batch_size
        assert self.working is not None, "calibrate first"
        batch = np.zeros((self.batch_size, *pixels[0].shape), dtype=np.uint8)
        batch[: len(pixels)] = np.stack(pixels)
        images = self._images(batch)
        parameters = self._parameters(self.working, images)[: len(pixels)]
        self.retried = [False] * len(pixels)
        if self.working is not self.vae:
            # One by one: a picture's second chance has the same shape whoever its neighbours are.
            for index in (~parameters.isfinite().all(dim=(1, 2, 3))).nonzero().flatten().tolist():
                parameters[index] = self._parameters(self.vae, images[index : index + 1])[0]
                self.retried[index] = True
        mean, logvar = parameters.chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], 1).cpu().numpy()

    def _images(self, batch: NDArray[np.uint8]) -> Tensor:
        """`[N, H, W, 3]` as `[N, 3, H, W]` in [-1, 1]."""
        return torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _parameters(self, vae: AutoencoderKL, images: Tensor) -> Tensor:
        """Mean and logvar in fp32, the logvar not yet clamped, so that its overflow shows."""
        return vae.encode(images.to(vae.dtype)).latent_dist.parameters.float()


def posterior_matters(moments: NDArray[np.float32]) -> bool:
    """Does the posterior's std exceed 1% of the spread of the means? moments `[N, 2C, h, w]`."""
    mean, logvar = np.split(moments.astype(np.float64), 2, axis=1)
    return bool(np.exp(0.5 * logvar).mean() > POSTERIOR_MATTERS * mean.std())
