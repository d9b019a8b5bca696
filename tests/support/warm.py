"""Processes of Python that need not import torch again: forks of one that has done so.

`fork_server` is called when pytest has collected the tests, and so has imported what they test; it
leaves a process behind that does nothing but fork. `start` and `run` are for tests of what a
process does, where the ten seconds it would take to begin say nothing: they take what follows
`python` on a command line. What is read while Python or a library is imported (PYTHONHASHSEED,
HF_HUB_OFFLINE) is that of pytest's process; a test of such a thing starts a process of its own.
"""

import contextlib
import importlib
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_server: socket.socket | None = None


class Process:
    """A command under way. Its output is read from files, so it never waits for its reader."""

    def __init__(self, words: Sequence[object], cwd: Path, env: Mapping[str, str]) -> None:
        assert _server, "no test of this session was collected"
        self.words = list(map(str, words))
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._end, theirs = socket.socketpair()
        wanted = pickle.dumps((self.words, str(cwd), dict(env)))
        fds = [theirs.fileno(), *(file.fileno() for file in self._files)]
        socket.send_fds(_server, [len(wanted).to_bytes(4, "little")], fds)
        _server.sendall(wanted)
        theirs.close()
        self.pid = int.from_bytes(_exactly(self._end, 4), "little")
        self.returncode: int | None = None

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            file.close()

    def poll(self) -> int | None:
        with contextlib.suppress(TimeoutError):
            return self.wait(timeout=0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Its status, as subprocess has it. Raises TimeoutError."""
        if self.returncode is None:
            self._end.settimeout(timeout if timeout != 0 else 1e-6)
            self.returncode = int.from_bytes(_exactly(self._end, 4), "little", signed=True)
            self._end.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to stdout and stderr, once it has ended."""
        self.wait(timeout)
        out, err = (os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0) for f in self._files)
        return out.decode(), err.decode()


def start(words: Sequence[object], cwd: Path, **env: str) -> Process:
    """`python WORDS` in `cwd`, with these variables besides our own."""
    return Process(words, cwd, os.environ | env)


def run(words: Sequence[object], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The same, waited for."""
    process = start(words, cwd, **env)
    try:
        out, err = process.communicate()
    finally:
        process.send_signal(signal.SIGKILL)  # where this test's time was up
    return subprocess.CompletedProcess(process.words, process.wait(), out, err)


def fork_server() -> None:
    """Leave a process behind that is as this one is now; it ends with this one."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
        else:
            _serve(os.dup2(theirs.detach(), 3))


def _exactly(end: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = end.recv(size - len(found))
        assert more, "the server of warm processes is gone"
        found += more
    return found


def _serve(fd: int) -> NoReturn:
    """Fork for every request: a child that waits for its own child, and tells its pid and status.

    Nothing of pytest stays open here: who reads the other end of its pipes sees it end.
    """
    status = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        requests = socket.socket(fileno=fd)
        while True:
            size, fds, *_ = socket.recv_fds(requests, 4, 3)
            if not size:
                break
            wanted = _exactly(requests, int.from_bytes(size, "little"))
            if not os.fork():
                requests.close()
                _nurse(fds, *pickle.loads(wanted))
            for theirs in fds:
                os.close(theirs)
        status = 0
    finally:
        os._exit(status)


def _nurse(fds: list[int], words: list[str], cwd: str, env: dict[str, str]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if not child:
        os.close(fds[0])
        os.dup2(fds[1], 1)
        os.dup2(fds[2], 2)
        os.close(fds[1])
        os.close(fds[2])
        _become(words, cwd, env)
    os.write(fds[0], child.to_bytes(4, "little"))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(fds[0], status.to_bytes(4, "little", signed=True))
    os._exit(0)


def _become(words: list[str], cwd: str, env: dict[str, str]) -> NoReturn:
    """Do as `python WORDS` does, and end as it ends."""
    status: Any = 1
    try:
        _forget_pytest()
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or torch.get_num_threads()))
        _interpret(words)
        status = 0
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def _forget_pytest() -> None:
    """Take back what pytest changed in the interpreter."""
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_pytest")]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.reload(warnings)
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)


def _interpret(words: list[str]) -> None:
    how, *rest = words
    if how == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(f"{rest[0]}.__main__", None)  # a test's import of it, which runpy warns of
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = [how, *rest[1:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(how))
        runpy.run_path(how, run_name="__main__")
