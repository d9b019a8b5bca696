"""Every objective over one cache, with the same arithmetic, in one table: `make objectives`.

Each training gets as many steps as the budget pays for, by what `train compare` counts for a step.
Two trainings run side by side, on a thread each, and what they say goes to files. Running it again
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.arguments import local_argument
from data.demo import SCORER, encode
from data.side_by_side import Job, Workers
from shared.cli.config import parse
from shared.errors import UserError, run_main
from shared.models.family import resolve_model
from shared.networks.denoiser import load_schedule
from shared.storage.files import create_exclusively, dump_json, parse_json
from train.comparison.cost import relative_cost
from train.config import DistillConfig, RunConfig
from train.evaluation.record import read_evaluation
from train.export.weights import exported_student
from train.objectives import objective_of

MODEL = "tiny-sd"
EVALUATION = "--num-samples 1000 --threads 1"
TEACHERS_ROWS = threading.Lock()  # held while they are drawn
BUDGET = 800.0  # in steps of LCD that ask the teacher, with the same kind of student
MOST = 1_000_000  # for a budget: months
ANSWERS = 16
PROCESSES = 2  # trainings side by side
SEEDS = (0, 1, 2)
COMMON = (
    "--train-batch-size 32 --lr-scheduler cosine --lr-warmup-steps 20 --threads 1 "
    "--checkpointing-steps 500 --checkpoints-total-limit 1 --validation-steps 0 "
    "--resume-from-checkpoint latest"
)


@dataclass(frozen=True)
class Recipe:
    """One line of the table, or the start of others.

    `share` of the budget is its own; the rest was spent on the recipe `after`, whose student it
    begins with. One that is not `shown` is neither evaluated nor compared.
    """

    name: str
    student: str
    flags: str
    share: float = 1.0
    after: str | None = None
    shown: bool = True


# Few intervals: what is known near the picture reaches pure noise in fewer trainings of the student
# on itself (docs/recipes.md).
FEW = "--num-ddim-timesteps 10 --teacher cached"
FULL = "--ema-decay 0.99 --learning-rate 2e-4"
# A LoRA student is not told the guidance (see data/demo.py).
LORA = "--w-min 0.5 --w-max 1.0 --learning-rate 2e-4"
PHASES = "--num-phases 2"  # a divisor of the intervals, so that two steps of drawing end at edges
DMD = "--objective dmd --num-student-steps 4 --learning-rate 2e-5 --fake-learning-rate 2e-4"
RECIPES = (
    Recipe("full-pcm", "full", f"--objective pcm {PHASES} {FEW} {FULL}"),
    Recipe("full-lcd", "full", f"--objective lcd {FEW} {FULL}"),
    Recipe("lora-lcd", "lora", f"--objective lcd {FEW} {LORA}"),
    Recipe("full-tcd", "full", f"--objective tcd {FEW} {FULL}"),
    Recipe("lora-pcm", "lora", f"--objective pcm {PHASES} {FEW} {LORA}"),
    Recipe("lora-tcd", "lora", f"--objective tcd {FEW} {LORA}"),
    Recipe("full-half", "full", f"--objective lcd {FEW} {FULL}", 0.5, shown=False),
    Recipe("lora-half", "lora", f"--objective lcd {FEW} {LORA}", 0.5, shown=False),
    Recipe("full-dmd", "full", f"{DMD} --fake full", 0.5, after="full-half"),
    Recipe("lora-dmd", "lora", f"{DMD} --w-min 0.5 --w-max 1.0", 0.5, after="lora-half"),
)
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


@dataclass(frozen=True)
class Bench:
    """Where everything lies, how much arithmetic a line of the table may cost, and who works."""

    folder: Path
    budget: float
    workers: Workers

    def cache(self, split: str) -> Path:
        """The cache of a split of the pictures."""
        return self.folder / "caches" / split

    def run(self, recipe: Recipe, seed: int) -> Path:
        """Where a recipe's student is trained: the first seed's run has its name."""
        return self.folder / "runs" / (recipe.name if not seed else f"{recipe.name}-seed{seed}")


def say(line: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}\n", end="", flush=True)  # by threads


def training_flags(bench: Bench, recipe: Recipe, seed: int) -> list[str]:
    """What is said to `train distill`, but for the number of steps."""
    words = [
        *("--model", MODEL, "--cache", str(bench.cache("train"))),
        *("--run", str(bench.run(recipe, seed)), "--seed", str(seed)),
        *("--student", recipe.student),
        *COMMON.split(),
        *recipe.flags.split(),
    ]
    if recipe.after:
        words += ["--init-student", str(bench.run(BY_NAME[recipe.after], seed))]
    return words


def steps_of(bench: Bench, recipe: Recipe) -> int:
    """How many steps the recipe's share of the budget pays for.

    What a step costs on the mean may depend on how many there are (DMD's fake score warms up), so
    the count is taken twice. Raises UserError where the budget is too small.
    """
    flags = parse(DistillConfig, training_flags(bench, recipe, 0), "train distill")
    config = RunConfig(**vars(flags))
    budget = recipe.share * bench.budget
    model, steps = resolve_model(MODEL), round(budget)
    for _ in range(2):
        steps = round(budget / relative_cost(model, config, steps))
    config = replace(config, max_train_steps=steps)
    try:
        objective_of(config).build(config, load_schedule(model.source), None)
    except UserError as error:
        cause = str(error).partition(";")[0]  # its remedy is flags that this command has not
        raise UserError(
            f"--budget {bench.budget:g} is too small for {recipe.name}: {cause}; give a larger one"
        ) from None
    return steps


def claim(bench: Bench) -> None:
    """Note in the folder what it is for.

    Raises UserError where that is something else: trainings would go on otherwise than they began.
    """
    bench.folder.mkdir(parents=True, exist_ok=True)
    recipes = [asdict(one) for one in RECIPES]
    ours = {"budget": bench.budget, "common": COMMON, "answers": ANSWERS, "recipes": recipes}
    file = bench.folder / "objectives.json"
    if create_exclusively(dump_json(ours), file, bench.folder / "tmp"):
        return
    theirs = parse_json(file.read_bytes(), file, "give another --folder")
    if theirs != ours:
        budget = theirs.get("budget") if isinstance(theirs, dict) else None
        other = isinstance(budget, float) and budget != bench.budget
        whose = f"--budget {budget:g}" if other else "other recipes"
        raise UserError(f"{bench.folder} holds the table of {whose}; give another --folder")


def prepare(bench: Bench) -> None:
    """Encode the pictures, and ask the teacher once for what most recipes then read."""
    for split in ("train", "heldout"):
        say(f"encode {split}")
        bench.workers.command(f"encode-{split}", *encode(split, bench.cache(split)))
    say(f"teach: {ANSWERS} answers a picture")
    bench.workers.command(
        "teach",
        *("prep", "teach", "--cache", bench.cache("train"), "--model", MODEL),
        *("--answers", str(ANSWERS), "--batch-size", "32"),
    )


def train(bench: Bench, recipe: Recipe, seed: int, steps: int) -> None:
    """Train a recipe's student, or go on with it, and evaluate it."""
    run = bench.run(recipe, seed)
    say(f"{run.name}: {steps:,} steps")
    flags = training_flags(bench, recipe, seed)
    bench.workers.command(run.name, "train", "distill", *flags, "--max-train-steps", str(steps))
    if recipe.shown and not evaluated(run, recipe):
        evaluate(bench, run)
    say(f"{run.name}: done")


def evaluate(bench: Bench, run: Path) -> None:
    """Evaluate a student; the first one draws the teacher's rows, and others wait to find them."""
    heldout = bench.cache("heldout")
    words = ["--run", str(run), "--eval-cache", str(heldout), "--scorer", SCORER]
    with TEACHERS_ROWS if not list(heldout.glob("evaluations/*.safetensors")) else nullcontext():
        say(f"{run.name}: evaluate")
        bench.workers.command(run.name, "train", "evaluate", *words, *EVALUATION.split())


def evaluated(run: Path, recipe: Recipe) -> bool:
    """Has the student that the run exported been evaluated?"""
    try:
        return read_evaluation(run).weights == exported_student(run, recipe.student)
    except UserError:
        return False


def two_best(bench: Bench) -> list[Recipe]:
    """The recipes whose students are right most often, on the mean over 1, 2 and 4 steps."""

    def rightness(recipe: Recipe) -> float:
        rows = read_evaluation(bench.run(recipe, 0)).rows
        few = [row for row in rows if row.sampler == "student" and row.steps in (1, 2, 4)]
        return sum(row.accuracy or 0.0 for row in few)

    return sorted(shown(), key=rightness, reverse=True)[:2]


def shown() -> list[Recipe]:
    """The lines of the table."""
    return [recipe for recipe in RECIPES if recipe.shown]


def with_beginnings(recipe: Recipe) -> list[Recipe]:
    """The recipe, and before it what it begins with."""
    return [*(with_beginnings(BY_NAME[recipe.after]) if recipe.after else []), recipe]


def measure(bench: Bench) -> None:
    """Make the caches, the students and the table."""
    say("count what a step of each costs")
    steps = {recipe.name: steps_of(bench, recipe) for recipe in RECIPES}
    claim(bench)  # now that the budget is known to be large enough
    prepare(bench)

    def job(recipe: Recipe, seed: int) -> Job:
        return Job(lambda: train(bench, recipe, seed, steps[recipe.name]), recipe.after)

    bench.workers.run({recipe.name: job(recipe, 0) for recipe in RECIPES})
    runs = [bench.run(recipe, 0) for recipe in shown()]
    best = two_best(bench)
    for seed in SEEDS[1:]:
        again = {one.name: job(one, seed) for each in best for one in with_beginnings(each)}
        bench.workers.run(again)
        runs += [bench.run(recipe, seed) for recipe in best]
    say("compare")
    folder = bench.folder / "comparison"
    bench.workers.command("compare", "train", "compare", *runs, "--output", folder)
    print((folder / "compare.md").read_text())


def budget_argument(text: str) -> float:
    """A number that trainings can have, as argparse's `type`."""
    try:
        budget = float(text)
    except ValueError:
        budget = math.nan
    if not 0 < budget <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0 and up to {MOST:,}")
    return budget


def main() -> None:
    """Read the flags and run it all; what is done is not done again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=local_argument, default=Path("demo-objectives"))
    parser.add_argument(
        "--budget", type=budget_argument, default=BUDGET, help="of a line, in steps of LCD"
    )
    args = parser.parse_args()
    workers = Workers(args.folder / "logs", PROCESSES)
    run_main(lambda: measure(Bench(args.folder, args.budget, workers)))


if __name__ == "__main__":
    main()
