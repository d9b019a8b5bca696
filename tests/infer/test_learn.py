"""`infer learn`: a picture goes through both stages, and its LoRA is an ordinary run's."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from infer.config import LearnConfig
from infer.learn.recipe import recipe_of, usual_rate
from shared.models.family import resolve_model
from tests.support.learned import few_redrawn, run_infer, shapes
from train.trainer.reporting.metrics import Recorder

FEW = ("--model", "tiny-sd", "--steps", 3, "--train-batch-size", 2, "--threads", 1)
LORA = "pytorch_lora_weights.safetensors"


class Learned(NamedTuple):
    """A folder with two pictures, the first of which has been learned there."""

    place: Path
    pictures: list[tuple[str, str]]  # with their captions
    run: Path
    said: str


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    place = tmp_path_factory.mktemp("learned")
    pictures = [(path.name, prompt) for path, prompt in shapes(2, place)]
    words = ["learn", pictures[0][0], *FEW, "--prompt", pictures[0][1]]
    answer = run_infer(words, place)
    assert answer.returncode == 0, answer.stderr
    return Learned(place, pictures, Path(answer.stdout.rstrip("\n")), answer.stderr)


@pytest.fixture
def learned(once, monkeypatch):
    few_redrawn(monkeypatch)
    monkeypatch.chdir(once.place)
    return once


def learn(cli, picture, prompt, *words):
    answer = cli("infer", "learn", picture, *FEW, "--prompt", prompt, *words)
    assert answer.status == 0, answer.err
    return Path(answer.out.rstrip("\n")), answer.err


def test_it_becomes_an_ordinary_run(learned, cli):
    run, (picture, prompt) = learned.run, learned.pictures[0]
    assert run.parent == Path("runs/learned")
    assert run.name.startswith(f"{Path(picture).stem}-")
    config = json.loads((run / "config.json").read_text())
    wanted = {"objective": "denoise", "student": "lora", "lora_rank": 16, "max_train_steps": 3,
              "learning_rate": 4e-3, "lr_scheduler": "cosine", "train_batch_size": 2}  # fmt: skip
    assert {name: config[name] for name in wanted} == wanted
    answer = cli("infer", "draw", "--run", run, "--steps", 2, "--threads", 1, "--output", "d.png")
    assert answer.status == 0, answer.err
    text = Image.open("d.png").text
    assert text["prompt"] == prompt  # unless another is given
    assert (text["run"], text["size"]) == (run.name, "64x64")


def test_stock_diffusers_draws_with_it(learned, tiny_sd):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        call = pipe(learned.pictures[0][1], num_inference_steps=2, height=64, width=64,
                    output_type="np", generator=torch.Generator().manual_seed(0))  # fmt: skip
        return call.images

    plain = draw()
    pipe.load_lora_weights(learned.run, weight_name=LORA)
    assert np.abs(draw() - plain).max() > 0.01


def test_it_says_what_it_will_do_how_long_it_takes_and_how_well_it_went(learned):
    picture, prompt = learned.pictures[0]
    first, second, *_ = learned.said.splitlines()
    assert first == (
        f"learn {picture} as {prompt!r}: a LoRA of rank 16 for tiny-sd, 3 steps of 2 noises at "
        f"64 px, on cpu, into {learned.run}"
    )
    assert second.startswith("this takes about ")
    number = r"(\d+\.\d)"
    found = re.search(
        rf"redrawn: {number} dB from plain noise and the prompt \(without the LoRA {number} dB\), "
        rf"{number} dB from its inverted noise, .*: {learned.run}/redrawn.png$",
        learned.said,
        re.M,
    )
    assert all(0 < float(one) < 60 for one in found.groups())
    sheet = Image.open(learned.run / "redrawn.png")
    assert sheet.width > 5 * 96  # five pictures side by side


def test_it_is_learned_once(learned, cli):
    before = {path: path.stat().st_mtime_ns for path in learned.run.rglob("*")}
    picture, prompt = learned.pictures[0]
    (learned.place / "renamed.jpg").write_bytes((learned.place / picture).read_bytes())
    for name in (picture, "renamed.jpg"):
        again, said = learn(cli, name, prompt)
        assert again == learned.run
        assert said == f"{name} has been learned: {learned.run}\n"
    assert {path: path.stat().st_mtime_ns for path in learned.run.rglob("*")} == before


def test_another_recipe_has_another_run(learned):
    picture, prompt = learned.pictures[0]
    usual = LearnConfig(model="tiny-sd", train_batch_size=2)
    model = resolve_model("tiny-sd")

    def folder(flags=usual, words=prompt, steps=3, name=picture):
        return recipe_of(flags, model, learned.place / name, words, steps).folder()

    assert folder() == folder(replace(usual, device="cpu", threads=1)) == learned.run
    others = [replace(usual, **{name: value}) for name, value in
              {"rank": 2, "learning_rate": 1e-3, "seed": 1, "resolution": 128}.items()]  # fmt: skip
    found = [*map(folder, others), folder(words="a cat"), folder(steps=4)]
    found.append(folder(name=learned.pictures[1][0]))
    assert len({learned.run, *found}) == 8


def test_a_run_of_something_else_is_left_alone(learned, cli):
    words = (learned.pictures[1][0], *FEW, "--prompt", "a dog", "--output")
    answer = cli("infer", "learn", *words, learned.run)
    assert answer.status == 1
    assert answer.err.count("\n") == 1
    assert "has learned something else: picture_sha256 is" in answer.err
    assert "choose another --output" in answer.err
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")
    answer = cli("infer", "learn", *words, "notes")
    assert answer.err == (
        "error: notes is there already and is no picture's run; choose another --output\n"
    )
    assert os.listdir("notes") == ["mine.txt"]


def test_ctrl_c_keeps_what_was_learned_and_the_same_command_goes_on(learned, cli):
    picture, prompt = learned.pictures[0]
    record = Recorder.record

    def interrupt(recorder, step, *rest):
        record(recorder, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "record", interrupt)
        words = (*FEW, "--prompt", prompt, "--output", "stopped")
        answer = cli("infer", "learn", picture, *words)
    assert (answer.status, answer.out) == (130, "")
    assert "stopped after step 2; the same command goes on from there" in answer.err
    assert not Path("stopped", LORA).exists()
    stopped, _ = learn(cli, picture, prompt, "--output", "stopped")
    one, other = (load_file(run / LORA) for run in (learned.run, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


MISTAKES = [
    ([], 2, "which picture? For example: python -m infer learn cat.jpg --prompt"),
    (["a.jpg"], 2, "what does a.jpg show? Say it: --prompt 'a photo of a cat'"),
    (["a.jpg", "--prompt", " "], 2, "what does a.jpg show?"),
    (["cut.png", "--prompt", "x"], 1, "picture cut.png is no picture that can be used: "),
    (["none.jpg", "--prompt", "x"], 1, "picture none.jpg is not there; check the path"),
    (["text.txt", "--prompt", "x"], 1, "picture text.txt is no picture that can be used: "),
    (["PICTURE", "--prompt", "x", "--model", "tiny-sdd"], 1, "did you mean tiny-sd?"),
    (
        ["PICTURE", "--prompt", "x", "--resolution", "60"],
        1,
        "--resolution 60 is not a multiple of 8, a latent's side",
    ),
]


@pytest.mark.parametrize(("words", "status", "said"), MISTAKES)
def test_mistakes_are_told_in_one_line(cli, once, tmp_path, monkeypatch, words, status, said):
    whole = once.place / once.pictures[0][0]
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("no picture")
    Image.effect_noise((64, 64), 50).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:1500])  # its size can still be read
    words = [whole if word == "PICTURE" else word for word in words]
    answer = cli("infer", "learn", *words, *([] if "--model" in words else FEW[:2]))
    assert answer.status == status, answer
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert said in answer.err
    assert sorted(os.listdir()) == ["cut.png", "text.txt"]


def test_the_learning_rate_is_for_the_width_of_the_network():
    assert usual_rate({"block_out_channels": [64, 64]}) == 4e-3
    assert usual_rate({"block_out_channels": (320, 640, 1280, 1280)}) == 2e-4
