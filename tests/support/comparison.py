"""Evaluated runs to compare, with few and short rows."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import shared_folder
from train.comparison import picture
from train.config import DistillConfig, EvaluateConfig
from train.evaluation import evaluate, teacher_results
from train.trainer.loop import distill
from train.trainer.setup import prepare

TEACHER = (("ddim", 3), ("ddim", 1), ("ddim", 2), ("dpmsolver++", 1), ("dpmsolver++", 2))

KINDS = {"consistency": {}, "trajectory": {"objective": "tcd", "student": "full",
                                           "unet_time_cond_proj_dim": 16,
                                           "learning_rate": 1e-3}}  # fmt: skip


def few_rows(monkeypatch: pytest.MonkeyPatch, teacher=TEACHER, student=(1, 2)) -> None:
    """These for the teacher, and the student's of so many steps."""
    for module in (evaluate, teacher_results, picture):
        monkeypatch.setattr(module, "REFERENCE", teacher[0])
    monkeypatch.setattr(teacher_results, "SOLVER_SAMPLINGS", teacher[1:])
    monkeypatch.setattr(teacher_results, "TEACHER_SAMPLINGS", teacher)
    monkeypatch.setattr(teacher_results, "TRIED", 5)
    monkeypatch.setattr(evaluate, "STUDENT_SAMPLINGS", tuple(("student", n) for n in student))
    monkeypatch.setattr(evaluate, "TIMED", 2)


def make_run(folder: Path, model: Path, cache: Path, held: Path, **more) -> Path:
    """A run of a few steps and its evaluation on `held`."""
    flags = {"student": "lora", "lora_rank": 2, "learning_rate": 1e-2} | more
    config = DistillConfig(
        model=str(model), cache=cache, run=folder, train_batch_size=4, max_train_steps=3,
        logging_steps=2, validation_steps=0, threads=1, device="cpu", report_to=("none",), **flags,
    )  # fmt: skip
    distill(prepare(config))
    assess(folder, held)
    return folder


def evaluated_runs(factory, model: Path, cache: Path) -> tuple[dict[str, Path], Path]:
    """Two runs, evaluated on the same held-out samples, and the cache of these.

    They are those of all workers: do not write into them.
    """

    def make(folder: Path) -> None:
        held = Path(shutil.copytree(cache, folder / "held"))
        with pytest.MonkeyPatch.context() as monkeypatch:
            few_rows(monkeypatch)
            for name, more in KINDS.items():
                make_run(folder / name, model, cache, held, **more)

    folder = shared_folder(factory, "evaluated", make)
    return {name: folder / name for name in KINDS}, folder / "held"


def assess(run: Path, held: Path, **more) -> None:
    flags = {"num_samples": 65} | more
    evaluate.evaluate(EvaluateConfig(run=run, eval_cache=held, threads=1, device="cpu", **flags))


def copied(runs: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Runs of one's own, to spoil."""
    return {name: Path(shutil.copytree(run, folder / name)) for name, run in runs.items()}
