"""Caring for answers: verify finds what is damaged, gc removes what nothing names."""

import shutil
from pathlib import Path

import pytest

from prep.cache import answers_fold
from prep.teach.teacher import Teacher
from shared.cache.answers_store import open_answers
from tests.support.kept_answers import assert_gc_removes, shard_of
from tests.support.sources import TINY_SD, Answer, captioned, encode, prep, write_tar


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    source = write_tar(folder / "a.tar", captioned(range(4)))
    cache = encode(source, folder / "cache")
    assert teach(cache).status == 0
    return cache


@pytest.fixture
def cache(taught, tmp_path) -> Path:
    return Path(shutil.copytree(taught, tmp_path / "cache"))


def teach(cache: Path, *more: object) -> Answer:
    return prep("teach", "--cache", cache, "--model", TINY_SD, "--answers", 2, "--threads", 1,
                "--batch-size", 4, *more)  # fmt: skip


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_sound_cache_has_no_damage(cache):
    said = prep("verify", "--cache", cache, "--reencode", 2)
    assert said.status == 0
    assert "no damage" in said.out
    assert "asked again: 2 samples; largest relative difference: " in said.err


def test_damage_is_named_and_mended_by_asking_for_that_unit(cache, taught):
    flip(shard_of(cache), open_answers(cache).shards[0].layout.offsets["answers"])
    said = prep("verify", "--cache", cache)
    assert said.status == 1
    assert f"answers/shards/{shard_of(cache).name} is not the file that was committed" in said.err
    assert "checksum differs" in said.err
    assert "then the same `prep teach`" in said.out
    said = prep("verify", "--cache", cache, "--repair")
    assert said.status == 1
    assert "run the same `prep teach`" in said.out
    assert (cache / "manifest.json").exists()  # the samples are whole
    assert open_answers(cache) is None
    assert teach(cache).status == 0
    assert prep("verify", "--cache", cache).status == 0
    assert shard_of(cache).read_bytes() == shard_of(taught).read_bytes()


def test_a_missing_shard_is_asked_for_again(cache, taught):
    shard_of(cache).unlink()
    said = prep("verify", "--cache", cache)
    assert said.status == 1
    assert "is missing" in said.err
    assert teach(cache).status == 0
    assert shard_of(cache).read_bytes() == shard_of(taught).read_bytes()


def test_answers_without_their_samples_do_not_end_the_search_for_damage(cache):
    next((cache / "shards").iterdir()).unlink()
    said = prep("verify", "--cache", cache)
    assert said.status == 1
    assert "1 damage" in said.out
    assert "then the `prep encode` that made the cache" in said.out


def test_answers_that_the_teacher_does_not_give_are_found(cache, monkeypatch):
    real = Teacher._forward
    monkeypatch.setattr(Teacher, "_forward", lambda *args: 1.1 * real(*args))
    said = prep("verify", "--cache", cache, "--reencode", 1)
    assert said.status == 1
    assert "differs by" in said.err


def test_gc_keeps_what_is_named_and_removes_what_is_not(cache):
    former = shard_of(cache)
    assert teach(cache, "--answers", 3).status == 0
    assert_gc_removes(cache, former)


def test_stats_tell_of_them(cache):
    assert "answers     2 of each sample by" in prep("stats", "--cache", cache).out


def test_a_dry_run_says_what_it_would_take(cache):
    shutil.rmtree(cache / "answers")
    line = teach(cache, "--dry-run").err.splitlines()[-1]
    for part in ("4 samples of 1 unit", "2 answers each", "50 timesteps", "precision no", " free"):
        assert part in line
    assert not (cache / "answers").exists()


def test_killed_after_its_manifest_it_leaves_no_record_of_a_unit_that_is_gone(
    tmp_path, monkeypatch
):
    """The manifest no longer tells then whose record it was, so the record goes before."""
    first, second = (
        write_tar(tmp_path / f"{name}.tar", captioned(range(start, start + 2)))
        for name, start in (("a", 0), ("b", 2))
    )
    cache = encode([first, second], tmp_path / "cache")
    assert teach(cache).status == 0
    (gone,) = (cache / "units").glob("b-*.json")
    gone.unlink()
    assert prep("finish", "--cache", cache).status == 0
    real = answers_fold.write_answers_manifest

    def killed(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers_fold, "write_answers_manifest", killed)
        assert teach(cache).status == 130
    assert teach(cache).status == 0
    assert [path.name[:2] for path in (cache / "answers/units").iterdir()] == ["a-"]
    assert len(open_answers(cache).shards) == 1
