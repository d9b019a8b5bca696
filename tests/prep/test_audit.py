"""`prep verify` finds what is damaged; `prep decode` draws what the latents show."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from shared.cache.layout import Layout
from tests.support.sources import (
    SIDE,
    TINY_SD,
    captioned,
    encode,
    file_of,
    manifest,
    photo,
    prep,
    refusal,
    samples,
    shards,
    units,
    write_folder,
    write_tar,
)

ZOOM = 3  # a 64-pixel picture is drawn at 192
GAP, LABEL = 4, 14


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    tars = [
        write_tar(folder / "a.tar", captioned(range(4))),
        write_tar(folder / "b.tar", captioned(range(10, 15))),
    ]
    return encode(tars, folder / "cache")


@pytest.fixture
def cache(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "cache")


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def damages(cache):
    """The lines about damage, after a look at the exit status."""
    answer = prep("verify", "--cache", cache)
    lines = [line for line in answer.err.splitlines() if line.startswith(("damaged:", "error:"))]
    assert answer.status == (1 if lines else 0)
    return lines


def test_a_clean_cache(cache):
    answer = prep("verify", "--cache", cache)
    assert answer.status == 0
    assert "9 samples checked, no damage" in answer.out
    assert damages(cache) == []


@pytest.mark.parametrize("field", ["latents", "prompt_embeds"])
def test_a_flipped_byte_names_the_shard_and_the_sample(cache, field):
    shard = shards(cache)[1]
    layout = Layout.from_json(manifest(cache)["layouts"][0])
    flip(shard, 2 * layout.stride + layout.offsets[field] + 1)
    keys = [sample.key for sample in samples(cache).values() if sample.record["source"][-5] == "b"]
    lines = damages(cache)
    assert all(shard.name in line for line in lines)
    assert any("sha256 differs" in line for line in lines)
    assert [line for line in lines if "sample 2" in line and keys[2] in line]
    assert not [line for line in lines if "sample 3" in line]


def test_a_flipped_byte_in_a_header_or_in_the_padding(cache):
    first, second = shards(cache)
    flip(first, 10)  # the first member's name
    flip(second, second.stat().st_size - 5)  # the end of the tar
    lines = damages(cache)
    assert any(first.name in line and "sample 0" in line for line in lines)
    assert any(second.name in line for line in lines)


def test_truncated_and_missing_shards_are_all_named(cache):
    first, second = shards(cache)
    first.write_bytes(first.read_bytes()[: -3 * 512])
    second.unlink()
    lines = damages(cache)
    assert any(first.name in line for line in lines)
    assert any(second.name in line and "missing" in line for line in lines)


@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_changed_or_missing_account(cache, how):
    unit = next(iter(units(cache).values()))
    path = cache / unit["samples"]
    flip(path, 100) if how == "changed" else path.unlink()
    (line,) = damages(cache)
    assert unit["samples"] in line


def test_non_finite_values_under_a_right_checksum(cache):
    """Written so by someone else's encoder: every hash agrees and the value is still no number."""
    import hashlib
    import zlib

    unit = next((cache / "units").glob("a-*"))
    record = json.loads(unit.read_text())
    shard = record["shards"][0]
    path = cache / shard["file"]
    layout = Layout.from_json(shard["layout"])
    content = bytearray(path.read_bytes())
    key, row, arrays = layout.unpack(bytes(content[: layout.stride]))
    changed = {name: array.copy() for name, array in arrays.items()}
    changed["latents"][0, 0, 0, 0] = np.nan
    crc = 0
    for array in changed.values():
        crc = zlib.crc32(array.tobytes(), crc)
    content[: layout.stride] = layout.pack(key, {**row, "crc32": crc}, changed)
    path.write_bytes(content)
    shard["sha256"] = hashlib.sha256(content).hexdigest()
    unit.write_text(json.dumps(record))
    lines = damages(cache)
    assert any(key in line and "non-finite" in line for line in lines)
    assert not any("sha256" in line or "checksum" in line for line in lines)


def test_a_unit_the_manifest_does_not_know(cache):
    next((cache / "units").glob("a-*")).unlink()
    (line,) = damages(cache)
    assert "manifest.json" in line
    assert "prep finish" in line
    assert prep("finish", "--cache", cache).status == 0
    assert damages(cache) == []
    assert manifest(cache)["totals"]["written"] == 5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shards", lambda m: m["shards"][0].update(sha256="0" * 64)),
        ("totals", lambda m: m["totals"].update(read=99)),
        ("statistics", lambda m: m["statistics"]["latents_mean"].reverse()),
        ("identity", lambda m: m["identity"]["vae"].update(fingerprint="dead")),
    ],
)
def test_verify_compares_the_manifest_with_what_the_units_add_up_to(cache, tmp_path, name, change):
    copy = shutil.copytree(cache, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    answer = prep("verify", "--cache", copy)
    assert answer.status == 1
    assert (
        f"manifest.json: its {name} are not what identity.json and the units add up" in answer.err
    )
    assert answer.out.endswith("samples checked, 1 damage\n")
    assert prep("finish", "--cache", copy, "--no-report").status == 0  # as it says
    assert (copy / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()


def test_verify_wants_a_finished_cache(cache, tmp_path):
    assert "is not a cache" in refusal("verify", "--cache", tmp_path / "none")
    (cache / "manifest.json").unlink()
    assert "unfinished" in refusal("verify", "--cache", cache)


# --- decode -------------------------------------------------------------------------------------


def decode(cache, output, *words):
    answer = prep("decode", "--cache", cache, "--output", output, *words)
    assert answer.status == 0, answer.err
    with Image.open(output) as sheet:
        assert sheet.format == "PNG"
        return np.asarray(sheet.convert("RGB"))


def pair(sheet):
    """Original and decoded picture of a sheet with one tile, at their own size."""
    big = SIDE * ZOOM
    assert sheet.shape == (big + LABEL + GAP, 2 * big + GAP + GAP, 3)
    left, right = sheet[:big, :big], sheet[:big, big + GAP : 2 * big + GAP]
    return left[::ZOOM, ::ZOOM], right[::ZOOM, ::ZOOM]


def reconstruction(latents):
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae", torch_dtype=torch.float32)
    with torch.inference_mode():
        image = vae.decode(torch.from_numpy(latents.astype(np.float32))).sample[0]
    return ((image.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255).round()


@pytest.mark.parametrize("latents", ["mean", "posterior"])
def test_the_original_beside_its_decoded_latents(tmp_path, latents):
    shown = photo(7, SIDE, SIDE)
    files = [("x.png", file_of(shown)), ("x.txt", "größer als «ein» ★".encode())]
    cache = encode(write_tar(tmp_path / "a.tar", files), tmp_path / "cache", latents=latents)
    left, right = pair(decode(cache, tmp_path / "new folder" / "sheet.png"))
    assert (left == np.asarray(shown)).all()
    wanted = reconstruction(samples(cache)["x"].arrays["latents"][:, :4])
    assert np.abs(right - wanted).max() <= 1


def test_originals_of_a_folder(tmp_path):
    folder = write_folder(tmp_path / "folder", range(1))
    shown = photo(3, SIDE, SIDE)
    shown.save(folder / "0000.png")
    cache = encode(folder, tmp_path / "cache")
    left, _ = pair(decode(cache, tmp_path / "sheet.png"))
    assert (left == np.asarray(shown)).all()


def test_as_many_pictures_as_asked_for(clean, tmp_path):
    tile_width, tile_height = 2 * SIDE * ZOOM + 2 * GAP, SIDE * ZOOM + LABEL + GAP
    for count, wanted in ((1, 1), (4, 4), (100, 9)):
        sheet = decode(clean, tmp_path / "sheet.png", "--count", count)
        columns, rows = sheet.shape[1] // tile_width, sheet.shape[0] // tile_height
        assert sheet.shape == (rows * tile_height, columns * tile_width, 3)
        assert rows * columns >= wanted > (rows - 1) * columns
    same = decode(clean, tmp_path / "again.png", "--count", 4, "--seed", 0)
    assert (same == decode(clean, tmp_path / "sheet.png", "--count", 4)).all()
    other = decode(clean, tmp_path / "other.png", "--count", 4, "--seed", 1)
    assert (other != same).any()


GONE = np.full((SIDE, SIDE, 3), 128)


@pytest.mark.parametrize("how", ["gone", "replaced", "cut short", "row gone"])
def test_sources_that_are_gone_or_changed(tmp_path, how):
    """Never another picture beside the latents than the one they were made from."""
    shown = photo(7, SIDE, SIDE)
    tar = tmp_path / "a.tar"
    write_tar(tar, [("x.png", file_of(shown)), ("x.txt", b"a star")])
    cache = encode(tar, tmp_path / "cache")
    if how == "gone":
        tar.unlink()
    elif how == "replaced":
        write_tar(tar, [("x.png", file_of(photo(8, SIDE, SIDE))), ("x.txt", b"a star")])
    elif how == "cut short":
        tar.write_bytes(tar.read_bytes()[:1500])
    else:
        write_tar(tar, [("y.png", file_of(shown)), ("y.txt", b"a star")])
    left, right = pair(decode(cache, tmp_path / "sheet.png"))
    assert (left == GONE).all()
    wanted = reconstruction(samples(cache)["x"].arrays["latents"])
    assert np.abs(right - wanted).max() <= 1


def test_of_equal_keys_the_right_picture(tmp_path):
    first, second = photo(1, SIDE, SIDE), photo(2, SIDE, SIDE)
    files = [
        file
        for image in (first, second)
        for file in (("x.png", file_of(image)), ("x.txt", b"a star"))
    ]
    cache = encode(write_tar(tmp_path / "a.tar", files), tmp_path / "cache")
    sheet = decode(cache, tmp_path / "sheet.png", "--count", 2)
    big = SIDE * ZOOM
    tiles = [sheet[:big, :big], sheet[big + LABEL + GAP :][:big, :big]]
    found = {tile[::ZOOM, ::ZOOM].tobytes() for tile in tiles}
    assert found == {np.asarray(image).tobytes() for image in (first, second)}


def test_a_long_caption_leaves_the_source_findable(tmp_path):
    """The record in the shard gives things up to fit in 1 KiB; decode must live with that."""
    shown = photo(7, SIDE, SIDE)
    files = [("x.png", file_of(shown)), ("x.txt", b"many words " * 200)]
    cache = encode(write_tar(tmp_path / "a.tar", files), tmp_path / "cache")
    left, _ = pair(decode(cache, tmp_path / "sheet.png"))
    assert (left == np.asarray(shown)).all() or (left == GONE).all()


def test_decode_refuses_another_vae(clean, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = shutil.copytree(TINY_SD, tmp_path / "model")
    (weights,) = (model / "vae").glob("*.safetensors")
    save_file({k: v * 1.01 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    line = refusal("decode", "--cache", clean, "--model", model, "--output", tmp_path / "x.png")
    assert "another VAE" in line
    assert "--model" in line
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("count", [0, -1])
def test_decode_wants_a_sensible_count(clean, tmp_path, count):
    line = refusal("decode", "--cache", clean, "--output", tmp_path / "x.png", "--count", count)
    assert "--count" in line
