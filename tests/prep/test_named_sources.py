"""What --shards names: files with odd names, files that are no source, globs and gaps."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.sources.find import SourceError, find_units
from shared.errors import UserError
from tests.support.folders import fill, rows_of
from tests.support.sources import captioned, png, refusal, write_tar

PNG = png(1, 16, 16)
PAIR = [("a.png", PNG), ("a.txt", b"a star")]
ROWS = {"a": (("a star",), "")}
WORDS = ("--model", "tiny-sd", "--threads", 1, "--no-report")


@pytest.mark.parametrize(
    "name",
    ["[2024] trip", "a{1,2}", "a{0..3}", "what?", "star*", "a b", "{", "}", "~", "~nobody",
     "back\\slash", "-dash", "caf\udce9", "a,b", "http:", "%41"],
)  # fmt: skip
def test_what_exists_is_meant(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / f"{name}.tar", PAIR)
    fill(tmp_path / name, {"a.png": PNG, "a.txt": "a star"})
    assert rows_of(f"{name}.tar") == rows_of(tmp_path / f"{name}.tar") == ROWS
    assert rows_of(name) == rows_of(tmp_path / name) == {"a.png": (("a star",), "")}
    assert rows_of(f"file://{tmp_path}/{name}.tar") == ROWS


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "a.tar", PAIR)
    assert rows_of("~/a.tar") == rows_of("~/*.tar") == rows_of("~/{a..a}.tar") == ROWS


OTHERS = {
    "a.jpg": (PNG, "is a picture (PNG); pass the folder that it is in"),
    "metadata.jsonl": (b'{"file_name": "a.jpg"}', "is JSON; if it lists pictures, pass the folder"),
    "metadata.csv": (b"file_name,text\n", "is a text; if it describes pictures, pass the folder"),
    "a.mp4": (b"\0\0\0\x18ftypisom\0\0\2\0", "is a video (MP4, MOV); leave it out of --shards"),
    "a.zip": (b"PK\3\4" + bytes(50), "is a zip archive; unpack it and pass the folder"),
    "a.rar": (b"Rar!\x1a\7\1\0", "is a RAR archive; unpack it and pass the folder"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it and pass the folder"),
    "a.tar.bz2": (b"BZh91AY", "is a file packed with bzip2; unpack it"),
    "a.tar.xz": (b"\xfd7zXZ\0", "is a file packed with xz; unpack it"),
    "page": (b"<!DOCTYPE html>\n<html>", "is a web page; download it again"),
    "a.bin": (b"version https://git-lfs.github.com/spec/v1\n", "get the files with `git lfs pull`"),
    "README.md": (b"# Pictures\n", "is a text; if it describes pictures"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_source_says_what_it_is(tmp_path, name):
    content, told = OTHERS[name]
    path = fill(tmp_path / "folder", {name: content}) / name
    line = refusal("encode", "--shards", path, "--cache", tmp_path / "c", *WORDS)
    assert f"{path} is" in line
    assert told in line
    assert not (tmp_path / "c").exists()


def test_a_page_named_like_a_tar_costs_its_unit_only(tmp_path):
    path = fill(tmp_path, {"a.tar": "<!DOCTYPE html>\n<html>404"}) / "a.tar"
    (unit,) = find_units([str(path)])
    with pytest.raises(SourceError, match=r"not a whole tar but a web page; download it again"):
        list(unit.rows())


def test_pipes_dangling_links_and_nothing(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.tar").symlink_to("gone.tar")
    for name, told in {"fifo": "pipe or a device", "link.tar": "link to what is not"}.items():
        with pytest.raises(UserError, match=told):
            find_units([str(tmp_path / name)])
    with pytest.raises(UserError, match="nothing matches ''"):
        find_units([""])


# --- globs, braces, folders of tars -------------------------------------------------------------


def img2dataset(folder):
    """Its output: tars, with a table and accounts beside each, none of which holds a picture."""
    folder.mkdir()
    for n in range(3):
        write_tar(folder / f"{n:05}.tar", captioned([n]))
        (folder / f"{n:05}.parquet").write_bytes(b"PAR1 of urls and status PAR1")
        (folder / f"{n:05}_stats.json").write_text('{"count": 1}')
    return folder


def test_img2datasets_folder(tmp_path):
    folder = img2dataset(tmp_path / "out")
    wanted = {f"{n:04}": ((f"picture number {n}",), "") for n in range(3)}
    for source in (folder, f"{folder}/*", f"{folder}/0*", f"{folder}/*.tar", f"{tmp_path}/*"):
        assert rows_of(source) == wanted, source
    names = {unit.name for unit in find_units([f"{folder}/*.tar"])}
    assert {unit.name for unit in find_units([str(folder)])} == names


def test_img2datasets_folders_of_files(tmp_path):
    folder = fill(tmp_path / "out", {"00000/a.png": PNG, "00000/a.txt": "a star"})
    (folder / "00000.parquet").write_bytes(b"PAR1 of urls and status PAR1")
    (folder / "00000_stats.json").write_text("{}")
    assert rows_of(f"{folder}/*") == {"a.png": (("a star",), "")}


def test_a_glob_below_a_folder_whose_name_looks_like_one(tmp_path):
    (tmp_path / "[2024] trip").mkdir()
    write_tar(tmp_path / "[2024] trip" / "a.tar", PAIR)
    for glob in ("*.tar", "[a-c].tar", "{a,a}*.tar"):
        assert rows_of(f"{tmp_path}/[2024] trip/{glob}") == ROWS
    with pytest.raises(UserError, match="nothing matches"):
        find_units([f"{tmp_path}/[2024] trip/b.tar"])


def test_a_parquet_file_of_another_name(tmp_path):
    table = pa.table({"image": [PNG], "text": ["a star"]})
    for name in ("data.pq", "blob"):
        pq.write_table(table, tmp_path / name)
        assert rows_of(tmp_path / name) == {"0": (("a star",), "")}
    (tmp_path / "a.feather").write_bytes(b"ARROW1\0\0")
    with pytest.raises(UserError, match=r"is an Arrow file; name it a\.arrow"):
        find_units([str(tmp_path / "a.feather")])


def test_a_folder_of_tars_in_folders(tmp_path):
    for name in ("a/1.tar", "b/2.tgz", "__MACOSX/3.tar"):
        (tmp_path / "f" / name).parent.mkdir(parents=True)
        write_tar(tmp_path / "f" / name, PAIR)
    assert len(find_units([str(tmp_path / "f")])) == 2


def test_a_glob_of_pictures_says_to_pass_their_folder(tmp_path):
    folder = fill(tmp_path / "pictures", {"a.png": PNG, "a.txt": "a"})
    with pytest.raises(UserError, match=r"a\.png is a picture .*pass the folder"):
        find_units([f"{folder}/*"])


def test_litter_of_a_glob_is_no_source(tmp_path):
    folder = fill(tmp_path / "f", {"Thumbs.db": PNG, "desktop.ini": "[a]", "__MACOSX/a": PNG})
    write_tar(folder / "a.tar", PAIR)
    assert rows_of(f"{folder}/*") == ROWS


def test_a_gap_in_braces(tmp_path):
    for n in (0, 1, 3):
        write_tar(tmp_path / f"{n:03}.tar", PAIR)
    with pytest.raises(UserError, match=r"1 of the 4 files of .* missing, such as .*002\.tar"):
        find_units([f"{tmp_path}/{{000..003}}.tar"])
    assert len(find_units([f"{tmp_path}/{{{{000..001}},003}}.tar"])) == 3


# --- tars whose files are in another order ------------------------------------------------------


def test_a_tar_whose_pictures_and_captions_lie_apart(tmp_path):
    files = captioned(range(4))
    tar = write_tar(tmp_path / "a.tar", files[::2] + files[1::2])
    with pytest.raises(SourceError, match=r"do not lie beside each other.*tar --sort=name"):
        rows_of(tar)
    line = refusal("encode", "--shards", tar, "--cache", tmp_path / "c", *WORDS)
    assert "do not lie beside each other" in line
    # Where only some do, those are rejected and say why.
    some = write_tar(tmp_path / "b.tar", [*PAIR, *files[::2], *files[1::2]])
    problems = [row.problem for row in find_units([str(some)])[0].rows()]
    apart = "no picture (it stands elsewhere in the tar, not beside its caption)"
    assert problems == ["", *["no caption"] * 4, *[apart] * 4]


def test_names_with_dots_in_a_tar(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("IMG.2024.png", PNG), ("IMG.2024.txt", b"a")])
    (problem,) = [problem for _, problem in rows_of(tar).values()]
    assert problem.startswith("no picture (its name has a dot")


def test_tars_beside_a_picture_of_them(tmp_path):
    folder = fill(tmp_path / "f", {"preview.png": PNG, "README.md": "# Pictures"})
    write_tar(folder / "a.tar", PAIR)
    assert rows_of(folder) == ROWS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed(tmp_path):
    folder = fill(tmp_path / "f", {"a.png": PNG, "sub/b.png": PNG})
    (folder / "sub").chmod(0)
    with pytest.raises(UserError, match="cannot be listed"):
        find_units([str(folder)])
