"""Looking into somebody's cache asks nobody but whom the user names."""

import json
import shutil
import socket
import subprocess
from unittest import mock

import fsspec
import huggingface_hub
import pytest

from shared.errors import UserError
from shared.models.family import recorded_model
from tests.support.sources import (
    TINY_SD,
    captioned,
    encode,
    manifest,
    prep,
    refusal,
    units,
    write_tar,
)

COMMANDS = {
    "report": (), "decode": ("--count", 3), "verify": ("--reencode", 3), "finish": (),
}  # fmt: skip


@pytest.fixture
def nobody(monkeypatch):
    """Any connection, and any command, is a failure of the test."""
    asked = []

    def refuse(*words, **_):
        asked.append(words)
        raise AssertionError(f"asked: {words}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    return asked


def rewrite(path, change):
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def sourced(cache, source):
    """The cache as if made from another source."""
    for path in (cache / "units").glob("*.json"):
        rewrite(path, lambda stored: stored.update(source=source))
    return cache


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return encode(write_tar(folder / "a.tar", captioned(range(3))), folder / "cache")


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


SOURCES = [
    "http://127.0.0.1:9/a.tar", "https://evil.example/a.parquet", "s3://bucket/a.tar",
    "hf://someone/pictures:train", "hf://datasets/someone/pictures/a.tar", "pipe:touch owned",
    "simplecache::http://127.0.0.1:9/a.tar", "zip://a.tar::http://127.0.0.1:9/a.zip",
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_no_address_of_a_record_is_asked(cache, nobody, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sourced(cache, source)
    with mock.patch("datasets.load_dataset_builder", side_effect=AssertionError("asked")):
        for command, flags in COMMANDS.items():
            answer = prep(command, "--cache", cache, *flags)
            assert answer.status == 0, answer.err
            words = (cache / "report.html").read_text() if command == "report" else ""
            told = answer.out + answer.err + words
            assert source[:8] in told, command
            assert "pass --shards" in told
    assert nobody == []
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def bucket(tmp_path):
    """memory://bucket/a.tar"""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe("/bucket/a.tar", write_tar(tmp_path / "b.tar", captioned(range(3))).read_bytes())
    yield "memory://bucket/a.tar"
    memory.store.clear()


def test_what_the_user_names_is_asked(bucket, tmp_path):
    cache = encode(bucket, tmp_path / "cache")
    answer = prep("verify", "--cache", cache, "--reencode", 3)
    assert "encoded again: 0 samples" in answer.err
    assert f"not compared: the originals of 3 samples are at {bucket}" in answer.err
    for shards in ("memory://bucket/*.tar", bucket):
        answer = prep("verify", "--cache", cache, "--reencode", 3, "--shards", shards)
        assert "encoded again: 3 samples" in answer.err
        assert "not compared" not in answer.err
    line = refusal("report", "--cache", cache, "--shards", "memory://bucket/b.tar")
    assert "memory://bucket/b.tar cannot be read" in line


def test_originals_that_moved_are_found_where_the_user_says(tmp_path):
    tar = write_tar(tmp_path / "a.tar", captioned(range(3)))
    cache = encode(tar, tmp_path / "cache")
    (tmp_path / "moved").mkdir()
    tar.rename(tmp_path / "moved" / "a.tar")
    gone = prep("verify", "--cache", cache, "--reencode", 3)
    assert "not compared: 3 samples whose source is gone" in gone.err
    moved = prep("verify", "--cache", cache, "--reencode", 3, "--shards", tmp_path / "moved/*.tar")
    assert "encoded again: 3 samples" in moved.err
    assert "not compared" not in moved.err


def test_an_encode_reads_the_originals_that_it_was_given(bucket, tmp_path):
    cache = encode(bucket, tmp_path / "cache", report=True)
    page = (cache / "report.html").read_text()
    assert page.count(" dB") >= 3
    assert "pass --shards" in prep("report", "--cache", cache).out
    assert prep("report", "--cache", cache, "--shards", bucket).status == 0
    assert (cache / "report.html").read_text() == page


def named(cache, **changes):
    """The cache with another model, or another VAE's place, in its records."""
    for path in (cache / "identity.json", cache / "manifest.json"):

        def change(stored):
            identity = stored.get("identity", stored)
            identity["model"] = changes.get("model", identity["model"])
            if "vae" in changes:
                identity["vae"]["source"] = changes["vae"]

        rewrite(path, change)
    return cache


@pytest.mark.parametrize("part", ["model", "vae"])
def test_a_model_that_a_record_names_is_not_downloaded(cache, nobody, part, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    named(cache, **{part: "someone/model"})
    told = f"say --{part} someone/model"
    for command, flags in {"decode": (), "verify": ("--reencode", 3)}.items():
        assert told in refusal(command, "--cache", cache, *flags)
    if part == "model":
        assert told in refusal("embed", "--cache", cache, "--prompts", "a")
    else:
        shards = ("--shards", manifest(cache)["shards"][0]["file"])
        words = ("--model", "tiny-sd", "--cache", cache, *shards)
        assert units(cache)
        assert "nothing matches" in refusal("encode", *words)
    assert prep("report", "--cache", cache).status == 0
    assert told in (cache / "report.html").read_text()
    assert prep("decode", "--cache", cache, f"--{part}", TINY_SD,
                "--output", tmp_path / "x.png").status == 0  # fmt: skip
    assert nobody == []


def test_the_hubs_local_copy_of_a_recorded_model_will_do(tmp_path, monkeypatch, nobody):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(TINY_SD, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert recorded_model("someone/model") == str(snapshot)
    with pytest.raises(UserError, match="say --model some/other if you trust it"):
        recorded_model("some/other")
    assert nobody == []
