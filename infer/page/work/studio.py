"""What the tab Draw wants becomes pictures, by what `infer draw` consists of.

A picture is the one that `infer draw` would write with the same settings, byte for byte.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.config import DrawConfig, MachineFlags
from infer.draw.artist import draw_one, steps_taken
from infer.draw.command import file_name
from infer.draw.flags import check_flags
from infer.draw.job import Job, plan_job
from infer.page.work.following import OnStep
from infer.page.work.held import Held
from infer.pictures.write import write_drawn
from infer.pipelines.build import load_pipeline, pick_dtype, pipeline_class, settings
from infer.pipelines.choose import Choice, choose
from infer.pipelines.loras import find_lora
from infer.pipelines.sampling import Guidance
from shared.cli.ranges import check_numbers
from shared.machine.device import pick_device, use_device
from shared.style import join_scale
from shared.wording import counted, duration

REMEMBERED = 16  # pictures of teachers, which many students are compared with

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Wish:
    """What is to be drawn, as the page asks for it."""

    run: Path | None  # the student's; else `model` draws, alone
    model: str | None
    prompt: str
    negative_prompt: str = ""
    steps: int | None = None  # None, also for the guidance: those that suit what draws
    guidance_scale: float | None = None
    seed: int = 0
    scheduler: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    image: Path | None = None
    strength: float = 0.6
    teacher_steps: int = 0  # 0 for no teacher beside the student


@dataclass(frozen=True)
class Drawing:
    """A picture that is planned, and how it will be drawn."""

    job: Job
    negative_left_out: bool  # because it would do nothing

    def key(self) -> Hashable:
        """Tell the pipeline, with its weights as they are on disk, from others."""
        choice = self.job.choice
        files = [choice.unet, *(lora.path for lora in choice.loras)]
        weights = [(str(one), state_of(one)) for one in files if one is not None]
        scales = [lora.scale for lora in choice.loras]
        return (choice.model.source, choice.vae, tuple(weights), tuple(scales), self.job.dtype)

    def picture_key(self) -> Hashable:
        """Tell the picture from others."""
        job, (prompt, seed) = self.job, next(self.job.pictures())
        image = job.given.image
        given = None if image is None else hashlib.sha256(image.tobytes()).digest()
        return (self.key(), tuple(job.metadata(prompt, seed).items()), given)

    @property
    def how(self) -> str:
        """In few words: steps, scheduler and guidance."""
        job, sampling = self.job, self.job.choice.sampling
        scheduler = type(sampling.scheduler).__name__.removesuffix("Scheduler")
        guided = f"guidance {job.guidance_scale:g}"
        if sampling.guidance is Guidance.LEARNED and job.guidance_scale == 1:
            guided = "guidance built in"
        mixed = f", with {job.mixed_in}" if job.mixed_in else ""
        left_out = ", no negative prompt" if self.negative_left_out else ""
        return f"{counted(job.steps, 'step')} of {scheduler}, {guided}{mixed}{left_out}"


@dataclass(frozen=True)
class Drawn:
    """A picture, its file, and how long it took."""

    drawing: Drawing
    pixels: Pixels
    file: Path
    seconds: float

    @property
    def took(self) -> str:
        """How long it took, in milliseconds where that says something."""
        return f"{self.seconds * 1000:,.0f} ms" if self.seconds < 10 else duration(self.seconds)


class Studio:
    """Draws with the pipeline that is held, and remembers what teachers drew."""

    def __init__(self, machine: MachineFlags, held: Held, folder: Path) -> None:
        self.machine, self.held, self.folder = machine, held, folder
        self.device = pick_device(machine.device)
        self.dtype = pick_dtype(machine.dtype, self.device)
        self._teachers = OrderedDict[Hashable, Drawn]()

    def plan(self, wish: Wish) -> tuple[Drawing, Drawing | None]:
        """The student's picture and, if it is wanted, the teacher's of the same noise.

        Raises UserError for what `infer draw` would refuse.
        """
        choice = self.choice(wish)
        own = self.drawing(student_config(wish, choice), wish, choice)
        if choice.run is None or not wish.teacher_steps:
            return own, None
        config = teacher_config(wish, own.job)
        return own, self.drawing(config, wish, choose(config))

    def choice(self, wish: Wish) -> Choice:
        """What the student, or the model, is drawn with."""
        return choose(student_flags(wish))

    def drawing(self, config: DrawConfig, wish: Wish, choice: Choice) -> Drawing:
        """Plan one picture. Raises UserError for what cannot work."""
        check_numbers(config)
        check_flags(config)
        job = plan_job(config, choice, str(self.dtype).removeprefix("torch."))
        return Drawing(job, bool(wish.negative_prompt) and job.negative_prompt is None)

    def draw(self, drawing: Drawing, on_step: OnStep) -> Drawn:
        """Draw a picture and write its file; `on_step` may end it by an exception."""
        use_device(self.device)  # this thread may be new
        pipe = self.pipe(drawing)
        job, (prompt, seed) = drawing.job, next(drawing.job.pictures())
        total, done = steps_taken(pipe, job), 0

        def count() -> None:
            nonlocal done
            done += 1
            on_step(done, total)

        started = time.perf_counter()
        pixels = draw_one(pipe, job, prompt, seed, count)
        seconds = time.perf_counter() - started
        told = job.metadata(prompt, seed)
        name = hashlib.sha256(repr(sorted(told.items())).encode() + pixels.tobytes()).hexdigest()
        file = self.folder / name[:16] / file_name(prompt, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_drawn(file, pixels, told)
        return Drawn(drawing, pixels, file, seconds)

    def draw_teacher(self, drawing: Drawing, on_step: OnStep) -> Drawn:
        """The same, unless the teacher has drawn this very picture before."""
        key = drawing.picture_key()
        if (known := self.remembered(drawing)) is not None:
            self._teachers.move_to_end(key)
            return known
        drawn = self._teachers[key] = self.draw(drawing, on_step)
        if len(self._teachers) > REMEMBERED:
            self._teachers.popitem(last=False)
        return drawn

    def remembered(self, drawing: Drawing) -> Drawn | None:
        """What the teacher drew before, if its file is still there."""
        known = self._teachers.get(drawing.picture_key())
        return known if known is not None and known.file.exists() else None

    def pipe(self, drawing: Drawing) -> Any:
        """The pipeline of a picture: the one that is held, if it fits."""
        job = drawing.job
        pipe = self.held.get(
            drawing.key(), lambda: load_pipeline(job.choice, self.device, self.dtype)
        )
        pipe.scheduler = job.choice.sampling.scheduler
        if not job.given.kind:
            return pipe
        parts = {**pipe.components, **settings(job.choice.model)}
        other = pipeline_class(job.choice, job.given.kind, controlled=False)(**parts)
        other.set_progress_bar_config(disable=True)
        return other

    def in_order(self, own: Drawing, teacher: Drawing) -> Iterator[Drawing]:
        """Both, first the one whose pipeline is held: so that a pair loads one, not two."""
        first_teacher = self.held.holds(teacher.key()) or self.remembered(teacher) is not None
        yield from (teacher, own) if first_teacher else (own, teacher)


def student_flags(wish: Wish) -> DrawConfig:
    """What is needed to look up what draws."""
    return DrawConfig(
        run=wish.run,
        model=None if wish.run is not None else wish.model,
        lora=tuple(join_scale(str(path), scale) for path, scale in wish.loras if scale),
        scheduler=wish.scheduler or None,
    )


def student_config(wish: Wish, choice: Choice) -> DrawConfig:
    """The flags of the student's picture, or of the model's.

    Guidance is told to those that have not learned it, and the negative prompt to those that are
    drawn with a second pass.
    """
    sampling = choice.sampling
    scale = None if sampling.guidance is Guidance.LEARNED else wish.guidance_scale
    negative = wish.negative_prompt or None
    if sampling.guidance is not Guidance.CLASSIFIER_FREE or not is_guided(scale, choice):
        negative = None
    return replace(
        student_flags(wish),
        prompt=(wish.prompt,) if wish.prompt else (),
        steps=wish.steps,
        guidance_scale=scale,
        negative_prompt=negative,
        seed=wish.seed,
        **picture_flags(wish),
    )


def is_guided(scale: float | None, choice: Choice) -> bool:
    """Does a second pass change anything?"""
    return (choice.sampling.guidance_scale if scale is None else scale) > 1


def teacher_config(wish: Wish, own: Job) -> DrawConfig:
    """The flags of the teacher's picture of the student's noise.

    LoRAs of few-step students are the student's way of drawing, and are left out; styles stay.
    """
    choice = own.choice
    source = choice.model.source
    styles = [
        (path, scale) for path, scale in wish.loras if scale and not is_few_step(path, source)
    ]
    width, height = own.size
    guided = wish.guidance_scale is None or wish.guidance_scale > 1
    return DrawConfig(
        model=source,
        vae=choice.vae,
        lora=tuple(join_scale(str(path), scale) for path, scale in styles),
        prompt=own.prompts[:1],
        negative_prompt=(wish.negative_prompt or None) if guided else None,
        steps=wish.teacher_steps,
        guidance_scale=wish.guidance_scale,
        size=f"{width}x{height}",
        clip_skip=own.clip_skip,
        seed=wish.seed,
        **picture_flags(wish),
    )


def is_few_step(lora: Path, source: str) -> bool:
    """Is a LoRA that of a distilled student?"""
    student = find_lora(str(lora)).student
    return student is not None and student.sampling(source).distilled


def picture_flags(wish: Wish) -> dict[str, Any]:
    """The picture to begin from, if there is one."""
    if wish.image is None:
        return {}
    return {"image": wish.image, "strength": wish.strength}


def state_of(path: Path) -> tuple[int, ...]:
    """What changes when weights are written anew: time and size of the file, or files."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    return tuple(n for stat in stats for n in (stat.st_mtime_ns, stat.st_size))
