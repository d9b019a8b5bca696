"""Temporary files: those of living processes stay, wherever they run; those of the dead go."""

import errno
import fcntl
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.storage import files, temporary
from tests.support.temporary import CONTAINED, can_unshare, holding, left_by_the_dead

DAYS = 24 * 3600.0


def age(path, days=2):
    """Last changed so many days ago, with all that is in it."""
    for found in (*path.rglob("*"), path):
        os.utime(found, (time.time() - days * DAYS,) * 2)


def strays(tmp, **flags):
    return list(temporary.strays(tmp, **flags))


# ---- What a sweep leaves and takes.


def test_a_living_process_keeps_its_files_however_old_and_a_dead_ones_go(tmp_path):
    dead = left_by_the_dead(tmp_path)
    with holding(tmp_path) as living:
        age(living.parent)
        assert strays(tmp_path) == [dead.parent]
        for young in (False, True):  # not even for one who says that nothing is running
            temporary.sweep(tmp_path, young)
            assert list(tmp_path.iterdir()) == [living.parent]
            assert living.exists()
    temporary.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_this_process_keeps_its_own(tmp_path):
    with temporary.temporary(tmp_path) as path:
        path.mkdir()
        (path / "part").write_text("")
        temporary.sweep(tmp_path, young=True)
        assert (path / "part").exists()
    assert list(tmp_path.iterdir()) == []  # what was not moved to its place


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make PID namespaces")
def test_containers_with_one_host_name_keep_each_others_files(tmp_path):
    """Each is pid 1 of a PID namespace of its own, and sees no process of the other."""
    sweep = (
        "import sys, pathlib; from shared.storage.temporary import sweep; "
        "sweep(pathlib.Path(sys.argv[1]))"
    )
    with holding(tmp_path, prefix=CONTAINED) as living:
        command = [*CONTAINED, sys.executable, "-c", sweep, str(tmp_path)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(files.__file__).parents[2]),
        }
        assert subprocess.run(command, env=environment).returncode == 0
        temporary.sweep(tmp_path)
        assert living.exists()
    time.sleep(0.1)
    for _ in range(100):  # the namespace ends a moment after what made it
        temporary.sweep(tmp_path)
        if not living.exists():
            break
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_free_lock_of_another_host_means_nothing_for_a_day(tmp_path, monkeypatch):
    """Some network file systems keep the locks of a host to itself."""
    left_by_the_dead(tmp_path)
    monkeypatch.setattr(temporary, "_kernel", lambda: "another")
    temporary.sweep(tmp_path)
    [folder] = tmp_path.iterdir()
    assert strays(tmp_path, young=True) == [folder]
    age(folder)
    temporary.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_held_lock_of_another_host_is_believed(tmp_path, monkeypatch):
    with holding(tmp_path) as living:
        age(living.parent)
        monkeypatch.setattr(temporary, "_kernel", lambda: "another")
        temporary.sweep(tmp_path)
        assert living.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_without_locks_a_day_decides(tmp_path, monkeypatch, number):
    def refuse(fd, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files.publish([b"x"], tmp_path / "file", tmp_path / "tmp")
    assert (tmp_path / "file").read_bytes() == b"x"
    with temporary.temporary(tmp_path / "tmp") as path:
        path.write_text("")
        for desks in (temporary._desks, temporary._Desks()):  # one's own, and another's
            monkeypatch.setattr(temporary, "_desks", desks)
            temporary.sweep(tmp_path / "tmp")
            assert path.exists()
        age(path.parent)
        temporary.sweep(tmp_path / "tmp")
        assert not path.exists()


def test_what_an_earlier_version_left_stays_for_a_day(tmp_path):
    """It is named after a host and a pid, which may be alive in another container."""
    names = [f"{os.uname().nodename}-4194305-0123456789ab-spool", "elsewhere-1-0123456789ab"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / f"{names[0]}-folder").mkdir()
    (tmp_path / f"{names[0]}-folder" / "file").write_text("")
    old = tmp_path / f"{names[0]}-folder"
    os.utime(old, (0, 0))  # but not what is in it
    temporary.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    age(old)
    temporary.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    temporary.sweep(tmp_path, young=True)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_way_is_removed_and_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "link").symlink_to(tmp_path / "mine")
    temporary.sweep(tmp_path / "tmp", young=True)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert (tmp_path / "mine" / "file").exists()


# ---- Several at a time.


def sweep_and_publish(number, folder, turns):
    for turn in range(turns):
        temporary.sweep(folder / "tmp")
        files.publish([b"%d" % number] * 3, folder / f"{number}-{turn}", folder / "tmp")


def test_processes_that_sweep_and_publish_at_once_lose_nothing(tmp_path):
    """A sweep may come at any moment of another's beginning, work and end."""
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=sweep_and_publish, args=(number, tmp_path, 150))
        for number in range(6)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert len(list(tmp_path.glob("*-*"))) == 6 * 150
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_process_may_begin_while_its_empty_folder_is_swept(tmp_path, monkeypatch):
    """Between the look at the folder without a lock and its removal its owner takes the lock."""
    folder = tmp_path / f"held-{temporary._reach(tmp_path)}-0123456789ab"
    folder.mkdir()
    look = temporary._owner_of

    @contextmanager
    def look_then_begin(path, young):
        with look(path, young) as owner:
            (path / "lock").write_text("")
            (path / "work").write_text("")
            yield owner

    monkeypatch.setattr(temporary, "_owner_of", look_then_begin)
    temporary.sweep(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "work"]


def test_where_no_folder_can_be_made_it_is_told(tmp_path, monkeypatch):
    """As in a working folder that is gone, where mkdir finds no parent however often it tries."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError):
        files.publish([b"x"], Path("below/file"), Path("below"))


def test_threads_share_their_processs_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(sweep_and_publish, number, tmp_path, 30) for number in range(8)]
        assert [future.result() for future in done] == [None] * 8
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_forked_child_does_not_keep_its_parents_files_alive(tmp_path):
    with temporary.temporary(tmp_path) as path:
        path.write_text("")
        child = os.fork()
        if not child:
            temporary.sweep(tmp_path)  # its parent is alive
            os._exit(0 if path.exists() and temporary._desks.held == {} else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- The scratch folder of a URL.


@pytest.fixture
def shared_folder(tmp_path, monkeypatch):
    """Stands for /tmp, where everybody may write."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_the_scratch_folder_is_for_its_user_alone(shared_folder):
    path = temporary.scratch("s3://bucket/cache")
    assert path.parent == shared_folder
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o777)  # as a version before may have left it
    assert temporary.scratch("s3://bucket/cache") == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_link_of_its_name_is_refused(shared_folder, tmp_path):
    path = temporary.scratch("s3://bucket/cache")
    path.rmdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    path.symlink_to(mine)
    with pytest.raises(UserError, match="set TMPDIR to a folder of your own") as error:
        temporary.scratch("s3://bucket/cache")
    assert str(path) in str(error.value)
    path.unlink()
    path.write_text("")
    with pytest.raises(UserError, match="set TMPDIR to a folder of your own"):
        temporary.scratch("s3://bucket/cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_somebody_elses_folder_is_refused(shared_folder):
    path = temporary.scratch("s3://bucket/cache")
    os.chown(path, 12345, -1)
    with pytest.raises(UserError, match="belongs to another user") as error:
        temporary.scratch("s3://bucket/cache")
    assert "\n" not in str(error.value)
