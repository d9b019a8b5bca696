"""Folders as people have them: links, lists of every shape, names that are written otherwise."""

import json
import os

import pytest

from prep.sources.find import find_units
from shared.errors import UserError
from tests.support.folders import fill, rows_of, tar_of
from tests.support.sources import encode, manifest, png, prep, refusal

PNG = png(1, 16, 16)
ROW = {"file_name": "a.png", "text": "a star"}
A = {"a.png": (("a star",), "")}
WORDS = ("--model", "tiny-sd", "--threads", 1, "--latents", "mean", "--no-report")


# --- links --------------------------------------------------------------------------------------


def test_a_users_links_are_followed(tmp_path):
    """As of a hub snapshot, whose files are links to blobs, and of a selection made by hand."""
    fill(tmp_path, {"blobs/1": PNG, "blobs/2": "a star", "shelf/b.png": PNG, "shelf/b.txt": "b"})
    folder = fill(tmp_path / "folder", {"c.png": PNG, "c.txt": "c"})
    (folder / "a.png").symlink_to("../blobs/1")
    (folder / "a.txt").symlink_to("../blobs/2")
    (folder / "linked").symlink_to("../shelf")
    (tmp_path / "entry").symlink_to("folder")
    wanted = A | {"linked/b.png": (("b",), ""), "c.png": (("c",), "")}
    assert rows_of(folder) == rows_of(tmp_path / "entry") == wanted
    (folder / "metadata.jsonl").write_text(json.dumps(ROW))
    assert rows_of(folder) == A


def test_loops_of_links_end(tmp_path):
    folder = fill(tmp_path / "folder", {"a.png": PNG, "a.txt": "a star", "sub/b.png": PNG})
    (folder / "sub" / "round").symlink_to("..")
    (folder / "up").symlink_to(tmp_path)  # which holds the folder
    (folder / "again").symlink_to("sub")
    (folder / "self").symlink_to("self")
    (folder / "self.png").symlink_to("self.png")
    fill(tmp_path, {"other/c.png": PNG})
    assert rows_of(folder) == A | {
        "sub/b.png": ((), "no caption"), "self.png": ((), "file missing")
    }  # fmt: skip


def test_metadata_that_points_outside_is_refused(tmp_path):
    fill(tmp_path, {"secret.png": PNG})
    folder = fill(tmp_path / "folder", {"a.png": PNG, "sub/b.png": PNG})
    (folder / "linked").symlink_to(tmp_path)
    outside = ["../secret.png", "sub/../../secret.png", str(tmp_path / "secret.png"), "/etc/passwd",
               "../folder2/a.png", "linked/../../secret.png"]  # fmt: skip
    inside = ["a.png", "sub/../a.png", "./a.png", str(folder / "a.png"), "../folder/a.png",
              "linked/../a.png", "linked/secret.png"]  # fmt: skip
    rows = [{"file_name": name, "text": "a"} for name in outside + inside]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = {key: problem for key, (_, problem) in rows_of(folder).items()}
    assert problems == dict.fromkeys(outside, "outside the folder") | dict.fromkeys(inside, "")


# --- lists of every shape -----------------------------------------------------------------------

TWO = [ROW, {"file_name": "b.png", "text": "one, two"}]
LISTS = {
    "lines": ("metadata.jsonl", "\n".join(map(json.dumps, TWO))),
    "list": ("metadata.jsonl", json.dumps(TWO)),
    "pretty list": ("metadata.jsonl", json.dumps(TWO, indent=2)),
    "pretty objects": ("metadata.jsonl", "\n".join(json.dumps(row, indent=2) for row in TWO)),
    "commas": ("metadata.jsonl", ",\n".join(map(json.dumps, TWO)) + ",\n"),
    "json": ("metadata.json", json.dumps(TWO)),
    "by name": ("metadata.json", json.dumps({row["file_name"]: row["text"] for row in TWO})),
    "kohya": ("metadata.json", json.dumps({r["file_name"]: {"caption": r["text"]} for r in TWO})),
    **{f"key {key}": ("metadata.jsonl", "\n".join(json.dumps({key: r["file_name"], "text": r["text"]
       }) for r in TWO)) for key in ("image", "filename", "path", "img", "file", "image_path")},
    "csv": ("metadata.csv", 'file_name,text\na.png,a star\nb.png,"one, two"\n'),
    "semicolons": ("metadata.csv", "file_name;text\na.png;a star\nb.png;one, two\n"),
    "tabs": ("metadata.csv", "file_name\ttext\r\na.png\ta star\r\nb.png\tone, two\r\n"),
    "tsv": ("metadata.tsv", "image\ttext\na.png\ta star\nb.png\tone, two\n"),
    "blanks": ("metadata.csv", '\nfile_name, text\n\na.png, a star\nb.png, "one, two"\n,\n'),
    "late blanks": ("metadata.csv", 'file_name,text\na.png,a star\nb.png, "one, two"\n'),
    "capitals": ("metadata.csv", 'Filename,text\na.png,a star\nb.png,"one, two"\n'),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_can_mean_one_thing_only_is_taken(tmp_path, name):
    file, text = LISTS[name]
    folder = fill(tmp_path / "folder", {"a.png": PNG, "b.png": PNG, file: text})
    assert rows_of(folder) == A | {"b.png": (("one, two",), "")}


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("metadata.jsonl", '{"url": "http://a/b.png", "text": "a"}', "download the pictures first"),
        (
            "metadata.jsonl",
            '{"text": "a"}\n{"text": "b"}',
            "row 1 has no file_name, only text",
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "note": "a"}', "Say --caption-column NAME"),
        ("metadata.csv", "a.png,a star\n", "its first line must name the columns, file_name and"),
        ("metadata.csv", "file_name text\na.png a star\n", "with commas between them"),
        ("metadata.csv", "file_name,text\na.png,one, two\n", "in double quotes"),
        ("metadata.json", '{"pictures": 3}', "row 1 has no file_name, only pictures"),
    ],
)
def test_other_lists_are_told_what_is_missing(tmp_path, file, text, told):
    folder = fill(tmp_path / "folder", {"a.png": PNG, file: text})
    with pytest.raises(UserError, match=told) as caught:
        find_units([str(folder)])
    assert str(folder) in str(caught.value)


def test_metadata_json_of_another_tool_leaves_the_captions_alone(tmp_path):
    files = {"a.png": PNG, "a.txt": "a star", "metadata.json": '{"pictures": 3}'}
    assert rows_of(fill(tmp_path / "folder", files)) == A


def test_metadata_in_subfolders(tmp_path):
    lines = '{"file_name": "a.png", "text": "a star"}'
    files = {
        "train/a.png": PNG, "train/deep/b.png": PNG, "train/metadata.jsonl": lines,
        "test/a.png": PNG, "test/metadata.csv": "file_name,text\na.png,b\n",
        "rest/c.png": PNG, "rest/c.txt": "c",
    }  # fmt: skip
    assert rows_of(fill(tmp_path / "folder", files)) == {
        "train/a.png": (("a star",), ""), "test/a.png": (("b",), ""), "rest/c.png": (("c",), ""),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ("a.png", "folder/a.png"), ("sub/a.png", "folder/sub/a.png"), ("sub/a.png", "sub\\a.png"),
        ("sub/a.png", ".\\sub\\a.png"), ("e\u0301.png", "é.png"), ("é.png", "e\u0301.png"),
        ("a.png", "a"), ("a.JPG", "a.jpg"), ("a.png", " a.png "), ("A b.Png", "a B.png"),
    ],
)  # fmt: skip
def test_a_name_that_can_mean_one_file_only_is_found(tmp_path, there, named):
    folder = fill(tmp_path / "folder", {there: PNG, "other.png": PNG})
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": named, "text": "a"}))
    assert rows_of(folder) == {named: (("a",), "")}


def test_a_name_that_can_mean_two_is_not(tmp_path):
    folder = fill(tmp_path / "folder", {"a.png": PNG, "a.jpg": PNG, "b.PNG": PNG, "B.png": PNG})
    rows = [{"file_name": name, "text": "a"} for name in ("a", "b.png", "c.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    missing = ((("a",), "file missing"),) * 3
    assert rows_of(folder) == dict(zip(("a", "b.png", "c.png"), missing, strict=True))


# --- captions beside pictures -------------------------------------------------------------------


def test_captions_beside_pictures_in_a_folder_and_a_tar(tmp_path):
    files = {
        "a.png": PNG, "a.caption": "a star", "b.png": PNG, "b.txt": "txt", "b.caption": "caption",
        "c.png": PNG, "c.png.txt": "named", "d.png": PNG, "d.TXT": "one\ntwo\n",
        "e.png": PNG, "e.json": '{"caption": "json", "score": 3}', "f.png": PNG, "f.json": "{",
    }  # fmt: skip
    wanted = {"a": "a star", "b": "txt", "c": "named", "d": "one\ntwo", "e": "json"}
    rows = {name: ((caption,), "") for name, caption in wanted.items()} | {"f": ((), "no caption")}
    assert rows_of(tar_of(tmp_path / "a.tar", files)) == rows
    folder = fill(tmp_path / "folder", files)
    assert rows_of(folder) == {f"{name}.png": row for name, row in rows.items()}
    # What the json says is there for --where, as in a tar.
    cache = encode(folder, tmp_path / "cache", where="has(score) and score > 2")
    assert manifest(cache)["totals"]["written"] == 1


def test_editing_a_json_beside_a_picture_is_a_change(tmp_path):
    folder = fill(tmp_path / "folder", {"a.png": PNG, "a.json": '{"caption": "a"}'})
    before = [unit.state for unit in find_units([str(folder)])]
    (folder / "a.json").write_text('{"caption": "another"}')
    assert [unit.state for unit in find_units([str(folder)])] != before


def test_pictures_without_any_captions(tmp_path):
    line = refusal("encode", "--shards", fill(tmp_path / "f", {"a.png": PNG, "b.heic": PNG}),
                   "--cache", tmp_path / "c", *WORDS)  # fmt: skip
    assert "none of its 2 pictures has a caption, such as NAME.txt beside NAME.jpg" in line


def test_kohyas_repeats_are_not_applied_and_it_says_so(tmp_path):
    folder = fill(tmp_path / "train", {"10_cat/a.png": png(1), "10_cat/a.txt": "a cat"})
    answer = prep("encode", "--shards", folder, "--cache", tmp_path / "c", *WORDS)
    assert answer.status == 0
    assert "10_cat: the repeats in a folder's name" in answer.err
    assert manifest(tmp_path / "c")["totals"]["written"] == 1
    inner = prep("encode", "--shards", folder / "10_cat", "--cache", tmp_path / "d", *WORDS)
    assert "10_cat: the repeats" in inner.err


def test_an_old_caches_units_are_those_of_today(tmp_path):
    """What tells a changed folder from an unchanged one has not changed itself."""
    folder = fill(tmp_path / "folder", {"a.png": PNG, "a.txt": "a star"})
    os.utime(folder / "a.png", ns=(10**18, 10**18))
    (unit,) = find_units([str(folder)])
    import hashlib

    row = json.dumps({"file_name": "a.png", "text": "a star"}, sort_keys=True)
    state = hashlib.sha256(f"{row}{len(PNG)} {10**18}".encode()).hexdigest()
    assert unit.state == {"sha256": state}


@pytest.mark.parametrize("name", ["captions.jsonl", "dataset.json", "labels.csv"])
def test_a_list_of_another_name_is_pointed_at(tmp_path, name):
    folder = fill(tmp_path / "f", {"a.png": png(1), "b.png": png(2), name: "[]"})
    ending = name.partition(".")[2]
    with pytest.raises(UserError, match=f"if {name} holds the captions, name it metadata.{ending}"):
        find_units([str(folder)])


def test_a_list_that_names_nothing(tmp_path):
    folder = fill(tmp_path / "f", {"a.png": png(1), "metadata.jsonl": ""})
    with pytest.raises(UserError, match=r"metadata\.jsonl names no pictures"):
        find_units([str(folder)])
