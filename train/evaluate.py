"""Student against teacher: one table, one picture. See docs/evaluation.md for what is measured."""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from shared.cache import open_manifest
from shared.errors import UserError
from shared.progress import Progress
from shared.storage import dump_json, load_json, publish
from shared.vae import decode_latents
from train.artist import Artist, open_artist
from train.config import EvaluateConfig
from train.heldout import HeldOut, load_heldout
from train.metrics import FEATURES, Gaussian, features, frechet_distance, high_frequency_share
from train.sample import spacing
from train.table import write_report

Scorer = Callable[[NDArray[np.uint8], Sequence[str]], NDArray[np.float64]]

STEPS = (1, 2, 4, 8)
REFERENCE = ("ddim", 50)
TEACHER_ROWS = (REFERENCE, *[(s, n) for s in ("ddim", "dpmsolver++") for n in STEPS])
STUDENT_ROWS = tuple(("student", n) for n in STEPS)
TIMED = 16  # pictures per timing
SHOWN = 6  # captions in the picture


@dataclass(frozen=True)
class Row:
    """A line of the table. Null where a figure does not apply."""

    sampler: str
    steps: int
    fd: float
    accuracy: float | None
    latent_mse: float | None  # 1 step only, against the teacher's 50 steps from the same noise
    high_frequency: float  # relative to the teacher's 50 steps
    ms_per_image: float = 0.0  # sampling alone, without the VAE's decoding
    timestep_spacing: str | None = None


@dataclass(frozen=True)
class Judge:
    """Everything a drawn set of latents is measured against."""

    real: Gaussian
    captions: tuple[str, ...]
    scorer: Scorer | None
    solution: Tensor  # the teacher's 50-step latents
    sharpness: float  # their high-frequency share

    def row(self, sampler: str, steps: int, latents: Tensor, artist: Artist) -> Row:
        """Measure latents `[N, C, h, w]`."""
        images = decode_all(artist, latents)
        scores = self.scorer(images, self.captions) if self.scorer else None
        return Row(
            sampler=sampler,
            steps=steps,
            fd=frechet_distance(self.real, Gaussian.of(features(images))),
            accuracy=None if scores is None else float(np.mean(scores)),
            latent_mse=float(((latents - self.solution) ** 2).mean()) if steps == 1 else None,
            high_frequency=high_frequency_share(images) / self.sharpness,
            timestep_spacing=None if sampler == "student" else spacing(sampler, steps),
        )


def evaluate(config: EvaluateConfig) -> None:
    """Write evaluation.json, evaluation.md and evaluation.png, and print the table."""
    scorer = load_scorer(config.scorer)
    artist = open_artist(config.run, config.threads, config.device, config.guidance_scale)
    manifest = open_manifest(config.eval_cache)
    artist.check_cache(manifest, config.eval_cache)
    heldout = load_heldout(config.eval_cache, manifest, config.num_samples)
    artist = artist.with_teacher(heldout.empty).for_shape(heldout.shape)
    sampled = len(TEACHER_ROWS + STUDENT_ROWS) * len(heldout)
    with Progress("evaluate", sampled, "img") as progress:
        judge, teacher = teacher_reference(config, artist, heldout, scorer, progress)
        student = [
            judge.row(*row, draw_all(artist, row, heldout, config, progress), artist)
            for row in STUDENT_ROWS
        ]
    rows = timed([*teacher, *student], artist, heldout, config)
    result = {
        "features": FEATURES,
        "num_samples": len(heldout),
        "guidance_scale": artist.guidance_scale,
        "student": artist.config["student"],
        "scorer": config.scorer,
        "rows": [asdict(row) for row in rows],
    }
    folder = config.output or config.run
    write_report(folder, result, showcase(artist, heldout, config), heldout.captions)


def teacher_reference(
    config: EvaluateConfig, artist: Artist, heldout: HeldOut, scorer: Scorer | None, bar: Progress
) -> tuple[Judge, list[Row]]:
    """The teacher's rows and what students are judged by.

    They depend on the teacher and the evaluation cache alone, so they are kept in the cache's
    `evaluations/` folder and the next student's evaluation finds them.
    """
    kept = config.eval_cache / "evaluations" / f"{reference_key(config, artist)}.safetensors"
    if kept.exists():
        tensors, rows = load_file(kept), load_json(kept.with_suffix(".json"))
        bar.update(len(TEACHER_ROWS) * len(heldout), "teacher's rows from an earlier evaluation")
        real = Gaussian(tensors["mean"].numpy(), tensors["covariance"].numpy())
        judge = Judge(real, heldout.captions, scorer, tensors["solution"], rows["sharpness"])
        return judge, [Row(**row) for row in rows["rows"]]
    real = Gaussian.of(features(decode_all(artist, heldout.latents)))
    solution = draw_all(artist, REFERENCE, heldout, config, bar)
    sharpness = high_frequency_share(decode_all(artist, solution))
    judge = Judge(real, heldout.captions, scorer, solution, sharpness)
    rows = [judge.row(*REFERENCE, solution, artist)]
    for row in TEACHER_ROWS[1:]:
        rows.append(judge.row(*row, draw_all(artist, row, heldout, config, bar), artist))
    keep_reference(kept, judge, rows)
    return judge, rows


def keep_reference(path: Path, judge: Judge, rows: Sequence[Row]) -> None:
    """Store a reference for the next evaluation; a read-only cache goes without."""
    tensors = {
        "mean": torch.from_numpy(judge.real.mean),
        "covariance": torch.from_numpy(judge.real.covariance).contiguous(),
        "solution": judge.solution.contiguous(),
    }
    table = {"sharpness": judge.sharpness, "rows": [asdict(row) for row in rows]}
    try:
        publish([dump_json(table)], path.with_suffix(".json"), path.parent)
        publish([save(tensors)], path, path.parent)
    except (OSError, UserError) as error:
        print(f"the teacher's rows are not kept for next time: {error}")


def reference_key(config: EvaluateConfig, artist: Artist) -> str:
    """A hash over all that the teacher's rows depend on."""
    parts = {
        "teacher": artist.teacher_fingerprint(),
        "cache": hashlib.sha256((config.eval_cache / "manifest.json").read_bytes()).hexdigest(),
        "samples": config.num_samples,
        "seed": config.seed,
        "guidance_scale": artist.guidance_scale,
        "scorer": config.scorer,
        "features": FEATURES,
        "rows": [(*row, spacing(*row)) for row in TEACHER_ROWS],
        "batch_size": config.batch_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def draw_all(
    artist: Artist, row: tuple[str, int], heldout: HeldOut, config: EvaluateConfig, bar: Progress
) -> Tensor:
    """Latents for every held-out caption; sample i starts from the noise of seed + i."""
    parts = []
    for start in range(0, len(heldout), config.batch_size):
        texts = heldout.texts[slice(start, start + config.batch_size)]
        seeds = range(config.seed + start, config.seed + start + len(texts))
        parts.append(artist.draw(*row, texts, seeds))
        bar.update(len(texts), f"{row[0]} {row[1]}")
    return torch.cat(parts)


def decode_all(artist: Artist, latents: Tensor, batch_size: int = 25) -> NDArray[np.uint8]:
    """Scaled latents to pixels."""
    raw = latents / artist.vae.config.scaling_factor
    return np.concatenate([decode_latents(artist.vae, part) for part in raw.split(batch_size)])


def timed(
    rows: Sequence[Row], artist: Artist, heldout: HeldOut, config: EvaluateConfig
) -> list[Row]:
    """The rows with ms per image, all measured here and now, so that they can be compared."""
    texts = heldout.texts[slice(0, TIMED)]
    finished = []
    for row in rows:
        seconds = []
        for _ in range(1 if row.steps > max(STEPS) else 3):
            start = time.perf_counter()
            artist.draw(row.sampler, row.steps, texts, range(len(texts)))
            if artist.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        finished.append(replace(row, ms_per_image=1000 * min(seconds) / len(texts)))
    return finished


def showcase(
    artist: Artist, heldout: HeldOut, config: EvaluateConfig
) -> dict[str, NDArray[np.uint8]]:
    """The same few captions and noises drawn by each sampler, for the picture."""
    texts = heldout.texts[slice(0, SHOWN)]
    seeds = range(config.seed, config.seed + len(texts))
    columns = {}
    for name, steps in [REFERENCE, ("ddim", 4), ("dpmsolver++", 4), *STUDENT_ROWS]:
        title = f"{'student' if name == 'student' else 'teacher'}, {steps} step{'s'[: steps > 1]}"
        solver = "" if name == "student" else name.upper()
        columns[f"{title}\n{solver}"] = decode_all(artist, artist.draw(name, steps, texts, seeds))
    return columns


def load_scorer(name: str | None) -> Scorer | None:
    """The function that MODULE:FUNCTION names. Raises UserError where there is none."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        scorer: Scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--scorer {name}: {error}; give MODULE:FUNCTION") from None
    return scorer
