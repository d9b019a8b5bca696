"""One process writes a run: others are told who, and one that lost it publishes nothing."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from shared.errors import UserError
from shared.storage.files import publish
from train.config import DistillConfig
from train.state import owner
from train.trainer import setup
from train.trainer.loop import distill
from train.trainer.setup import prepare

# Takes a run, says so, and at each line of its input publishes a file in it.
WRITER = """
import sys
from pathlib import Path
from shared.errors import run_main
from shared.storage.files import publish
from train.state import owner
def main():
    run = Path(sys.argv[1])
    owner.take(run, "a test", "wait", take_over="over" in sys.argv)
    print("took it", flush=True)
    for line in sys.stdin:
        publish([line.encode()], run / "published", run / "tmp")
        print("published", flush=True)
    owner.release(run)
run_main(main)
"""


@pytest.fixture
def writer(repo, tmp_path):
    """Start a process that takes tmp_path/run; it is killed in the end."""
    started = []

    def start(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), *words]
        environment = {**os.environ, "PYTHONPATH": str(repo)}
        process = subprocess.Popen(
            command, cwd=repo, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def began(process: subprocess.Popen) -> subprocess.Popen:
    assert process.stdout.readline() == "took it\n", process.stderr.read()
    return process


def files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.parts[len(folder.parts)] not in ("tmp", "logs")
    }


def test_a_second_process_is_refused_and_told_who_has_the_run(writer, tmp_path):
    first = began(writer())
    second = writer()
    out, err = second.communicate()
    assert (second.returncode, out, err.count("\n")) == (1, "", 1)
    assert f"{tmp_path / 'run'} is being written by `a test` on " in err
    assert f"(pid {first.pid}, since 20" in err
    assert err.endswith("; wait\n")
    with pytest.raises(UserError, match=f"pid {first.pid}"):
        owner.refuse_other(tmp_path / "run", "wait")


def test_one_that_ends_leaves_no_trace_and_one_that_is_killed_leaves_it_free(writer, tmp_path):
    first = began(writer())
    first.communicate("")
    assert not (tmp_path / "run" / owner.OWNER).exists()
    second = began(writer())
    second.kill()
    second.wait()
    assert (tmp_path / "run" / owner.OWNER).exists()
    began(writer()).communicate("again\n")
    assert (tmp_path / "run" / "published").read_text() == "again\n"


@pytest.mark.parametrize("ended", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sleeper_that_wakes_publishes_nothing(writer, tmp_path, ended):
    sleeper = began(writer())
    sleeper.send_signal(signal.SIGSTOP)
    assert writer().wait() == 1  # it lives, however deep its sleep is
    second = began(writer("over"))
    second.stdin.write("the second's\n")
    second.stdin.flush()
    assert second.stdout.readline() == "published\n"
    if ended:
        second.communicate()
    before = files(tmp_path / "run")
    sleeper.send_signal(signal.SIGCONT)
    out, err = sleeper.communicate("the sleeper's\n")
    assert (sleeper.returncode, out, err.count("\n")) == (1, "", 1)
    said = "has lost its owner.json" if ended else f"was taken over by .*pid {second.pid}"
    assert said.partition(".*")[0] in err
    assert "published nothing since" in err
    assert files(tmp_path / "run") == before
    assert list((tmp_path / "run" / "tmp").iterdir()) == []
    if not ended:
        assert second.poll() is None
        assert "taken over from `a test`" in second.communicate()[1]


def test_of_many_at_once_one_writes(writer, tmp_path):
    processes = [writer() for _ in range(6)]
    ended = [process.communicate(f"{number}\n") for number, process in enumerate(processes)]
    wrote = [number for number, (out, _) in enumerate(ended) if "published" in out]
    assert wrote
    for process, (_, err) in zip(processes, ended, strict=True):
        assert (process.returncode, err.count("\n")) in ((0, 0), (1, 1))
    assert (tmp_path / "run" / "published").read_text().strip() in map(str, wrote)


def test_a_file_system_without_locks_asks_for_a_word(writer, tmp_path, monkeypatch):
    """There nobody can be known to be dead, so who did not end counts as living."""
    killed = began(writer())
    killed.kill()
    killed.wait()

    def none(*_):
        raise OSError(owner.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(owner.fcntl, "flock", none)
    with pytest.raises(UserError, match="is being written by"):
        owner.take(tmp_path / "run", "a test", "wait")
    owner.take(tmp_path / "run", "a test", "wait", take_over=True)
    publish([b"x"], tmp_path / "run" / "published", tmp_path / "run" / "tmp")
    owner.release(tmp_path / "run")
    assert not (tmp_path / "run" / owner.OWNER).exists()


# ---- Trainings.


@pytest.fixture
def settings(tiny_cache, tiny_sd, tmp_path):
    def make(**more) -> DistillConfig:
        flags = {
            "model": str(tiny_sd), "cache": tiny_cache, "run": tmp_path / "run", "threads": 1,
            "train_batch_size": 2, "max_train_steps": 3, "checkpointing_steps": 2, "lora_rank": 2,
            "logging_steps": 1, "validation_steps": 2, "device": "cpu", "report_to": ("none",),
        }  # fmt: skip
        return DistillConfig(**flags | more)

    return make


def words(config: DistillConfig) -> list[str]:
    given = {k: v for k, v in vars(config).items() if v != getattr(DistillConfig, k, None)}
    flags = {k: "" if v is True else f"={v}" for k, v in given.items()}
    plain = [f"--{k}{v}" for k, v in flags.items() if not isinstance(given[k], tuple | frozenset)]
    return [*plain, "--report-to", *config.report_to]


def test_a_training_that_is_taken_over_leaves_every_file_as_it_is(settings, writer, tmp_path):
    run = prepare(settings())
    began(writer("over"))
    before = files(tmp_path / "run")
    assert {"config.json", "owner.json"} <= before.keys()
    for publishing in (run.save, run.export, run.preview, lambda: distill(run)):
        with pytest.raises(UserError, match="was taken over by `a test`"), run.recorder:
            publishing()
        assert files(tmp_path / "run").keys() - before.keys() <= {"metrics.jsonl"}
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_commands_that_write_into_a_run_wait_for_its_training(cli, settings, writer, tmp_path):
    distill(prepare(settings()))
    first = began(writer())
    before = files(tmp_path / "run")
    elsewhere = ["--output", tmp_path / "elsewhere"]
    for command, more in (
        ("export", []), ("evaluate", ["--eval-cache", settings().cache]),
        ("distill", words(settings(max_train_steps=9))),
        ("distill", [*words(settings()), "--seed", 5]),
        ("distill", [*words(settings(max_train_steps=9)), "--dry-run"]),
    ):  # fmt: skip
        if command != "distill":
            more = ["--run", tmp_path / "run", *more]
        answer = cli("train", command, *more)
        assert answer.status == 1, answer
        assert f"pid {first.pid}" in answer.err.splitlines()[-1]
    assert files(tmp_path / "run") == before
    assert cli("train", "export", "--run", tmp_path / "run", *elsewhere).status == 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_owner_that_is_no_file_is_not_waited_for(settings, tmp_path, make):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "owner.json")
    with pytest.raises(UserError, match=r"owner.json is a .*, no file; move it away"):
        prepare(settings())


def test_a_dry_run_takes_nothing(settings, tmp_path):
    prepare(settings(dry_run=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_another_saved_in_between_is_not_left_behind(settings, monkeypatch):
    """It trained and ended while this command was loading its networks."""
    build = setup.build_student
    monkeypatch.setattr(setup, "build_student", lambda *args: (other(), build(*args))[1])

    def other() -> None:
        monkeypatch.setattr(setup, "build_student", build)
        distill(prepare(settings()))

    with pytest.raises(UserError, match=r"another process has gone on .* the same command again"):
        prepare(settings())


@pytest.mark.parametrize("end", [KeyboardInterrupt, UserError])
def test_one_that_ends_before_its_first_step_leaves_the_run_free(
    settings, monkeypatch, tmp_path, end
):
    """Also where no lock would tell that it is dead."""
    monkeypatch.setattr(setup, "sweep", Mock(side_effect=end))
    with pytest.raises(end):
        prepare(settings())
    assert not (tmp_path / "run" / "owner.json").exists()


@pytest.mark.slow
def test_two_trainings_and_a_sleeping_one(settings, repo, tmp_path):
    def start(config: DistillConfig) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "train", "distill", *words(config)], cwd=repo, text=True,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    both = [start(settings(seed=seed, max_train_steps=30)) for seed in (0, 1)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    [refused] = [err for process, err in zip(both, said, strict=True) if process.returncode]
    assert "Traceback" not in refused
    sleeper = start(settings(run=tmp_path / "slept", max_train_steps=30))
    run = tmp_path / "slept"
    while not (run / "checkpoints" / "step-00000002").exists():
        time.sleep(0.05)
    sleeper.send_signal(signal.SIGSTOP)
    more = settings(run=run, max_train_steps=60, resume_from_checkpoint="latest")
    refused = start(more)
    assert f"pid {sleeper.pid}" in refused.communicate()[1]
    assert refused.returncode == 1
    second = start(settings(**vars(more) | {"take_over": True}))
    second.communicate()
    assert second.returncode == 0
    before = files(run)
    sleeper.send_signal(signal.SIGCONT)
    _, err = sleeper.communicate()
    assert sleeper.returncode == 1
    assert err.splitlines()[-1].startswith(f"error: {run} has lost its owner.json")
    assert files(run) == before
