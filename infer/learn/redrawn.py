"""Does the LoRA draw the picture? Measured against what the VAE makes of it, and shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.learn.recipe import Recipe
from infer.pictures.write import write_sheet
from infer.pipelines import inversion
from infer.pipelines.adapters import share
from shared.cli.progress import Progress
from shared.models.family import Model

SHEET = "redrawn.png"
STEPS = 50
PASSES = 4 * STEPS
ETA = 1.0  # new noise in each step leaves nothing of what the steps before got wrong

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Redrawn:
    """A picture `[H, W, 3]`, and the ways to draw it anew."""

    picture: Pixels  # as it was learned: cut out and resized
    reconstruction: Pixels  # by the VAE alone, the best that any LoRA can do
    from_inverted: Pixels  # DDIM, from the noise that DDIM's inversion finds
    from_noise: Pixels  # DDIM with eta 1, from plain noise and the prompt
    without_lora: Pixels  # the same by the model alone

    def psnr(self, drawn: Pixels) -> float:
        """How near a drawing comes to the VAE's reconstruction, in dB."""
        return inversion.psnr(drawn, self.reconstruction)

    def __str__(self) -> str:
        return (
            f"redrawn: {self.psnr(self.from_noise):.1f} dB from plain noise and the prompt "
            f"(without the LoRA {self.psnr(self.without_lora):.1f} dB), "
            f"{self.psnr(self.from_inverted):.1f} dB from its inverted noise, against the VAE's "
            "own reconstruction"
        )


def redraw(pipe: Any, model: Model, recipe: Recipe, picture: Pixels) -> Redrawn:
    """Draw a learned picture from plain and from inverted noise; the LoRA is `pipe`'s first."""
    way = inversion.trajectory_of(model, STEPS)
    prompt = inversion.encode_prompt(pipe, recipe.prompt)
    latents = inversion.encode_picture(pipe, picture)
    noise = inversion.noise_of(latents, recipe.seed)
    with Progress("redraw", PASSES, "step") as progress:

        def after_step() -> None:
            progress.update(1)

        without = inversion.redraw(pipe, way, noise, prompt, after_step, ETA)
        share(pipe, [1.0])
        plain = inversion.redraw(pipe, way, noise, prompt, after_step, ETA)
        inverted = inversion.invert(pipe, way, latents, prompt, after_step)
        back = inversion.redraw(pipe, way, inverted, prompt, after_step)
    pictures = (inversion.decode(pipe, one) for one in (latents, back, plain, without))
    return Redrawn(picture, *pictures)


def write(path: Path, redrawn: Redrawn, label: str) -> None:
    """Write them side by side, each with its PSNR."""
    columns = {
        "picture": redrawn.picture,
        "the VAE's own": redrawn.reconstruction,
        "from inverted noise": redrawn.from_inverted,
        "from plain noise": redrawn.from_noise,
        "without the LoRA": redrawn.without_lora,
    }
    titles = [
        f"{name}\n{redrawn.psnr(pixels):.1f} dB" if pixels is not redrawn.reconstruction else name
        for name, pixels in columns.items()
    ]
    write_sheet(path, [list(columns.values())], titles, [label])
