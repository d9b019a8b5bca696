"""Only what is new goes through the encoders; everything else is copied, byte for byte."""

import json
import shutil

import pytest

from prep.cache.reuse import Entries, Index, caption_digest
from prep.encoders.text import TextEncoder
from prep.encoders.vae import VaeEncoder
from tests.support.sources import (
    captioned,
    encode,
    png,
    prep,
    shards,
    units,
    write_folder,
    write_rows,
    write_tar,
)


@pytest.fixture
def encoded(monkeypatch):
    """Pictures and captions that reach the encoders from here on; call it to read and reset."""
    count = {"pictures": 0, "captions": 0}
    vae, text = VaeEncoder.start, TextEncoder._encode_batch

    def vae_start(self, pixels):
        count["pictures"] += len(pixels)
        return vae(self, pixels)

    def text_encode(self, captions, clip_skip):
        count["captions"] += sum(map(bool, captions))  # the rest pads the batch
        return text(self, captions, clip_skip)

    monkeypatch.setattr(VaeEncoder, "start", vae_start)
    monkeypatch.setattr(TextEncoder, "_encode_batch", text_encode)

    def read():
        found = (count["pictures"], count["captions"])
        count.update(pictures=0, captions=0)
        return found

    return read


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def same_as_from_scratch(source, cache, fresh):
    """Shards are named by their content, so equal names are equal bytes."""
    encode(source, fresh)
    assert [p.name for p in shards(cache)] == [p.name for p in shards(fresh)]
    assert all(
        a.read_bytes() == b.read_bytes() for a, b in zip(shards(cache), shards(fresh), strict=True)
    )
    wanted = {n: {**u, "source_state": 0} for n, u in units(fresh).items()}
    assert {n: {**u, "source_state": 0} for n, u in units(cache).items()} == wanted
    shutil.rmtree(fresh)


def insert(folder, number):
    (folder / "000-first.png").write_bytes(png(number))
    row = {"file_name": "000-first.png", "text": "quite another caption"}
    write_rows(folder, [row, *rows_of(folder)])


def edit_pictures(folder, *numbers):
    for number in numbers:
        (folder / f"{number:04d}.png").write_bytes(png(5000 + number))


def rename(folder, number):
    (folder / f"{number:04d}.png").rename(folder / "renamed.png")
    old = f"{number:04d}.png"
    rows = [{**row, "file_name": row["file_name"].replace(old, "renamed.png")}
            for row in rows_of(folder)]  # fmt: skip
    write_rows(folder, rows)


def delete(folder, number):
    (folder / f"{number:04d}.png").unlink()
    write_rows(folder, [r for r in rows_of(folder) if r["file_name"] != f"{number:04d}.png"])


def edit_captions(folder, *numbers):
    edited = {f"{number:04d}.png": f"number {number}, told anew" for number in numbers}
    write_rows(
        folder,
        [{**r, "text": edited.get(r["file_name"], r["text"])} for r in rows_of(folder)],
    )


STEPS = {
    "insert 1": (lambda folder: insert(folder, 7000), (1, 1)),
    "edit 3 pictures": (lambda folder: edit_pictures(folder, 3, 4, 5), (3, 0)),
    "rename 1": (lambda folder: rename(folder, 6), (0, 0)),
    "delete 1": (lambda folder: delete(folder, 7), (0, 0)),
    "edit 2 captions": (lambda folder: edit_captions(folder, 8, 9), (0, 2)),
}


def walk_through(folder, cache, fresh, encoded):
    """Every step in turn; after each the cache is what it would be if made from scratch."""
    for step, (change, wanted) in STEPS.items():
        change(folder)
        encoded()
        encode(folder, cache)
        assert encoded() == wanted, step
        same_as_from_scratch(folder, cache, fresh)


def test_each_change_encodes_what_is_new_and_nothing_else(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr("prep.rows.unit.UNIT_ROWS", 10)
    folder = write_folder(tmp_path / "pictures", range(20))
    cache = encode(folder, tmp_path / "cache")
    walk_through(folder, cache, tmp_path / "fresh", encoded)


def test_more_units_copy_from_fewer_and_the_other_way_round(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr("prep.rows.unit.UNIT_ROWS", 10)
    folder = write_folder(tmp_path / "pictures", range(10))
    cache = encode(folder, tmp_path / "cache")
    assert len(units(cache)) == 1
    write_folder(folder, range(13))
    encoded()
    encode(folder, cache)
    assert len(units(cache)) == 2
    assert encoded() == (3, 3)
    same_as_from_scratch(folder, cache, tmp_path / "fresh")
    write_folder(folder, range(9))
    encoded()
    encode(folder, cache)
    assert len(units(cache)) == 1
    assert encoded() == (0, 0)
    same_as_from_scratch(folder, cache, tmp_path / "fresh")


@pytest.mark.slow
def test_a_thousand_pictures_and_a_boundary_of_units(tmp_path, encoded):
    folder = write_folder(tmp_path / "pictures", range(1000))
    cache = encode(folder, tmp_path / "cache")
    walk_through(folder, cache, tmp_path / "fresh", encoded)
    grown = write_folder(tmp_path / "grown", range(1000))
    cache = encode(grown, tmp_path / "grown-cache")
    write_folder(grown, range(1030))
    encoded()
    encode(grown, cache)
    assert (len(units(cache)), encoded()) == (2, (30, 30))
    same_as_from_scratch(grown, cache, tmp_path / "fresh")


def test_every_digest_is_found_again():
    """Also those that end in zero bytes, which NumPy's strings drop."""
    digests = [bytes([n, 7]) + bytes(14) for n in range(50)] + [bytes(15) + b"x", bytes(16)]
    digests += [caption_digest(str(n)) for n in range(2000)]
    entries = Entries()
    for n, digest in enumerate(digests):
        entries.add(digest, (n, 2 * n, 3))
    index = Index.of(entries)
    assert [index.find(digest) for digest in digests] == [
        (n, 2 * n, 3) for n in range(len(digests))
    ]
    assert index.find(b"nowhere to be fnd") is None
    assert index.find(bytes([0, 7]) + bytes(13) + b"y") is None
    assert Index.of(Entries()).find(bytes(16)) is None


def test_a_changed_tar_encodes_its_changes(tmp_path, encoded):
    tar = write_tar(tmp_path / "a.tar", captioned(range(6)))
    cache = encode(tar, tmp_path / "cache", model="tiny-xl")
    write_tar(tar, [("new.png", png(77)), ("new.txt", b"new"), *captioned(range(6))])
    encoded()
    encode(tar, cache, model="tiny-xl")
    assert encoded() == (1, 1)
    encode(tar, tmp_path / "fresh", model="tiny-xl")
    assert [p.name for p in shards(cache)] == [p.name for p in shards(tmp_path / "fresh")]


def test_a_damaged_payload_is_encoded_not_copied(tmp_path, encoded):
    folder = write_folder(tmp_path / "pictures", range(4))
    cache = encode(folder, tmp_path / "cache")
    (shard,) = shards(cache)
    data = bytearray(shard.read_bytes())
    data[shard.stat().st_size // 8] ^= 1  # in the first sample
    shard.write_bytes(data)
    write_folder(folder, range(5))
    encoded()
    encode(folder, cache)
    assert encoded() == (2, 2)
    same_as_from_scratch(folder, cache, tmp_path / "fresh")


def test_a_damaged_table_is_not_believed(tmp_path, encoded):
    """Which picture lies where is said by the table alone."""
    folder = write_folder(tmp_path / "pictures", range(4))
    cache = encode(folder, tmp_path / "cache")
    (table,) = (cache / "samples").glob("*.parquet")
    table.write_bytes(table.read_bytes()[:-100])
    write_folder(folder, range(5))
    encoded()
    encode(folder, cache)
    assert encoded() == (5, 5)
    same_as_from_scratch(folder, cache, tmp_path / "fresh")


def test_several_captions_are_each_known(tmp_path, encoded):
    folder = write_folder(tmp_path / "pictures", range(3))
    rows = [{**row, "text": [f"{row['text']}, {n}" for n in range(2)]} for row in rows_of(folder)]
    write_rows(folder, rows)
    cache = encode(folder, tmp_path / "cache", max_captions=2)
    rows[0]["text"] = [*reversed(rows[0]["text"])]
    rows[1]["text"] = [rows[1]["text"][1], "another"]
    write_rows(folder, rows)
    encoded()
    encode(folder, cache, max_captions=2)
    assert encoded() == (0, 1)
    encode(folder, tmp_path / "fresh", max_captions=2)
    assert [p.name for p in shards(cache)] == [p.name for p in shards(tmp_path / "fresh")]


def test_the_command_says_what_it_encoded(tmp_path):
    folder = write_folder(tmp_path / "pictures", range(3))
    words = ["encode", "--shards", folder, "--model", "tiny-sd", "--cache", tmp_path / "cache"]
    assert "3 pictures and 3 captions encoded" in prep(*words, "--threads", 1).out
    edit_pictures(folder, 1)
    assert "1 picture and 0 captions encoded" in prep(*words).out
