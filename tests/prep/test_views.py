"""Crops and flips: their time_ids are true, and they depend on nothing but the picture."""

import numpy as np
import pytest
from PIL import Image

from prep.images.buckets import choose_buckets
from prep.images.crop import Framing, prepare
from tests.support.sources import (
    SIDE,
    accounts,
    captioned,
    encode,
    file_of,
    manifest,
    photo,
    png,
    prep,
    refusal,
    samples,
    tree,
    write_tar,
)

RANDOM = {"random_crop": True, "random_flip": True}


def coordinates(width, height):
    """A picture whose red and green say where a pixel lies (column, row)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def assert_lies_where_it_says(picture, width, height):
    """The crop, found again by the colours of its corners: (height, width) is the original's."""
    pixels = picture.pixels.astype(int)
    target = pixels.shape[:2]
    assert picture.time_ids == (height, width, *picture.crop, *target)
    columns, rows = pixels[0, :, 0], pixels[:, 0, 1]
    flipped = columns[-1] < columns[0]
    if flipped:
        columns = width - 1 - columns  # as they count in the flipped picture
    assert (columns == np.arange(picture.crop[1], picture.crop[1] + target[1])).all()
    assert (rows == np.arange(picture.crop[0], picture.crop[0] + target[0])).all()
    return flipped


@pytest.mark.parametrize(("width", "height"), [(250, SIDE), (SIDE, 201), (SIDE, SIDE), (65, 64)])
def test_time_ids_say_where_a_view_lies(width, height):
    framing = Framing(SIDE, "random", random_flip=True, views=32, seed=5)
    content = file_of(coordinates(width, height))
    views = prepare(content, framing)
    flips = [assert_lies_where_it_says(view, width, height) for view in views]
    assert sum(flips) == 16
    places = {view.crop for view in views}
    room = width * height // SIDE - SIDE
    assert len(places) == 1 if room == 0 else len(places) > min(room, 12)
    if room > 100:  # from one end to the other
        reached = [sum(place) for place in places]
        assert min(reached) < room / 5
        assert max(reached) > room * 4 / 5


@pytest.mark.parametrize("crop", ["center", "corner"])
def test_a_flip_of_a_crop_that_is_not_random(crop):
    content = file_of(coordinates(200, SIDE))
    views = prepare(content, Framing(SIDE, crop, random_flip=True, views=2))
    assert {view.crop for view in views} == {(0, 68) if crop == "center" else (0, 0)}
    flips = [assert_lies_where_it_says(view, 200, SIDE) for view in views]
    assert sorted(flips) == [False, True]


def test_a_view_of_a_turned_and_shrunk_picture():
    """Where the resize by 2 puts them, to a pixel; sizes are those of the upright original."""
    tags = Image.Exif()
    tags[0x0112] = 6
    stored = coordinates(240, 2 * SIDE).transpose(Image.Transpose.ROTATE_90)
    content = file_of(stored, exif=tags)  # shown as the picture before the turn
    for view in prepare(content, Framing(SIDE, "random", views=8)):
        assert view.original_size == (2 * SIDE, 240)
        assert np.abs(view.pixels[2:-2, 2:-2, 0] - 2.0 * np.arange(
            view.crop[1] + 2, view.crop[1] + SIDE - 2) - 0.5).max() <= 1.5  # fmt: skip


def test_a_view_in_a_bucket():
    buckets = choose_buckets(SIDE, None, None, None, False)
    views = prepare(
        file_of(coordinates(200, 48)), Framing(SIDE, "random", True, 6, buckets=buckets)
    )
    for view in views:
        assert view.pixels.shape == (32, 128, 3)
        assert view.original_size == (48, 200)
        assert view.crop[0] == 0
        assert 0 <= view.crop[1] <= 133 - 128


def test_a_very_long_picture_has_views_too():
    line = np.zeros((2, 4000, 3), np.uint8)
    line[..., 0] = np.arange(4000) // 16
    views = prepare(file_of(Image.fromarray(line)), Framing(SIDE, "random", True, 12))
    for view in views:
        found = int(view.pixels[0, SIDE // 2, 0]) * 16 / 4000
        centre = (view.crop[1] + SIDE / 2) / (4000 * SIDE / 2)
        flipped = abs(1 - found - centre) < 0.01
        assert flipped or abs(found - centre) < 0.01


def test_flips_and_places_are_uniform_over_pictures():
    framing = Framing(SIDE, "random", random_flip=True)
    flips, lefts = [], []
    for n in range(200):
        pixels = np.asarray(coordinates(96, SIDE)).copy()
        pixels[..., 2] = n  # another picture, another draw
        (view,) = prepare(file_of(Image.fromarray(pixels)), framing)
        flips.append(assert_lies_where_it_says(view, 96, SIDE))
        lefts.append(view.crop[1])
    assert 70 < sum(flips) < 130
    assert (min(lefts), max(lefts)) == (0, 32)
    assert abs(np.mean(lefts) - 16) < 3


def test_the_seed_changes_crops_and_flips_only_with_randomness():
    content = png(1, 200, 90)
    places = {prepare(content, Framing(SIDE, "random", seed=seed))[0].crop for seed in range(8)}
    assert len(places) > 4
    assert prepare(content, Framing(SIDE, seed=1))[0].crop == (0, 39)


# --- the command ----------------------------------------------------------------------------------


def test_views_do_not_depend_on_names_places_or_neighbours(tmp_path):
    """The same picture under another name, in another tar, among others: the same latents."""
    settings = {"views": 3, "model": "tiny-xl", **RANDOM}
    one = [("a.png", png(7, 150, 90)), ("a.txt", b"a star")]
    other = [*captioned(range(11)), ("zz.png", png(7, 150, 90)), ("zz.txt", b"a star")]
    alone = encode(write_tar(tmp_path / "one.tar", one), tmp_path / "alone", **settings)
    among = encode(write_tar(tmp_path / "two.tar", other), tmp_path / "among", **settings)
    first, second = samples(alone)["a"].arrays, samples(among)["zz"].arrays
    for name in ("latents", "time_ids"):
        assert (first[name] == second[name]).all(), name
    assert first["latents"].shape == (3, 4, 8, 8)
    assert first["time_ids"].shape == (3, 6)
    assert first["time_ids"].dtype == np.int32
    assert manifest(alone)["identity"]["preprocessing"]["views"] == 3


def test_each_view_is_encoded_as_if_alone(tmp_path):
    """A view's latents are those of a plain picture of its pixels."""
    content = png(7, 150, 90)
    tar = write_tar(tmp_path / "a.tar", [("a.png", content), ("a.txt", b"a star")])
    found = samples(encode(tar, tmp_path / "cache", views=9, seed=4, **RANDOM))["a"].arrays
    pictures = prepare(content, Framing(SIDE, "random", random_flip=True, views=9, seed=4))
    files = [
        file
        for n, picture in enumerate(pictures)
        for file in ((f"{n}.png", file_of(Image.fromarray(picture.pixels))), (f"{n}.txt", b"a"))
    ]
    plain = samples(encode(write_tar(tmp_path / "b.tar", files), tmp_path / "plain"))
    for n in range(9):
        assert (found["latents"][n] == plain[str(n)].arrays["latents"][0]).all()


def test_the_same_cache_twice(tmp_path):
    tar = write_tar(tmp_path / "a.tar", captioned(range(13)))
    settings = {"views": 2, "buckets": True, **RANDOM}
    first = encode(tar, tmp_path / "first", decode_workers=1, **settings)
    assert tree(first) == tree(encode(tar, tmp_path / "second", decode_workers=3, **settings))
    assert len(accounts(first)) == 13


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--views", "2"], "--views 2: all would be equal"),
        (["--views", "0", "--random-crop"], "--views 0 must be at least 1"),
        (["--random-crop", "--seed", "-1"], "--seed -1 must be at least 0"),
    ],
)
def test_flags_that_cannot_work_are_one_line(tmp_path, flags, words):
    tar = write_tar(tmp_path / "a.tar", captioned(range(2)))
    line = refusal(
        "encode", "--shards", tar, "--model", "tiny-sd", "--cache", tmp_path / "c", *flags
    )
    assert words in line
    assert not (tmp_path / "c").exists()


def test_what_is_drawn_belongs_to_the_identity(tmp_path):
    tar = write_tar(tmp_path / "a.tar", captioned(range(2)))
    cache = encode(tar, tmp_path / "cache", views=2, **RANDOM)
    words = ["encode", "--shards", tar, "--model", "tiny-sd", "--cache", cache, "--threads", 1]
    same = ["--views", 2, "--random-crop", "--random-flip"]
    assert prep(*words, *same).status == 0
    assert prep(*words, *same, "--no-center-crop").status == 0  # decides nothing here
    for flags, what in [
        ([*same, "--seed", 1], "preprocessing.seed is 0 there, 1 here"),
        (["--views", 3, *same[2:]], "preprocessing.views is 2 there, 3 here"),
        (same[:3], "preprocessing.random_flip is True there, False here"),
        ([*same[:2], same[3]], "preprocessing.random_crop is True there, False here"),
        ([*same, "--buckets"], "preprocessing.buckets is None there"),
    ]:
        line = refusal(*words, *flags)
        assert what in line
    plain = encode(tar, tmp_path / "plain")
    encode(tar, plain, seed=3)  # without randomness the seed decides nothing


def test_the_contact_sheet_shows_the_first_view(tmp_path):
    shown = photo(7, 160, SIDE)
    tar = write_tar(tmp_path / "a.tar", [("x.png", file_of(shown)), ("x.txt", b"a star")])
    cache = encode(tar, tmp_path / "cache", views=2, **RANDOM)
    answer = prep("decode", "--cache", cache, "--output", tmp_path / "sheet.png")
    assert answer.status == 0, answer.err
    left = np.asarray(Image.open(tmp_path / "sheet.png"))[: 3 * SIDE : 3, : 3 * SIDE : 3]
    (row,) = accounts(cache)
    top, start = row["time_ids"][2:4]
    pixels = np.asarray(shown)
    plain = pixels[top : top + SIDE, start : start + SIDE]
    mirrored = pixels[:, ::-1][top : top + SIDE, start : start + SIDE]
    assert (left == plain).all() != (left == mirrored).all()
