"""The same sources give the same bytes, whatever the workers, the order and the neighbours."""

import random
from unittest import mock

import pytest
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from tests.support.sources import (
    captioned,
    encode,
    samples,
    tree,
    units,
    write_folder,
    write_rows,
    write_tar,
)

# Small batches, so that ten pictures make several and the last one is not full.
BATCHES = {"vae_batch_size": 4, "text_batch_size": 4}


@pytest.fixture
def tars(tmp_path):
    return [
        write_tar(tmp_path / "a.tar", captioned(range(10))),
        write_tar(tmp_path / "b.tar", captioned(range(20, 26))),
    ]


def test_two_runs_and_any_number_of_decode_workers(tars, tmp_path):
    first = tree(encode(tars, tmp_path / "first", **BATCHES))
    assert len(first) == 3 + 2 * 3  # identity, conditioning, manifest; shard, account, record
    again = encode(tars, tmp_path / "again", **BATCHES)
    assert tree(again) == first
    for workers in (1, 7):
        assert tree(encode(tars, tmp_path / f"{workers}", decode_workers=workers, **BATCHES)) == (
            first
        )


def test_the_order_in_which_units_were_done(tars, tmp_path):
    flags = {**BATCHES, "preview_prompts": ("a prompt",)}
    together = tree(encode(tars, tmp_path / "together", **flags))
    for name, begin in (("forwards", tars[:1]), ("backwards", tars[1:])):
        cache = encode(begin, tmp_path / name, **flags)
        assert len(units(cache)) == 1
        encode(tars, cache, **flags)
        assert tree(cache) == together
    assert tree(encode(tars[::-1], tmp_path / "listed backwards", **flags)) == together


def test_previews_are_the_first_captions_however_often_it_was_interrupted(tars, tmp_path):
    """Going on with the second unit must not add its captions to the previews."""
    together = encode(tars, tmp_path / "together")
    halves = encode(tars[:1], tmp_path / "halves")
    encode(tars, halves)
    assert tree(halves) == tree(together)


def test_neighbours_in_the_batch_do_not_matter(tmp_path):
    """Picture 8 is alone in the last batch at first, then shares a full one."""
    flags = {**BATCHES, "model": "tiny-xl", "resolution": 128}
    path = write_tar(tmp_path / "a.tar", captioned(range(9)))
    before = samples(encode(path, tmp_path / "before", **flags))
    write_tar(path, captioned([2, 3, 5, 30, 31, 32, 7, 8]))
    after = samples(encode(path, tmp_path / "after", **flags))
    common = before.keys() & after.keys()
    assert len(common) == 5
    for key in common:
        assert after[key].key == before[key].key
        assert after[key].members == before[key].members


def test_every_batch_has_the_recorded_shape(tmp_path):
    """On which the summation order, and with it the last bit, depends."""
    path = write_tar(tmp_path / "a.tar", captioned(range(9)))
    pictures, captions = [], []
    real_vae, real_text = AutoencoderKL.encode, CLIPTextModel.forward

    def encode_pictures(self, x, *args, **options):
        pictures.append(len(x))
        return real_vae(self, x, *args, **options)

    def encode_captions(self, ids, *args, **options):
        captions.append(len(ids))
        return real_text(self, ids, *args, **options)

    with (
        mock.patch.object(AutoencoderKL, "encode", encode_pictures),
        mock.patch.object(CLIPTextModel, "forward", encode_captions),
    ):
        encode(path, tmp_path / "cache", vae_batch_size=4, text_batch_size=5)
    assert len(pictures) >= 3
    assert set(pictures) == {4}
    assert len(captions) >= 2
    assert set(captions) == {5}


def test_the_order_of_a_folders_rows(tmp_path):
    folder = write_folder(tmp_path / "folder", range(12))
    sorted_rows = tree(encode(folder, tmp_path / "sorted", folder_units=2, **BATCHES))
    rows = [{"file_name": f"{n:04d}.png", "text": f"picture number {n}"} for n in range(12)]
    random.Random(3).shuffle(rows)
    write_rows(folder, rows)
    assert tree(encode(folder, tmp_path / "shuffled", folder_units=2, **BATCHES)) == sorted_rows


def test_a_shards_samples_stand_sorted_by_key(tars, tmp_path):
    cache = encode(tars[0], tmp_path / "cache")
    keys = [sample.key for sample in samples(cache).values()]
    assert len(keys) == 10
    assert keys == sorted(keys)
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)
