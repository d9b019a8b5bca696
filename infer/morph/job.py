"""What `morph` is going to do, decided before anything is learned or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infer.config import MorphConfig
from infer.learn.lesson import Lesson
from infer.learn.recipe import recipe_of
from infer.pipelines.inversion import Trajectory, trajectory_of
from shared.errors import UsageError
from shared.models.family import Model, model_name, resolve_model
from shared.storage.files import beside, check_free, guard
from shared.wording import counted

MORPHED = Path("morphed")
EXAMPLE = "python -m infer morph cat.jpg dog.jpg --prompts 'a photo of a cat' 'a photo of a dog'"
# Flags of learning, which do nothing where nothing is learned.
LEARNING = ("learn_steps", "rank", "learning_rate", "train_batch_size", "gradient_checkpointing",
            "seed")  # fmt: skip
ADDED = 3  # frames that are drawn to choose from, for each that is asked for


@dataclass(frozen=True)
class Job:
    """Two pictures, what leads from one to the other, and where the frames go."""

    config: MorphConfig
    model: Model
    lessons: tuple[Lesson, Lesson]
    way: Trajectory
    output: Path

    @property
    def runs(self) -> list[Path]:
        """Whose LoRAs are led one into the other."""
        return [one.run for one in self.lessons] if self.config.learn else []

    @property
    def kept_steps(self) -> int:
        """Of DDIM, in which self-attention sees both ends."""
        return round(self.config.attention * self.way.steps)

    @property
    def drawings(self) -> int:
        """How often the way is gone, there or back: for each end both, for each frame back."""
        return 4 + self.config.frames - 2 + self.added

    @property
    def added(self) -> int:
        """Frames that are drawn besides, to choose evenly spaced ones of all."""
        return ADDED * self.config.frames if self.config.reschedule else 0

    def __str__(self) -> str:
        """What will be done."""
        config, (first, last) = self.config, self.lessons
        side = first.recipe.resolution
        how = ["noises and embeddings interpolated"]
        how += [f"LoRAs of rank {config.rank}, learned and interpolated"] * config.learn
        how += ["AdaIN"] * config.adain
        how += [f"attention to both ends for {counted(self.kept_steps, 'step')}"] * bool(
            self.kept_steps
        )
        how += ["spaced evenly"] * config.reschedule
        return (
            f"morph {first.picture} into {last.picture} with {model_name(config.model)}: "
            f"{counted(config.frames, 'frame')} of {side}x{side} px, "
            f"{counted(config.steps, 'step')} of DDIM, {', '.join(how)}; into {self.output}"
        )


def plan_job(config: MorphConfig) -> Job:
    """Check the flags, and decide what they leave open.

    Raises UsageError for a command that is not whole, and UserError for what is no picture and for
    an output that has something in it.
    """
    if len(config.pictures) != 2:
        raise UsageError(f"which two pictures? For example: {EXAMPLE}")
    if len(config.prompts) != 2 or not all(one.strip() for one in config.prompts):
        raise UsageError(f"what do the two pictures show? Say both, as in: {EXAMPLE}")
    idle = [name for name in LEARNING if name in config.typed and not config.learn]
    if idle:
        flag = f"--{idle[0].replace('_', '-')}"
        raise UsageError(f"{flag} is of learning and means nothing beside --no-learn; leave it out")
    model = resolve_model(config.model)
    way = trajectory_of(model, config.steps)
    first, last = (
        lesson_of(config, model, *pair)
        for pair in zip(config.pictures, config.prompts, strict=True)
    )
    return Job(config, model, (first, last), way, output_of(config))


def lesson_of(config: MorphConfig, model: Model, picture: Path, prompt: str) -> Lesson:
    """How one of the pictures is learned: as `learn` does it, so that its run is found here."""
    recipe = recipe_of(config, model, picture, prompt.strip(), config.learn_steps)
    return Lesson(config, model, recipe, picture, recipe.folder())


def output_of(config: MorphConfig) -> Path:
    """The folder that will appear. Raises UserError for one that has something in it."""
    if config.output is not None:
        check_free(config.output)
        with guard(config.output), beside(config.output) as tmp:  # before hours of drawing
            tmp.mkdir(parents=True, exist_ok=True)
        return config.output
    name = "-to-".join(one.stem for one in config.pictures)
    names = [name, *(f"{name}-{number}" for number in range(2, 10_000))]
    return next(MORPHED / one for one in names if not (MORPHED / one).exists())
