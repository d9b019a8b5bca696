"""An export onto a disk that is full or read-only: a line, the former export whole, no litter."""

import errno
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from shared.errors import UserError
from shared.networks.denoiser import load_unet
from shared.storage.files import publish
from train.config import DistillConfig
from train.export.student import COMPANIONS, export_student
from train.export.weights import exported_student
from train.networks.full import guided_copy
from train.state import checkpoint
from train.trainer.loop import distill
from train.trainer.setup import prepare

MAKING = ("open", "write", "mkdir")  # what a full disk refuses
CHANGING = (*MAKING, "fsync", "replace")
CODES = (errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class Refusing:
    """Counts the calls of `os` that change files, and refuses some of them as the kernel does.

    Of the writes to a file the first counts, and those that are refused with it.
    """

    def __init__(self, monkeypatch, names, refused=lambda number: False, code=errno.ENOSPC):
        self.count, self.refused, self.code = 0, refused, code
        self.begun: set[int] = set()
        for name in names:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, real):
        def call(*args, **options):
            making = name != "open" or args[1] & os.O_CREAT
            there = name == "mkdir" and os.path.isdir(args[0])
            more = name == "write" and args[0] in self.begun
            if making and not there and not more:
                self.count += 1
                if self.refused(self.count):
                    raise OSError(self.code, os.strerror(self.code), str(args[0]))
            answer = real(*args, **options)
            if name == "write":
                self.begun.add(args[0])
            if name == "open":
                self.begun.discard(answer)
            return answer

        return call


@pytest.fixture(params=["lora", "full"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def export(kind, tiny_sd, tmp_path):
    """`export(1.0)` exports a student that is told by the number; returns its fingerprint."""
    unet = load_unet(str(tiny_sd))
    if kind == "full":
        unet = guided_copy(unet, 32, "random")
    else:
        unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"]))
    weight = dict(unet.named_parameters())
    told = next(p for name, p in weight.items() if kind == "full" or "lora_A" in name)

    def run(number: float, folder: Path = tmp_path / "run") -> str:
        with torch.no_grad():
            told.fill_(number)

        def describe(building: Path, student: str) -> None:
            for name in ("README.md", "scheduler/scheduler_config.json"):
                publish([student.encode()], building / name, folder / "tmp")

        export_student(unet, folder, describe=describe)
        return exported_student(folder, kind)

    return run


def content(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_full_disk_leaves_the_former_export_as_it_was(export, tmp_path, monkeypatch):
    """From the first refusal on nothing can be made any more, whichever call it is."""
    export(1.0)
    old = content(tmp_path / "run")
    with monkeypatch.context() as patch:
        calls = Refusing(patch, MAKING)
        export(2.0)
    new = content(tmp_path / "run")
    assert new.keys() == old.keys()
    assert all(new[name] != old[name] for name in new if not name.endswith("unet/config.json"))
    export(1.0)
    assert calls.count > 10
    for first in range(1, calls.count + 1):
        with monkeypatch.context() as patch:
            Refusing(patch, MAKING, lambda number, first=first: number >= first)
            with pytest.raises(UserError, match="the disk is full; free some space") as refusal:
                export(2.0)
        assert "\n" not in str(refusal.value)
        assert content(tmp_path / "run") == old, first
        assert list((tmp_path / "run/tmp").iterdir()) == []
    export(2.0)
    assert content(tmp_path / "run") == new


def test_any_refusal_leaves_one_student(export, tmp_path, monkeypatch, kind):
    """A single call fails; also a rename, after which what is there is of one student."""
    before = export(1.0)
    with monkeypatch.context() as patch:
        calls = Refusing(patch, CHANGING)
        after = export(2.0)
    found = after
    for first, code in zip(range(1, calls.count + 1), itertools.cycle(CODES), strict=False):
        if found == after:
            export(1.0)
        with monkeypatch.context() as patch:
            Refusing(patch, CHANGING, lambda number, first=first: number == first, code)
            with pytest.raises((UserError, OSError)):  # the latter is a line of run_main's
                export(2.0)
        found = exported_student(tmp_path / "run", kind)
        assert found in (before, after)
        for name in ("README.md", "scheduler/scheduler_config.json"):
            if (tmp_path / "run" / name).exists():
                assert (tmp_path / "run" / name).read_text() == found, (first, name)
        if kind == "lora":
            assert same_student(tmp_path / "run"), first
        assert list((tmp_path / "run/tmp").iterdir()) == []


def same_student(run: Path) -> bool:
    """Do both files, as far as they are there, hold the same numbers?"""
    kohya = run / "kohya_lora_weights.safetensors"
    if not kohya.exists():
        return True
    downs = [
        {float(tensor.flatten()[0]) for name, tensor in load_file(file).items() if side in name}
        for file, side in (
            (run / "pytorch_lora_weights.safetensors", ".lora_A."),
            (kohya, ".lora_down."),
        )
    ]
    return downs[0] == downs[1]


def test_what_the_new_export_does_not_have_is_gone(export, tmp_path, kind):
    """No file of the former student is left to be taken for the new one's."""
    run = tmp_path / "run"
    export(1.0)
    for name in COMPANIONS:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("the former student's")
    (run / "notes.txt").write_text("the user's")
    export(2.0)
    assert all(content(run)[n] != b"the former student's" for n in COMPANIONS if (run / n).exists())
    assert not (run / "preview.png").exists()
    assert (run / "notes.txt").read_text() == "the user's"


def test_a_full_disk_leaves_no_part_of_a_checkpoint(tmp_path, monkeypatch):
    """Which would keep the disk full."""

    def save(step: int) -> None:
        tensors = {"a": torch.full((3,), float(step))}
        progressed = checkpoint.TrainingState(step, step, 1, {})
        checkpoint.save_checkpoint(tmp_path, checkpoint.Checkpoint(progressed, tensors, tensors), 1)

    save(1)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        calls = Refusing(patch, MAKING)
        save(2)
    shutil.rmtree(tmp_path / "checkpoints")
    save(1)
    for first in range(1, calls.count + 1):
        with monkeypatch.context() as patch:
            Refusing(patch, MAKING, lambda number, first=first: number >= first)
            with pytest.raises(UserError, match="the disk is full"):
                save(2)
        assert content(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_full_disk(small_disk, cli, tiny_cache, tiny_sd, tmp_path):
    config = DistillConfig(
        model=str(tiny_sd), cache=tiny_cache, run=tmp_path / "run", train_batch_size=2,
        max_train_steps=1, lora_rank=4, validation_steps=0, threads=1, device="cpu",
        report_to=("none",),
    )  # fmt: skip
    distill(prepare(config))
    out = small_disk / "out"
    words = ("train", "export", "--run", config.run, "--output", out)
    assert cli(*words).status == 0
    old = content(out)
    size = sum(map(len, old.values()))
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - size // 2))
    answer = cli(*words)
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == (
        f"error: {out / 'tmp'}: the disk is full; free some space and run the same command again\n"
    )
    assert content(out) == old
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    answer = cli(*words)
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert "the file system is read-only; choose another folder" in answer.err
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    again = cli(*words)
    assert again.status == 0, again.err
    assert content(out) == old
    assert json.loads(old["scheduler/scheduler_config.json"])["_class_name"] == "LCMScheduler"
