"""What `infer draw` leaves on disk, and what it says of mistakes."""

import os
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.drawing import PROMPT, draw, refusal, write_controlnet, write_picture
from tests.support.exports import make_run
from tests.support.styles import write_style

MODEL = ("--model", "tiny-sd")


@pytest.fixture(scope="module")
def lora(tiny_cache, tiny_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return make_run(folder, tiny_cache, tiny_sd, "sd", "lora", report_to=())


@pytest.fixture(scope="module")
def full(tiny_cache, tiny_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return make_run(folder, tiny_cache, tiny_sd, "sd", "full", report_to=())


def test_pictures_say_how_they_were_drawn(cli, lora, tmp_path):
    """Typed again with what a file says, the command draws the same picture."""
    style = write_style(lora.model, tmp_path / "ink.safetensors")
    output = tmp_path / "out"
    prompts = ("a red circle", "zwei blaue Sterne, größer als ein ▲")
    answer = cli("infer", "draw", "--run", lora.folder, "--lora", f"{style}:0.5", "--steps", 2,
                 "--threads", 1, "--prompt", prompts[0], "--prompt", prompts[1], "--num-images", 2,
                 "--seed", 7, "--output", output)  # fmt: skip
    assert answer.status == 0, answer.err
    names = [
        "a-red-circle-seed7.png", "a-red-circle-seed8.png",
        "zwei-blaue-sterne-größer-als-ein-seed7.png", "zwei-blaue-sterne-größer-als-ein-seed8.png",
        "sheet.png",
    ]  # fmt: skip
    assert answer.out.splitlines() == [str(output / name) for name in names]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    with Image.open(output / names[3]) as picture:
        told, pixels = picture.text, np.asarray(picture).astype(int)
    version = told.pop("Software")
    assert re.fullmatch(r"Latent Distillery \S.*", version)
    assert told == {
        "prompt": prompts[1], "seed": "8", "steps": "2", "guidance_scale": "1", "size": "64x64",
        "model": "tiny-sd", "run": "mine", "loras": "ink.safetensors at 0.5",
        "scheduler": "LCMScheduler", "dtype": "float32",
    }  # fmt: skip
    again = draw(cli, tmp_path / "one.png", "--run", lora.folder, "--lora", f"{style}:0.5",
                 "--steps", 2, "--prompt", told["prompt"], "--seed", told["seed"])  # fmt: skip
    assert (again == pixels).all()  # whatever else was drawn beside it


def test_the_sheet_has_a_row_for_each_prompt(cli, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue star\n", encoding="utf-8")
    output = tmp_path / "sheet.png"
    answer = cli("infer", "draw", *MODEL, "--steps", 1, "--prompts", tmp_path / "prompts.txt",
                 "--num-images", 3, "--output", output)  # fmt: skip
    assert answer.status == 0, answer.err
    assert answer.out == f"{output}\n"
    assert answer.err.startswith("draw 6 pictures (2 prompts, 3 seeds) of 64x64 px: tiny-sd")
    with Image.open(output) as sheet:
        width, height = sheet.size
    assert width > 3 * 64
    assert height > 2 * 64
    assert list(tmp_path.glob("*.png")) == [output]


def test_another_picture_of_the_same_name_is_kept(cli, tmp_path):
    words = (*MODEL, "--prompt", "a red circle", "--output", tmp_path)
    first = cli("infer", "draw", *words, "--steps", 1)
    same = cli("infer", "draw", *words, "--steps", 1)
    other = cli("infer", "draw", *words, "--steps", 2)
    assert first.out == same.out == f"{tmp_path / 'a-red-circle-seed0.png'}\n"
    assert other.out == f"{tmp_path / 'a-red-circle-seed0-2.png'}\n"


def test_a_run_without_a_prompt_draws_its_previews_prompts(cli, lora, tmp_path):
    answer = cli("infer", "draw", "--run", lora.folder, "--steps", 1, "--output", tmp_path)
    assert answer.status == 0, answer.err
    assert answer.err.startswith("draw 4 pictures (4 prompts, 1 seed)")


def test_the_newest_run_is_the_default(cli, lora, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(lora.folder)
    monkeypatch.chdir(tmp_path)
    answer = cli("infer", "draw", "--prompt", PROMPT, "--steps", 1)
    assert answer.status == 0, answer.err
    assert answer.err.startswith("run runs/mine, the newest of runs/ (--run chooses another)\n")
    assert answer.out == "drawn/a-blue-star-on-a-green-field-seed0.png\n"


def test_long_prompts_are_cut_with_a_note(cli, tmp_path):
    answer = cli("infer", "draw", *MODEL, "--steps", 1, "--prompt", "very " * 100 + "red",
                 "--output", tmp_path / "a.png")  # fmt: skip
    assert answer.status == 0, answer.err
    assert "note: only the first 16 tokens are read of: very very" in answer.err


def test_mistakes_of_flags_are_told_in_a_line(cli, lora, tmp_path):
    picture = write_picture(tmp_path / "in.png")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "folder.png").mkdir()
    run, asked = ("--run", lora.folder), ("--prompt", PROMPT)
    for words, cause in (
        ((*MODEL,), "there is nothing to draw: say it with --prompt"),
        ((*MODEL, "--prompts", tmp_path / "none.txt"), "is empty; write a prompt into each line"),
        ((*run, *asked, "--negative-prompt", "red"),
         "--negative-prompt does nothing at --guidance-scale 1, with which mine is drawn; leave it "
         "out, or add --guidance-scale 1.5"),
        ((*run, *asked, "--image", picture, "--strength", 0.2),
         "--strength 0.2 of --steps 4 leaves no step to draw: give --strength 0.25 or --steps 6"),
        ((*run, *asked, "--steps", 51), "--steps 51 must be 1 to 50, all that mine knows"),
        ((*run, *asked, "--eta", 0.5), "--eta 0.5 means nothing to LCMScheduler"),
        ((*asked, "--run", lora.folder.parent / "mime"), "is not there; did you mean"),
        ((*asked, "--run", tmp_path), "holds no student; give the folder"),
        ((*asked, "--run", lora.model), "holds no student; it is a whole model: --model"),
        ((*MODEL, *asked, "--mask", picture), "--mask does nothing without --image"),
        ((*MODEL, *asked, "--controlnet", tmp_path), "does nothing without --control-image"),
        ((*MODEL, *asked, "--canny"), "--canny does nothing without --control-image"),
        ((*MODEL, *asked, "--clip-skip", 2), "leaves nothing of the 2 layers of"),
        ((*MODEL, *asked, "--size", "60"), "sides are multiples of 8; the nearest to 60 is 64"),
        ((*MODEL, *asked, "--size", "big"), "is not SIDE or WIDTHxHEIGHT"),
        ((*MODEL, *asked, "--size", "4096x64"), "draws no picture of more than 256x"),
        ((*MODEL, *asked, "--output", tmp_path / "a.jpg"), f"name such as {tmp_path}/a.png"),
        ((*asked, "--model", lora.folder), f"is a run; give --run {lora.folder}"),
        ((*MODEL, *asked, "--scheduler", "dpm"), "there are dpmsolvermultistep, dpmsolversingle"),
        ((*MODEL, *asked, "--scheduler", "eulr"), "none that draws Stable Diffusion; there are dd"),
        ((*MODEL, *asked, "--output", tmp_path / "folder.png"), "is a folder; give a file's name"),
        ((*MODEL, *asked, "--output", tmp_path / "none.txt"), "none.txt is a file; give a folder"),
    ):  # fmt: skip
        status, said = refusal(cli, *words)
        assert status == 1, said
        assert cause in said, (words, said)


def test_a_prompt_without_text_is_refused(cli, lora):
    assert refusal(cli, "--run", lora.folder, "--prompt") == (
        2, "error: --prompt has no text behind it; say what to draw, or leave it out\n"
    )  # fmt: skip


def test_the_unet_of_a_student_is_no_run(cli, full):
    status, said = refusal(cli, "--run", full.folder / "unet", "--prompt", PROMPT)
    assert (status, f"is the UNet of a student; give --run {full.folder}\n" in said) == (1, True)


def test_guidance_that_a_student_does_not_know_is_noted(cli, full, tmp_path):
    """tiny-sd's students are told w from 1 to 2.5: a guidance_scale of 2 to 3.5."""
    words = ("--run", full.folder, "--prompt", PROMPT, "--steps", 1, "--output", tmp_path / "a.png")
    said = cli("infer", "draw", *words, "--guidance-scale", 9).err
    assert "note: whole was trained with guidance_scale 2 to 3.5; what 9 draws is a guess" in said
    assert "is a guess" not in cli("infer", "draw", *words, "--guidance-scale", 3.5).err


def test_a_mask_of_another_shape_is_noted(cli, tmp_path):
    picture = write_picture(tmp_path / "in.png")
    Image.new("L", (60, 30), 255).save(tmp_path / "mask.png")
    said = cli("infer", "draw", *MODEL, "--prompt", PROMPT, "--steps", 1, "--image", picture,
               "--mask", tmp_path / "mask.png", "--output", tmp_path / "a.png").err  # fmt: skip
    assert "note: --mask is 60x30, --image" in said
    same = cli("infer", "draw", *MODEL, "--prompt", PROMPT, "--steps", 1, "--image", picture,
               "--mask", picture, "--output", tmp_path / "b.png").err  # fmt: skip
    assert "--mask is" not in same


def test_mistakes_of_files_are_told_in_a_line(cli, repo, lora, tmp_path):
    asked = ("--prompt", PROMPT, "--steps", 2, "--output", tmp_path / "a.png")
    picture = write_picture(tmp_path / "in.png")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:100])
    (tmp_path / "text.png").write_text("no picture")
    xl = write_style(repo / "data/tiny-xl", tmp_path / "xl.safetensors")
    short = {name: tensor[..., :1] for name, tensor in load_file(xl).items()}
    save_file({n: t.contiguous() for n, t in short.items()}, tmp_path / "short.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"x")
    control = write_controlnet(repo / "data/tiny-xl", tmp_path / "control")
    for words, cause in (
        (("--image", tmp_path / "no.png"), "--image " + str(tmp_path / "no.png") + " is not there"),
        (("--image", tmp_path), "is a folder; give one picture's file"),
        (("--image", tmp_path / "text.png"), "is no picture that can be used"),
        (("--image", tmp_path / "cut.png"), "is no picture that can be used"),
        (("--image", picture, "--mask", tmp_path / "no.png"), "no.png is not there"),
        (("--lora", tmp_path / "no.safetensors"), "no.safetensors is not there"),
        (("--lora", tmp_path / "x.ckpt"), "is a pickle, which can run code"),
        (("--lora", picture), "is no .safetensors file"),
        (("--lora", tmp_path), "holds no LoRA; give a .safetensors file"),
        (("--lora", repo / "data/tiny-sd"), "holds a whole UNet, a model of its own"),
    ):  # fmt: skip
        status, said = refusal(cli, *MODEL, *asked, *words)
        assert status == 1, said
        assert cause in said, (words, said)
    for words, cause in (  # found when the networks are there
        (("--lora", xl), "xl.safetensors is of another model than"),
        (("--lora", tmp_path / "short.safetensors"), "short.safetensors"),
        (("--controlnet", control, "--control-image", picture), "is for another model: its cross"),
        (
            ("--controlnet", "nothing", "--control-image", picture),
            "neither a folder here nor a hub",
        ),
    ):
        answer = cli("infer", "draw", *MODEL, *asked, *words)
        assert answer.status == 1, answer
        last = answer.err.splitlines()[-1]
        assert last.startswith("error: "), answer.err
        assert cause in last, (words, last)
    assert not (tmp_path / "a.png").exists()


def test_ctrl_c_leaves_whole_pictures_only(cli, tmp_path, monkeypatch):
    """Interrupted as the second picture is about to get its name."""
    replaced = os.replace

    def interrupted(source, target, **more):
        if "seed1" in str(target):
            raise KeyboardInterrupt
        replaced(source, target, **more)

    monkeypatch.setattr(os, "replace", interrupted)
    answer = cli("infer", "draw", *MODEL, "--prompt", "a red circle", "--steps", 1,
                 "--num-images", 3, "--output", tmp_path)  # fmt: skip
    assert answer.status == 130
    assert answer.err.splitlines()[-1] == "interrupted: every file that was written is whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a-red-circle-seed0.png"]
