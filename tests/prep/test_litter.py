"""What systems and programs leave beside pictures is no data, in whatever source it comes."""

import json

import pytest

from prep.files.litter import is_litter
from tests.support.folders import fill, rows_of, table_of, tar_of
from tests.support.sources import accounts, encode, manifest, png

PNG = png(1, 16, 16)
LITTER = (  # before an extension
    ".ipynb_checkpoints/a-checkpoint", "__MACOSX/a", "sub/__MACOSX/a", "._a", "sub/._a",
    ".thumbnails/a", "@eaDir/a", "#recycle/a", "$RECYCLE.BIN/a", ".Trash-1000/files/a",
    "lost+found/a", "System Volume Information/a", ".hidden", ".git/a", ".cache/huggingface/a",
)  # fmt: skip
SYSTEMS = ("Thumbs.db", "desktop.ini", ".DS_Store", "sub/THUMBS.DB")
NO_LITTER = (
    "a.png", "./a.png", "../a.png", "sub/a.b.png", "a..png", "macosx/a.png", "thumbs/a.png",
    "/srv/me/.cache/huggingface/downloads/a.png", "https://host/.well-known/a.png",
    "D:\\me\\.cache\\a.png", "DS_Store.png",
)  # fmt: skip


@pytest.mark.parametrize("name", [*(f"{name}.png" for name in LITTER), *SYSTEMS])
def test_litter(name):
    assert is_litter(name)
    assert is_litter(f"./{name}")
    assert is_litter(name.replace("/", "\\"))
    assert is_litter(f"/absolute/{name}") is not name.startswith(".cache")


@pytest.mark.parametrize("name", NO_LITTER)
def test_names_that_are_none(name):
    assert not is_litter(name)


def test_one_rule_for_folders_and_tars(tmp_path):
    files = {"a.png": PNG, "a.txt": "a star", "sub/b.png": PNG, "sub/b.txt": "a ring"}
    files |= {f"{name}.png": PNG for name in LITTER} | {f"{name}.txt": "litter" for name in LITTER}
    files |= dict.fromkeys(SYSTEMS, PNG)
    assert set(rows_of(fill(tmp_path / "folder", files))) == {"a.png", "sub/b.png"}
    assert set(rows_of(tar_of(tmp_path / "a.tar", files))) == {"a", "sub/b"}


def test_a_list_or_a_table_that_names_it_has_its_row_rejected(tmp_path):
    names = ["a.png", "__MACOSX/._a.png", ".ipynb_checkpoints/a-checkpoint.png"]
    folder = fill(tmp_path / "folder", dict.fromkeys(names, PNG))
    lines = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    wanted = {"a.png": "", **dict.fromkeys(names[1:], "hidden or a system's file")}
    assert {key: problem for key, (_, problem) in rows_of(folder).items()} == wanted


def test_six_pictures_are_six_samples(tmp_path):
    files = {f"{n}.png": png(n) for n in range(6)} | {f"{n}.txt": f"{n}" for n in range(6)}
    copies = {f".ipynb_checkpoints/{n}": content for n, content in files.items()}
    cache = encode(fill(tmp_path / "folder", files | copies), tmp_path / "cache")
    assert manifest(cache)["totals"]["written"] == len(accounts(cache)) == 6


def test_a_table_tells_a_cache_below_a_hidden_folder_from_litter(tmp_path):
    table = table_of(tmp_path / "a.parquet", {"/srv/me/.cache/huggingface/a.png": PNG})
    assert rows_of(table) == {"/srv/me/.cache/huggingface/a.png": (("a",), "")}
