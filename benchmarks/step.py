"""Stage two: does a training step cost more than its own arithmetic?

`python -m benchmarks.step` prints, as medians over interleaved pairs of steps,

- loader: a step fed by the loader relative to one with a batch that lies there (the goal is 1.05
  on a CPU), and the share of it spent waiting for the loader (1%).
- online: a step that runs the VAE and the text encoders, and asks a teacher of its own twice,
  relative to the cached one; beside it the ratio of their floating-point operations.
- memory: the peak of a LoRA step that holds a teacher beside the student, and of ours, whose
  teacher is the student without its adapters; of one that matches distributions, whose fake score
  is a second set of adapters, without and with the GAN term (the goal is 1.25 of a LoRA step of
  LCD); of a full student's with its teacher, and reading the teacher's answers instead; each in a
  process of its own.
- answers: the online step, and ours with the teacher (`asked`), relative to ours that reads the
  teacher's answers (the goals are 1.9 and 1.5 for a LoRA, 1.4 for a full student's own).

On the tiny teacher and on one of SD 1.5's size with random weights. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.common.machine import record, save
from benchmarks.common.memory import peak_bytes
from benchmarks.common.models import model_folder, write_answers, write_cache
from benchmarks.common.online import Online, TwoCalls, build_teacher
from benchmarks.common.steps import Cached, compare, flops, open_run
from shared.machine.device import pick_device
from train.networks.lora import LoraStudent

REPO = Path(__file__).resolve().parent.parent
WARM_UP = 2
# Both networks learn in each step.
MATCHING = {"objective": "dmd", "fake_warmup_steps": 0, "fake_updates": 1, "teacher": None}
MEMORY: dict[str, dict[str, Any]] = {  # whose peak is measured, with their flags
    "one_unet": {},
    "separate_teacher": {},
    "matching": MATCHING,
    "matching_gan": MATCHING | {"gan_weight": 5e-3},
    "full_asking": {"student": "full"},
    "full_reading": {"student": "full", "teacher": "cached"},
}


@dataclass(frozen=True)
class Case:
    """What a step is taken with, and how often."""

    model: str
    resolution: int
    batch: int
    pairs: int
    threads: int | None = None


def cached(case: Case, root: Path, device: torch.device, **flags: Any) -> Cached:
    """The trainer with a cache of its own for this case, which has answers of the teacher, too."""
    source = model_folder(case.model, root)
    cache = root / f"{case.model}-cache"
    if not cache.exists():
        write_cache(source, cache, case.resolution, max(64, 4 * case.batch))
        write_answers(source, cache, device)
    flags = {"teacher": "online", "train_batch_size": case.batch} | flags
    run = open_run(
        source, cache, root / f"{case.model}-run", device, **flags, threads=case.threads,
        mixed_precision="bf16" if device.type == "cuda" else "no",
    )  # fmt: skip
    return Cached(run)


def measure_loader(case: Case, root: Path, device: torch.device) -> dict[str, Any]:
    """The loader's share of a step."""
    trainer = cached(case, root, device)
    for _ in range(WARM_UP):
        trainer.fed()
        trainer.with_resident()
    trainer.waited = 0.0
    found = compare(trainer.fed, trainer.with_resident, case.pairs, device)
    trainer.close()
    waited = trainer.waited / case.pairs / found["seconds"]
    return {**vars(case), **found, "waited": waited}


def measure_online(case: Case, root: Path, device: torch.device) -> dict[str, Any]:
    """The online baseline beside the cached step."""
    trainer = cached(case, root, device)
    online = Online(trainer.run, trainer.resident, case.resolution)
    counted = flops(online.step), flops(trainer.fed)  # which warms up, too
    found = compare(online.step, trainer.fed, case.pairs, device)
    trainer.close()
    return {
        **vars(case),
        **found,
        "tflop": [count / 1e12 for count in counted],
        "ratio_by_flops": counted[0] / counted[1],
    }


def measure_answers(case: Case, root: Path, device: torch.device, student: str) -> dict[str, Any]:
    """A step that reads the teacher's answers beside one that asks it, and the online baseline.

    A LoRA step is fed by the loader. A full student that reads them has no teacher to compare with,
    so it is given answers that lie there.
    """
    lora = student == "lora"
    trainer = cached(case, root, device, student=student, teacher="cached" if lora else "online")
    batch = trainer.resident
    asking = replace(batch, answers=None)
    reading = replace(batch, answers=torch.stack([batch.noise.half()] * 2, dim=1))
    step = trainer.fed if lora else partial(trainer.take, reading)
    baseline = Online(trainer.run, asking, case.resolution)
    found: dict[str, Any] = {**vars(case), "student": student}
    counted = flops(step)  # which warms up, too
    for name, other in (("asked", partial(trainer.take, asking)), ("online", baseline.step)):
        found[name] = {"ratio_by_flops": flops(other) / counted}
        found[name] |= compare(other, step, case.pairs, device)
    trainer.close()
    return found


def measure_memory(case: Case, root: Path, device: torch.device, kind: str) -> dict[str, float]:
    """The peak of this process after two steps of this kind (MEMORY)."""
    trainer = cached(case, root, device, **MEMORY[kind])
    if kind == "separate_teacher":
        networks = TwoCalls(cast(LoraStudent, trainer.run.student), build_teacher(trainer.run))
        objective = trainer.run.objective
        other: Any = lambda batch, empty, _: objective(batch, empty, networks)  # noqa: E731
        trainer.run.objective = other
    for _ in range(2):
        trainer.fed()
    trainer.close()
    return {"peak_gb": peak_bytes(device) / 1e9}


def in_child(kind: str, case: Case, root: Path, device: torch.device) -> dict[str, float]:
    """`measure_memory` in a process of its own."""
    words = [kind, case.model, case.resolution, case.batch, case.threads or 0, root, device]
    command = [sys.executable, "-m", "benchmarks.step", "--child", *map(str, words)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=REPO)
    found: dict[str, float] = json.loads(answer.stdout)
    return found


def child(words: list[str]) -> None:
    """What `in_child` starts."""
    kind, model, resolution, batch, threads, root, device = words
    case = Case(model, int(resolution), int(batch), 0, int(threads) or None)
    print(json.dumps(measure_memory(case, Path(root), torch.device(device), kind)))


def say(what: str, found: dict[str, Any]) -> None:
    """A line for people."""
    figures = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    print(f"{what}: {figures}", flush=True)


def main() -> None:
    """Measure everything and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of the networks")
    parser.add_argument("--pairs", type=int, default=100, help="with the tiny teacher")
    parser.add_argument(
        "--large", default="sd15", help="the model of real size, `tiny-xl` for a trial"
    )
    parser.add_argument("--full", default="sd15", help="likewise for a full student: 22 GB in fp32")
    parser.add_argument("--large-resolution", type=int, default=256)
    parser.add_argument("--large-pairs", type=int, default=3)
    parser.add_argument("--child", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    device = pick_device(args.device)
    tiny = Case("tiny-sd", 64, 8, args.pairs, args.threads)
    large = Case(args.large, args.large_resolution, 1, args.large_pairs, args.threads)
    full = replace(large, model=args.full)
    with tempfile.TemporaryDirectory() as folder:
        measure_all(tiny, large, full, Path(folder), device)


def measure_all(tiny: Case, large: Case, full: Case, root: Path, device: torch.device) -> None:
    """Everything, written down part by part: the large step takes long."""
    found: dict[str, Any] = {"loader": measure_loader(tiny, root, device)}
    say("loader", found["loader"])
    found["memory"] = vars(large) | {
        kind: in_child(kind, large, root, device)
        for kind in ("one_unet", "separate_teacher", "matching", "matching_gan")
    }
    say(f"memory, {large.model}", found["memory"])
    found["full_memory"] = vars(full) | {
        kind: in_child(kind, full, root, device) for kind in ("full_asking", "full_reading")
    }
    say(f"memory, full {full.model}", found["full_memory"])
    found["answers"] = {}
    for student, case in (("lora", large), ("full", full)):
        found["answers"][student] = measure_answers(case, root, device, student)
        say(f"answers, {student} {case.model}", found["answers"][student])
        save("step", found)
    found["online"] = {}
    for name, case in (("tiny", tiny), ("large", large)):
        found["online"][name] = measure_online(case, root, device)
        say(f"online, {case.model}", found["online"][name])
        save("step", found)
    record("step", found)


if __name__ == "__main__":
    main()
