"""A picture that is learned: what is to do, how long it takes, and the doing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from infer.config import LearnFlags
from infer.learn import redrawn
from infer.learn.recipe import Recipe, check, claim
from infer.learn.stages import is_learned, make_cache, train_lora
from infer.pictures.read import content, framed
from infer.pipelines.adapters import load_with_adapters
from infer.pipelines.timing import seconds_per_pass
from shared.machine.device import pick_device
from shared.models.family import Model, model_name, vae_downscale
from shared.networks.denoiser import Denoiser
from shared.wording import counted

STOPPED = 143  # the exit status that shells give to SIGTERM
FORWARD_AND_BACK = 3.5  # a step through frozen weights and a LoRA, in passes without gradients


@dataclass(frozen=True)
class Lesson:
    """A picture, how it is learned, and the run that learns it."""

    flags: LearnFlags
    model: Model
    recipe: Recipe
    picture: Path
    run: Path

    def __str__(self) -> str:
        """What will be done."""
        recipe = self.recipe
        return (
            f"learn {self.picture} as {recipe.prompt!r}: a LoRA of rank {recipe.rank} for "
            f"{model_name(self.flags.model)}, {counted(recipe.steps, 'step')} of "
            f"{recipe.train_batch_size} noises at {recipe.resolution} px, on "
            f"{pick_device(self.flags.device).type}, into {self.run}"
        )

    def learned(self) -> bool:
        """Has this been learned? Raises UserError where the run has learned something else."""
        check(self.run, self.recipe)
        return is_learned(self.flags, self.recipe, self.run)

    def learn(self) -> int:
        """Learn the picture and measure what is learned; what is there is kept.

        Returns the exit status: 0, or that of a signal, after which the same command goes on.
        """
        claim(self.run, self.recipe)
        if self.learned():
            print(f"{self.picture} has been learned: {self.run}", file=sys.stderr)
        else:
            data = content(self.picture, "picture")
            make_cache(self.flags, self.recipe, data, self.run)
            if status := train_lora(self.flags, self.recipe, self.run):
                return status
            if not self.learned():
                return STOPPED  # SIGTERM; what there is, is saved
        if not (self.run / redrawn.SHEET).exists():
            self.measure()
        return 0

    def measure(self) -> None:
        """Draw the picture with what was learned; say how near that comes, and show it."""
        pipe = load_with_adapters(self.flags, [self.run])
        pixels = framed(content(self.picture, "picture"), self.recipe.resolution)
        found = redrawn.redraw(pipe, self.model, self.recipe, pixels)
        sheet = self.run / redrawn.SHEET
        redrawn.write(sheet, found, self.recipe.prompt)
        print(f"{found}: {sheet}", file=sys.stderr)


def seconds_of(lessons: list[Lesson], unet: Denoiser) -> float:
    """About how long these take that have something to learn, by passes of their model's UNet."""
    if not lessons:
        return 0.0
    recipe = lessons[0].recipe
    side = recipe.resolution // vae_downscale(lessons[0].model.source)
    learning = FORWARD_AND_BACK * seconds_per_pass(unet, side, side, recipe.train_batch_size)
    drawing = redrawn.PASSES * seconds_per_pass(unet, side, side)
    return len(lessons) * (recipe.steps * learning + drawing)
