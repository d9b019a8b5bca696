"""Aspect ratio buckets: the table, the choice, and batches of one size at a time."""

import math
import os

import numpy as np
import pytest
from PIL import Image

from prep.encode import decode_rows, latents
from prep.images.buckets import choose_buckets
from prep.images.crop import BadImage, Framing, prepare
from shared.cache.manifest import open_manifest
from tests.support.sources import (
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
    shards,
    tree,
    write_tar,
)
from train.data.bucket import open_buckets


def table(resolution, steps=None, low=None, high=None, no_upscale=False):
    return choose_buckets(resolution, steps, low, high, no_upscale)


def brute_force(resolution, steps, low, high):
    """Of all sizes on the grid and not above the square's area: those of the largest height for
    their width, or the largest width for their height; and the square."""
    sides = [side for side in range(low, high + 1) if side % steps == 0]
    small = {(h, w) for h in sides for w in sides if h * w <= resolution**2}
    tallest = {(h, w) for h, w in small if h == max(a for a, b in small if b == w)}
    square = resolution // steps * steps
    return tallest | {(w, h) for h, w in tallest} | {(square, square)}


@pytest.mark.parametrize(
    ("resolution", "steps", "low", "high"),
    [(512, 64, 256, 1024), (768, 64, 256, 1024), (1024, 64, 512, 2048), (64, 8, 32, 128),
     (512, 64, 300, 1000), (640, 8, 320, 704), (1000, 64, 256, 1536), (512, 512, 512, 512)],
)  # fmt: skip
def test_the_table_against_brute_force(resolution, steps, low, high):
    sizes = table(resolution, steps, low, high).sizes
    assert set(sizes) == brute_force(resolution, steps, low, high)
    assert len(set(sizes)) == len(sizes)


def test_kohyas_table_for_512():
    """As sd-scripts lists them for 512, 256 to 1024, steps of 64."""
    known = {(256, 1024), (320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384),
             (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
             (320, 704), (256, 832), (256, 896), (256, 960)}  # fmt: skip
    assert set(table(512).sizes) == known


def test_defaults_are_in_proportion():
    found = {
        r: (table(r).steps, table(r).min_reso, table(r).max_reso) for r in (64, 512, 768, 1024)
    }
    assert found == {
        64: (8, 32, 128), 512: (64, 256, 1024), 768: (64, 384, 1536), 1024: (64, 512, 2048),
    }  # fmt: skip


def test_the_nearest_aspect_ratio_is_chosen():
    rng = np.random.default_rng(0)
    buckets = table(512)
    for height, width in np.exp(rng.uniform(np.log(20), np.log(4000), (300, 2))).astype(int):
        found = buckets.choose(int(height), int(width))
        errors = {s: abs(math.log(s[0] / s[1]) - math.log(height / width)) for s in buckets.sizes}
        assert errors[found] == pytest.approx(min(errors.values()))
        assert buckets.choose(int(width), int(height)) == found[::-1]  # a turned picture, turned


def test_without_enlarging():
    """No side ever grows; on the grid; not above the area; None only below the shortest side."""
    rng = np.random.default_rng(1)
    buckets = table(512, no_upscale=True)
    for height, width in np.exp(rng.uniform(np.log(60), np.log(4000), (500, 2))).astype(int):
        found = buckets.choose(int(height), int(width))
        if found is None:
            assert min(height, width) < 256
            continue
        assert found[0] <= height
        assert found[1] <= width
        assert all(side % 64 == 0 and 256 <= side <= 1024 for side in found)
        assert found[0] * found[1] <= 512**2
        if min(height, width) >= 1024:
            assert found == table(512).choose(int(height), int(width))
    assert buckets.choose(500, 400) == (448, 384)
    assert buckets.choose(255, 800) is None
    with pytest.raises(BadImage, match="smaller than --min-bucket-reso"):
        prepare(png(1, 255, 800), Framing(512, buckets=buckets))


def test_a_picture_covers_its_bucket_and_keeps_its_shape():
    """A ring stays round, and nothing but the crop is lost."""
    y, x = np.mgrid[-150:150, -200:200]
    disc = np.where(np.hypot(x, y) < 120, 255, 0).astype(np.uint8)
    content = file_of(Image.fromarray(disc).convert("RGB"))
    (picture,) = prepare(content, Framing(256, buckets=table(256)))
    height, width = table(256).choose(300, 400)
    assert picture.pixels.shape == (height, width, 3)
    scale = max(height / 300, width / 400)
    inside = picture.pixels[..., 0] > 127
    assert abs(inside.any(0).sum() - 240 * scale) <= 2
    assert abs(inside.any(1).sum() - 240 * scale) <= 2
    top, left = picture.crop
    assert top == (round(300 * scale) - height) // 2
    assert left == (round(400 * scale) - width) // 2


# --- the command ----------------------------------------------------------------------------------

SIZES = [(64, 64), (60, 180), (180, 60), (90, 60), (61, 91), (200, 70), (64, 66)]


def mixed(count):
    return [
        file
        for n in range(count)
        for file in (
            (f"{n:04d}.png", png(n, *SIZES[n % len(SIZES)])),
            (f"{n:04d}.txt", f"picture {n}".encode()),
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    tar = write_tar(folder / "a.tar", mixed(40))
    return encode(tar, folder / "cache", model="tiny-xl", buckets=True, views=2, random_crop=True)


def test_each_size_has_a_shard_of_its_own(cache):
    found = samples(cache)
    assert len(found) == 40
    for number in range(40):
        width, height = SIZES[number % len(SIZES)]
        size = table(64).choose(height, width)
        arrays = found[f"{number:04d}"].arrays
        assert arrays["latents"].shape == (2, 4, size[0] // 8, size[1] // 8)
        assert arrays["time_ids"][:, [0, 1, 4, 5]].tolist() == [[height, width, *size]] * 2
    sizes = {table(64).choose(height, width) for width, height in SIZES}
    assert len(shards(cache)) == len(sizes) == len(manifest(cache)["layouts"])
    assert prep("verify", "--cache", cache).status == 0


def test_neither_neighbours_nor_waiting_show_in_the_latents(cache, tmp_path, monkeypatch):
    """Encoded alone, or in batches that memory cut short: the same bytes, shard by shard."""
    monkeypatch.setattr(latents, "WAITING_BATCHES", 1)
    settings = {"model": "tiny-xl", "buckets": True, "views": 2, "random_crop": True}
    tar = cache.parent / "a.tar"
    short = encode(tar, tmp_path / "short", **settings)
    assert tree(short / "shards") == tree(cache / "shards")
    one = [file for file in mixed(40) if file[0].startswith("0017")]
    alone = encode(write_tar(tmp_path / "one.tar", one), tmp_path / "alone", **settings)
    for name, array in samples(alone)["0017"].arrays.items():
        assert (array == samples(cache)["0017"].arrays[name]).all(), name


def test_a_fixed_number_of_pictures_waits(tmp_path, monkeypatch):
    """However many sizes there are: pictures on hand stay within what is read ahead and waits."""
    on_hand, most = 0, 0
    prepare_row, start_batch = decode_rows.decode_row, latents.start

    def decode_row(row, settings, known):
        nonlocal on_hand, most
        sample = prepare_row(row, settings, known)
        if settings.framing.buckets:  # not the probe, which takes squares
            on_hand += len(sample.pictures)
        most = max(most, on_hand)
        return sample

    def start_some(batch, vae):
        nonlocal on_hand
        sizes = {picture.pixels.shape for one in batch for picture in one.decoded.pictures}
        assert len(sizes) == 1
        on_hand -= sum(len(sample.decoded.pictures) for sample in batch)
        return start_batch(batch, vae)

    monkeypatch.setattr(decode_rows, "decode_row", decode_row)
    monkeypatch.setattr(latents, "start", start_some)
    files = [
        file
        for n in range(150)
        for file in ((f"{n}.png", png(n % 5, 30 + 3 * (n % 37), 40)), (f"{n}.txt", b"a"))
    ]
    settings = {"vae_batch_size": 2, "text_batch_size": 4, "decode_workers": 1, "buckets": True}
    cache = encode(write_tar(tmp_path / "a.tar", files), tmp_path / "cache", **settings)
    assert len(accounts(cache)) == 150
    # 8 batches of the VAE wait; a chunk of 4 is in hand, one is due, one is put together, and as
    # many pictures are being prepared.
    assert most <= 8 * 2 + 5 * 4
    assert on_hand == 0


def test_no_upscale_rejects_the_small_and_enlarges_none(tmp_path):
    files = [
        file
        for key, size in {"small": (31, 200), "odd": (47, 55), "large": (300, 290)}.items()
        for file in ((f"{key}.png", file_of(photo(1, *size))), (f"{key}.txt", b"a"))
    ]
    words = {"buckets": True, "bucket_no_upscale": True}
    cache = encode(write_tar(tmp_path / "a.tar", files), tmp_path / "cache", **words)
    rows = {row["source_key"]: (row["reason"], row["time_ids"][4:]) for row in accounts(cache)}
    assert rows == {
        "small": ("smaller than --min-bucket-reso", []),
        "odd": ("", [48, 40]),
        "large": ("", [64, 64]),
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bucket-no-upscale"], "need --buckets"),
        (["--bucket-reso-steps", "8"], "need --buckets"),
        (["--buckets", "--bucket-reso-steps", "12"], "steps 12 is not a multiple of 8"),
        (["--buckets", "--bucket-reso-steps", "0"], "steps 0 must be at least 1"),
        (["--buckets", "--bucket-reso-steps", "128"], "is above --resolution 64"),
        (["--buckets", "--min-bucket-reso", "65"], "--min-bucket-reso 65, --resolution 64"),
        (["--buckets", "--max-bucket-reso", "63"], "--max-bucket-reso 63 must be in ascending"),
        (["--buckets", "--min-bucket-reso", "0"], "--min-bucket-reso 0"),
    ],
)  # fmt: skip
def test_flags_that_cannot_work_are_one_line(tmp_path, flags, words):
    tar = write_tar(tmp_path / "a.tar", captioned(range(2)))
    line = refusal(
        "encode", "--shards", tar, "--model", "tiny-sd", "--cache", tmp_path / "c", *flags
    )
    assert words in line
    assert not (tmp_path / "c").exists()


def test_the_table_belongs_to_the_identity(cache):
    words = ["--shards", cache.parent / "a.tar", "--model", "tiny-xl", "--cache", cache]
    flags = ["--threads", 1, "--latents", "mean", "--views", 2, "--random-crop", "--buckets"]
    line = refusal("encode", *words, *flags, "--bucket-reso-steps", 16)
    assert "preprocessing.buckets.bucket_reso_steps is 8 there, 16 here" in line


def test_a_contact_sheet_of_several_sizes(cache, tmp_path):
    answer = prep("decode", "--cache", cache, "--output", tmp_path / "x.png", "--count", 6)
    assert answer.status == 0, answer.err
    assert "6 pictures" in answer.out


def test_train_reads_buckets_and_views(cache, cli, tmp_path):
    buckets = open_buckets(cache, open_manifest(cache))
    assert sorted(len(bucket) for bucket in buckets) == sorted(
        row["count"] for row in manifest(cache)["shards"]
    )
    words = f"--model tiny-xl --cache {cache} --run {tmp_path / 'run'} --threads 1 --student lora"
    answer = cli(
        "train", "distill", *words.split(), "--max-train-steps", 6, "--train-batch-size", 3,
        "--validation-steps", 0, "--lora-rank", 2,
    )  # fmt: skip
    assert answer.status == 0, answer.err
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_a_unit_of_more_sizes_than_files_may_be_open(tmp_path):
    """Every size is spooled to a file of its own, and few of them are open at a time."""
    resource = pytest.importorskip("resource")
    sizes = [(8 * h, 8 * w) for h in range(1, 9) for w in range(1, 9)]
    files = [
        file
        for number, (height, width) in enumerate(sizes)
        for file in ((f"{number}.png", png(number, width, height)), (f"{number}.txt", b"a"))
    ]
    tar = write_tar(tmp_path / "a.tar", files)
    flags = {"buckets": True, "bucket_no_upscale": True, "min_bucket_reso": 8}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 40, hard))
    try:
        cache = encode(tar, tmp_path / "cache", vae_batch_size=1, **flags)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(open_manifest(cache).shards) == len(sizes)
