"""However processes are started: they find each other, or a line says why not."""

import os
import subprocess
import sys

import pytest

from shared.errors import UserError
from tests.support import warm
from train.trainer.launch import TORCH, join

SLURM = {
    "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1234567",
}  # fmt: skip


def mpi(rank: int, size: int, here: int) -> dict[str, str]:
    name = "OMPI_COMM_WORLD_"
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank % here, "LOCAL_SIZE": here}
    return {name + key: str(value) for key, value in values.items()}


PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ALONE = [
    {},
    {"WORLD_SIZE": "1"},
    mpi(0, 1, 1),
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},  # a batch script
    SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"},
    {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
]


@pytest.mark.parametrize("environment", ALONE)
def test_a_process_that_is_alone(environment):
    before = dict(environment)
    assert join(environment) == 1
    assert environment == before


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (mpi(1, 2, 2), ["1", "2", "1", "2"]),
        (mpi(3, 4, 2) | {"MASTER_ADDR": "first"}, ["3", "4", "1", "2"]),
        (PMI, ["1", "2", "1", "2"]),
        (SLURM, ["1", "2", "1", "2"]),
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
                     "MASTER_ADDR": "first"},
            ["1", "6", "1", "2"],
        ),
        (dict(zip(TORCH, "1212", strict=True)), ["1", "2", "1", "2"]),
    ],
)  # fmt: skip
def test_processes_of_any_launcher_find_each_other(environment, told):
    assert join(environment) == int(told[1])
    assert [environment[name] for name in TORCH] == told
    again = dict(environment)
    assert join(environment) == int(told[1])
    assert environment == again


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
         "accelerate was asked for several processes and has started one"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        (mpi(1, 4, 2), "mpirun has started 4 processes, 2 of them here; export MASTER_ADDR"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "2 processes that cannot find each other"),
    ],
)  # fmt: skip
def test_those_that_cannot_are_refused_in_a_line(environment, said):
    with pytest.raises(UserError) as error:
        join(environment)
    assert said in str(error.value)
    assert "torchrun" in str(error.value)
    assert "\n" not in str(error.value)


def words(tiny_cache, tiny_sd, run) -> list[str]:
    told = [
        "distill", "--model", tiny_sd, "--cache", tiny_cache, "--run", run, "--lora-rank", 2,
        "--train-batch-size", 2, "--max-train-steps", 2, "--validation-steps", 0, "--threads", 1,
        "--report-to", "none", "--device", "cpu",
    ]  # fmt: skip
    return list(map(str, told))


@pytest.mark.slow
def test_accelerates_one_process_of_several_is_refused(repo, tiny_cache, tiny_sd, tmp_path):
    """The launcher starts warm, and `python -m train`, as the launcher starts it, does not."""
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "train"]
    command += words(tiny_cache, tiny_sd, tmp_path / "run")
    answer = warm.run(command, repo, PYTHONPATH=str(repo))
    assert answer.returncode != 0
    assert "error: accelerate was asked for several processes and has started one" in answer.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_two_processes_of_another_launcher_train_together(
    repo, tiny_cache, tiny_sd, tmp_path, launcher
):
    processes = []
    for rank in range(2):
        told = mpi(rank, 2, 2)
        if launcher == "srun":
            told = SLURM | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "train", *words(tiny_cache, tiny_sd, tmp_path / "run")],
                cwd=repo, env={**os.environ, "PYTHONPATH": str(repo), **told}, text=True,
                stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "2 steps of 4 samples over 2 processes" in said[0]
