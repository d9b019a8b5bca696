"""Small encodes, and the account that a cache gives of every input row."""

from collections import Counter

from tests.support.sources import (
    accounts,
    encode,
    manifest,
    units,
    write_tar,
)


def account(cache):
    """`source_key -> reason` ("" for written), after checking that the books balance."""
    rows = accounts(cache)
    totals = manifest(cache)["totals"]
    reasons = Counter(row["reason"] for row in rows if row["status"] == "rejected")
    written = [row for row in rows if row["status"] == "written"]
    assert len(rows) == totals["read"] == totals["written"] + sum(totals["rejected"].values())
    assert totals["rejected"] == reasons
    assert totals["written"] == len(written) == sum(r["count"] for r in manifest(cache)["shards"])
    assert len({row["key"] for row in rows}) == len(rows)
    assert all(row["reason"] == "" for row in written)
    assert "" not in reasons
    for unit in units(cache).values():
        assert unit["read"] == unit["written"] + sum(unit["rejected"].values())
    return {row["source_key"]: row["reason"] for row in rows}


def encoded_tar(tmp_path, *files, **flags):
    tar = write_tar(tmp_path / "source.tar", list(files))
    return encode(tar, tmp_path / "cache", max_reject_fraction=1.0, **flags)
