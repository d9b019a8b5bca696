"""What a run does where its flags do not say; the first line tells."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.cli.defaults import CACHES, MODEL, RUNS, default_cache
from shared.cli.ranges import Precision
from shared.errors import UserError
from shared.machine.device import pick_device
from shared.models.family import FAMILIES, model_name
from shared.networks.precision import device_precision
from shared.storage.urls import Place
from train.config import DistillConfig, RunConfig
from train.state.run_config import run_config
from train.trainer.distributed import as_launched
from train.trainer.resume import FREE

# Flags that make no other student, so the run is the same; and those that have a part of the name.
BESIDE = FREE | {"student", "hub_token", "mixed_precision", "typed"}
LONGEST = 80  # characters of a run's name


def with_defaults(flags: DistillConfig) -> RunConfig:
    """Decide model, cache, run and precision; the main process says what was chosen."""
    left_alone = None in (flags.model, flags.cache, flags.run)
    model = flags.model or (MODEL if flags.cache is None else model_of(flags.cache))
    cache = default_cache(model) if flags.cache is None else flags.cache
    if flags.cache is None:
        refuse_absent(cache, model)
    decided = {**vars(flags), "model": model, "cache": cache}
    run = flags.run or RUNS / run_name(DistillConfig(**decided))
    config = with_precision(as_launched(RunConfig(**decided | {"run": run})))
    if os.environ.get("RANK", "0") != "0":
        return config
    precision = f"precision {config.mixed_precision}"
    if left_alone:
        print(
            f"model {model}, cache {cache}, run {config.run}, {precision} "
            "(--model, --cache, --run and --mixed-precision choose others)",
            file=sys.stderr,
        )
    elif config.mixed_precision != "no" and "mixed_precision" not in config.typed:
        print(f"{precision} (--mixed-precision chooses another)", file=sys.stderr)
    return config


def model_of(cache: Place) -> str:
    """The model that a cache was made for: a preset, or one that lies where it lay.

    What someone else's cache names is not asked of the hub: raises UserError, with the flag.
    """
    recorded = open_manifest(cache, check_sizes=False).identity.model
    name = model_name(recorded)
    if name in FAMILIES or Path(recorded).exists():
        return name if name in FAMILIES else recorded
    raise UserError(f"{cache} was made for {recorded!r}; pass that, or its copy, as --model")


def refuse_absent(cache: Place, model: str) -> None:
    """Raise UserError where the cache that nobody named is not there, with those that are."""
    paths = CachePaths(cache)
    if paths.manifest.exists() or paths.identity.exists():
        return
    there = [str(path.parent) for path in sorted(CACHES.glob("*/manifest.json"))]
    others = f"; or pass --cache: there is {', '.join(there)}" if there else ""
    raise UserError(
        f"there is no cache {cache} yet; `python -m prep encode --model {model} --shards ...` "
        f"makes it{others}"
    )


def run_name(config: DistillConfig) -> str:
    """MODEL-STUDENT and what else is not as usual: the same flags give the same run's name.

    So a command that was interrupted goes on when it is given again, and another has another run.
    """
    assert config.model is not None
    parts = [model_name(config.model), config.student]
    if config.cache != default_cache(config.model):
        parts.append(part(str(config.cache).removeprefix(f"{CACHES}/")))
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name not in BESIDE and value != one.default:
            parts.append(f"{one.name.replace('_', '-')}-{part(value)}")
    name = "-".join(parts)
    if len(name) > LONGEST:
        name = f"{parts[0]}-{parts[1]}-{digest(name)}"
    return name


def part(value: Any) -> str:
    """A flag's value as a part of a name; what does not fit there is told by a digest."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    plain = re.sub(r"[^\w.]+", "-", text).strip("-")
    return plain if plain == text else f"{plain}-{digest(text)}"


def digest(text: str) -> str:
    """Six hex digits that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]


def with_precision(config: RunConfig) -> RunConfig:
    """The same with --mixed-precision: as given, else the run's own, else what the device has."""
    if config.mixed_precision is not None:
        return config
    return replace(config, mixed_precision=recorded_precision(config) or own_precision(config))


def recorded_precision(config: RunConfig) -> Precision | None:
    """That of the run that is gone on with, if there is one."""
    run, wanted = config.run, config.resume_from_checkpoint
    if wanted is not None and Path(wanted).is_dir():
        run = Path(wanted).absolute().parent.parent  # RUN/checkpoints/step-N
    if not (run / "config.json").is_file():
        return None
    return run_config(run).mixed_precision


def own_precision(config: DistillConfig) -> Precision:
    """That of the device."""
    return device_precision(pick_device(config.device))
