"""Units of work on a Ray cluster: a worker per GPU, or per so many CPU cores.

The loop is thin because a unit is idempotent and shares nothing: when a worker or its node dies,
Ray starts it elsewhere and its unit is done again, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prep.engine import Job, Outcome, encode_unit
from prep.identity import load_encoders
from prep.sources import Unit
from shared.errors import UserError
from shared.progress import Progress

EXTRA = "ray is not installed; pip install 'latent-distillery[ray]', or use --engine local"


class Worker:
    """One set of encoders on one GPU or on a few cores."""

    def __init__(self, job: Job) -> None:
        self.job, self.encoders = job, load_encoders(job.model, job.shapes)

    def encode(self, unit: Unit) -> Outcome:
        """Encode and commit a unit."""
        return encode_unit(self.job, unit, self.encoders, lambda *_: None)


def encode_with_ray(
    job: Job, units: Sequence[Unit], address: str | None, cpus: int, progress: Progress
) -> Iterator[Outcome]:
    """Outcomes as they come. Raises UserError as `encode_unit` does, or without a cluster."""
    try:
        import ray
    except ImportError:
        raise UserError(EXTRA) from None
    try:
        ray.init(address, log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as error:
        raise UserError(f"--ray-address {address}: {error}") from None
    resources = {"num_gpus": 1} if job.shapes.device == "cuda" else {"num_cpus": cpus}
    remote = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(Worker)
    shared_job = ray.put(job)
    workers = [remote.remote(shared_job) for _ in range(min(slots(ray, resources), len(units)))]
    waiting = iter(units)
    running = {
        worker.encode.remote(unit): worker for worker, unit in zip(workers, waiting, strict=False)
    }
    try:
        while running:
            (ref,), _ = ray.wait(list(running))
            worker = running.pop(ref)
            if (unit := next(waiting, None)) is not None:
                running[worker.encode.remote(unit)] = worker
            outcome = ray.get(ref)
            progress.update(outcome.rows, f"{len(workers)} workers")
            yield outcome
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    finally:
        ray.shutdown()


def slots(ray: Any, resources: dict[str, int]) -> int:
    """How many workers the cluster has room for. Raises UserError where there is none."""
    have = ray.cluster_resources()
    ((name, each),) = (({"num_gpus": "GPU", "num_cpus": "CPU"}[k], v) for k, v in resources.items())
    count = int(have.get(name, 0) // each)
    if count == 0:
        raise UserError(
            f"a worker wants {each} {name}, and the Ray cluster has {have.get(name, 0):g} in all; "
            "lower --cpus-per-worker or choose another --device"
        )
    return count
