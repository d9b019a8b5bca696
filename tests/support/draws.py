"""All random numbers of one sample at once, as the loader draws them one after the other."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.cache.draws import Choice, DrawSpec, choose, draw_noises, generator


@dataclass(frozen=True)
class Draw(Choice):
    """One sample's draws; the noises have the latents' shape `[C, h, w]`, fp32."""

    noise: NDArray[np.float32]
    latent_noise: NDArray[np.float32] | None


def draw(spec: DrawSpec, position: int, num_captions: int, shape: tuple[int, ...]) -> Draw:
    """Draw for the sample at `position`."""
    rng = generator(spec, position)
    choice = choose(spec, rng, num_captions)
    noise = np.empty(shape, dtype=np.float32)
    latent_noise = draw_noises(spec, rng, noise)
    return Draw(**vars(choice), noise=noise, latent_noise=latent_noise)
