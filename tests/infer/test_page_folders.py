"""What the page lists, and that a browser can name nothing else."""

import json
import os

import pytest

from infer.page import given
from infer.page.folders import Folders, choices, chosen
from shared.errors import UserError
from tests.support.page import HOSTILE
from tests.support.styles import write_style


def run(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_runs_are_found_two_folders_deep(tmp_path):
    for name in ("a", "learned/cat", "x/y/too-deep", ".hidden"):
        run(tmp_path / "runs" / name)
    found = Folders(tmp_path / "runs", tmp_path, ()).trainings()
    assert found == {name: tmp_path / "runs" / name for name in ("a", "learned/cat")}
    one = Folders(tmp_path / "runs/a", tmp_path, ()).trainings()
    assert one == {"a": tmp_path / "runs/a"}
    assert Folders(tmp_path / "nowhere", tmp_path, ()).trainings() == {}


def test_links_that_lead_out_are_left_out(tmp_path):
    run(tmp_path / "elsewhere")
    inside = run(tmp_path / "runs/a")
    (tmp_path / "runs/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs/in").symlink_to(inside)
    assert set(Folders(tmp_path / "runs", tmp_path, ()).trainings()) == {"a", "in"}


@pytest.mark.parametrize("name", [HOSTILE.replace("/", ""), "gap \u202e\n", b"\xff\xfe"])
def test_any_name_of_a_folder_can_be_chosen(tmp_path, name):
    """It goes through JSON, and comes back as it went."""
    name = os.fsdecode(name)
    folder = run(tmp_path / "runs" / name)
    listed = Folders(tmp_path / "runs", tmp_path, ()).trainings()
    ((label, value),) = json.loads(json.dumps(choices(listed)))
    assert chosen(value, listed, "run") == folder
    assert "\u202e" not in label
    json.dumps(label).encode()


@pytest.mark.parametrize("name", ["../a", "/etc", "b", "", None, 1, ["a"], HOSTILE])
def test_what_is_in_no_list_is_refused(tmp_path, name):
    run(tmp_path / "runs/a")
    listed = Folders(tmp_path / "runs", tmp_path, ()).trainings()
    with pytest.raises(UserError, match=r"there is no run|choose a run first") as refused:
        chosen(name, listed, "run")
    assert "\n" not in str(refused.value)


def test_models_and_loras_of_a_folder(tmp_path, tiny_sd):
    shelf = tmp_path / "models"
    shelf.mkdir()
    (shelf / "mine").symlink_to(tiny_sd)  # which leads out
    (shelf / "copy").mkdir()
    (shelf / "copy/model_index.json").write_text("{}")
    style = write_style(tiny_sd, shelf / "ink.safetensors")
    (shelf / "damaged.safetensors").write_bytes(b"nothing")
    folders = Folders(tmp_path / "runs", tmp_path, (str(shelf), "tiny-xl"))
    assert folders.loras() == {"ink.safetensors": style}
    models = folders.all_models()
    assert models["copy"] == str(shelf / "copy")
    assert models["tiny-xl"] == "tiny-xl"
    assert "ink" not in models


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"path": "/etc/passwd"}, "is no file that was uploaded here"),
        ({"path": "UPLOADS/../../etc/passwd"}, "is no file that was uploaded here"),
        ({"path": "UPLOADS/link"}, "is no file that was uploaded here"),
        ({"path": None}, "is no file that was uploaded here"),
        ("/etc/passwd", "is no file that was uploaded here"),
        ({"path": "a\0b"}, "is no file that was uploaded here"),
    ],
)
def test_a_picture_is_one_that_was_uploaded(tmp_path, value, said):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "link").symlink_to("/etc/passwd")
    if isinstance(value, dict) and value["path"]:
        value = {"path": value["path"].replace("UPLOADS", str(uploads))}
    with pytest.raises(UserError, match=said):
        given.upload(value, "the picture", uploads)
    (uploads / "a.png").write_bytes(b"")
    found = given.upload({"path": str(uploads / "a.png"), "orig_name": "b.png"}, "it", uploads)
    assert (found.file, found.name) == (uploads / "a.png", "b.png")
    assert given.upload(None, "it", uploads) is None


@pytest.mark.parametrize("value", [True, "4", None, float("nan"), float("inf"), 0, 9, 2.5, [4]])
def test_numbers_stay_in_their_range(value):
    with pytest.raises(UserError, match="steps is"):
        given.whole(value, "steps", 1, 8)
    assert given.whole(4.0, "steps", 1, 8) == 4


def test_text_is_text_of_some_length():
    assert given.text("  a cat ", "the prompt") == "a cat"
    assert given.text(None, "the prompt") == ""
    with pytest.raises(UserError, match="the prompt has 2,001 characters; 2,000 are read"):
        given.text("x" * 2001, "the prompt")
    with pytest.raises(UserError, match="the prompt is no text"):
        given.text({"path": "x"}, "the prompt")
