"""`infer draw` from pictures, into pictures and with a ControlNet, against stock pipelines."""

from pathlib import Path

import cv2
import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, LCMScheduler, UNet2DConditionModel
from PIL import Image

from tests.support.drawing import (
    PROMPT,
    assert_equal_pictures,
    draw,
    drawn_by,
    stock,
    write_controlnet,
    write_picture,
)
from tests.support.exports import make_run

NAMES = {"tiny-sd": "StableDiffusion", "tiny-xl": "StableDiffusionXL"}
FAST = {"num_inference_steps": 4, "guidance_scale": 3.0}


def pipeline(name: str, kind: str):
    return getattr(diffusers, f"{NAMES[name]}{kind}Pipeline")


@pytest.fixture(scope="module")
def full(tiny_cache, tiny_sd, tmp_path_factory):
    """A full student, which is told its guidance."""
    folder = tmp_path_factory.mktemp("full")
    return make_run(folder, tiny_cache, tiny_sd, "sd", "full", report_to=())


def with_student(run, kind, **parts):
    pipe = stock(run.model, kind, unet=run.student.unet, **parts)
    pipe.scheduler = LCMScheduler.from_pretrained(run.folder, subfolder="scheduler")
    return pipe


@pytest.mark.parametrize("name", ["tiny-sd", pytest.param("tiny-xl", marks=pytest.mark.slow)])
def test_from_a_picture(cli, repo, tmp_path, name):
    picture = write_picture(tmp_path / "in.png")
    ours = draw(
        cli, tmp_path / "a.png", "--model", name, "--prompt", PROMPT, "--steps", 4,
        "--image", picture, "--strength", 0.5,
    )  # fmt: skip
    pipe = stock(repo / "data" / name, pipeline(name, "Img2Img"))
    wanted = drawn_by(pipe, image=Image.open(picture), strength=0.5, **FAST)
    assert_equal_pictures(ours, wanted)


def test_a_student_draws_from_a_picture_in_the_steps_that_are_left(cli, full, tmp_path):
    picture = write_picture(tmp_path / "in.png")
    words = ("--run", full.folder, "--prompt", PROMPT, "--image", picture, "--strength", 0.5)
    answer = cli("infer", "draw", *words, "--output", tmp_path / "a.png")
    assert answer.status == 0, answer.err
    assert "of 64x64 px from a picture" in answer.err
    assert "2 of 2 steps" in answer.err
    pipe = with_student(full, pipeline("tiny-sd", "Img2Img"))
    wanted = drawn_by(pipe, image=Image.open(picture), strength=0.5, **FAST)
    assert_equal_pictures(np.asarray(Image.open(tmp_path / "a.png")).astype(int), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_into_a_picture_where_the_mask_is_white(cli, repo, tmp_path, name):
    picture = write_picture(tmp_path / "in.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    ours = draw(
        cli, tmp_path / "a.png", "--model", name, "--prompt", PROMPT, "--steps", 4,
        "--image", picture, "--mask", tmp_path / "mask.png",
    )  # fmt: skip
    pipe = stock(repo / "data" / name, pipeline(name, "Inpaint"))
    wanted = drawn_by(
        pipe, image=Image.open(picture), mask_image=mask, strength=1.0, height=64, width=64, **FAST
    )
    assert_equal_pictures(ours[:, 32:], wanted[:, 32:])
    given = np.asarray(Image.open(picture)).astype(int)
    assert (ours[:, :32] == given[:, :32]).all()  # to the bit, which the VAE does not give back
    assert np.abs(ours[:, 32:] - given[:, 32:]).mean() > 5


@pytest.mark.parametrize("name", [pytest.param("tiny-sd", marks=pytest.mark.slow), "tiny-xl"])
def test_a_controlnet_steers(cli, repo, tmp_path, name):
    model = repo / "data" / name
    network = write_controlnet(model, tmp_path / "control")
    seen = write_picture(tmp_path / "seen.png", seed=2)
    words = ("--model", name, "--prompt", PROMPT, "--steps", 4, "--controlnet", network,
             "--control-image", seen)  # fmt: skip
    ours = draw(cli, tmp_path / "a.png", *words, "--control-scale", 0.8)
    loaded = ControlNetModel.from_pretrained(network, torch_dtype=torch.float32)
    pipe = stock(model, pipeline(name, "ControlNet"), controlnet=loaded)
    wanted = drawn_by(
        pipe, image=Image.open(seen), controlnet_conditioning_scale=0.8, height=64, width=64, **FAST
    )
    assert_equal_pictures(ours, wanted)
    assert np.abs(ours - drawn_by(stock(model), **FAST)).mean() > 2
    picture = write_picture(tmp_path / "in.png", seed=3)
    both = draw(cli, tmp_path / "b.png", *words, "--image", picture, "--strength", 0.75)
    pipe = stock(model, pipeline(name, "ControlNetImg2Img"), controlnet=loaded)
    wanted = drawn_by(
        pipe, image=Image.open(picture), control_image=Image.open(seen), strength=0.75,
        controlnet_conditioning_scale=1.0, **FAST,
    )  # fmt: skip
    assert_equal_pictures(both, wanted)


def test_a_told_student_with_a_controlnet_and_a_picture(cli, full, tmp_path):
    """Diffusers cannot tell it the guidance there; it is folded in, and means the same."""
    network = write_controlnet(full.model, tmp_path / "control")
    seen = write_picture(tmp_path / "seen.png", seed=2)
    words = ("--run", full.folder, "--prompt", PROMPT, "--guidance-scale", 2.5, "--controlnet",
             network, "--control-image", seen)  # fmt: skip
    alone = draw(cli, tmp_path / "a.png", *words)
    loaded = ControlNetModel.from_pretrained(network, torch_dtype=torch.float32)
    pipe = with_student(full, pipeline("tiny-sd", "ControlNet"), controlnet=loaded)
    wanted = drawn_by(pipe, image=Image.open(seen), num_inference_steps=4, guidance_scale=2.5,
                      height=64, width=64)  # fmt: skip
    assert_equal_pictures(alone, wanted)
    # From a picture: against a plain UNet, whose weights have the guidance in them.
    picture = write_picture(tmp_path / "in.png", seed=3)
    both = draw(cli, tmp_path / "b.png", *words, "--image", picture, "--strength", 0.75)
    kind = pipeline("tiny-sd", "ControlNetImg2Img")
    folder = cli("train", "export", "--run", full.folder, "--guidance-scale", 2.5)
    plain = UNet2DConditionModel.from_pretrained(
        Path(folder.out.strip()), torch_dtype=torch.float32
    )
    pipe = stock(full.model, kind, controlnet=loaded, unet=plain)
    pipe.scheduler = LCMScheduler.from_pretrained(full.folder, subfolder="scheduler")
    wanted = drawn_by(
        pipe, image=Image.open(picture), control_image=Image.open(seen), strength=0.75,
        controlnet_conditioning_scale=1.0, num_inference_steps=4, guidance_scale=1.0,
    )  # fmt: skip
    assert_equal_pictures(both, wanted)


def test_edges_are_what_a_canny_controlnet_sees(cli, repo, tmp_path):
    network = write_controlnet(repo / "data/tiny-sd", tmp_path / "control")
    square = Image.new("RGB", (64, 64), "navy")
    square.paste("white", (16, 16, 48, 48))
    square.save(tmp_path / "square.png")
    found = cv2.Canny(np.asarray(square.convert("L")), 100, 200)
    assert found.any()
    Image.fromarray(found).save(tmp_path / "edges.png")
    words = ("--model", "tiny-sd", "--prompt", PROMPT, "--steps", 2, "--controlnet", network,
             "--control-image")  # fmt: skip
    ours = draw(cli, tmp_path / "a.png", *words, tmp_path / "square.png", "--canny")
    assert_equal_pictures(ours, draw(cli, tmp_path / "b.png", *words, tmp_path / "edges.png"))
    plain = draw(cli, tmp_path / "c.png", *words, tmp_path / "square.png")
    assert np.abs(ours - plain).mean() > 0.5


def test_a_picture_keeps_its_shape_at_the_models_area(cli, tmp_path):
    wide = write_picture(tmp_path / "wide.jpg", (300, 150))
    words = ("--model", "tiny-sd", "--prompt", PROMPT, "--steps", 2, "--image", wide)
    ours = draw(cli, tmp_path / "a.png", *words)
    height, width, _ = ours.shape
    assert (width, height) == (96, 48)  # of 64 x 64 pixels, in steps that the UNet halves well
    typed = draw(cli, tmp_path / "b.png", *words, "--size", "64x32")
    assert typed.shape == (32, 64, 3)


def test_a_picture_is_turned_upright(cli, tmp_path):
    """As a camera's file says, which `prep` heeds too."""
    picture = Image.open(write_picture(tmp_path / "in.png", (64, 64)))
    tagged = Image.Exif()
    tagged[0x0112] = 6  # to be turned by 90 degrees
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=tagged)
    words = ("--model", "tiny-sd", "--prompt", PROMPT, "--steps", 2, "--image")
    upright = draw(cli, tmp_path / "a.png", *words, tmp_path / "in.png")
    assert_equal_pictures(draw(cli, tmp_path / "b.png", *words, tmp_path / "turned.png"), upright)
