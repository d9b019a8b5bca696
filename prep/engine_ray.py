"""Units of work on a Ray cluster: a worker per GPU, or per so many CPU cores.

The loop is thin because a unit is idempotent and shares nothing: when a worker or its node dies,
another worker does its unit again, with the same bytes.
"""

from __future__ import annotations

from collections import deque
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
        self.job = job
        self.encoders = load_encoders(job.model, job.shapes, job.vae, job.settings.clip_skip)

    def ready(self) -> None:
        """Answers when the encoders are loaded, or loaded again elsewhere."""

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
    try:
        needs = {"num_gpus": 1} if job.shapes.device == "cuda" else {"num_cpus": cpus}
        remote = ray.remote(max_restarts=-1, **needs)(Worker)
        sent = ray.put(job)
        workers = [remote.remote(sent) for _ in range(min(slots(ray, needs), len(units)))]
        for outcome in dispatched(ray, workers, units):
            progress.update(outcome.rows, f"{len(workers)} workers")
            yield outcome
    finally:
        ray.shutdown()


def dispatched(ray: Any, workers: Sequence[Any], units: Sequence[Unit]) -> Iterator[Outcome]:
    """Hand each worker a unit at a time; the unit of one that dies goes to the next free one.

    A dead worker comes back when Ray has found a place for it, which may be never.
    """
    waiting, idle = deque(units), list[Any]()
    busy: dict[Any, tuple[Any, Unit | None]] = {w.ready.remote(): (w, None) for w in workers}
    while waiting or any(unit for _, unit in busy.values()):
        (call,), _ = ray.wait(list(busy))
        worker, unit = busy.pop(call)
        try:
            outcome = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except ray.exceptions.RayActorError:
            if unit is not None:
                waiting.append(unit)
            busy[worker.ready.options(max_task_retries=-1).remote()] = (worker, None)
        else:
            idle.append(worker)
            if outcome is not None:
                yield outcome
        while waiting and idle:
            worker, unit = idle.pop(), waiting.popleft()
            busy[worker.encode.remote(unit)] = (worker, unit)


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
