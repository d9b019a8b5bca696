"""A style for few-step students, two ways, in two tables and two pictures: `make style`.

First a full student of the plain world learns 200 studded pictures, by consistency fine-tuning and
by the ordinary loss. Then a LoRA learns them, and meets a few-step LoRA: mixed with it, or worn by
the teacher of another. What the trainings say goes to files. Running it again goes on where the
trainings stopped, and draws anew.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from data.arguments import local_argument
from data.demo import encode
from data.make_pictures import SPLITS, write_tar
from data.objectives import COMMON, FULL, LORA, say
from data.side_by_side import Job, Workers
from data.style_measure import Easel, Line, Pictures, Score, of_lora, of_run, table, write_columns
from shared.cli.config import parse
from shared.errors import UserError, run_main
from shared.models.family import resolve_model
from shared.wording import counted, duration
from train.comparison.cost import relative_cost
from train.config import DistillConfig, RunConfig
from train.export.weights import LORA_FILE

MODEL, STYLE = "tiny-sd", "studded"
BUDGET = 400  # steps of LCD, of each distillation
PICTURES = 200
CAPTIONS = 640
SHOWN = 5  # captions in the pictures
STEP_SECONDS = 0.36  # of LCD with 32 samples on one core that nothing else uses (AMD EPYC, Zen 4)
BESIDES_SECONDS = 300.0  # for all that is no training
GUIDANCE_SCALE = 3
SCALES = (0.6, 0.8, 1.0, 1.2)  # of the style beside the few-step LoRA


@dataclass(frozen=True)
class Training:
    """A run: what it learns from which cache.

    It `begins` with another's student, or its teacher `wears` another's LoRA.
    """

    name: str
    student: str
    flags: str
    cache: str
    begins: str | None = None
    wears: str | None = None


# The best of the tries in docs/results.md; with 50 intervals it learned nothing in 200 steps.
LCF = "--objective lcf --num-ddim-timesteps 4 --ema-decay 0.9"
PLAIN_COPY = f"guidance-{GUIDANCE_SCALE}"  # where `train export` writes `start` with its guidance
TRAININGS = (
    Training("start", "full", f"--objective lcd {FULL}", "plain"),
    Training("style", "lora", "--objective denoise --learning-rate 1e-3", STYLE),
    Training("few-steps", "lora", f"--objective lcd {LORA}", "plain"),
    Training("lcf", "full", f"{LCF} --learning-rate 1e-3", STYLE, begins="start"),
    Training("denoise", "full", "--objective denoise --learning-rate 1e-3", STYLE, begins="start"),
    Training("styled", "lora", f"--objective lcd {LORA}", STYLE, wears="style"),
)  # fmt: skip


@dataclass(frozen=True)
class Studio:
    """Where everything lies, how much is trained and drawn, and who works."""

    folder: Path
    budget: int
    pictures: int
    captions: int
    workers: Workers

    def cache(self, name: str) -> Path:
        """The cache of plain, studded or held-out pictures."""
        return self.folder / "caches" / name

    def run(self, name: str) -> Path:
        """Where a student is trained."""
        return self.folder / "runs" / name

    def mixed(self, scale: float) -> Path:
        """The few-step LoRA and the style at a scale, in one file."""
        return self.folder / "mixed" / f"few-steps-style-{scale:g}.safetensors"


def training_flags(studio: Studio, training: Training) -> list[str]:
    """What is said to `train distill`."""
    words = [
        *("--model", MODEL, "--cache", str(studio.cache(training.cache))),
        *("--run", str(studio.run(training.name)), "--student", training.student),
        *("--max-train-steps", str(studio.budget)),
        *COMMON.split(),
        *training.flags.split(),
    ]
    if training.begins:
        beginning = studio.run(training.begins)
        # The ordinary loss has no input for a guidance: it begins with one that is folded in.
        folded = "--objective denoise" in training.flags
        words += ["--init-student", str(beginning / PLAIN_COPY if folded else beginning)]
    if training.wears:
        words += ["--teacher-lora", str(studio.run(training.wears) / LORA_FILE)]
    return words


def seconds_of(studio: Studio, training: Training) -> float:
    """About how long a training takes, by what `train compare` counts for a step."""
    alone = replace(training, begins=None, wears=None)  # which are not there yet
    flags = parse(DistillConfig, training_flags(studio, alone), "train distill")
    cost = relative_cost(resolve_model(MODEL), RunConfig(**vars(flags)), studio.budget)
    return STEP_SECONDS * studio.budget * cost


def check(studio: Studio) -> None:
    """Raise UserError for numbers that cannot be."""
    for split, wanted, least in (
        ("train", studio.pictures, 32),
        ("heldout", studio.captions, 65),
    ):
        most = SPLITS[split][1]
        if not least <= wanted <= most:
            flag = "--pictures" if split == "train" else "--num-samples"
            raise UserError(f"{flag} {wanted} cannot be; choose {least} to {most:,}")
    if studio.budget < 1:
        raise UserError(f"--budget {studio.budget} trains nothing; choose 1 or more")


def announce(studio: Studio) -> None:
    """Say what will be done, and about how long it takes."""
    total = 0.0
    for training in TRAININGS:
        seconds = seconds_of(studio, training)
        total += seconds
        after = training.begins or training.wears
        say(
            f"to do: {training.name}, {counted(studio.budget, 'step')} on "
            f"{training.cache} pictures{f', after {after}' if after else ''}: "
            f"{duration(seconds)} on a core"
        )
    total = total / studio.workers.count + BESIDES_SECONDS
    say(f"all of it takes about {duration(total)} where nothing else runs; what is there stays")


def prepare(studio: Studio) -> None:
    """Draw the studded pictures, and encode them and the plain ones."""
    for split, count in (("train", studio.pictures), ("heldout", studio.captions)):
        tar = studio.folder / "pictures" / split / "00000.tar"
        if not tar.exists():
            tar.parent.mkdir(parents=True, exist_ok=True)
            say(f"draw {count} {STYLE} pictures: {split}")
            write_tar(tar.with_suffix(".part"), split, range(count), STYLE)
            os.replace(tar.with_suffix(".part"), tar)
    studio.workers.command("encode-plain", *encode("train", studio.cache("plain")))
    for split, name in (("train", STYLE), ("heldout", "heldout")):
        shards = studio.folder / "pictures" / split / "*.tar"
        studio.workers.command(
            f"encode-{name}",
            *("prep", "encode", "--shards", shards, "--model", MODEL),
            *("--cache", studio.cache(name)),
        )


def train(studio: Studio, training: Training) -> None:
    """Train a student, or go on with it."""
    run = studio.run(training.name)
    say(f"{training.name}: {counted(studio.budget, 'step')}")
    studio.workers.command(training.name, "train", "distill", *training_flags(studio, training))
    if training.name == "start" and not (run / PLAIN_COPY).exists():
        studio.workers.command(
            training.name,
            *("train", "export", "--run", run, "--guidance-scale", str(GUIDANCE_SCALE)),
        )
    say(f"{training.name}: done")


def mix(studio: Studio) -> None:
    """Merge the few-step LoRA with the style, at each scale."""
    for scale in SCALES:
        say(f"mix few-steps with style at {scale:g}")
        studio.workers.command(
            "mix",
            *("infer", "merge", studio.run("few-steps"), f"{studio.run('style')}:{scale:g}"),
            *("--form", "diffusers", "--output", studio.mixed(scale)),
        )


def adapted_lines(studio: Studio) -> list[Line]:
    """The full student before, and after either fine-tuning."""
    return [
        Line(name, of_run(studio.run(name)), steps)
        for name in ("start", "lcf", "denoise")
        for steps in (1, 4)
    ]


def mixed_lines(studio: Studio) -> list[Line]:
    """The few-step LoRA, the style alone, the two mixed, and the student of the styled teacher."""
    few, style, styled = (of_run(studio.run(name)) for name in ("few-steps", "style", "styled"))
    mixed = [Line(f"+ style {scale:g}", of_lora(MODEL, studio.mixed(scale)), 4) for scale in SCALES]
    return [
        Line("few-steps", few, 4),
        Line("style alone", style, 50, guided=True),
        Line("style alone", style, 4, guided=True),
        *mixed,
        Line("styled", styled, 1),
        Line("styled", styled, 4),
    ]


def measure(studio: Studio) -> None:
    """Make everything that is not there yet, then the tables and the pictures."""
    check(studio)
    announce(studio)
    prepare(studio)
    jobs = {
        one.name: Job(partial(train, studio, one), one.begins or one.wears) for one in TRAININGS
    }
    studio.workers.run(jobs)
    mix(studio)
    easel = Easel.open(MODEL, studio.cache("heldout"), studio.captions)
    parts = {"adapted": adapted_lines(studio), "mixed": mixed_lines(studio)}
    results = {name: draw(studio, easel, name, lines) for name, lines in parts.items()}
    report(studio, results)


def draw(studio: Studio, easel: Easel, name: str, lines: Sequence[Line]) -> list[Score]:
    """Draw and score lines, and put their first captions into NAME.png."""
    scores, columns = list[Score](), dict[str, Pictures]()
    for line in lines:
        say(f"draw {line.title.replace(chr(10), ', ')}")
        pictures = easel.draw(line)
        scores.append(easel.score(line, pictures))
        columns[line.title] = pictures[:SHOWN]
    write_columns(studio.folder / f"{name}.png", easel.heldout.captions, columns, SHOWN)
    return scores


def report(studio: Studio, results: dict[str, list[Score]]) -> None:
    """Write style.json and style.md, and print the tables."""
    told = {
        "captions": studio.captions,
        "pictures": studio.pictures,
        "budget": studio.budget,
        **{name: [asdict(one) for one in scores] for name, scores in results.items()},
    }
    (studio.folder / "style.json").write_text(json.dumps(told, indent=2) + "\n")
    text = "\n\n".join(table(scores) for scores in results.values())
    (studio.folder / "style.md").write_text(text + "\n")
    print(f"\n{text}\n")
    for name in ("style.md", "style.json", *(f"{name}.png" for name in results)):
        print(studio.folder / name)


def main() -> None:
    """Read the flags and run it all; what is trained is not trained again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=local_argument, default=Path("demo-style"))
    parser.add_argument("--budget", type=int, default=BUDGET, help="of a distillation, in steps")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="studded ones to learn from")
    parser.add_argument("--num-samples", type=int, default=CAPTIONS, help="held-out captions")
    parser.add_argument("--processes", type=int, default=2, help="trainings side by side")
    args = parser.parse_args()
    workers = Workers(args.folder / "logs", args.processes)
    studio = Studio(args.folder, args.budget, args.pictures, args.num_samples, workers)
    run_main(lambda: measure(studio))


if __name__ == "__main__":
    main()
