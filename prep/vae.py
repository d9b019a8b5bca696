"""Pixels to latents, in batches of a fixed shape.

A batch always has the recorded number of pictures, the last one padded: a convolution's summation
order depends on the batch size, and with it half a percent of the fp16 values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from shared.fingerprint import fingerprint
from shared.vae import load_vae

LOGVAR_RANGE = (-30.0, 20.0)  # what diffusers clamps to
POSTERIOR_MATTERS = 0.01  # of the latents' own spread


class VaeEncoder:
    """A frozen AutoencoderKL in fp32."""

    def __init__(self, source: str, device: torch.device, batch_size: int) -> None:
        self.vae = load_vae(source).to(device)
        self.device, self.batch_size = device, batch_size

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
            "dtype": "float32",
            "rescale": 1.0,
        }

    @torch.inference_mode()
    def encode(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Posterior mean and logvar `[N, 2C, h, w]` of up to `batch_size` pictures `[H, W, 3]`."""
        assert 0 < len(pixels) <= self.batch_size
        batch = np.zeros((self.batch_size, *pixels[0].shape), dtype=np.uint8)
        batch[: len(pixels)] = np.stack(pixels)
        images = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        logvar = posterior.logvar.clamp(*LOGVAR_RANGE)
        return torch.cat([posterior.mean, logvar], 1)[: len(pixels)].cpu().numpy()


def posterior_matters(moments: NDArray[np.float32]) -> bool:
    """Does the posterior's std exceed 1% of the spread of the means? moments `[N, 2C, h, w]`."""
    mean, logvar = np.split(moments.astype(np.float64), 2, axis=1)
    return bool(np.exp(0.5 * logvar).mean() > POSTERIOR_MATTERS * mean.std())
