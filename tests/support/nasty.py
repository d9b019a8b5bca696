"""Sources of everything nasty, and how each row should end."""

import csv
import io
import json
import os
import sys
import tarfile

from prep.sources.tars.tar_rows import DOTTED
from tests.support.pictures import bad_pictures, good_pictures
from tests.support.sources import (
    png,
)

CAPTION = b"a caption"
LARGE = "larger than --max-image-bytes"
GOOD, BAD = good_pictures(), bad_pictures()
PNG = png(1, 16, 16)
NOT_UTF8 = "its txt is not UTF-8; save as UTF-8, or say --caption-encoding cp1252 or what it is"
# What a NAME.txt holds, and the reason for which its row is rejected.
TEXTS = {
    "long": (b"word " * 20_000, ""), "latin-1": ("caf\xe9".encode("latin-1"), NOT_UTF8),
    "utf-16": ("a star".encode("utf-16"), ""), "bytes": (bytes(range(256)), NOT_UTF8),
    "nul": (b"a\0b", ""), "only nul": (b"\0", "no caption"), "empty": (b"", "no caption"),
    "blank": (b" \r\n\t ", "no caption"), "mark": (b"\xef\xbb\xbf", "no caption"),
    "right to left": ("\u202eabc\u202c \u05d0\u05d1".encode(), ""),
    "control": (b"\x1b[31mred\x1b[0m\x07\x08\r\n", ""), "emoji": ("👩‍👩‍👧‍👦🏳️‍🌈".encode(), ""),
    "combining": (("a" + "\u0301" * 5000).encode(), ""),
    "html": (b"<img src=x onerror=alert(1)></script>", ""), "special": (b"<|endoftext|>", ""),
    "one word": (b"x" * 100_000, ""), "surrogates": (b"\xed\xa0\x80", NOT_UTF8),
}  # fmt: skip
# What "caption" is in a json.
VALUES = {
    "null": (None, "no caption"), "number": (7, "no caption"), "true": (True, "no caption"),
    "object": ({"en": "a"}, "no caption"), "list": (["", "a star", 3, None], ""),
    "no list": ([], "no caption"), "lists": ([["a"]], "no caption"),
    "surrogate": ("a\ud800b", ""), "nan": (float("nan"), "no caption"),
    "text of nul": ("\0", "no caption"), "many": ([f"caption {n}" for n in range(3000)], ""),
    "long text": ("x" * 100_000, ""), "huge number": (10**5000, "no caption"),
}  # fmt: skip
# Files that should be json.
JSONS = {
    "cut": b'{"caption": "a st', "array": b'["a star"]', "string": b'"a star"', "no json": b"",
    "deep": b"[" * 10_000 + b"]" * 10_000, "deep object": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "bytes of json": bytes(range(256)), "other keys": b'{"title": "a star"}',
}  # fmt: skip
DEEP_ENOUGH = b'{"caption": "a star", "deep": ' + b"[" * 400 + b"]" * 400 + b"}"
Expected = list[tuple[str, str]]


def pictures_and_texts(folder="", ending=""):
    """Files `(name, content)` that a folder and a tar can hold, and what becomes of each row."""
    files, expected = [], []

    def add(name, picture, text, reason):
        files.extend([(f"{folder}{name}.png", picture), (f"{folder}{name}.txt", text)])
        expected.append((f"{folder}{name}{ending}", reason))

    for name, content in GOOD.items():
        add(f"good {name}", content, CAPTION, "")
    for name, (content, reason) in BAD.items():
        add(f"bad {name}", content, CAPTION, reason)
    for name, (text, reason) in TEXTS.items():
        add(f"text {name}", PNG, text, reason)
    add("large", PNG + bytes(2_000_000), CAPTION, LARGE)
    return files, expected


def jsons():
    """Rows of a tar whose captions are in a json."""
    files, expected = [], []
    for name, (value, reason) in VALUES.items():
        text = "9" * 9000 if name == "huge number" else json.dumps(value)
        files += [
            (f"json {name}.png", PNG),
            (f"json {name}.json", b'{"caption": %b}' % text.encode()),
        ]
        expected.append((f"json {name}", reason))
    for name, content in JSONS.items():
        files += [(f"json {name}.png", PNG), (f"json {name}.json", content)]
        files += [
            (f"both {name}.png", PNG),
            (f"both {name}.json", content),
            (f"both {name}.txt", b"a"),
        ]
        reason = NOT_UTF8.replace("txt", "json") if name == "bytes of json" else "no caption"
        expected += [(f"json {name}", reason), (f"both {name}", "")]
    files += [("json deep enough.png", PNG), ("json deep enough.json", DEEP_ENOUGH)]
    return files, [*expected, ("json deep enough", "")]


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def names():
    """Rows whose names, kinds or headers would hurt a careless reader, as `(info, content)`."""
    good = [
        "../../up", "/absolute/path", "..", "a/../../b", "-rf", "--cache=x", "*", "{a,b}", "$(ls)",
        "C:\\windows\\system32", "line\nfeed", "carriage\rreturn", "tab\there", "bell\x07\x1b[31m",
        "emoji 👩‍👩‍👧‍👦", "caf\udce9", "a/b/c/d", "v1.2/dots", "x" * 240, "folder/" * 60 + "é" * 60,
        "e\u0301", "\u202egnp", "CON", "nul", " ", "a'\"b", "<b>", "0", "%00", "&amp;",
    ]  # fmt: skip
    files, expected = [], []
    for name in good:
        files += [member(f"{name}.png", PNG), member(f"{name}.txt", CAPTION)]
        if not name.startswith(".."):
            expected.append((name.encode("utf-8", "replace").decode(), ""))
    expected.append(("../../up", ""))  # `..png` has no name before its first dot
    for name, fields, reason in (
        ("symlink", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "no picture"),
        ("hard link", {"type": tarfile.LNKTYPE, "linkname": "0.png"}, "no picture"),
        ("device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "no picture"),
        ("block device", {"type": tarfile.BLKTYPE}, "no picture"),
        ("fifo", {"type": tarfile.FIFOTYPE}, "no picture"),
        ("folder", {"type": tarfile.DIRTYPE}, "no picture"),
        ("unknown type", {"type": b"Z"}, "no picture"),
        ("old file", {"type": tarfile.AREGTYPE}, ""),
        ("contiguous", {"type": tarfile.CONTTYPE}, ""),
        ("times", {"mtime": 2**33, "mode": 0, "uid": 2**40, "uname": "é" * 12}, ""),
    ):
        empty = reason == "no picture"
        files += [
            member(f"{name}.png", b"" if empty else PNG, **fields),
            member(f"{name}.txt", CAPTION),
        ]
        expected.append((name, reason))
    sparse = member("sparse.png", bytes(512), type=tarfile.GNUTYPE_SPARSE)
    files += [
        sparse, member("sparse.txt", CAPTION), member("README", CAPTION),
        member(".hidden.png", PNG),
        member("__MACOSX/._0.png", b"Mac"),
        member("twice.png", PNG), member("twice.txt", b"a"),
        member("twice.png", PNG), member("twice.txt", b"b"), member("twice.png", PNG),
        member("dots.v1.png", PNG), member("dots.v1.txt", CAPTION), member("UP.PNG", PNG),
        member("UP.TXT", CAPTION), member("alone.png", PNG), member("only.txt", CAPTION),
        member("two.jpg", PNG), member("two.png", b"other"), member("two.txt", CAPTION),
        member("other.heic", PNG), member("other.txt", CAPTION),
    ]  # fmt: skip
    expected += [
        ("sparse", "sparse file"), ("twice", ""), ("twice", ""), ("twice", "no caption"),
        ("dots", DOTTED), ("UP", ""), ("alone", "no caption"), ("only", "no picture"),
        ("two", ""), ("other", ""),
    ]  # fmt: skip
    return files, expected


def nasty_tar(path, form=tarfile.GNU_FORMAT):
    """The tar, and what becomes of each of its rows."""
    files, expected = pictures_and_texts()
    more, expected_more = jsons()
    odd, expected_odd = names()
    with tarfile.open(path, "w", format=form) as tar:
        for info, content in [*(member(*file) for file in files + more), *odd]:
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {
                    "comment": "é" * 5000,
                    "SCHILY.xattr.user.x": "\0\1",
                    "ctime": "x",
                }
            tar.addfile(info, io.BytesIO(content))
    return expected + expected_more + expected_odd


def nasty_folder(path):
    """A folder with NAME.txt beside each picture."""
    path.mkdir()
    files, expected = pictures_and_texts(ending=".png")
    for name, content in files:
        (path / name).write_bytes(content)
    (path / "alone.png").write_bytes(PNG)
    (path / "sub.folder").mkdir()
    (path / ".hidden.png").write_bytes(PNG)
    (path / ".hidden.txt").write_bytes(CAPTION)
    for name in ("sub.folder/a.b", "-rf", "line\nfeed", "emoji 👩‍👩‍👧‍👦", "x" * 240):
        (path / f"{name}.PNG").write_bytes(PNG)
        (path / f"{name}.txt").write_bytes(CAPTION)
        expected.append((f"{name}.PNG", ""))
    if sys.platform != "darwin":  # its file names are always UTF-8
        for ending, content in ((b".png", PNG), (b".txt", CAPTION)):
            with open(os.fsencode(path) + b"/caf\xe9" + ending, "wb") as file:
                file.write(content)
        expected.append(("caf?.png", ""))
    for name in ("fifo", "a folder", "out", "loop", "nowhere"):
        (path / f"{name}.txt").write_bytes(CAPTION)
    os.mkfifo(path / "fifo.png")
    (path / "a folder.png").mkdir()
    (path / "out.png").symlink_to("/dev/zero")
    (path / "loop.png").symlink_to("loop.png")
    (path / "nowhere.png").symlink_to("gone.png")
    return [
        *expected, ("alone.png", "no caption"), ("fifo.png", "file missing"),
        ("a folder.png", "file missing"), ("out.png", "file missing"),
        ("loop.png", "file missing"), ("nowhere.png", "file missing"),
    ]  # fmt: skip


def listed_folder(path):
    """A folder with metadata.jsonl."""
    path.mkdir()
    rows, expected = [], []
    for name, (value, reason) in VALUES.items():
        if name != "huge number":
            (path / f"{name}.png").write_bytes(PNG)
            rows.append({"file_name": f"{name}.png", "text": value})
            expected.append((f"{name}.png", reason))
    (path.parent / "outside.png").write_bytes(PNG)
    for name, reason in {
        "../outside.png": "outside the folder", "/etc/passwd": "outside the folder",
        "": "file missing",
        "..": "outside the folder",
        ".": "file missing", "gone.png": "file missing",
        "nul\0.png": "file missing", "x" * 5000: "file missing", "sur\ud800.png": "file missing",
        "line\nfeed.png": "file missing", "null.png": "",
    }.items():  # fmt: skip
        rows.append(
            {"file_name": name, "text": "a caption", "similarity": "high", "x": {"y": [[]]}}
        )
        expected.append((name.encode("utf-8", "replace").decode(), reason))
    rows.append({"file_name": "null.png"})
    expected.append(("null.png", "no caption"))
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return expected


def csv_folder(path):
    """A folder with metadata.csv."""
    path.mkdir()
    texts = {"a": "one, two", "b": "line\nfeed", "c": "", "d": "x" * 100_000, "e": '"', "f": "é\0"}
    with (path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "width"])
        for name, text in texts.items():
            (path / f"{name}.png").write_bytes(PNG)
            writer.writerow([f"{name}.png", text, "wide"])
    return [(f"{name}.png", "" if text else "no caption") for name, text in texts.items()]
