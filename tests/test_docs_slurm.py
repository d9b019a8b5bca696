"""The batch scripts of the documentation, run as they stand, with a small Slurm in place of one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.state.checkpoint import read_progress, whole_checkpoints

SRUN = """# Starts $TASKS tasks and ends with the worst status.
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < TASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=$TASKS "$@" & pids+=($!); echo $! >> tasks
done
worst=0
for pid in "${pids[@]}"; do wait $pid; status=$?; ((status > worst)) && worst=$status; done
rm -f tasks; exit $worst
"""
SCANCEL = '[[ "$1 $2" == "--signal=TERM 77" ]] && kill -TERM $(cat tasks)\n'
SCONTROL = """if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$*" >> queue; fi
"""


def block(page: Path, begins: str, **changes: str) -> str:
    """The code block in which a text stands, with what is too large for a test made small."""
    found = [code for code in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
             if begins in code]  # fmt: skip
    assert len(found) == 1
    for old, new in changes.items():
        assert old in found[0], old
        found[0] = found[0].replace(old, new)
    return found[0]


class Slurm:
    """A folder to submit from, and a job that runs there."""

    def __init__(self, folder: Path, repo: Path, tasks: int) -> None:
        self.folder, self.repo = folder, repo
        for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
            self.program(f"bin/{name}", text)
        activate = folder / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
        self.environment = {
            **os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1", "TASKS": str(tasks),
            "PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "2", "SLURM_ARRAY_JOB_ID": "70",
        }  # fmt: skip

    def program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)

    @property
    def queue(self) -> list[str]:
        """What was put into the queue again."""
        path = self.folder / "queue"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, script: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", script], cwd=self.folder, env=self.environment | environment,
            stdout=subprocess.DEVNULL, stderr=(self.folder / "log").open("a"),
        )  # fmt: skip

    def run(self, script: str, **environment: str) -> int:
        return self.start(script, **environment).wait()

    def log(self) -> str:
        return (self.folder / "log").read_text()[-3000:]


def wait_for(condition, process) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_training_goes_on_in_the_next_job(tmp_path, repo, tiny_sd, tiny_cache, tasks):
    slurm = Slurm(tmp_path, repo, tasks)
    steps = 60
    script = block(
        repo / "docs" / "training.md", "train distill --model sdxl",
        **{
            "--model sdxl": f"--model {tiny_sd}", "caches/cc12m-sdxl": str(tiny_cache),
            "20000 \\": f"{steps} \\", "--train-batch-size 8": "--train-batch-size 2",
            "--lora-rank 64": "--lora-rank 4 --validation-steps 0 --report-to none",
        },
    )  # fmt: skip
    job, run = slurm.start(script), tmp_path / "runs" / "lora"
    wait_for((run / "metrics.jsonl").exists, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 0, slurm.log()
    assert slurm.queue == ["requeue 77"]
    [saved] = whole_checkpoints(run)
    assert 0 < read_progress(saved).step < steps
    assert not (run / "pytorch_lora_weights.safetensors").exists()
    assert slurm.run(script) == 0, slurm.log()
    assert slurm.queue == ["requeue 77"]  # what has come to its end is not queued again
    assert read_progress(whole_checkpoints(run)[-1]).step == steps
    assert (run / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_fails_is_not_queued_again(tmp_path, repo):
    slurm = Slurm(tmp_path, repo, 1)
    script = block(
        repo / "docs" / "training.md", "train distill --model sdxl",
        **{"--model sdxl": "--model tiny-sd", "caches/cc12m-sdxl": "nowhere"},
    )  # fmt: skip
    assert slurm.run(script) == 1
    assert "nowhere is not a cache" in slurm.log()
    assert slurm.queue == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_array_encodes_a_cache_and_a_part_whose_time_is_up_is_queued_again(tmp_path, repo):
    slurm = Slurm(tmp_path, repo, 1)
    page = repo / "docs" / "scaling.md"
    tars = f"{repo}/data/pictures/train/{{00000..00001}}.tar"
    script = block(page, "--array=0-15", **{
        "pictures/{00000..00999}.tar": tars, "--model sd15": "--model tiny-sd", "/16": "/2",
    })  # fmt: skip
    fold = block(page, "sbatch --parsable", **{"JOB=$(sbatch --parsable encode.sbatch)": "JOB=70"})
    slurm.program("bin/sbatch", '[[ "$1 $2" == "--dependency=afterok:70 --wrap" ]] && $3\n')
    slurm.program(".venv/bin/python", f'exec "{sys.executable}" "$@"\n')
    job = slurm.start(script, SLURM_ARRAY_TASK_ID="0")
    wait_for((tmp_path / "caches" / "sd15" / "identity.json").exists, job)
    job.send_signal(signal.SIGUSR1)
    job.wait()
    assert slurm.queue == ["requeue 70_0"]
    for pid in (tmp_path / "tasks").read_text().split():  # requeueing ends what the job runs
        os.kill(int(pid), signal.SIGKILL)
    for part in ("1", "0"):
        assert slurm.run(script, SLURM_ARRAY_TASK_ID=part) == 0, slurm.log()
    assert slurm.queue == ["requeue 70_0"]
    assert slurm.run(fold) == 0, slurm.log()
    found = json.loads((tmp_path / "caches" / "sd15" / "manifest.json").read_text())
    assert found["totals"]["units"] == 2
    assert found["identity"]["shapes"]["threads"] == 1  # OMP_NUM_THREADS, below what was granted
