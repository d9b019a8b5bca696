"""Running `prep encode` again does what is missing or changed, and nothing else."""

import os
import shutil
from unittest import mock

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

import prep.encode.engine
import prep.rows.unit
from shared.errors import UserError
from tests.support.sources import (
    SIDE,
    TINY_SD,
    captioned,
    encode,
    manifest,
    png,
    samples,
    tree,
    units,
    write_folder,
    write_tar,
)
from tests.support.temporary import holding, left_by_the_dead


@pytest.fixture
def tars(tmp_path):
    return [
        write_tar(tmp_path / f"{name}.tar", captioned(range(first, first + 3)))
        for name, first in (("a", 0), ("b", 10), ("c", 20))
    ]


def encoded_units(*args, **flags):
    """Sources of the units that `encode` encodes this time, by name of the unit."""
    real, seen = prep.encode.engine.encode_unit, []

    def counted(job, unit, *rest):
        seen.append(unit.name)
        return real(job, unit, *rest)

    with mock.patch.object(prep.encode.engine, "encode_unit", counted):
        encode(*args, **flags)
    return seen


def stamps(cache):
    """Modification times of what units own."""
    folders = [cache / name for name in ("units", "shards", "samples")]
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}


def test_a_second_run_encodes_nothing(tars, tmp_path):
    cache = tmp_path / "cache"
    assert len(encoded_units(tars, cache)) == 3
    before, bytes_before = stamps(cache), tree(cache)
    assert encoded_units(tars, cache) == []
    assert stamps(cache) == before
    assert tree(cache) == bytes_before


def test_only_missing_and_changed_units_are_encoded_again(tars, tmp_path):
    cache = tmp_path / "cache"
    names = {name.partition("-")[0]: name for name in encoded_units(tars, cache)}
    before = stamps(cache)
    next((cache / "units").glob("a-*")).unlink()
    assert encoded_units(tars, cache) == [names["a"]]
    write_tar(tars[1], captioned([10, 11, 40]))
    assert encoded_units(tars, cache) == [names["b"]]
    kept = {path: time for path, time in stamps(cache).items() if path.name.startswith("c-")}
    assert len(kept) == 3
    assert kept.items() <= before.items()
    assert set(samples(cache)) == {"0000", "0001", "0002", "0010", "0011", "0040", "0020", "0021",
                                   "0022"}  # fmt: skip


def test_a_touched_tar_counts_as_changed_and_gives_the_same_shard(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    before = tree(cache / "shards")
    os.utime(tars[0], ns=(1, 1))
    assert len(encoded_units(tars, cache)) == 1
    assert tree(cache / "shards") == before


def test_an_edited_picture_touches_only_its_unit(tmp_path):
    folder = write_folder(tmp_path / "folder", range(16))
    flags = {"folder_units": 4}
    cache = tmp_path / "cache"
    assert len(encoded_units(folder, cache, **flags)) == 4
    before = samples(cache)
    (folder / "0005.png").write_bytes(png(500))
    assert len(encoded_units(folder, cache, **flags)) == 1
    after = samples(cache)
    assert after.keys() == before.keys()
    differing = [key for key in after if after[key].members != before[key].members]
    assert differing == ["0005.png"]


def test_a_new_an_edited_and_a_removed_row_touch_only_their_units(tmp_path):
    folder = write_folder(tmp_path / "folder", range(16))
    flags = {"folder_units": 16}
    cache = encode(folder, tmp_path / "cache", **flags)
    count = len(units(cache))
    assert 8 < count <= 16
    write_folder(folder, range(16), n3="another caption")
    (changed,) = encoded_units(folder, cache, **flags)
    assert samples(cache)["0003.png"].record["captions"] == ["another caption"]
    sizes = {name: unit["read"] for name, unit in units(cache).items()}
    crowded = max(sizes, key=sizes.get)
    inside = [row for row in range(16) if owner(cache, f"{row:04d}.png") == crowded]
    assert len(inside) >= 2
    rest = [row for row in range(16) if row != inside[0]]
    write_folder(folder, rest, n3="another caption")
    assert encoded_units(folder, cache, **flags) == [crowded]
    assert f"{inside[0]:04d}.png" not in samples(cache)
    write_folder(folder, range(16), n3="another caption")
    assert encoded_units(folder, cache, **flags) == [crowded]
    assert changed in units(cache)
    assert len(samples(cache)) == 16


def owner(cache, key):
    """Name of the unit that has the row `key`."""
    for name, unit in units(cache).items():
        if key in pq.read_table(cache / unit["samples"]).column("source_key").to_pylist():
            return name
    return None


def test_a_folder_may_grow_past_the_size_that_decided_its_units(tmp_path):
    folder = write_folder(tmp_path / "folder", range(4))
    with mock.patch.object(prep.rows.unit, "UNIT_ROWS", 4):
        cache = encode(folder, tmp_path / "cache")
        write_folder(folder, range(5))
        encode(folder, cache)
    assert len(samples(cache)) == 5


def test_units_of_a_folder_with_a_long_name_are_told_apart(tmp_path):
    """The name is cut short, but not the number at its end."""
    folder = write_folder(tmp_path / ("long" * 40), range(6))
    cache = encode(folder, tmp_path / "cache", folder_units=4)
    assert len(samples(cache)) == 6
    assert all(len(name.encode()) < 120 for name in units(cache))


def test_a_unit_that_loses_its_last_row_is_dropped(tmp_path):
    folder = write_folder(tmp_path / "folder", range(6))
    flags = {"folder_units": 16}
    cache = encode(folder, tmp_path / "cache", **flags)
    alone = next(name for name, unit in units(cache).items() if unit["read"] == 1)
    (row,) = [row for row in range(6) if owner(cache, f"{row:04d}.png") == alone]
    write_folder(folder, [n for n in range(6) if n != row])
    assert encoded_units(folder, cache, **flags) == []
    assert alone not in units(cache)
    assert len(samples(cache)) == 5


def test_a_missing_shard_is_made_again(tars, tmp_path):
    """What `prep verify` and `train` advise for a damaged cache."""
    cache = encode(tars, tmp_path / "cache")
    wanted = tree(cache)
    next((cache / "shards").glob("a-*")).unlink()
    shortened = next((cache / "shards").glob("b-*"))
    shortened.write_bytes(shortened.read_bytes()[:-100])
    assert len(encoded_units(tars, cache)) == 2
    assert tree(cache) == wanted


def test_units_no_longer_listed_are_refused_until_pruned(tars, tmp_path):
    cache = encode(tars, tmp_path / "cache")
    before = tree(cache)
    with pytest.raises(UserError) as caught:
        encode(tars[1:], cache)
    line = str(caught.value)
    assert str(tars[0]) in line
    assert "--prune" in line
    assert tree(cache) == before
    assert encoded_units(tars[1:], cache, prune=True) == []
    assert len(units(cache)) == 2
    assert manifest(cache)["totals"]["written"] == 6
    assert set(samples(cache)) == {"0010", "0011", "0012", "0020", "0021", "0022"}


@pytest.mark.parametrize(
    ("flags", "there", "here"),
    [
        ({"resolution": 48}, f"resolution is {SIDE} there", "48 here"),
        ({"center_crop": False}, "center_crop is True there", "False here"),
        ({"latents": "posterior"}, "latents is mean there", "posterior here"),
        ({"max_captions": 2}, "max_captions is 1 there", "2 here"),
        ({"vae_batch_size": 3}, "vae_batch_size is 8 there", "3 here"),
        ({"model": "tiny-xl"}, "family is tiny-sd there", "tiny-xl here"),
    ],
)
def test_other_flags_are_refused_naming_both_values(tars, tmp_path, flags, there, here):
    cache = encode(tars[0], tmp_path / "cache")
    before = tree(cache)
    for listed in (tars[0], tars[:2]):
        with pytest.raises(UserError) as caught:
            encode(listed, cache, **flags)
        line = str(caught.value)
        assert "\n" not in line
        assert str(cache) in line
        assert f"{there}, {here}" in line
        assert "another --cache" in line
        assert tree(cache) == before


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_models_encoders_are_refused(tars, tmp_path, part):
    """A fine-tune of the same family: same shapes, other weights."""
    cache = encode(tars[0], tmp_path / "cache")
    model = tmp_path / "model"
    shutil.copytree(TINY_SD, model)
    (weights,) = (model / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.01 + 0.01
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        encode(tars[:2], cache, model=str(model))
    assert ("vae" if part == "vae" else "text") + ".fingerprint" in str(caught.value)
    assert len(units(cache)) == 1


def test_the_same_weights_under_another_path_go_on(tars, tmp_path):
    cache = encode(tars[0], tmp_path / "cache")
    shutil.copytree(TINY_SD, tmp_path / "copy")
    assert len(encoded_units(tars[:2], cache, model=str(tmp_path / "copy"))) == 1
    assert len(units(cache)) == 2


def test_what_dead_processes_left_is_swept_and_what_living_ones_write_is_not(tars, tmp_path):
    cache = encode(tars[0], tmp_path / "cache")
    dead, odd = left_by_the_dead(cache / "tmp"), cache / "tmp" / "stray"
    odd.write_bytes(b"x")
    os.utime(odd, (0, 0))
    with holding(cache / "tmp") as alive:
        encode(tars[0], cache)
        assert alive.exists()
    assert not dead.exists()
    assert not odd.exists()
