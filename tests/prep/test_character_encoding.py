"""Captions in every encoding: a mark decides, else UTF-8; what is neither is a row rejected."""

import json

import pytest

from prep.sources.find import find_units
from shared.errors import UserError
from tests.support.folders import fill, rows_of, tar_of
from tests.support.sources import accounts, encode, png, refusal

PNG = png(1, 16, 16)
TEXT = "café, 日本"
NOT_UTF8 = "its txt is not UTF-8; save as UTF-8, or say --caption-encoding cp1252 or what it is"
UTF16 = "its txt is UTF-16 without a byte order mark; save as UTF-8 or say --caption-encoding "

READ = {
    "utf-8": TEXT.encode(), "utf-8 mark": TEXT.encode("utf-8-sig"),
    "utf-16": TEXT.encode("utf-16"), "utf-16-be": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"), "utf-32-be": b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"),
}  # fmt: skip
UNREAD = {
    "cp1252": ("a café".encode("cp1252"), NOT_UTF8),
    "cp932": ("日本の猫".encode("cp932"), NOT_UTF8),
    "gb18030": ("猫在桌子上".encode("gb18030"), NOT_UTF8),
    "utf-16-le": ("a dog".encode("utf-16-le"), UTF16 + "utf-16-le"),
    "utf-16-be": ("a dog".encode("utf-16-be"), UTF16 + "utf-16-be"),
    "utf-16 of accents": ("é à ü".encode("utf-16-le"), NOT_UTF8),
}
INVISIBLE = (
    "", " \r\n\t", "\ufeff", "\u200b\u200d\u2060", "\u00ad", "\u00a0\u3000", "\u202e\u202c\u200f",
    "\ufe0f", "\U000e0100", "\u3164", "\u115f\u1160", "\u2800", "\u034f", "\0", "\u180e",
    "\U000e0041",
)  # fmt: skip


def both(tmp_path, files, **options):
    """Rows of a folder and of a tar of the same files, by the picture's name without `.png`."""
    folder = rows_of(fill(tmp_path / "folder", files), **options)
    tar = rows_of(tar_of(tmp_path / "a.tar", files), **options)
    folder = {key.removesuffix(".png"): row for key, row in folder.items()}
    assert folder == tar
    return folder


def pairs(texts):
    files = {f"{name}.png": PNG for name in texts}
    return files | {f"{name}.txt": text for name, text in texts.items()}


def test_a_byte_order_mark_decides(tmp_path):
    found = both(tmp_path, pairs(READ))
    assert found == {name: ((TEXT,), "") for name in READ}


def test_garbage_is_a_rejected_row(tmp_path):
    found = both(tmp_path, pairs({name: content for name, (content, _) in UNREAD.items()}))
    assert {name: captions for name, (captions, _) in found.items()} == dict.fromkeys(UNREAD, ())
    told = {name: problem for name, (_, problem) in found.items()}
    accents = told.pop("utf-16 of accents")  # both are true of it
    assert accents.startswith("its txt is ")
    assert told == {name: why for name, (_, why) in UNREAD.items() if name in told}


@pytest.mark.parametrize("name", ["cp1252", "cp932", "gb18030", "utf-16-le"])
def test_the_encoding_is_what_the_user_says(tmp_path, name):
    wanted = UNREAD[name][0].decode(name)
    files = pairs({"a": UNREAD[name][0], "marked": TEXT.encode("utf-8-sig")})
    found = both(tmp_path, files, caption_encoding=name)
    assert found == {"a": ((wanted,), ""), "marked": ((TEXT,), "")}


@pytest.mark.parametrize("number", range(len(INVISIBLE)))
def test_a_caption_that_shows_nothing_is_none(tmp_path, number):
    text = INVISIBLE[number]
    files = pairs({"a": text, "b": f"{text}a star"}) | {"c.png": PNG, "c.txt": "c"}
    files["c.json"] = json.dumps({"caption": text})
    found = both(tmp_path, files)
    assert found["a"] == ((), "no caption")
    assert found["b"][1] == ""


def test_json_is_unicode_by_itself(tmp_path):
    record = json.dumps({"caption": TEXT}, ensure_ascii=False)
    files = {f"{name}.png": PNG for name in ("u8", "u16", "cp")}
    files |= {"u8.json": record.encode(), "u16.json": record.encode("utf-16-le")}
    files |= {"cp.json": '{"caption": "café"}'.encode("cp1252")}
    assert both(tmp_path, files, caption_encoding="cp1252") == {
        "u8": ((TEXT,), ""), "u16": ((TEXT,), ""), "cp": (("café",), "")
    }  # fmt: skip
    why = NOT_UTF8.replace("txt", "json")
    assert rows_of(tmp_path / "a.tar")["cp"] == ((), why)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.json"])
def test_metadata_by_the_same_rule(tmp_path, name):
    row = {"file_name": "a.png", "text": "café"}
    text = "file_name,text\na.png,café\n" if name.endswith("csv") else json.dumps(
        row if name.endswith("l") else [row], ensure_ascii=False
    )  # fmt: skip
    folder = fill(tmp_path / "folder", {"a.png": PNG})
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (folder / name).write_bytes(text.encode(encoding))
        assert rows_of(folder) == {"a.png": (("café",), "")}
    (folder / name).write_bytes(text.encode("cp1252"))
    assert rows_of(folder, caption_encoding="cp1252") == {"a.png": (("café",), "")}
    with pytest.raises(UserError, match=rf"{name} is not UTF-8; .*--caption-encoding"):
        find_units([str(folder)])


def test_the_flag_is_part_of_what_a_unit_is(tmp_path):
    folder = fill(tmp_path / "folder", pairs({"a": "café".encode("cp1252"), "b": "a star"}))
    first = encode(folder, tmp_path / "cache")
    reasons = {row["source_key"]: row["reason"] for row in accounts(first)}
    assert reasons == {"a.png": NOT_UTF8, "b.png": ""}
    encode(folder, tmp_path / "cache", caption_encoding="cp1252")
    captions = {row["source_key"]: row["captions"] for row in accounts(first)}
    assert captions == {"a.png": ["café"], "b.png": ["a star"]}


@pytest.mark.parametrize("name", ["cp12521", "rot13", "hex", "idna", ""])
def test_encodings_that_are_none(tmp_path, name):
    words = ["encode", "--shards", tmp_path, "--model", "tiny-sd", "--cache", tmp_path / "c"]
    line = refusal(*words, f"--caption-encoding={name}")
    assert line.startswith(f"--caption-encoding {name!r}: no such encoding; for example cp1252")
