"""Answers that were kept while drawing: verify, stats, gc and the announcement know of them."""

import json
import shutil

import numpy as np
import pytest

from prep.inspect.verify_answers import one_step_away
from prep.teach.teacher import Teacher
from shared.cache.answers_store import open_answers
from tests.support.drawn import CAPTIONS, draw, lines
from tests.support.kept_answers import assert_gc_removes, shard_of
from tests.support.sources import prep

FLAGS = {"steps": 5, "answers": 2}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    source = lines(folder / "captions.txt", CAPTIONS[:5])
    draw(source, folder / "cache", **FLAGS)
    return source, folder / "cache"


@pytest.fixture
def cache(kept, tmp_path):
    return shutil.copytree(kept[1], tmp_path / "cache")


def test_the_teacher_says_the_same_again(cache):
    said = prep("verify", "--cache", cache, "--reencode", 5)
    assert said.status == 0
    assert "nothing encoded again: drawn by the teacher" in said.err
    assert "asked again: 5 samples; largest relative difference: " in said.err
    assert float(said.err.split("difference: ")[1].split()[0]) < 2e-3


def test_answers_that_the_teacher_does_not_give_are_found(cache, monkeypatch):
    real = Teacher._forward
    monkeypatch.setattr(Teacher, "_forward", lambda *args: 1.1 * real(*args))
    said = prep("verify", "--cache", cache, "--reencode", 2)
    assert said.status == 1
    assert "differs by" in said.err


def test_a_step_of_fp16_is_more_than_rounding_took():
    values = np.random.default_rng(0).standard_normal((4, 64, 64)).astype(np.float32)
    rounded = values.astype(np.float16)
    beside = one_step_away(rounded, "0123456789abcdef")
    moved = np.abs(beside.astype(np.float64) - rounded.astype(np.float64))
    assert (moved > 0).all()
    lost = np.abs(values - rounded.astype(np.float64))
    assert np.sqrt((lost**2).mean()) < np.sqrt((moved**2).mean()) / 3
    assert abs((beside > rounded).mean() - 0.5) < 0.02


def test_damage_is_named_and_mended_by_the_same_synthesize(kept, cache):
    source, whole = kept
    path, content = shard_of(cache), bytearray(shard_of(cache).read_bytes())
    content[open_answers(cache).shards[0].layout.offsets["answers"]] ^= 1
    path.write_bytes(content)
    said = prep("verify", "--cache", cache)
    assert said.status == 1
    assert "checksum differs" in said.err
    assert "--repair`, then the same `prep synthesize`" in said.out
    said = prep("verify", "--cache", cache, "--repair")
    assert "1 record of answers removed; run the same `prep synthesize` to have these" in said.out
    assert draw(source, cache, **FLAGS).startswith("5 samples drawn")
    assert shard_of(cache).read_bytes() == shard_of(whole).read_bytes()
    assert prep("verify", "--cache", cache).status == 0


def test_stats_say_that_they_were_kept_while_drawing(cache):
    out = prep("stats", "--cache", cache).out
    assert "answers     2 of each sample by " in out
    assert " at 5 timesteps, kept while drawing, " in out
    found = json.loads(prep("stats", "--cache", cache, "--json").out)
    assert found["answers"]["trajectory"] is True


def test_gc_keeps_what_is_named_and_removes_what_is_not(kept, cache, tmp_path):
    former = shard_of(cache)
    draw(lines(tmp_path / "captions.txt", CAPTIONS[:6]), cache, prune=True, **FLAGS)
    assert_gc_removes(cache, former)


def test_a_dry_run_counts_their_bytes(tmp_path):
    source = lines(tmp_path / "c.txt", CAPTIONS)

    def announced(*more):
        answer = prep("synthesize", "--captions", source, "--model", "tiny-sd", "--cache",
                      tmp_path / "cache", "--per-caption", 30, "--threads", 1, "--steps", 10,
                      "--dry-run", *more)  # fmt: skip
        assert answer.status == 0, answer.err
        return answer.err.splitlines()[-1]

    assert "1 unit to draw, 300 samples: " in announced()
    line = announced("--answers", 10)
    assert "1 unit to draw, 300 samples with 10 answers each: " in line
    more = megabytes(line) - megabytes(announced())
    assert more == pytest.approx(300 * (10 * 1536 + 2048) * 1e-6, abs=0.11)  # and headers
    assert not (tmp_path / "cache").exists()


def megabytes(line):
    return float(line.split(": ")[1].split(" MB")[0])


def test_answers_of_a_unit_that_another_process_is_about_to_commit_stay(tmp_path):
    """Its answers are there, and its samples not yet, when this process writes the manifest."""
    folder = tmp_path / "captions"
    folder.mkdir()
    lines(folder / "a.txt", CAPTIONS[:3])
    draw(folder / "*.txt", tmp_path / "one", **FLAGS)
    lines(folder / "b.txt", CAPTIONS[3:7])
    shutil.copytree(tmp_path / "one", tmp_path / "both")
    draw(folder / "*.txt", tmp_path / "both", **FLAGS)
    theirs = [path for path in (tmp_path / "both/answers").rglob("b.txt-*") if path.is_file()]
    assert [path.suffix for path in sorted(theirs)] == [".tar", ".json"]
    for path in theirs:
        shutil.copy(path, tmp_path / "one" / path.relative_to(tmp_path / "both"))
    assert prep("finish", "--cache", tmp_path / "one").status == 0
    for path in theirs:
        assert (tmp_path / "one" / path.relative_to(tmp_path / "both")).exists()
    assert len(open_answers(tmp_path / "one").shards) == 1
    for name in ("units", "samples", "shards"):  # now they are committed
        for path in (tmp_path / "both" / name).glob("b.txt-*"):
            shutil.copy(path, tmp_path / "one" / name)
    assert prep("finish", "--cache", tmp_path / "one").status == 0
    assert open_answers(tmp_path / "one") == open_answers(tmp_path / "both")
    # One that the manifest knows goes with its unit.
    for path in (tmp_path / "one/units").glob("b.txt-*"):
        path.unlink()
    assert prep("finish", "--cache", tmp_path / "one").status == 0
    assert not list((tmp_path / "one/answers/units").glob("b.txt-*"))
    assert len(open_answers(tmp_path / "one").shards) == 1
