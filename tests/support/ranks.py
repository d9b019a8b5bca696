"""One process of a run under a launcher, watched: `python -m tests.support.ranks FLAGS.json`.

Beside the run it keeps what the tests want to know: the ids each process read, the first step's
gradients, and with "double" all arithmetic in float64.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from shared.cli.config import coerce
from shared.errors import run_main
from shared.networks import styled
from train.config import DistillConfig
from train.data.loader import Batch, Loader
from train.trainer import loop, setup


def main() -> None:
    wanted = json.loads(Path(sys.argv[1]).read_text())
    spied = Path(wanted["spied"])
    config = DistillConfig(**coerce(DistillConfig, wanted["flags"]))
    if wanted.get("double"):
        compute_in_float64()
    run = setup.prepare(config)
    if wanted.get("double"):
        schedule = run.objective.schedule.to("cpu", torch.float64)
        run.objective = dataclasses.replace(run.objective, schedule=schedule)
    keep_ids(run.loader, spied / f"ids-{run.step:03d}-{run.distributed.rank}.jsonl")
    keep_first_gradients(run, spied / "gradients.pt")
    loop.distill(run)


def compute_in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    load, to = styled.load_unet, Batch.to
    styled.load_unet = lambda source, *rest: load(source, *rest).double()

    def doubled(batch: Batch, device: torch.device) -> Batch:
        moved = to(batch, device)
        names = {"latents", "noise", "w", "noises"} & moved.tensors().keys()
        floats = {name: getattr(moved, name).double() for name in names}
        return dataclasses.replace(moved, **floats)

    Batch.to = doubled


def keep_ids(loader: Loader, path: Path) -> None:
    """Of the batches that are consumed, not of those that are read ahead."""
    batches = loader.batches

    def watched():
        for index, batch in enumerate(batches(), start=loader.start):
            bucket, ids, positions = loader.order.rank_batch(index, loader.rank, loader.world)
            with path.open("a") as file:
                line = {"bucket": bucket, "ids": ids.tolist(), "positions": positions.tolist()}
                file.write(json.dumps(line) + "\n")
            yield batch

    loader.batches = watched


def keep_first_gradients(run, path: Path) -> None:
    """Of each network that is trained."""
    backward, kept, seen, resumed = loop.backward, {}, set(), path.exists()

    def keeping(run, one, batch):
        result = backward(run, one, batch)
        if not resumed and one.name not in seen:
            seen.add(one.name)
            gradients = {name: p.grad.clone() for name, p in one.parameters.items()}
            kept.update(run.distributed.gather(gradients))
            if run.distributed.main:
                torch.save(kept, path)
        return result

    loop.backward = keeping


if __name__ == "__main__":
    run_main(main)
