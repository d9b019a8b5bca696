"""Processors that a process may use: the least of what the system and its schedulers grant."""

import os

import pytest

from shared.machine import cpus
from tests.support import warm


@pytest.fixture
def cores(monkeypatch):
    """A machine of 16 cores, of which all may be used, without quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(cpus, "_quota", lambda proc: 1 << 20)


@pytest.mark.parametrize(
    ("environment", "processors", "threads"),
    [
        ({}, 16, 16),
        ({"OMP_NUM_THREADS": "3"}, 16, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 16, 4),
        ({"OMP_NUM_THREADS": "64"}, 16, 16),
        ({"OMP_NUM_THREADS": "many"}, 16, 16),
        ({"OMP_NUM_THREADS": "0", "SLURM_CPUS_PER_TASK": ""}, 16, 16),
        ({"SLURM_CPUS_PER_TASK": "6"}, 6, 6),
        ({"SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "2"}, 6, 2),
        ({"SLURM_CPUS_PER_TASK": "64"}, 16, 16),
        # A launcher's processes share what its task was granted; OMP_NUM_THREADS means each.
        ({"LOCAL_WORLD_SIZE": "4"}, 4, 4),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "8"}, 2, 2),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "3"}, 4, 3),
        ({"LOCAL_WORLD_SIZE": "64"}, 1, 1),
        (  # srun has started each of two processes, with cores of its own
            {"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "8", "WORLD_SIZE": "2", "RANK": "1",
             "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 8, 8,
        ),
    ],
)  # fmt: skip
def test_the_least_that_is_granted(cores, environment, processors, threads):
    assert cpus.cpus(environment) == processors
    assert cpus.threads(environment) == threads


# ---- Quotas of cgroups, as in containers.


def system(folder, cgroup, mountinfo):
    """A /proc/self with these files, `{}` standing for where cgroups are mounted."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mountinfo.format(folder / "fs"))
    return proc


def limit(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


V2 = "30 23 0:26 / {} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 31 0:30 {root} {{}}/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.mark.parametrize(
    ("own", "around", "wanted"),
    [
        ("200000 100000", "max 100000", 2),
        ("max 100000", "350000 100000", 3),
        ("800000 100000", "400000 100000", 4),
        ("50000 100000", "max 100000", 1),
    ],
)
def test_version_2_own_or_of_a_group_around(tmp_path, own, around, wanted):
    proc = system(tmp_path, "0::/system.slice/job\n", V2)
    limit(tmp_path / "fs" / "system.slice" / "job", cpu__max=own)
    limit(tmp_path / "fs" / "system.slice", cpu__max=around)
    assert cpus._quota(proc) == wanted


def test_version_1(tmp_path):
    proc = system(tmp_path, "9:cpu,cpuacct:/docker/abc\n4:memory:/x\n", V1.format(root="/"))
    limit(
        tmp_path / "fs" / "cpu" / "docker" / "abc",
        cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n",
    )  # fmt: skip
    limit(tmp_path / "fs" / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cpus._quota(proc) == 2


@pytest.mark.parametrize("root", ["/docker/abc", "/elsewhere"])
def test_a_container_that_sees_its_own_group_as_the_root(tmp_path, root):
    """/proc/self/cgroup tells the path outside, which is not there inside."""
    proc = system(tmp_path, "9:cpu,cpuacct:/docker/abc\n", V1.format(root=root))
    limit(tmp_path / "fs" / "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert cpus._quota(proc) == 3


def test_no_quota_and_no_linux(tmp_path):
    proc = system(tmp_path, "0::/\n", V2)
    limit(tmp_path / "fs")  # the root has no cpu.max
    assert cpus._quota(proc) >= 1 << 20
    assert cpus._quota(tmp_path / "nowhere") >= 1 << 20


# ---- What follows of it.


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_networks_of_a_pinned_process_take_no_more_threads(repo):
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch; from shared.machine.device import set_threads\n"
        "torch.set_num_threads(3); set_threads(None); print(torch.get_num_threads())"
    )
    answer = warm.run(["-c", script], repo, OMP_NUM_THREADS="")
    assert answer.stdout.strip() == "1", answer.stderr


def test_the_networks_take_what_there_is_or_what_is_asked_for(monkeypatch):
    import torch

    from shared.machine.device import set_threads

    before, told = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(cpus, "threads", lambda: 5)
    set_threads(None)
    set_threads(7)
    assert told == [5, 7]
    assert torch.get_num_threads() == before
