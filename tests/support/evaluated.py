"""Small runs that are evaluated while they are trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support import warm
from train.config import DistillConfig

Settings = Callable[..., DistillConfig]


def holding_out(cache: Path, folder: Path, count: int) -> Path:
    """A copy of a cache, in a folder, that holds out some of its samples."""
    shutil.copytree(cache, folder / "cache")
    words = f"-m prep finish --cache cache --holdout {count} --no-report"
    warm.run(words.split(), folder, OMP_NUM_THREADS="1").check_returncode()
    return folder / "cache"


def small(model: Path, cache: Path, folder: Path) -> Settings:
    """Flags of a run of three steps, evaluated after the second and the third.

    Its students draw in one step. `settings("other", seed=1)` names another run and changes flags.
    """

    def make(run: str = "run", **more) -> DistillConfig:
        flags = {
            "model": str(model), "cache": cache, "run": folder / run, "threads": 1, "device": "cpu",
            "train_batch_size": 2, "max_train_steps": 3, "checkpointing_steps": 2,
            "logging_steps": 1, "validation_steps": 0, "learning_rate": 1e-3,
            "num_ddim_timesteps": 1, "report_to": ("none",), "evaluation_steps": 2,
            "num_eval_samples": 66,
        }  # fmt: skip
        if more.get("student") == "full":
            flags["unet_time_cond_proj_dim"] = 16
        else:
            flags["lora_rank"] = 4
        if more.get("objective") == "dmd":
            del flags["num_ddim_timesteps"]
        return DistillConfig(**flags | more)

    return make


def evaluations(run: Path) -> list[dict]:
    """The lines of evaluations.jsonl."""
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict]:
    """The same without what depends on the machine."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in evaluations(run)]
