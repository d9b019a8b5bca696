"""Pictures are told by content: what is read, what is not and why, the same from every source."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from prep.images.crop import BadImage, Framing, prepare
from prep.images.kinds import kind_of, not_a_source
from tests.support.folders import fill, rows_of, table_of, tar_of
from tests.support.sources import SIDE, accounts, encode, file_of, manifest, photo, png, refusal

PNG = png(1, 16, 16)
FTYP = b"\0\0\0\x18ftyp"
GOOD = {kind: file_of(photo(1), kind) for kind in
        ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "TGA", "PPM", "QOI",
         "DDS", "MPO")}  # fmt: skip
CONVERT = "is not read: convert it to PNG or JPEG"
BAD = {
    "jxl": (b"\xff\x0a" + bytes(50), f"JPEG XL {CONVERT}"),
    "jxl in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), f"JPEG XL {CONVERT}"),
    "psd": (b"8BPS\0\1" + bytes(50), f"Photoshop {CONVERT}"),
    "cr2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(50), f"camera raw (CR2) {CONVERT}"),
    "cr3": (FTYP + b"crx \0\0\0\1crx isom", f"camera raw (CR3) {CONVERT}"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="">' + b" " * 50, f"SVG {CONVERT}"),
    "pdf": (b"%PDF-1.7\n" + bytes(50), f"PDF {CONVERT}"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", f"PostScript {CONVERT}"),
    "ico": (file_of(photo(1), "ICO"), f"ICO or ICNS {CONVERT}"),
    "mp4": (FTYP + b"isom\0\0\2\0isomiso2" + bytes(50), "a video (MP4, MOV), no picture"),
    "webm": (b"\x1aE\xdf\xa3" + bytes(50), "a video (WebM, Matroska), no picture"),
}
DISGUISED = {  # only where the name says that they are pictures
    "page": (b"<!DOCTYPE html>\n<title>404</title>", "a web page instead of a picture: "
             "download it again"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                "a Git LFS pointer instead of a picture: get the files with `git lfs pull`"),
    "zip": (b"PK\3\4" + bytes(50), "a zip archive, no picture"),
    "fork": (b"\0\5\x16\7" + bytes(50), "a macOS resource fork, no picture"),
    "nothing": (b"", "empty file"),
    "noise": (bytes(range(200)), "cannot be decoded"),
}  # fmt: skip


def reason(content):
    try:
        prepare(content, Framing(SIDE))
    except BadImage as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", GOOD)
def test_what_pillow_reads_is_read(kind):
    (picture,) = prepare(GOOD[kind], Framing(SIDE))
    wanted = prepare(GOOD["PNG"], Framing(SIDE))[0].pixels.astype(int)
    lossy = 40 if kind in ("GIF",) else 8
    assert np.abs(picture.pixels - wanted).mean() < lossy


@pytest.mark.parametrize("name", BAD | DISGUISED)
def test_what_cannot_be_read_is_named(name):
    content, why = (BAD | DISGUISED)[name]
    assert reason(content) == why


def test_extensions_do_not_matter(tmp_path):
    """Captioned files of any name are rows, each with its reason, the same from each source."""
    contents = {**{k: (content, "") for k, content in GOOD.items()}, **BAD}
    extensions = ["jpg", "heic", "dat", "jfif", "x"]
    files: dict[str, bytes | str] = {}
    for number, (name, (content, _)) in enumerate(contents.items()):
        files |= {f"{name}.{extensions[number % 5]}": content, f"{name}.txt": "a"}
    wanted = {name: why for name, (_, why) in contents.items()}
    folder, tar = fill(tmp_path / "folder", files), tar_of(tmp_path / "a.tar", files)
    table = table_of(tmp_path / "a.parquet", {k: c for k, (c, _) in contents.items()})
    for source in (folder, tar, table):
        flags = {"max_reject_fraction": 1.0}
        cache = encode(source, tmp_path / f"cache of {source.name}", **flags)
        found = {row["source_key"].partition(".")[0]: row["reason"] for row in accounts(cache)}
        assert found == wanted, source
        assert manifest(cache)["totals"]["written"] == len(GOOD)


def test_a_picture_without_an_extension_and_one_without_a_caption(tmp_path):
    heic = FTYP + b"heic\0\0\0\0mif1heic"
    files = {"photo": GOOD["JPEG"], "photo.txt": "a", "alone.heic": heic, "b": GOOD["AVIF"]}
    files |= {"LICENSE": b"free", "notes.md": b"#", "clip.mp4": BAD["mp4"][0], "a.npz": b"PK\3\4"}
    found = rows_of(fill(tmp_path / "folder", files))
    assert found == {
        "photo": (("a",), ""), "alone.heic": ((), "no caption"), "b": ((), "no caption")
    }  # fmt: skip


def test_what_lies_beside_a_picture_is_its_own(tmp_path):
    """Of a camera's raw file, a live photo's video or kohya's latents the picture is the row."""
    files = {"a.jpg": GOOD["JPEG"], "a.cr2": BAD["cr2"][0], "a.mov": BAD["mp4"][0], "a.npz": b"PK"}
    files |= {"a.txt": "a star", "a.xmp": b"<x:xmpmeta/>"}
    assert rows_of(fill(tmp_path / "folder", files)) == {"a.jpg": (("a star",), "")}
    assert rows_of(tar_of(tmp_path / "a.tar", files)) == {"a": (("a star",), "")}


def test_a_folder_of_nothing_else_says_so(tmp_path):
    folder = fill(tmp_path / "folder", {"a.jxl": BAD["jxl"][0], "a.txt": "a star"})
    line = refusal("encode", "--shards", folder, "--model", "tiny-sd", "--cache", tmp_path / "c")
    assert BAD["jxl"][1] in line
    assert "a.jxl" in line


# --- HEIC, with the extra `heif` and without ------------------------------------------------------


def heic(orientation=1):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    tags = Image.Exif()
    tags[0x0112] = orientation
    return file_of(photo(4, 90, 60), "HEIF", quality=-1, exif=tags.tobytes())


def test_heic_is_read_upright():
    (picture,) = prepare(heic(6), Framing(SIDE))
    assert picture.original_size == (90, 60)
    wanted = prepare(file_of(photo(4, 90, 60).rotate(-90, expand=True)), Framing(SIDE))[0].pixels
    assert np.abs(picture.pixels - wanted.astype(int)).mean() < 8
    assert reason(heic()[:-2000]) == "cannot be decoded"


def test_heic_waits_for_its_package(tmp_path, monkeypatch):
    """Without it the row is rejected and says what to install; with it the unit is made again."""
    from prep.images import decode

    files = {"a.heic": heic(), "a.txt": "a star", "b.png": PNG, "b.txt": "b"}
    folder = fill(tmp_path / "folder", files)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        decode.reads_heif.cache_clear()
        cache = encode(folder, tmp_path / "cache")
    why = "HEIC needs another package: pip install 'latent-distillery[heif]'"
    assert {row["source_key"]: row["reason"] for row in accounts(cache)}["a.heic"] == why
    decode.reads_heif.cache_clear()
    encode(folder, cache)
    assert {row["reason"] for row in accounts(cache)} == {""}


# --- numbers, EXIF ------------------------------------------------------------------------------


def tiff(levels, **tags):
    """An uncompressed TIFF of one channel of these numbers, with some tags of its own."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[{"white": 262, "dng": 50706, "preview": 254, "sub": 330}[name]] = value
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "TIFF", tiffinfo=info)
    return buffer.getvalue()


RAMP = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
GREY = (RAMP * 255 + 0.5).astype(int)
RANGES = {
    "0 to 1": RAMP, "0 to 255": RAMP * 255, "0 to 65535": RAMP * 65535,
    "overshot": (RAMP * 1.04 - 0.02).astype(np.float32), "32 bits": (RAMP * 255).astype(np.int32),
    "32 bits of 16": (RAMP * 65535).astype(np.int32), "16 bits": (RAMP * 65535).astype(np.uint16),
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_numbers_are_shown_in_the_range_that_they_fill(name):
    decode = prepare(tiff(RANGES[name]), Framing(SIDE))[0].pixels.astype(int)
    assert np.abs(decode - GREY[..., None]).max() <= (6 if name == "overshot" else 1)


@pytest.mark.parametrize("scale", [3.0, 4000.0, 1e7, -1.0])
def test_numbers_of_no_known_range_are_rejected(scale):
    assert reason(tiff(RAMP * np.float32(scale))).startswith("numbers whose black and white")


def test_numbers_that_are_none():
    for value in (np.nan, np.inf):
        levels = RAMP.copy()
        levels[3, 3] = value
        assert reason(tiff(levels)).startswith("numbers that are infinite or NaN")


def test_zero_may_be_white():
    content = bytearray(tiff((RAMP * 65535).astype(np.uint16)))
    entry = content.index(struct.pack("<HHI", 262, 3, 1))  # PhotometricInterpretation
    content[entry + 8 : entry + 10] = b"\0\0"
    decode = prepare(bytes(content), Framing(SIDE))[0].pixels.astype(int)
    assert np.abs(255 - decode - GREY[..., None]).max() <= 1


def test_a_cameras_raw_tiff_is_not_taken_for_its_preview():
    raw = "camera raw is not read: convert it to PNG or JPEG"
    levels = np.zeros((60, 80), np.uint8)
    assert reason(tiff(levels, dng=b"\1\4\0\0")) == raw
    assert reason(tiff(levels, preview=1, sub=8)) == raw
    assert reason(tiff(levels)) == ""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "tags", [b"Exif\0\0none", b"none", bytes(20), b"Exif\0\0MM\0*\0\0\0\x08\0\5", b"II*\0\xff" * 9]
)
def test_broken_exif_costs_its_orientation_only(kind, tags):
    content = file_of(photo(2), kind, exif=tags)
    (picture,) = prepare(content, Framing(SIDE))
    assert np.array_equal(picture.pixels, prepare(file_of(photo(2), kind), Framing(SIDE))[0].pixels)


def test_a_targa_whose_fourth_channel_means_nothing():
    image = photo(3).convert("RGBA")
    image.putalpha(0)
    decode = prepare(file_of(image, "TGA"), Framing(SIDE))[0].pixels
    assert np.array_equal(decode, prepare(file_of(photo(3)), Framing(SIDE))[0].pixels)


def test_noise_is_not_taken_for_anything():
    """Pillow would take much for a Targa, which has no mark."""
    rng = np.random.default_rng(0)
    names = [kind_of(rng.bytes(4096)) for _ in range(20_000)]
    assert sum(kind is not None and kind.name == "Targa" for kind in names) == 0
    assert sum(bool(not_a_source(rng.bytes(512))) for _ in range(2000)) < 5
    assert kind_of(bytes(4096)) is None
