"""`prep stats` says what is there, and `verify` what to do about damage."""

import hashlib
import json
import shutil
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest

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
    write_tar,
)


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
