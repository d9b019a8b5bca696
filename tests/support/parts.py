"""Parts of one `prep encode` as processes of their own, begun at once on one cache.

    python tests/support/parts.py --cache CACHE --rounds 20 --parts 8 [--gap 0.5] [--unlike]
        [--overwrite] [--kill] -- FLAGS OF ENCODE

Everything is imported once and a child is forked per part: it runs the real command. With --unlike
each part is on another kind of machine: it measures otherwise, and has other defaults. With --kill
some are killed on their way and begun again. Prints, as JSON, what each process ended with.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run by path, so the repository is not on it

import torch  # noqa: E402

import prep.encoders.vae  # noqa: E402
from prep import __main__ as main  # noqa: E402
from prep import commands  # noqa: E402
from prep.encode import networks  # noqa: E402
from shared.machine import cpus  # noqa: E402
from shared.storage import retry  # noqa: E402

LIMIT = 300.0  # seconds that no process takes


def unlike(number: int) -> None:
    """Make this process one on another machine."""
    networks.cpus.threads = lambda *_: 1 + number % 2
    networks.default_vae_batch_size = lambda *_: 2 + number % 3
    commands.posterior_matters = lambda _: bool(number % 2)
    prep.encoders.vae.scale_for = lambda _: 2.0 ** -(number % 4)
    assert cpus


def forked(work: Callable[[], None], log: Path) -> int:
    """A child that runs `work`; what it prints goes to `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command(*words: object) -> Callable[[], None]:
    def run() -> None:
        sys.argv = ["prep", *map(str, words)]
        main.main()

    return run


def part(number: int, delay: float, different: bool, words: list[object]) -> Callable[[], None]:
    def run() -> None:
        time.sleep(delay)
        if different:
            unlike(number)
        command(*words)()

    return run


def ended(child: int) -> int:
    """Its status, as a shell tells it; killed where it takes too long."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def play(args: argparse.Namespace, number: int, logs: Path) -> dict[str, Any]:
    """All parts at once, killed ones again, then `prep finish`: their statuses and last words."""
    rng, cache = random.Random(number), f"{args.cache}-{number}"
    flags = [*args.flags, "--cache", cache, "--no-report"]
    if args.overwrite:
        assert ended(forked(command("encode", *flags), logs / "before")) == 0
        flags += ["--resolution", "32", "--overwrite"]

    def begin(i: int, delay: float) -> int:
        words = ["encode", *flags, *(["--part", f"{i}/{args.parts}"] if args.parts > 1 else [])]
        return forked(part(i, delay, args.unlike, words), logs / f"part-{i}")

    count = args.processes or args.parts
    order = rng.sample(range(count), count)
    children = {i: begin(i % args.parts, rng.uniform(0, args.gap)) for i in order}
    if args.kill:
        time.sleep(rng.uniform(0, args.gap + 1.0))
        for i in rng.sample(order, count // 2):
            os.kill(children[i], signal.SIGKILL)
    statuses = {i: ended(child) for i, child in children.items()}
    for i in [i for i, status in statuses.items() if status == -signal.SIGKILL and args.kill]:
        statuses[i] = ended(begin(i % args.parts, 0.0))
    statuses["finish"] = ended(
        forked(command("finish", "--cache", cache, "--no-report"), logs / "f")
    )
    said = {path.name: path.read_text()[-1500:] for path in sorted(logs.iterdir())}
    failed = {name: status for name, status in statuses.items() if status}
    return {"cache": cache, "failed": failed, "said": said if failed else {}}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--processes", type=int, help="where several have the same part")
    parser.add_argument("--gap", type=float, default=0.0, help="begun within so many seconds")
    for name in ("unlike", "overwrite", "kill"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    retry.FIRST_WAIT = 0.05
    args.logs.mkdir(exist_ok=True)
    print(json.dumps([play(args, number, args.logs) for number in range(args.rounds)]))


if __name__ == "__main__":
    run()
