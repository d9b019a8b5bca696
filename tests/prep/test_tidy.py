"""`prep stats`, `gc`, `pack` and `unpack`, and what `verify` does about damage."""

import hashlib
import json
import os
import shutil
import time
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

from prep.cache import accounts as accounts_module
from shared.cache.layout import Layout
from tests.support.sources import (
    TINY_XL,
    accounts,
    captioned,
    encode,
    manifest,
    png,
    prep,
    refusal,
    samples,
    shards,
    tree,
    units,
    write_tar,
)
from tests.support.temporary import holding, left_by_the_dead


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tidy")
    bad = [("bad\x1b[2J.png", b"no picture"), ("bad\x1b[2J.txt", b"x"), ("bare.png", png(1))]
    return [
        write_tar(folder / "a.tar", [*captioned(range(5)), *bad]),
        write_tar(folder / "b.tar", captioned(range(10, 14))),
    ]


@pytest.fixture(scope="module")
def clean(tars):
    return encode(tars, tars[0].parent / "cache")


@pytest.fixture
def cache(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "cache")


def lines(answer, start):
    return [line for line in answer.err.splitlines() if line.startswith(start)]


# --- stats --------------------------------------------------------------------------------------


def test_stats_agree_with_the_cache(cache):
    told = json.loads(prep("stats", "--cache", cache, "--json").out)
    rows = accounts(cache)
    stack = np.concatenate([s.arrays["latents"][:, :4] for s in samples(cache).values()])
    values = stack.astype(np.float64)
    assert told["state"] == "complete"
    assert (told["read"], told["written"], told["units"], told["shards"]) == (11, 9, 2, 2)
    assert told["bytes"] == sum(path.stat().st_size for path in shards(cache))
    assert told["latents_mean"] == pytest.approx(values.mean((0, 2, 3)))
    assert told["latents_std"] == pytest.approx(values.std((0, 2, 3)))
    (bucket,) = told["buckets"]
    assert (bucket["height"], bucket["width"], bucket["latent_height"]) == (64, 64, 8)
    assert (bucket["samples"], bucket["bytes"]) == (9, told["bytes"])
    found = {r["reason"]: (r["count"], r["example"]) for r in told["rejected"]}
    wanted = {r["reason"]: (1, r["source_key"]) for r in rows if r["status"] == "rejected"}
    assert found == wanted
    assert {s["source"].rpartition("/")[2]: s["written"] for s in told["sources"]} == {
        "a.tar": 5,
        "b.tar": 4,
    }
    assert told["identity"] == json.loads((cache / "identity.json").read_text())
    assert told["versions"] == manifest(cache)["versions"]


def test_the_table_is_readable_and_safe_for_a_terminal(cache):
    table = prep("stats", "--cache", cache).out
    assert "9 of 11 rows (2 rejected)" in table
    assert "cannot be decoded" in table
    assert "bad[U+001B][2J" in table
    assert "\x1b" not in table
    assert max(map(len, table.splitlines())) < 200


def test_stats_reads_tables_in_pieces_and_without_some_columns(cache, monkeypatch):
    """An older or newer table may lack columns; a large one is not read at once."""
    monkeypatch.setattr(accounts_module, "BATCH_ROWS", 2)
    told = json.loads(prep("stats", "--cache", cache, "--json").out)
    assert all(r["example"] for r in told["rejected"])
    for path in (cache / "samples").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(["source_key", "captions"]), path)
    told = json.loads(prep("stats", "--cache", cache, "--json").out)
    assert [r["example"] for r in told["rejected"]] == ["", ""]


def test_stats_of_what_is_not_whole(cache, tmp_path):
    next((cache / "units").glob("a-*")).unlink()
    told = json.loads(prep("stats", "--cache", cache, "--json").out)
    assert "prep finish" in told["state"]
    assert told["written"] == 4
    (cache / "manifest.json").unlink()
    assert "unfinished" in prep("stats", "--cache", cache).out
    assert "is not a cache" in refusal("stats", "--cache", tmp_path / "none")


# --- verify -------------------------------------------------------------------------------------


def test_verify_says_what_to_do_and_repair_does_it(tars, cache):
    wanted = tree(cache)
    shard = shards(cache)[0]
    content = bytearray(shard.read_bytes())
    content[5000] ^= 0xFF
    shard.write_bytes(content)  # of the same size, so that only a hash can tell
    answer = prep("verify", "--cache", cache)
    assert answer.status == 1
    assert f"verify --cache {cache} --repair" in answer.out
    assert (cache / "manifest.json").exists()
    answer = prep("verify", "--cache", cache, "--repair")
    assert answer.status == 1
    assert "1 unit record removed" in answer.out
    assert "unfinished" in refusal("verify", "--cache", cache)
    encode(tars, cache)
    assert tree(cache) == wanted
    assert prep("verify", "--cache", cache).status == 0


def test_a_record_that_cannot_be_read_is_damage(tars, cache):
    wanted = tree(cache)
    for path, content in zip(sorted((cache / "units").iterdir()), ("{", "[1]"), strict=True):
        path.write_text(content)
    answer = prep("verify", "--cache", cache, "--repair")
    assert len(lines(answer, "damaged: units/")) == 2
    encode(tars, cache)
    assert tree(cache) == wanted


def test_damaged_prompts_are_found_and_repaired(tars, cache):
    (cache / "conditioning.safetensors").write_bytes(b"nonsense")
    (line,) = lines(prep("verify", "--cache", cache, "--repair"), "damaged:")
    assert "conditioning.safetensors" in line
    encode(tars, cache)
    assert prep("verify", "--cache", cache).status == 0


def test_encoding_again_agrees(cache):
    answer = prep("verify", "--cache", cache, "--reencode", 4)
    assert answer.status == 0, answer
    assert "encoded again: 4 samples" in answer.err
    assert "not compared" not in answer.err


def rewrite(cache, change):
    """Change every sample's arrays, with every checksum, hash and the manifest made right again."""
    for path in (cache / "units").glob("*.json"):
        record = json.loads(path.read_text())
        for shard in record["shards"]:
            layout = Layout.from_json(shard["layout"])
            file, parts = cache / shard["file"], []
            content = file.read_bytes()
            for start in range(0, shard["count"] * layout.stride, layout.stride):
                key, row, arrays = layout.unpack(content[start : start + layout.stride])
                arrays = change({name: array.copy() for name, array in arrays.items()})
                crc = 0
                for array in arrays.values():
                    crc = zlib.crc32(array.tobytes(), crc)
                parts.append(layout.pack(key, {**row, "crc32": crc}, arrays))
            content = b"".join(parts) + bytes(1024)
            file.write_bytes(content)
            shard["sha256"] = hashlib.sha256(content).hexdigest()
        path.write_text(json.dumps(record))
    assert prep("finish", "--cache", cache, "--no-report").status == 0


@pytest.mark.parametrize(
    ("field", "factor", "told"), [("latents", 1.05, True), ("latents", 1.0005, False),
                                  ("prompt_embeds", 1.05, True)]
)  # fmt: skip
def test_latents_of_another_encoder_are_found(cache, field, factor, told):
    """Every hash agrees; only encoding again can tell. Rounding on another machine is allowed."""
    rewrite(cache, lambda arrays: {**arrays, field: (arrays[field] * factor).astype(np.float16)})
    assert prep("verify", "--cache", cache).status == 0
    answer = prep("verify", "--cache", cache, "--reencode", 3)
    found = lines(answer, "damaged:")
    assert len(found) == (3 if told else 0), answer
    assert answer.status == (1 if told else 0)
    assert all(f"{field} differ by 4.7" in line for line in found)


def test_sources_that_are_gone_are_no_damage(tmp_path):
    tars = [write_tar(tmp_path / f"{n}.tar", captioned(range(n, n + 2))) for n in (0, 5)]
    cache = encode(tars, tmp_path / "cache")
    tars[0].unlink()
    write_tar(tars[1], [("0005.png", png(77)), ("0005.txt", b"x"), *captioned([6])])
    answer = prep("verify", "--cache", cache, "--reencode", 100)
    assert answer.status == 0
    assert "encoded again: 1 sample;" in answer.err
    assert "not compared: 3 samples whose source is gone or has changed" in answer.err


def test_encoding_again_wants_the_same_model(cache, tmp_path):
    line = refusal("verify", "--cache", cache, "--reencode", 1, "--model", TINY_XL)
    assert "another text encoder" in line
    assert "--reencode" in refusal("verify", "--cache", cache, "--reencode", -1)


# --- gc -----------------------------------------------------------------------------------------


def litter(cache, age):
    """A shard, a table and a stray of nobody; returns them."""
    found = [
        cache / "shards" / "gone-8x8-0123456789ab.tar",
        cache / "samples" / "gone-0123456789ab.parquet",
    ]
    for path in found:
        path.write_bytes(bytes(1000))
        os.utime(path, (time.time() - age,) * 2)
    return found


def test_gc_removes_what_no_record_names_and_says_how_much(cache):
    wanted = tree(cache)
    litter(cache, 25 * 3600)
    left_by_the_dead(cache / "tmp", size=500)
    with holding(cache / "tmp", size=500):
        littered = tree(cache)
        answer = prep("gc", "--cache", cache, "--dry-run")
        assert "2 files and 1 stray in tmp/ would be removed, 2,500 bytes" in answer.out
        assert "gone-8x8-0123456789ab.tar" in answer.out
        assert tree(cache) == littered
        assert "2,500 bytes (2.5 kB) freed" in prep("gc", "--cache", cache).out
        assert len(tree(cache).keys() - wanted.keys()) == 2  # the living one's lock and file
    assert "0 files and 1 stray" in prep("gc", "--cache", cache).out
    assert tree(cache) == wanted
    assert "0 files and 0 strays" in prep("gc", "--cache", cache).out


def test_gc_all_removes_what_may_be_another_hosts_unless_it_is_in_use(cache):
    """Named as an earlier version did, it may be alive; whoever says --all knows."""
    (cache / "tmp").mkdir(exist_ok=True)
    (cache / "tmp" / "elsewhere-1-0123456789ab-spool").write_bytes(bytes(500))
    with holding(cache / "tmp") as living:
        assert "0 files and 0 strays" in prep("gc", "--cache", cache).out
        assert "0 files and 1 stray" in prep("gc", "--cache", cache, "--all").out
        assert living.exists()


def test_gc_keeps_what_a_running_encode_may_be_about_to_name(cache):
    young = litter(cache, 60)
    assert "2 in use less than a day ago kept" in prep("gc", "--cache", cache).out
    assert all(path.exists() for path in young)
    assert prep("gc", "--cache", cache, "--all").status == 0
    assert not any(path.exists() for path in young)


def test_gc_never_touches_what_is_not_ours(cache):
    mine = [cache / "shards" / "holiday.tar", cache / "samples" / "notes.txt", cache / "x.tar"]
    link = cache / "shards" / "link-8x8-0123456789ab.tar"
    for path in mine:
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    link.symlink_to(mine[0])
    assert prep("gc", "--cache", cache, "--all").status == 0
    assert all(path.exists() for path in (*mine, link))


def test_gc_keeps_what_the_manifest_names(cache):
    """Somebody may be training on it, although its record is gone."""
    for path in (cache / "units").iterdir():
        path.unlink()
    assert prep("gc", "--cache", cache, "--all").status == 0
    assert all(path.exists() for path in shards(cache))


def test_gc_removes_nothing_where_a_record_cannot_be_read(cache, tmp_path):
    next((cache / "units").iterdir()).write_text("{")
    before = tree(cache, *(path.name for path in litter(cache, 25 * 3600)))
    assert "not valid JSON" in refusal("gc", "--cache", cache)
    assert all((cache / name).exists() for name in before)
    assert (cache / "shards" / "gone-8x8-0123456789ab.tar").exists()
    assert "nothing was removed" in refusal("gc", "--cache", tmp_path)


# --- pack and unpack ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archived(clean, tmp_path_factory):
    archive = tmp_path_factory.mktemp("pack") / "archive"
    assert prep("pack", "--cache", clean, "--output", archive, "--threads", 1).status == 0
    return archive


@pytest.fixture
def archive(archived, tmp_path):
    return shutil.copytree(archived, tmp_path / "archive")


def test_there_and_back_bit_for_bit(clean, archived, tmp_path):
    back = tmp_path / "back"
    answer = prep("unpack", "--input", archived, "--cache", back)
    assert "9 samples in 2 shards" in answer.out
    assert tree(back) == tree(clean)
    for line in (archived / "SHA256SUMS").read_text().splitlines():  # as `sha256sum -c` reads it
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((archived / name).read_bytes()).hexdigest() == digest
    shard = next((archived / "shards").iterdir())
    content = zstandard.ZstdDecompressor().stream_reader(shard.read_bytes()).read()
    assert content == (clean / "shards" / shard.name.removesuffix(".zst")).read_bytes()


def test_packing_again_writes_only_what_is_missing_or_wrong(clean, archive):
    wanted, (first, second) = tree(archive), sorted((archive / "shards").iterdir())
    first.write_bytes(first.read_bytes()[:-9])
    (archive / "SHA256SUMS").unlink()
    (archive / "manifest.json").unlink()
    stamp = second.stat().st_mtime_ns
    assert prep("pack", "--cache", clean, "--output", archive, "--threads", 1).status == 0
    assert tree(archive) == wanted
    assert second.stat().st_mtime_ns == stamp


def test_unpacking_again_writes_only_what_is_missing_or_wrong(clean, archived, tmp_path):
    back = shutil.copytree(clean, tmp_path / "back")
    first, second = shards(back)
    content = bytearray(first.read_bytes())
    content[3000] ^= 1
    first.write_bytes(content)
    stamp = second.stat().st_mtime_ns
    assert "1 shard was there" in prep("unpack", "--input", archived, "--cache", back).out
    assert tree(back) == tree(clean)
    assert second.stat().st_mtime_ns == stamp


def test_a_damaged_archive_is_one_line_and_no_cache(archive, tmp_path):
    shard = sorted((archive / "shards").iterdir())[1]
    whole = shard.read_bytes()
    for content in (whole[:-20], whole[:99] + bytes(9) + whole[108:], b"", whole[:-4] + b"abcd"):
        shard.write_bytes(content)
        line = refusal("unpack", "--input", archive, "--cache", tmp_path / "back")
        assert str(shard) in line
        assert "copy it again" in line
        assert not (tmp_path / "back" / "manifest.json").exists()
    shard.write_bytes(whole)
    assert prep("unpack", "--input", archive, "--cache", tmp_path / "back").status == 0


def test_an_archive_whose_shard_is_another_one(archive, tmp_path):
    """Right to zstd and to SHA256SUMS, but not what the records say."""
    shard = next((archive / "shards").iterdir())
    shard.write_bytes(zstandard.ZstdCompressor().compress(bytes(10**8)))
    line = refusal("unpack", "--input", archive, "--cache", tmp_path / "back")
    assert "is damaged" in line
    assert sum(p.stat().st_size for p in (tmp_path / "back").rglob("*") if p.is_file()) < 10**6


@pytest.mark.parametrize("name", ["../evil", "/etc/evil.json", "units/../../evil.json", "x.sh"])
def test_names_that_lead_elsewhere_are_refused(archive, tmp_path, name):
    with (archive / "SHA256SUMS").open("a") as file:
        file.write(f"{hashlib.sha256(b'').hexdigest()}  {name}\n")
    line = refusal("unpack", "--input", archive, "--cache", tmp_path / "back")
    assert "is not of a `prep pack` archive" in line
    assert not (tmp_path / "back").exists()


def test_mistakes_of_pack_and_unpack(cache, archive, tmp_path, monkeypatch):
    back = tmp_path / "back"
    assert "--level" in refusal("pack", "--cache", cache, "--output", back, "--level", 99)
    assert "another folder" in refusal("pack", "--cache", cache, "--output", cache)
    (archive / "units" / "other-01234567.json").write_text("{}")
    assert "choose another --output" in refusal("pack", "--cache", cache, "--output", archive)
    (cache / "units" / "other-01234567.json").write_text("{}")
    assert "choose another --cache" in refusal("unpack", "--input", archive, "--cache", cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert "free some space" in refusal("unpack", "--input", archive, "--cache", back)
    (archive / "SHA256SUMS").unlink()
    assert "not a finished archive" in refusal("unpack", "--input", archive, "--cache", back)


def test_a_damaged_cache_is_not_packed(cache, tmp_path):
    shard = shards(cache)[0]
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    line = refusal("pack", "--cache", cache, "--output", tmp_path / "archive")
    assert shard.name in line
    assert "verify --repair" in line
    assert not (tmp_path / "archive" / "SHA256SUMS").exists()
    assert list((tmp_path / "archive").rglob("*.zst")) == []
    assert units(cache)
