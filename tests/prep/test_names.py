"""Names of units: readable, the same for ever, and such that an archive can hold them."""

import os
import re

import pytest

from prep.rows.unit import unit_name
from tests.support.sources import captioned, encode, manifest, prep, refusal, tree, units, write_tar

ODD = [b"caf\xe9", b"line\nfeed", b"back\\slash", "line\u2028separator".encode(), b"tab\t", b"\r"]


@pytest.fixture
def odd(tmp_path):
    """A folder of tars with odd names."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, name in enumerate(ODD):
        tar = write_tar(folder / "a.tar", captioned([number]))
        os.rename(tar, os.path.join(os.fsencode(folder), name + b".tar"))
    return f"{folder}/*.tar"


def test_ordinary_names_stay_as_they_are():
    assert unit_name("cc12m_00000", "a/cc12m_00000.tar") == "cc12m_00000-f39433f8"
    assert unit_name("déjà vu (1) [%] $", "x").startswith("déjà vu (1) [%] $-")


def test_what_is_packed_is_unpacked_whatever_the_tars_are_called(odd, tmp_path):
    cache = encode(odd, tmp_path / "cache")
    assert len(units(cache)) == len(ODD)
    assert prep("pack", "--cache", cache, "--output", tmp_path / "archive").status == 0
    answer = prep("unpack", "--input", tmp_path / "archive", "--cache", tmp_path / "back")
    assert answer.status == 0, answer.err
    assert tree(tmp_path / "back") == tree(cache)


def test_a_cache_with_names_of_old_is_not_packed_but_mended(odd, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.rows.unit.UNSAFE", re.compile("nothing"))
    cache = encode(odd, tmp_path / "cache")
    monkeypatch.undo()
    words = ("pack", "--cache", cache, "--output", tmp_path / "archive")
    assert "run the same `prep encode` again" in refusal(*words)
    assert not (tmp_path / "archive").exists()
    answer = prep("encode", "--shards", odd, "--model", "tiny-sd", "--cache", cache, "--threads", 1)
    assert "0 pictures and 0 captions encoded" in answer.err + answer.out
    assert manifest(cache)["totals"]["written"] == len(units(cache)) == len(ODD)
    assert prep(*words).status == 0
