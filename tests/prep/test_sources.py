"""Every input row of tars and folders is accounted for: written, or rejected with a reason."""

import json
import os
import sys

import pytest

from prep.sources.tars.tar_rows import DOTTED
from tests.support.accounts import account, encoded_tar
from tests.support.sources import (
    accounts,
    captioned,
    encode,
    file_of,
    photo,
    png,
    samples,
    units,
    write_folder,
    write_rows,
    write_tar,
)

PNG = png(1)


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
