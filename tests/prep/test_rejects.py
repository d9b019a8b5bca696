"""Too many rejected rows stop an encode before anything is published."""

import itertools
from collections import Counter

import pytest

from prep.encode import pipeline
from shared.errors import UserError
from tests.support.accounts import account
from tests.support.sources import (
    captioned,
    encode,
    manifest,
    png,
    units,
    write_tar,
)

PNG = png(1)


def bad_rows(count, reason):
    """Files of rows that are rejected for `reason`."""
    kinds = {"cannot be decoded": (b"no picture", b"a"), "no caption": (PNG, None)}
    picture, caption = kinds[reason]
    files = []
    for number in range(count):
        key = f"{reason} {number}"
        files.append((f"{key}.png", picture))
        files += [] if caption is None else [(f"{key}.txt", caption)]
    return files


@pytest.mark.parametrize("first", [True, False], ids=["first unit", "later unit"])
def test_all_rejected_stops_with_the_dominant_reason(tmp_path, first):
    tars = [write_tar(tmp_path / "b.tar", captioned(range(3)))]
    bad = bad_rows(2, "no caption") + bad_rows(5, "cannot be decoded")
    tars.append(write_tar(tmp_path / ("a.tar" if first else "c.tar"), bad))
    with pytest.raises(UserError) as caught:
        encode(tars, tmp_path / "cache", max_reject_fraction=0.99)
    line = str(caught.value)
    assert "\n" not in line
    assert str(tars[1]) in line
    assert "7 of 7 rows" in line
    assert "5 of them for 'cannot be decoded'" in line


@pytest.mark.parametrize("bad", ["too small", "no caption"])
def test_a_unit_may_yield_nothing_where_the_user_says_so(tmp_path, bad):
    files = [("0.png", png(0, 20, 99)), ("0.txt", b"a")] if bad == "too small" else [("0.png", PNG)]
    tars = [write_tar(tmp_path / "good.tar", captioned(range(2))), write_tar(tmp_path / "z", files)]
    # --min-size is a filter, and a filter is no damage.
    flags = {"min_size": 32} if bad == "too small" else {"max_reject_fraction": 1.0}
    cache = encode(tars, tmp_path / "cache", **flags)
    assert Counter(account(cache).values())[""] == 2
    assert manifest(cache)["totals"]["read"] == 3


def test_a_cache_of_nothing_is_not_finished(tmp_path):
    """The source was fine when the cache was begun."""
    tar = write_tar(tmp_path / "a.tar", captioned(range(2)))
    cache = encode(tar, tmp_path / "cache")
    before = (cache / "manifest.json").read_bytes()
    write_tar(tar, bad_rows(1, "no caption") + bad_rows(2, "cannot be decoded"))
    with pytest.raises(UserError) as caught:
        encode(tar, cache, max_reject_fraction=1.0)
    line = str(caught.value)
    assert "3 of 3 rows rejected, 2 of them for 'cannot be decoded' (first: 'cannot be " in line
    assert f"of {tar}); mend the sources" in line
    assert (cache / "manifest.json").read_bytes() == before


def test_usable_rows_may_come_late(tmp_path, monkeypatch):
    """256 rows without a caption say little about a source."""
    monkeypatch.setattr("prep.encode.plan.PROBED_ROWS", 4)
    files = bad_rows(6, "no caption") + captioned(range(4))
    tar = write_tar(tmp_path / "a.tar", files)
    cache = encode(tar, tmp_path / "cache", max_reject_fraction=1.0)
    assert Counter(account(cache).values()) == {"": 4, "no caption": 6}
    # But not for ever: a mistake is told in a moment.
    monkeypatch.setattr("prep.encode.plan.SEARCHED_ROWS", 5)
    with pytest.raises(UserError, match=r"mostly: no caption, such as 'no caption 0' of .*a\.tar"):
        encode(tar, tmp_path / "other", max_reject_fraction=1.0)
    assert not (tmp_path / "other").exists()


def test_a_row_that_gets_lost_on_its_way_is_noticed(tmp_path, monkeypatch):
    decode_rows = pipeline.decode_rows

    def losing(rows, *more):
        return decode_rows(itertools.islice(rows, 3, None), *more)

    tar = write_tar(tmp_path / "a.tar", captioned(range(5)))
    monkeypatch.setattr(pipeline, "decode_rows", losing)
    with pytest.raises(AssertionError, match="2 of 5 rows accounted"):
        encode(tar, tmp_path / "cache")
    assert units(tmp_path / "cache") == {}


def test_nothing_usable_anywhere(tmp_path):
    files = bad_rows(1, "no caption") + bad_rows(4, "cannot be decoded")
    tar = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError) as caught:
        encode(tar, tmp_path / "cache", max_reject_fraction=1.0)
    assert str(tar) in str(caught.value)
    assert "cannot be decoded" in str(caught.value)
    assert "no caption" not in str(caught.value)


def test_too_many_rejected_stops_before_anything_is_published(tmp_path):
    files = captioned(range(4)) + bad_rows(5, "no caption")
    tar = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError, match=r"5 of 9 rows rejected.*'no caption'.*--max-reject-frac"):
        encode(tar, tmp_path / "cache")
    assert units(tmp_path / "cache") == {}
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []
    cache = encode(tar, tmp_path / "cache", max_reject_fraction=0.6)
    assert Counter(account(cache).values()) == {"": 4, "no caption": 5}
