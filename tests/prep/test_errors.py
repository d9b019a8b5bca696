"""A user's mistake is one line with its cause and its remedy, and exit status 1."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import prep.sources.braces
from tests.support.sources import (
    ROOT,
    TINY_SD,
    captioned,
    encode,
    manifest,
    refusal,
    tree,
    units,
    write_folder,
    write_tar,
)
from tests.support.sources import prep as run_prep


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "good.tar", captioned(range(6)))


@pytest.fixture
def run(tmp_path):
    """The line with which `prep encode` refuses; it must not leave a cache that looks begun."""

    def refused(shards, *flags, model="tiny-sd", cache=None):
        shards = [shards] if isinstance(shards, str | os.PathLike) else shards
        cache = cache or tmp_path / "cache"
        words = ["--model", model, "--cache", cache, "--threads", 1, *flags]
        return refusal("encode", "--shards", *shards, *words)

    return refused


# --- sources ------------------------------------------------------------------------------------


def test_the_real_command_says_it_in_one_line(tmp_path):
    words = ["encode", "--shards", "pictures/{00..03}.tar", "--model", "tiny-sd", "--cache", "c"]
    answer = subprocess.run(
        [sys.executable, "-m", "prep", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr == (
        "error: --shards: nothing matches 'pictures/00.tar' (pictures does not exist)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_mistyped_paths(run, tmp_path, tar):
    line = run(tmp_path / "god.tar")
    assert str(tmp_path / "god.tar") in line
    assert "no such file" in line
    assert f"{tmp_path / 'nowhere'} does not exist" in run(tmp_path / "nowhere" / "a.tar")
    assert "*.tgz" in run(f"{tmp_path}/*.tgz")
    assert "good7.tar" in run(f"{tmp_path}/good{{,7}}.tar")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pattern", ["a/{00..03.tar", "a/00..03}.tar", "a/{{1..2}.tar"])
def test_unbalanced_braces(run, tmp_path, pattern):
    line = run(tmp_path / pattern)
    assert pattern in line
    assert "braces" in line or "nothing matches" in line


def test_too_many_names(run, tmp_path):
    with mock.patch.object(prep.sources.braces, "MANY", 1000):
        assert "more than 1000 names" in run(f"{tmp_path}/{{0..99}}/{{0..99}}.tar")


def test_a_folder_without_captions(run, tmp_path):
    (tmp_path / "folder").mkdir()
    line = run(tmp_path / "folder")
    assert "metadata.jsonl" in line
    assert '{"file_name": "a.jpg", "text": "a caption"}' in line


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("metadata.jsonl", b'{"file_name": "0000.png", "text": "a"}\n{"file_name": ', "line 2"),
        ("metadata.jsonl", b'{"name": "0000.png", "text": "a"}\n', "file_name"),
        ("metadata.jsonl", b'"0000.png"\n', "file_name"),
        ("metadata.jsonl", b"\n", "no pictures"),
        ("metadata.jsonl", '{"file_name": "0000.png", "text": "é"}'.encode("latin-1"), "UTF-8"),
        ("metadata.csv", "file_name,text\n0000.png,é\n".encode("latin-1"), "UTF-8"),
        ("metadata.csv", b"file_name,text\n0000.png,a red, round star\n", "row 1"),
        ("metadata.csv", b"name,text\n0000.png,a star\n", "file_name"),
    ],
)
def test_damaged_metadata(run, tmp_path, name, content, named):
    folder = write_folder(tmp_path / "folder", range(1))
    (folder / "metadata.jsonl").unlink()
    (folder / name).write_bytes(content)
    line = run(folder)
    assert str(folder) in line
    assert named in line
    assert not (tmp_path / "cache").exists()


def test_empty_tars(run, tmp_path):
    (tmp_path / "zero.tar").touch()
    line = run(tmp_path / "zero.tar")
    assert "zero.tar is empty" in line
    assert "download it again" in line
    line = run(write_tar(tmp_path / "nothing.tar", []))
    assert "nothing.tar" in line
    assert "no files" in line


def test_a_file_that_is_no_tar(run, tmp_path):
    (tmp_path / "page.tar").write_text("<html>404 not found</html>" * 100)
    line = run(tmp_path / "page.tar")
    assert "page.tar is not a whole tar" in line
    assert "download it again" in line


def cuts(tar):
    """Sizes to which a tar may be cut short, by where that is in its second row's picture."""
    import tarfile

    with tarfile.open(tar) as file:
        info = file.getmembers()[2]
    return {
        "in the header": info.offset + 200,
        "in the data": info.offset_data + 700,
        "in the data at a block": info.offset_data + 1024,
        "before the end mark": info.offset,
        "between header and data": info.offset_data,
    }


CUTS = ("in the header", "in the data", "in the data at a block", "before the end mark",
        "between header and data")  # fmt: skip


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_truncated_tar_among_good_ones(run, tmp_path, where, place):
    good = [
        write_tar(tmp_path / f"{name}.tar", captioned(range(first, first + 3)))
        for name, first in (("b", 0), ("c", 10))
    ]
    bad = write_tar(tmp_path / ("a.tar" if place == "first" else "d.tar"), captioned(range(6)))
    whole = bad.read_bytes()
    bad.write_bytes(whole[: cuts(bad)[where]])
    line = run([*good, bad], "--latents", "mean")
    assert str(bad) in line
    assert "download it again" in line
    assert {unit["source"] for unit in units(tmp_path / "cache").values()} == set(map(str, good))
    # Downloaded again it is taken in, and the good ones are not done twice.
    bad.write_bytes(whole)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "shards").iterdir()}
    encode([*good, bad], tmp_path / "cache")
    assert all(path.stat().st_mtime_ns == time for path, time in stamps.items())
    assert manifest(tmp_path / "cache")["totals"]["written"] == 12


def test_a_truncated_tar_alone(run, tmp_path, tar):
    tar.write_bytes(tar.read_bytes()[: cuts(tar)["in the data"]])
    assert str(tar) in run(tar)
    assert units(tmp_path / "cache") == {}


# --- models -------------------------------------------------------------------------------------


@pytest.fixture
def offline():
    import huggingface_hub.constants

    with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
        yield


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("tiny-sdd", "tiny-sd, tiny-xl"),
        ("./tiny-sd", "neither a folder here"),
        ("nobody/no-such-model", "hf download nobody/no-such-model --local-dir FOLDER"),
        ("a/b/c", "owner/name"),
    ],
)
def test_mistyped_models(run, tar, tmp_path, offline, model, named):
    line = run(tar, model=model)
    assert repr(model) in line
    assert named in line
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_no_model(run, tar, tmp_path):
    line = run(tar, model=tmp_path)
    assert f"{tmp_path} has no unet/config.json" in line


def test_a_model_of_no_known_family(run, tar, tmp_path):
    model = shutil.copytree(TINY_SD, tmp_path / "model")
    config = (model / "unet" / "config.json").read_text()
    (model / "unet" / "config.json").write_text(
        config.replace('"cross_attention_dim": 64', '"cross_attention_dim": 65')
    )
    line = run(tar, model=model)
    assert "65" in line
    assert "sdxl 2048" in line


@pytest.mark.parametrize(
    "part",
    [
        "vae/diffusion_pytorch_model.safetensors", "vae/config.json",
        "text_encoder/model.safetensors", "text_encoder/config.json",
        "tokenizer/tokenizer.json", "unet/config.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "cut short", "git-lfs pointer"])
def test_a_damaged_model(run, tar, tmp_path, part, how):
    model = shutil.copytree(TINY_SD, tmp_path / "model")
    path = model / part
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    line = run(tar, model=model)
    assert str(model) in line
    assert not (tmp_path / "cache").exists()


def test_pickled_weights_are_not_read(run, tar, tmp_path):
    for part, name in (
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ):
        model = shutil.copytree(TINY_SD, tmp_path / f"model of {part}")
        (weights,) = (model / part).glob("*.safetensors")
        torch.save(load_file(weights), model / part / f"{name}.bin")
        weights.unlink()
        assert str(model) in run(tar, model=model)


# --- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--resolution", 20), ("--resolution", -64), ("--max-captions", 0), ("--latents", "median"),
        ("--decode-workers", 0), ("--vae-batch-size", -1), ("--text-batch-size", -1),
        ("--threads", -1), ("--device", "gpu"), ("--folder-units", -2), ("--folder-units", 0),
        ("--max-reject-fraction", 1.5), ("--max-reject-fraction", "nan"), ("--max-pwatermark", 80),
    ],
)  # fmt: skip
def test_impossible_flags(run, tar, tmp_path, flag, value):
    assert flag in run(tar, flag, value)
    assert not (tmp_path / "cache").exists()


def test_folder_units_that_are_no_power_of_two(run, tmp_path):
    folder = write_folder(tmp_path / "folder", range(2))
    assert "--folder-units 3 is not a power of two" in run(folder, "--folder-units", 3)


def test_an_unknown_command_and_a_missing_setting(tmp_path):
    assert "encode, finish, embed, verify, decode" in refusal("enc")
    (tmp_path / "run.toml").write_text("shard = ['a.tar']\n")
    line = refusal("encode", "--config", tmp_path / "run.toml", "--model", "m", "--cache", "c")
    assert "no such setting: shard" in line


# --- the disk -----------------------------------------------------------------------------------


def test_a_cache_that_is_a_file(run, tar, tmp_path):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        line = run(tar, cache=cache)
        assert str(tmp_path / "file") in line
        assert "is a file, not a folder" in line


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_a_cache_that_may_not_be_written(run, tar, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid():
        locked.chmod(0o555)
        line = run(tar, cache=locked / "cache")
    else:  # root may write anywhere, so the operating system's answer is put in its mouth
        real = os.mkdir

        def mkdir(path, *args, **options):
            if str(path).startswith(str(locked)):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path, *args, **options)

        with mock.patch.object(os, "mkdir", mkdir):
            line = run(tar, cache=locked / "cache")
    assert str(locked) in line
    assert "choose a folder you may write to" in line


Usage = namedtuple("Usage", "total used free")


def with_free(free):
    return mock.patch.object(shutil, "disk_usage", return_value=Usage(10**12, 0, free))


def test_too_little_disk_space(run, tar, tmp_path):
    need = sum(p.stat().st_size for p in (encode(tar, tmp_path / "c") / "shards").iterdir())
    with with_free(need // 2):
        line = run(tar, "--latents", "mean")
    assert str(tmp_path / "cache") in line
    assert " are free; " in line
    assert "free some space or choose another --cache" in line
    assert not (tmp_path / "cache").exists()
    with with_free(4 * need):
        encode(tar, tmp_path / "cache")


def test_the_space_that_one_unit_takes_while_it_is_written_counts(run, tar, tmp_path):
    """Until it is published, a unit is on the disk twice: as encoded, and sorted."""
    need = sum(p.stat().st_size for p in (encode(tar, tmp_path / "c") / "shards").iterdir())
    with with_free(int(1.3 * need)):
        assert " are free; " in run(tar, "--latents", "mean")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small tmpfs takes root on Linux")
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no tmpfs may be mounted here")
    yield folder
    # Lazily: what safetensors mapped may not have been collected yet.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 8, 40, 120, 220])
def test_a_disk_that_fills_up_and_is_freed(run, small_disk, tmp_path, room):
    """`room` kB are left: too few for the identity, ..., for the second unit's shard."""
    tars = [
        write_tar(tmp_path / f"{name}.tar", captioned(range(first, first + 12)))
        for name, first in (("a", 0), ("b", 20))
    ]
    wanted = tree(encode(tars, tmp_path / "wanted"))
    cache, ballast = small_disk / "cache", small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - room * 1024))
    with with_free(10**9):  # someone else fills the disk after the check
        line = run(tars, "--latents", "mean", cache=cache)
    assert str(cache) in line
    assert "the disk is full" in line
    assert "run the same command again" in line
    assert not list(cache.glob("tmp/*"))
    ballast.unlink()
    assert tree(encode(tars, cache)) == wanted


COMMANDS = {
    "finish": ["finish", "--cache", "CACHE", "--no-report"],
    "report": ["report", "--cache", "CACHE"],
    "embed": ["embed", "--cache", "CACHE", "--prompts", "a kite"],
    "pack": ["pack", "--cache", "CACHE", "--output", "DISK/archive", "--threads", "1"],
    "unpack": ["unpack", "--input", "ARCHIVE", "--cache", "DISK/restored"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("room", [0, 8])
def test_a_disk_that_is_full_for_the_other_commands(small_disk, tmp_path, command, room):
    tar = write_tar(tmp_path / "a.tar", captioned(range(4)))
    cache, archive = encode(tar, small_disk / "cache"), tmp_path / "archive"
    shutil.copytree(cache, tmp_path / "cache")
    assert run_prep("pack", "--cache", cache, "--output", archive).status == 0
    places = {"CACHE": str(cache), "DISK": str(small_disk), "ARCHIVE": str(archive)}
    words = COMMANDS[command]
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    before = tree(cache)
    ballast = small_disk / "ballast"
    pages = shutil.disk_usage(small_disk).free // 4096
    ballast.write_bytes(bytes(4096 * pages - room * 1024))
    with with_free(10**9):  # someone else fills the disk after the check
        answer = run_prep(*words)
    # What fits in 8 kB may succeed: the manifest and the prompts do.
    if room == 0 or answer.status:
        assert answer.status == 1
        (line,) = answer.errors
        assert str(small_disk) in line
        assert "the disk is full; free some space and run the same command again" in line
        assert tree(cache) == before
        assert not [p for p in small_disk.rglob("*") if p.parent.name == "tmp"]
    ballast.unlink()
    assert run_prep(*words).status == 0
    if command == "unpack":
        assert tree(small_disk / "restored") == before
    elif command == "pack":
        assert tree(small_disk / "archive") == tree(archive)
    elif command == "embed":
        run_prep("embed", "--cache", tmp_path / "cache", "--prompts", "a kite")
        assert tree(cache) == tree(tmp_path / "cache")
    else:
        assert tree(cache) == before
