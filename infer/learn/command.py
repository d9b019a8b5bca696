"""`infer learn`: a picture becomes a LoRA that draws it."""

from __future__ import annotations

import sys

from infer.config import LearnConfig
from infer.learn.lesson import Lesson, seconds_of
from infer.learn.recipe import recipe_of
from infer.pipelines.adapters import bare_unet
from shared.errors import UsageError
from shared.machine.device import set_threads
from shared.models.family import resolve_model
from shared.wording import duration


def learn(config: LearnConfig) -> int:
    """Learn a picture, unless it has been learned; measure the result, and print where it is.

    Returns the exit status. Raises UserError, before anything is written, for what is no picture,
    and UsageError where the prompt is missing.
    """
    picture, prompt = config.picture, (config.prompt or "").strip()
    if picture is None:
        raise UsageError(
            "which picture? For example: python -m infer learn cat.jpg --prompt 'a photo of a cat'"
        )
    if not prompt:
        raise UsageError(f"what does {picture} show? Say it: --prompt 'a photo of a cat'")
    set_threads(config.threads)
    model = resolve_model(config.model)
    recipe = recipe_of(config, model, picture, prompt, config.steps)
    lesson = Lesson(config, model, recipe, picture, config.output or recipe.folder())
    if not lesson.learned():
        print(lesson, file=sys.stderr)
        seconds = seconds_of([lesson], bare_unet(config, model))
        print(f"this takes about {duration(seconds)}", file=sys.stderr)
    status = lesson.learn()
    if status == 0:
        print(lesson.run)
    return status
