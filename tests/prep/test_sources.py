"""Every input row is accounted for: written, or rejected with a reason that can be acted upon."""

import itertools
import json
import os
import struct
import subprocess
import sys
from collections import Counter

import pytest
from diffusers import AutoencoderKL
from PIL import Image

from prep.encode import pipeline
from prep.sources.tars.tar_rows import DOTTED
from shared.errors import UserError
from tests.support.sources import (
    ROOT,
    TINY_SD,
    accounts,
    captioned,
    encode,
    file_of,
    manifest,
    photo,
    png,
    samples,
    units,
    write_folder,
    write_rows,
    write_tar,
)

PNG = png(1)


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


def encoded_folder(tmp_path, rows, **flags):
    folder = write_folder(tmp_path / "folder", range(3))
    write_rows(folder, rows)
    return encode(folder, tmp_path / "cache", max_reject_fraction=1.0, **flags)


# --- which sources ------------------------------------------------------------------------------


def test_braces_globs_and_lists_name_the_same_tars(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number:02d}.tar", captioned([number]))
    wanted = {f"{number:02d}.tar" for number in range(3)}
    for count, shards in enumerate(
        [
            [f"{tmp_path}/{{00..02}}.tar"],
            [f"{tmp_path}/*.tar"],
            [f"{tmp_path}/0[0-2].tar"],
            [f"{tmp_path}/{{00,01,02}}.tar"],
            [f"{tmp_path}/{{00..01}}.tar", f"{tmp_path}/02.tar", f"{tmp_path}/./02.tar"],
        ]
    ):
        found = units(encode(shards, tmp_path / f"cache{count}"))
        assert {os.path.basename(unit["source"]) for unit in found.values()} == wanted
        assert len(found) == 3


def test_units_carry_the_name_of_their_source(tmp_path):
    write_tar(tmp_path / "cc12m-00000.tar", captioned([1]))
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub" / "cc12m-00000.tar", captioned([2]))
    tars = [tmp_path / "cc12m-00000.tar", tmp_path / "sub" / "cc12m-00000.tar"]
    found = units(encode(tars, tmp_path / "cache"))
    assert len(found) == 2
    assert all(name.startswith("cc12m-00000-") for name in found)


# --- tars ---------------------------------------------------------------------------------------


def test_rows_of_a_tar_are_webdatasets(tmp_path):
    cache = encoded_tar(
        tmp_path,
        ("one.png", PNG), ("one.txt", b"a star"),
        ("folder.v1/two.jpg", file_of(photo(2), "JPEG")), ("folder.v1/two.txt", b"two"),
        ("three.JPEG", file_of(photo(3), "JPEG")), ("three.TXT", b"three"),
        ("four.webp", file_of(photo(4), "WEBP")), ("four.json", b'{"caption": "four"}'),
        ("five.png", PNG), ("five.cls", b"7"), ("five.txt", b"five"), ("five.json", b"{}"),
        ("UPPER/six.png", PNG), ("UPPER/six.json", b'{"TEXT": " six "}'),
    )  # fmt: skip
    assert set(account(cache).values()) == {""}
    captions = {key: sample.record["captions"] for key, sample in samples(cache).items()}
    assert captions == {
        "one": ["a star"], "folder.v1/two": ["two"], "three": ["three"], "four": ["four"],
        "five": ["five"], "UPPER/six": ["six"],
    }  # fmt: skip


def test_a_name_goes_on_after_its_first_dot_as_webdataset_has_it(tmp_path):
    """`a.v1.png` is the member `v1.png` of the sample `a`: no picture to webdataset either."""
    cache = encoded_tar(
        tmp_path, ("a.v1.png", PNG), ("a.txt", b"a"), ("b.png", PNG), ("b.txt", b"b")
    )
    assert account(cache) == {"a": DOTTED, "b": ""}


def test_equal_keys_are_different_rows(tmp_path):
    other = png(2)
    cache = encoded_tar(
        tmp_path,
        ("a.png", PNG), ("a.txt", b"first"), ("a.png", other), ("a.txt", b"second"),
        ("b.png", PNG), ("b.txt", b"b"), ("a.png", PNG), ("a.txt", b"third"),
    )  # fmt: skip
    account(cache)
    rows = accounts(cache)
    assert sorted(row["source_key"] for row in rows) == ["a", "a", "a", "b"]
    assert sorted(row["captions"][0] for row in rows) == ["b", "first", "second", "third"]
    assert {row["status"] for row in rows} == {"written"}


def test_where_the_caption_comes_from(tmp_path):
    rows = {
        "txt wins": ({"txt": b" from txt \n", "json": b'{"caption": "from json"}'}, "from txt"),
        "json only": ({"json": b'{"caption": "from json"}'}, "from json"),
        "json list": ({"json": b'{"caption": ["", "first", "second"]}'}, "first"),
        "broken json, txt": ({"txt": b"from txt", "json": b'{"caption": "fro'}, "from txt"),
        "empty txt": ({"txt": b" \n", "json": b'{"caption": "from json"}'}, "from json"),
        "nothing": ({}, None),
        "broken json": ({"json": b'{"caption": "fro'}, None),
        "no object": ({"json": b'["a caption"]'}, None),
        "null": ({"json": b'{"caption": null}'}, None),
        "only empty txt": ({"txt": b""}, None),
        "deep": ({"json": b"[" * 100_000}, None),
    }
    files = [("good.png", PNG), ("good.txt", b"good")]
    for key, (members, _) in rows.items():
        files.append((f"{key}.png", PNG))
        files += [(f"{key}.{extension}", content) for extension, content in members.items()]
    cache = encoded_tar(tmp_path, *files)
    reasons = account(cache)
    found = {key: sample.record["captions"][0] for key, sample in samples(cache).items()}
    for key, (_, caption) in rows.items():
        assert reasons[key] == ("no caption" if caption is None else ""), key
        assert found.get(key) == caption, key


# --- pictures -----------------------------------------------------------------------------------


def orientation_as_text():
    """A JPEG whose EXIF says that the orientation is the word `abc`."""
    entry = struct.pack("<HHI4s", 0x0112, 2, 4, b"abc\0")
    tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
    return file_of(photo(1), "JPEG", exif=tags)


AVIF = file_of(photo(1), "AVIF")
BAD_PICTURES = {
    "cut png": PNG[: len(PNG) // 2],
    "cut jpeg": file_of(photo(1), "JPEG")[:400],
    "cut avif": AVIF[: len(AVIF) // 2],
    # 30,000 x 30,000 pixels in a few bytes of header
    "bomb": b"BM" + struct.pack("<IHHIIiiHH24x", 0, 0, 0, 54, 40, 30000, 30000, 1, 24),
}
GOOD_PICTURES = {
    "1x1": png(1, 1, 1),
    "1x4000": png(1, 1, 4000),
    "4000x1": png(1, 4000, 1),
    "cmyk": file_of(photo(1).convert("CMYK"), "JPEG"),
    "16 bit": file_of(Image.new("I;16", (80, 70), 30000)),
    "palette": file_of(photo(1).quantize(16), "GIF"),
    "alpha": file_of(photo(1).convert("RGBA")),
    "grey": file_of(photo(1).convert("L"), "JPEG"),
    "grey alpha": file_of(photo(1).convert("LA")),
    "bits": file_of(photo(1).convert("1"), "TIFF"),
    "odd exif": orientation_as_text(),
}


def test_odd_pictures_are_written_and_broken_ones_rejected(tmp_path):
    pictures = GOOD_PICTURES | BAD_PICTURES
    files = [f for k, data in pictures.items() for f in ((f"{k}.jpg", data), (f"{k}.txt", b"a"))]
    reasons = account(encoded_tar(tmp_path, *files))
    assert {key: reasons[key] for key in GOOD_PICTURES} == dict.fromkeys(GOOD_PICTURES, "")
    assert reasons.pop("bomb") == "too many pixels"
    bad = [key for key in BAD_PICTURES if key != "bomb"]
    assert {key: reasons[key] for key in bad} == dict.fromkeys(bad, "cannot be decoded")


def test_a_line_of_pixels_does_not_eat_the_memory(tmp_path):
    """1 x 4000 to a short side of 512 would be 1 G pixels, 4 GB, before the crop."""
    (tmp_path / "line.png").write_bytes(png(1, 1, 4000))
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from prep.images.crop import BadImage, Framing, prepare\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: prepare(Path(sys.argv[1]).read_bytes(), Framing(512))\n"
        "except BadImage: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    words = [sys.executable, "-c", script, tmp_path / "line.png"]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    grown = int(answer.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 1_500_000_000


def test_mistakes_in_file_kinds_do_not_run_other_programs(tmp_path):
    """PIL would hand a PostScript file to Ghostscript, whatever its name says."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 72 72\n%%EndComments\nshowpage\n"
    marker = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / "a.jpg").write_bytes(postscript)
    script = (
        "import sys; from pathlib import Path\n"
        "from prep.images.crop import BadImage, Framing, prepare\n"
        "try: prepare(Path(sys.argv[1]).read_bytes(), Framing(64))\n"
        "except BadImage as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.jpg"],
        cwd=ROOT, env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert answer.stdout == "PostScript is not read: convert it to PNG or JPEG\n"
    assert not marker.exists()


# --- folders ------------------------------------------------------------------------------------


def test_folder_with_metadata_jsonl(tmp_path):
    rows = [
        {"file_name": "0000.png", "text": "a red star"},
        {"file_name": "0001.png", "caption": "a blue ring"},
        {"file_name": "0002.png", "captions": ["one", "two"]},
    ]
    cache = encoded_folder(tmp_path, rows)
    assert account(cache) == {"0000.png": "", "0001.png": "", "0002.png": ""}
    captions = {key: sample.record["captions"] for key, sample in samples(cache).items()}
    assert captions == {
        "0000.png": ["a red star"], "0001.png": ["a blue ring"], "0002.png": ["one"],
    }  # fmt: skip


@pytest.mark.parametrize("mark", ["", "\ufeff"])  # Excel begins a file with a byte order mark
def test_folder_with_metadata_csv(tmp_path, mark):
    folder = write_folder(tmp_path / "folder", range(3))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(
        f'{mark}file_name,text\n0000.png,"a red, round star"\n0001.png,\n0002.png,grün\n', "utf-8"
    )
    cache = encode(folder, tmp_path / "cache", max_reject_fraction=1.0)
    assert account(cache) == {"0000.png": "", "0001.png": "no caption", "0002.png": ""}
    assert samples(cache)["0000.png"].record["captions"] == ["a red, round star"]
    assert samples(cache)["0002.png"].record["captions"] == ["grün"]


def test_folder_with_a_txt_beside_each_picture(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub.v1").mkdir(parents=True)
    for name in ("a.png", "sub.v1/b.c.PNG", "no caption.png"):
        (folder / name).write_bytes(PNG)
    (folder / "a.txt").write_text("a star\n")
    (folder / "sub.v1" / "b.c.txt").write_text("a ring")
    cache = encode(folder, tmp_path / "cache")
    assert account(cache) == {
        "a.png": "", "sub.v1/b.c.PNG": "", "no caption.png": "no caption"
    }  # fmt: skip
    assert samples(cache)["sub.v1/b.c.PNG"].record["captions"] == ["a ring"]


def test_rows_that_lead_nowhere_or_outside(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    folder = write_folder(tmp_path / "folder", range(3))
    (folder / "loop").symlink_to("loop")
    (folder / "sub").mkdir()
    problems = {
        "../secret.png": "outside the folder",
        "sub/../../secret.png": "outside the folder",
        str(tmp_path / "secret.png"): "outside the folder",
        "gone.png": "file missing",
        "sub": "file missing",
        "": "file missing",
        "x" * 300 + ".png": "file missing",
        "nul\0.png": "file missing",
        "loop/a.png": "file missing",
        "half \ud83d.png": "file missing",
    }
    rows = [{"file_name": name, "text": "a star"} for name in problems]
    rows.append({"file_name": "0001.png", "text": "a star"})
    rows.append({"file_name": "sub/../0002.png", "text": "a star"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reasons = account(encode(folder, tmp_path / "cache", max_reject_fraction=1.0))
    wanted = {name.replace("\ud83d", "?"): reason for name, reason in problems.items()}
    assert reasons == {**wanted, "0001.png": "", "sub/../0002.png": ""}


@pytest.mark.parametrize(
    "caption",
    [
        "line\u2028separators and\u0085next lines",  # legal within a line of JSON
        "half an emoji \ud83d",  # what a caption cut by UTF-16 units ends in
        "nul \0 and \x1b[31m control",
        "word " * 2000,
        "🌟" * 500,
    ],
    ids=["separators", "surrogate", "control", "long", "emoji"],
)
def test_any_caption_goes_through(tmp_path, caption):
    folder = write_folder(tmp_path / "folder", range(2))
    rows = [{"file_name": "0000.png", "text": caption}, {"file_name": "0001.png", "text": "b"}]
    lines = [json.dumps(row, ensure_ascii="\ud83d" in caption) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    cache = encode(folder, tmp_path / "cache")
    assert account(cache) == {"0000.png": "", "0001.png": ""}
    kept = next(row["captions"] for row in accounts(cache) if row["source_key"] == "0000.png")
    assert kept == [caption.replace("\ud83d", "?").strip()]  # whole, in samples/
    record = samples(cache)["0000.png"].record
    assert kept[0].startswith(record["captions"][0])  # cut at a code point, if at all
    assert record["captions"][0]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are always UTF-8")
def test_file_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in ((b"caf\xe9.png", PNG), (b"caf\xe9.txt", b"a"), (b"b.png", PNG)):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content)
    (folder / "b.txt").write_text("b")
    assert account(encode(folder, tmp_path / "cache")) == {"b.png": "", "caf?.png": ""}


def test_very_long_keys(tmp_path):
    long = "folder/" * 150 + "key"
    cache = encoded_tar(tmp_path, (f"{long}.png", PNG), (f"{long}.txt", b"a star"))
    assert account(cache) == {long: ""}
    assert next(iter(samples(cache).values())).record["captions"] == ["a star"]


def test_rows_go_to_units_by_their_name(tmp_path):
    folder = write_folder(tmp_path / "folder", range(24))
    cache = encode(folder, tmp_path / "cache", folder_units=4)
    found = units(cache)
    assert len(found) == 4
    assert all("of4-" in name for name in found)
    assert set(account(cache)) == {f"{n:04d}.png" for n in range(24)}


# --- too many rejected --------------------------------------------------------------------------


def bad_rows(count, reason):
    """Files of rows that are rejected for `reason`."""
    kinds = {"cannot be decoded": (b"no picture", b"a"), "no caption": (PNG, None)}
    picture, caption = kinds[reason]
    files = []
    for number in range(count):
        key = f"{reason} {number}"
        files.append((f"{key}.png", picture))
        files += [] if caption is None else [(f"{key}.txt", caption)]
    return files


@pytest.mark.parametrize("first", [True, False], ids=["first unit", "later unit"])
def test_all_rejected_stops_with_the_dominant_reason(tmp_path, first):
    tars = [write_tar(tmp_path / "b.tar", captioned(range(3)))]
    bad = bad_rows(2, "no caption") + bad_rows(5, "cannot be decoded")
    tars.append(write_tar(tmp_path / ("a.tar" if first else "c.tar"), bad))
    with pytest.raises(UserError) as caught:
        encode(tars, tmp_path / "cache", max_reject_fraction=0.99)
    line = str(caught.value)
    assert "\n" not in line
    assert str(tars[1]) in line
    assert "7 of 7 rows" in line
    assert "5 of them for 'cannot be decoded'" in line


@pytest.mark.parametrize("bad", ["too small", "no caption"])
def test_a_unit_may_yield_nothing_where_the_user_says_so(tmp_path, bad):
    files = [("0.png", png(0, 20, 99)), ("0.txt", b"a")] if bad == "too small" else [("0.png", PNG)]
    tars = [write_tar(tmp_path / "good.tar", captioned(range(2))), write_tar(tmp_path / "z", files)]
    # --min-size is a filter, and a filter is no damage.
    flags = {"min_size": 32} if bad == "too small" else {"max_reject_fraction": 1.0}
    cache = encode(tars, tmp_path / "cache", **flags)
    assert Counter(account(cache).values())[""] == 2
    assert manifest(cache)["totals"]["read"] == 3


def test_a_cache_of_nothing_is_not_finished(tmp_path):
    """The source was fine when the cache was begun."""
    tar = write_tar(tmp_path / "a.tar", captioned(range(2)))
    cache = encode(tar, tmp_path / "cache")
    before = (cache / "manifest.json").read_bytes()
    write_tar(tar, bad_rows(1, "no caption") + bad_rows(2, "cannot be decoded"))
    with pytest.raises(UserError) as caught:
        encode(tar, cache, max_reject_fraction=1.0)
    line = str(caught.value)
    assert "3 of 3 rows rejected, 2 of them for 'cannot be decoded' (first: 'cannot be " in line
    assert f"of {tar}); mend the sources" in line
    assert (cache / "manifest.json").read_bytes() == before


def test_usable_rows_may_come_late(tmp_path, monkeypatch):
    """256 rows without a caption say little about a source."""
    monkeypatch.setattr("prep.encode.plan.PROBED_ROWS", 4)
    files = bad_rows(6, "no caption") + captioned(range(4))
    tar = write_tar(tmp_path / "a.tar", files)
    cache = encode(tar, tmp_path / "cache", max_reject_fraction=1.0)
    assert Counter(account(cache).values()) == {"": 4, "no caption": 6}
    # But not for ever: a mistake is told in a moment.
    monkeypatch.setattr("prep.encode.plan.SEARCHED_ROWS", 5)
    with pytest.raises(UserError, match=r"mostly: no caption, such as 'no caption 0' of .*a\.tar"):
        encode(tar, tmp_path / "other", max_reject_fraction=1.0)
    assert not (tmp_path / "other").exists()


def test_a_row_that_gets_lost_on_its_way_is_noticed(tmp_path, monkeypatch):
    decode_rows = pipeline.decode_rows

    def losing(rows, *more):
        return decode_rows(itertools.islice(rows, 3, None), *more)

    tar = write_tar(tmp_path / "a.tar", captioned(range(5)))
    monkeypatch.setattr(pipeline, "decode_rows", losing)
    with pytest.raises(AssertionError, match="2 of 5 rows accounted"):
        encode(tar, tmp_path / "cache")
    assert units(tmp_path / "cache") == {}


def test_nothing_usable_anywhere(tmp_path):
    files = bad_rows(1, "no caption") + bad_rows(4, "cannot be decoded")
    tar = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError) as caught:
        encode(tar, tmp_path / "cache", max_reject_fraction=1.0)
    assert str(tar) in str(caught.value)
    assert "cannot be decoded" in str(caught.value)
    assert "no caption" not in str(caught.value)


def test_too_many_rejected_stops_before_anything_is_published(tmp_path):
    files = captioned(range(4)) + bad_rows(5, "no caption")
    tar = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError, match=r"5 of 9 rows rejected.*'no caption'.*--max-reject-frac"):
        encode(tar, tmp_path / "cache")
    assert units(tmp_path / "cache") == {}
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []
    cache = encode(tar, tmp_path / "cache", max_reject_fraction=0.6)
    assert Counter(account(cache).values()) == {"": 4, "no caption": 5}


def test_latents_that_fp16_cannot_hold_are_rejected(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for part in TINY_SD.iterdir():
        if part.name != "vae":
            (model / part.name).symlink_to(part)
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae")
    vae.quant_conv.weight.data *= 1e8
    vae.save_pretrained(model / "vae")
    tar = write_tar(tmp_path / "a.tar", captioned(range(3)))
    with pytest.raises(UserError, match=r"3 of 3 rows rejected.*'non-finite latents'"):
        encode(tar, tmp_path / "cache", model=str(model), max_reject_fraction=1.0)
