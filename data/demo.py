"""The main job from end to end, offline: `make demo` and its long version, `make reproduce`.

Each step is a command that you could type; it is printed before it runs. Running it again goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from data.arguments import local_argument

PROMPTS = (
    "a red circle on a blue field",
    "a large yellow star at the top of a purple field",
    "a small white ring on the left of a green field",
    "a black cross in the middle of an orange field",
)
NEW_PROMPTS = ("a small green star on a white field", "a blue ring on a yellow field")
SCORER = "data.oracle:score"


@dataclass(frozen=True)
class Plan:
    """Where everything goes, and what is said to `train distill` for each student.

    `answers` of the teacher are kept for each sample, 0 for none. The table is of `captions`.
    """

    folder: Path
    students: tuple[tuple[str, str], ...]
    answers: int
    captions: int


# A LoRA student is not told the guidance and applies it again at every step: what it learns is the
# middle of a range below the guidance it stands for (docs/recipes.md). In so short a training TCD
# brings one further than LCD (docs/results.md).
DEMO = Plan(
    Path("demo"),
    (
        ("full", "--max-train-steps 300"),
        ("lora", "--objective tcd --max-train-steps 150 --w-min 0.5 --w-max 1.0"),
    ),
    answers=2,
    captions=300,
)
REPRODUCE = Plan(
    Path("demo-long"),
    (
        ("full", "--max-train-steps 2000 --ema-decay 0.99"),
        ("lora", "--max-train-steps 1000 --w-min 0.5 --w-max 1.0"),
    ),
    answers=0,
    captions=1000,
)


def commands(plan: Plan) -> list[list[str]]:
    """Everything that is run, in order."""
    caches = {split: plan.folder / "caches" / split for split in ("train", "heldout")}
    steps = [encode(split, cache) for split, cache in caches.items()]
    if plan.answers:
        steps.append(
            f"prep teach --cache {caches['train']} --model tiny-sd --answers {plan.answers} "
            "--batch-size 32".split()
        )
    for student, flags in plan.students:
        run = plan.folder / "runs" / student
        steps.append(
            f"train distill --model tiny-sd --cache {caches['train']} --run {run} "
            f"--student {student} {flags} --train-batch-size 32 "
            "--learning-rate 2e-4 --lr-scheduler cosine --lr-warmup-steps 20 "
            "--checkpointing-steps 500 --checkpoints-total-limit 1 --validation-steps 500 "
            "--resume-from-checkpoint latest".split()
        )
        steps.append(
            f"train evaluate --run {run} --eval-cache {caches['heldout']} --scorer {SCORER} "
            f"--num-samples {plan.captions}".split()
        )
    draw = f"infer draw --run {plan.folder / 'runs' / 'full'} --num-images 4 --output".split()
    return [*steps, [*draw, str(plan.folder / "drawn.png"), "--prompt", *NEW_PROMPTS]]


def encode(split: str, cache: Path) -> list[str]:
    """Stage one over a split of the pictures that come with the project."""
    shards = f"data/pictures/{split}/*.tar"
    flags = ["--shards", shards, "--model", "tiny-sd", "--cache", str(cache)]
    return ["prep", "encode", *flags, "--preview-prompts", *PROMPTS]


def run(command: list[str]) -> int:
    """`python -m ...` in this process, which has torch imported already; returns its status."""
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def main() -> int:
    """Run the plan; stop at the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reproduce", action="store_true", help="the long version")
    parser.add_argument("--folder", type=local_argument, help="where to put everything")
    args = parser.parse_args()
    plan = REPRODUCE if args.reproduce else DEMO
    plan = replace(plan, folder=args.folder or plan.folder)
    started = time.monotonic()
    for command in commands(plan):
        print(f"\n$ python -m {shlex.join(command)}", flush=True)
        if status := run(command):
            return status
    print(f"\ndone in {time.monotonic() - started:.0f} s; look at")
    for student in ("full", "lora"):
        for name in ("evaluation.png", "evaluation.md"):
            print(f"  {plan.folder / 'runs' / student / name}")
    print(f"  {plan.folder / 'drawn.png'}")
    run_folder = plan.folder / "runs" / "full"
    print(f"and draw what you like: make draw RUN={run_folder} PROMPT='{PROMPTS[1]}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
