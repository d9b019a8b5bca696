"""Units of work on a Ray cluster: a worker per GPU, or per so many CPU cores.

The loop is thin because a unit is idempotent and shares nothing: when a worker or its node dies,
another worker does its unit again, with the same bytes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

from prep.engines.job import Job, Outcome, Unit
from prep.files.library_errors import raised_in
from shared.cli.progress import Progress
from shared.errors import UserError, first_line
from shared.storage.errors import is_mistake

EXTRA = "ray is not installed; pip install 'latent-distillery[ray]', or use --engine local"
STORE_BYTES = 1 << 27  # Ray's shared memory holds the job alone; its default is a third of all
CONNECT_SECONDS = 10.0
MOST_LOSSES = 5  # a unit that so many workers died of will not fare better with the next


class Worker:
    """One set of networks on one GPU or on a few cores."""

    def __init__(self, job: Job, folder: str) -> None:
        self.job, self.folder = job, folder

    @cached_property
    def networks(self) -> Any:
        """Loaded at the first use, not by __init__, whose errors Ray takes for a death.

        Raises UserError where this machine does not see what the others see.
        """
        try:
            os.chdir(self.folder)  # relative paths mean what they mean to the command
            self.job.cache.identity.stat()
        except OSError as error:
            raise UserError(
                f"{socket.gethostname()} does not see {error.filename}; the folder the command "
                "starts in, the cache and the sources must be on a file system that all workers see"
            ) from None
        return self.job.load()

    def ready(self) -> None:
        """Answers when the networks are loaded."""
        assert self.networks

    def do(self, unit: Unit) -> Outcome:
        """Do and commit a unit."""
        return self.job.do(unit, self.networks, lambda *_: None)


def run_with_ray(
    job: Job, units: Sequence[Unit], address: str | None, cpus: int, progress: Progress
) -> Iterator[Outcome]:
    """Outcomes as they come. Raises UserError as `Job.do` does, or without a cluster."""
    try:
        import ray
    except ImportError:
        raise UserError(EXTRA) from None
    try:
        connect(ray, address)
        on_gpu = job.device == "cuda"
        needs: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": cpus}
        remote = ray.remote(**needs)(Worker)  # restarted by us, who count how often
        sent, folder = ray.put(job), os.getcwd()  # held to the end: later workers read it, too
        count = min(slots(ray, **needs), len(units))
        start = partial(remote.remote, sent, folder)
        for outcome in dispatched(ray, start, count, units, progress):
            progress.update(outcome.rows, f"{count} workers")
            yield outcome
    finally:
        ray.shutdown()


def connect(ray: Any, address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine. Raises UserError."""
    # Ray's C++ half would warn of restarts that lose their arguments (ours are held) and of every
    # failed attempt to connect; `info` in this variable brings its logs back.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    own = {} if address else {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    terminate = signal.getsignal(signal.SIGTERM)
    if address and address != "auto":  # where nobody listens, Ray would try for a minute
        _knock(address)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises bare ones too, such as for a node too slow to start
        if is_mistake(error) or not (isinstance(error, OSError) or raised_in(error, "ray")):
            raise
        if address is None:
            reason = first_line(error)
            raise UserError(f"Ray does not start here ({reason}); use --engine local") from None
        raise _no_cluster(address, first_line(error)) from None
    if signal.getsignal(signal.SIGTERM) is not terminate:  # Ray's own ends without a word
        signal.signal(signal.SIGTERM, terminate)


def _knock(address: str) -> None:
    """Raise UserError where nobody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise _no_cluster(address, f"{port!r} is no port")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # the latter for a name that is none
        raise _no_cluster(address, first_line(error)) from None


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"--ray-address {address}: no cluster to join there ({reason}); give the HOST:PORT "
        "that `ray start --head` printed, or auto on a machine of the cluster"
    )


def dispatched(
    ray: Any, start: Callable[[], Any], count: int, units: Sequence[Unit], progress: Progress
) -> Iterator[Outcome]:
    """Hand each of `count` workers a unit at a time; one that dies is replaced by a new one.

    Its unit goes to the next free worker. A new one takes part once it is ready, that is when Ray
    has found a place for it, which may be never. Raises UserError where a unit costs too many
    workers, or where none gets ready.
    """
    waiting, idle, losses = deque(units), list[Any](), Counter[str]()
    busy = dict[Any, tuple[Any, Unit | None, int]]()

    def start_worker(failures: int) -> None:
        worker = start()
        busy[worker.ready.remote()] = (worker, None, failures)

    for _ in range(count):
        start_worker(0)
    while waiting or any(unit for _, unit, _ in busy.values()):
        (call,), _ = ray.wait(list(busy))
        worker, unit, failures = busy.pop(call)
        try:
            outcome = ray.get(call)
        except UserError as error:  # with a traceback in front
            raise UserError(str(getattr(error, "cause", error))) from None
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            if unit is not None:
                start_worker(0)
                waiting.append(unit)
                losses[unit.name] += 1
                progress.write(f"lost a worker in {unit.source}; another one takes it")
                if losses[unit.name] == MOST_LOSSES:
                    reason = first_line(error)
                    raise UserError(
                        f"{unit.source}: {MOST_LOSSES} workers died of it (the last: {reason}); "
                        "give a worker more memory, or see what --engine local says of it"
                    ) from None
            elif failures + 1 < MOST_LOSSES:
                start_worker(failures + 1)
            else:
                progress.write(f"a worker does not get ready ({cause(error)}); on without it")
                if not (busy or idle):
                    raise UserError(
                        f"no Ray worker gets ready: {cause(error)}; all machines of the cluster "
                        "need the same packages, and a worker memory for the networks"
                    ) from None
        else:
            idle.append(worker)
            if outcome is not None:
                yield outcome
        while waiting and idle:
            worker, unit = idle.pop(), waiting.popleft()
            busy[worker.do.remote(unit)] = (worker, unit, 0)


def cause(error: Exception) -> str:
    """Take the last line of what Ray says of a death: the exception, where there was one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def slots(ray: Any, num_gpus: int = 0, num_cpus: int = 0) -> int:
    """How many workers the cluster's nodes have room for. Raises UserError where there is none."""
    name, each = ("GPU", num_gpus) if num_gpus else ("CPU", num_cpus)
    have = [node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]]
    count = sum(int(amount // each) for amount in have)
    if count == 0:
        raise UserError(
            f"a worker wants {each} {name}, and the largest node of the Ray cluster has "
            f"{max(have, default=0):g}; lower --cpus-per-worker or choose another --device"
        )
    return count
