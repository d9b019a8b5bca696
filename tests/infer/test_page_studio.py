"""What the page draws: the pictures of `infer draw`, with one model in memory."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.config import MachineFlags
from infer.page.work.held import Held
from infer.page.work.studio import Studio, Wish
from infer.page.work.turns import Cancelled
from shared.errors import UserError
from tests.support.drawing import PROMPT, draw, write_picture
from tests.support.exports import make_run
from tests.support.styles import write_style


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_cache, tiny_sd):
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("lora", "full"):
        make_run(folder / kind, small_cache, tiny_sd, "sd", kind, report_to=())
    return folder


class Counted(Held):
    """Counts what is loaded, and what is in memory at once."""

    def __init__(self):
        super().__init__()
        self.loads = 0

    def get(self, key, load):
        def counting():
            assert self._model is None, "the former model is still in memory"
            self.loads += 1
            return load()

        return super().get(key, counting)


@pytest.fixture
def studio(tmp_path):
    return Studio(MachineFlags(device="cpu", threads=1), Counted(), tmp_path / "drawn")


def drawn(studio, wish, steps=None):
    """The pictures of a wish, the student's and the teacher's, as pixels and files."""
    own, teacher = studio.plan(wish)
    found = {}
    for one in [own] if teacher is None else studio.in_order(own, teacher):
        act = studio.draw if one is own else studio.draw_teacher
        found["own" if one is own else "teacher"] = act(one, steps or (lambda *_: None))
    return found


def same_as(cli, ours, output: Path, *words) -> None:
    """The command writes the same file: the same pixels, and the same words about them."""
    theirs = draw(cli, output, *words)
    np.testing.assert_array_equal(ours.pixels, theirs)
    assert ours.file.read_bytes() == output.read_bytes()


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_both_pictures_are_those_of_infer_draw(studio, runs, cli, tmp_path, kind):
    run = runs / kind
    wish = Wish(run=run, model=None, prompt=PROMPT, steps=2, seed=3, guidance_scale=2.5,
                teacher_steps=4, negative_prompt="red")  # fmt: skip
    found = drawn(studio, wish)
    told = ("--guidance-scale", 2.5) if kind == "full" else ()
    same_as(cli, found["own"], tmp_path / "a.png", "--run", run, "--prompt", PROMPT, "--steps", 2,
            "--seed", 3, *told)  # fmt: skip
    same_as(
        cli,
        found["teacher"],
        tmp_path / "b.png",
        "--model",
        "tiny-sd",
        "--prompt",
        PROMPT,
        "--steps",
        4,
        "--seed",
        3,
        "--guidance-scale",
        2.5,
        "--negative-prompt",
        "red",
    )
    assert "no negative prompt" in found["own"].drawing.how
    assert "negative" not in found["teacher"].drawing.how


@pytest.mark.slow
def test_a_style_is_mixed_into_both_and_a_few_step_lora_into_the_student(
    studio, runs, cli, tmp_path, tiny_sd
):
    style = write_style(tiny_sd, tmp_path / "ink.safetensors")
    loras = ((style, 0.7), (runs / "lora", 0.5))
    wish = Wish(run=runs / "full", model=None, prompt=PROMPT, steps=1, loras=loras,
                teacher_steps=2)  # fmt: skip
    found = drawn(studio, wish)
    same_as(cli, found["own"], tmp_path / "a.png", "--run", runs / "full", "--prompt", PROMPT,
            "--steps", 1, "--lora", f"{style}:0.7", f"{runs / 'lora'}:0.5")  # fmt: skip
    same_as(cli, found["teacher"], tmp_path / "b.png", "--model", "tiny-sd", "--prompt", PROMPT,
            "--steps", 2, "--lora", f"{style}:0.7")  # fmt: skip
    assert "with ink.safetensors at 0.7" in found["teacher"].drawing.how


@pytest.mark.slow
def test_both_begin_with_a_picture(studio, runs, cli, tmp_path):
    picture = write_picture(tmp_path / "given.png", (96, 80))
    wish = Wish(run=runs / "lora", model=None, prompt=PROMPT, steps=4, image=picture, strength=0.5,
                teacher_steps=4)  # fmt: skip
    found = drawn(studio, wish)
    more = ("--image", picture, "--strength", 0.5, "--prompt", PROMPT, "--steps", 4)
    same_as(cli, found["own"], tmp_path / "a.png", "--run", runs / "lora", *more)
    theirs = draw(cli, tmp_path / "b.png", "--model", "tiny-sd", *more)
    np.testing.assert_array_equal(found["teacher"].pixels, theirs)


def test_one_model_is_in_memory_and_is_kept_between_pictures(studio, runs):
    held = studio.held
    wish = Wish(run=runs / "lora", model=None, prompt=PROMPT, steps=1, teacher_steps=1)
    drawn(studio, wish)
    assert held.loads == 2  # the student's, then the teacher's
    again = drawn(studio, Wish(**vars(wish) | {"seed": 1}))  # the teacher first, which is held
    assert held.loads == 3
    drawn(studio, Wish(**vars(wish) | {"seed": 1, "steps": 2}))  # what the teacher drew is known
    assert held.loads == 3
    known = drawn(studio, Wish(**vars(wish) | {"seed": 1, "steps": 3}))
    assert known["teacher"] is again["teacher"]
    drawn(studio, Wish(run=None, model="tiny-sd", prompt=PROMPT, steps=1))
    assert held.loads == 4
    drawn(studio, Wish(run=None, model="tiny-sd", prompt=PROMPT, steps=1, scheduler="euler"))
    assert held.loads == 4  # another scheduler is no other model


def test_a_run_that_was_trained_on_is_loaded_anew(studio, runs):
    wish = Wish(run=runs / "lora", model=None, prompt=PROMPT, steps=1)
    drawn(studio, wish)
    weights = runs / "lora" / "pytorch_lora_weights.safetensors"
    weights.touch()
    drawn(studio, wish)
    assert studio.held.loads == 2


def test_it_ends_between_two_steps(studio, runs):
    steps = []

    def on_step(done, total):
        steps.append((done, total))
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        drawn(studio, Wish(run=runs / "lora", model=None, prompt=PROMPT, steps=4), on_step)
    assert steps == [(1, 4), (2, 4)]
    found = drawn(studio, Wish(run=runs / "lora", model=None, prompt=PROMPT, steps=1))
    assert found["own"].pixels.shape == (64, 64, 3)


def test_the_file_says_how_it_was_drawn_and_names_no_path(studio, runs):
    wish = Wish(run=runs / "lora", model=None, prompt=PROMPT, steps=1, seed=7)
    file = drawn(studio, wish)["own"].file
    assert file.name == "a-blue-star-on-a-green-field-seed7.png"
    text = Image.open(file).text
    assert (text["run"], text["steps"], text["prompt"]) == ("lora", "1", PROMPT)
    assert str(runs) not in str(text)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"steps": 51}, "--steps 51 must be 1 to 50"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"scheduler": "nothing"}, "--scheduler nothing is none that draws"),
        ({"loras": ((Path("nowhere.safetensors"), 1.0),)}, "nowhere.safetensors is not there"),
    ],
)
def test_what_draw_refuses_is_refused(studio, runs, more, said):
    wish = {"run": runs / "lora", "model": None, "prompt": PROMPT, "teacher_steps": 2} | more
    with pytest.raises(UserError, match=said):
        studio.plan(Wish(**wish))
