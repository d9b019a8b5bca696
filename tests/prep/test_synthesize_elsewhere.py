"""`prep synthesize` from and to object storage, and on a Ray cluster: the bytes are the same."""

import pytest

from tests.support.s3 import bucket, forget, objects, serving
from tests.support.sources import prep, tree

WORDS = ["--model", "tiny-sd", "--steps", 1, "--threads", 1, "--batch-size", 4, "--no-report",
         "--folder-units", 2, "--answers", 1]  # fmt: skip


@pytest.fixture
def source(tmp_path):
    text = "\n".join(f"{n} boats in a harbour" for n in range(6))
    (tmp_path / "captions.txt").write_text(text)
    return tmp_path / "captions.txt"


def synthesize(captions, cache, *words):
    answer = prep("synthesize", "--captions", captions, "--cache", cache, *WORDS, *words)
    assert answer.status == 0, answer.err
    return answer.out


def test_captions_and_cache_behind_a_url(source, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serving():
        bucket().put_file(str(source), "bucket/captions.txt")
        url = "s3://bucket/captions.txt"
        synthesize(url, tmp_path / "cache")
        synthesize(url, "s3://bucket/cache")
        forget()
        assert objects("s3://bucket/cache") == tree(tmp_path / "cache")
        assert synthesize(url, "s3://bucket/cache").startswith("nothing had to be drawn")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(source, tmp_path, ray):
    synthesize(source, tmp_path / "here")
    synthesize(source, tmp_path / "there", "--engine", "ray", "--cpus-per-worker", 1)
    assert tree(tmp_path / "here") == tree(tmp_path / "there")
