"""The tab Morph: `infer morph` in a process of its own, told, shown and cancelled."""

import os
import threading
import time

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from infer.page.tabs.morph import MorphTab
from infer.page.work.child import ROOT, Child
from infer.page.work.turns import Cancelled, Turn, Turns
from shared.errors import UserError
from tests.support.learned import shapes
from tests.support.page import room_of

REQUEST = gr.Request(session_hash="one")


@pytest.fixture
def tab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with gr.Blocks(analytics_enabled=False):
        return MorphTab(room_of(tmp_path, tmp_path / "runs", tmp_path / "caches", "tiny-sd"))


def sent(tmp_path, **more):
    """What the tab sends: the cheapest morph there is."""
    (first, prompt), (last, other) = shapes(2, tmp_path)
    values = {"first": {"path": str(first)}, "last": {"path": str(last)}, "first_prompt": prompt,
              "last_prompt": other, "model": "tiny-sd", "frames": 3, "steps": 2, "learn": False,
              "learn_steps": 10, "reschedule": False}  # fmt: skip
    return values | more


def morphed(tab, values):
    return list(tab.morph(REQUEST, **values))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"first": None}, "a morph leads from one picture to another; choose both"),
        ({"last": {"path": "/etc/passwd"}}, "the last picture is no file that was uploaded here"),
        ({"first_prompt": "  "}, "what do the two pictures show?"),
        ({"model": "/etc"}, "there is no model &#39;/etc&#39;"),
        ({"frames": 2}, "frames is 2; give a number from 3 to 48"),
        (
            {"learn": True, "learn_steps": 1e9},
            "steps of learning is 1,000,000,000; give a number from 10 to 1,000",
        ),
    ],
)
def test_what_the_page_would_not_send_is_refused_in_a_line(tab, tmp_path, more, said):
    (answer,) = morphed(tab, sent(tmp_path, **more))
    assert answer[tab.note].startswith('<p class="note bad"')
    assert said in answer[tab.note]
    assert not (tmp_path / "morphed").exists()


@pytest.mark.slow
def test_a_film_and_its_strip_are_shown(tab, tmp_path, cli):
    values = sent(tmp_path)
    *told, last = morphed(tab, values)
    assert any("morph 0" not in one[tab.note] and "3 frames" in one[tab.note] for one in told)
    assert "dB from the VAE" in last[tab.note]
    assert Image.open(last[tab.film]).n_frames == 3
    assert Image.open(last[tab.strip]).width > 3 * 64
    pictures = [values["first"]["path"], values["last"]["path"]]
    words = ("--frames", 3, "--steps", 2, "--no-learn", "--output", tmp_path / "theirs")
    answer = cli(
        "infer",
        "morph",
        *pictures,
        "--prompts",
        values["first_prompt"],
        values["last_prompt"],
        "--model",
        "tiny-sd",
        *words,
    )
    assert answer.status == 0, answer.err
    ours = os.path.dirname(last[tab.film])
    for name in ("000.png", "001.png", "002.png"):
        frames = [np.asarray(Image.open(f"{one}/frames/{name}")) for one in (ours, answer.out[:-1])]
        np.testing.assert_allclose(*map(np.int16, frames), atol=1)  # other threads, other sums


@pytest.mark.slow
def test_words_are_no_flags_and_refusals_are_one_line(tab, tmp_path):
    *_, last = morphed(tab, sent(tmp_path, first_prompt="--output=/etc", last_prompt="--help"))
    assert "dB from the VAE" in last[tab.note]
    (tmp_path / "text.png").write_text("no picture")
    *_, last = morphed(tab, sent(tmp_path, first={"path": str(tmp_path / "text.png")}))
    assert "is no picture that can be used" in last[tab.note]
    assert "Traceback" not in last[tab.note]


def test_the_process_runs_the_code_of_this_page(repo):
    assert repo == ROOT


@pytest.mark.slow
def test_cancel_ends_the_process(tab, tmp_path):
    many = sent(tmp_path, frames=48, steps=100)
    waiting = tab.morph(REQUEST, **many)
    answers = [next(waiting), next(waiting)]  # it is under way
    threading.Timer(0.1, tab.cancel, [REQUEST]).start()
    started = time.monotonic()
    answers += waiting
    assert "Cancelled; what has been learned is kept." in answers[-1][tab.note]
    assert time.monotonic() - started < 30
    assert not (tmp_path / "morphed").exists()


def test_a_process_that_is_cancelled_is_told_so(tmp_path):
    """Before it has said anything, too."""
    turn = Turn()
    child = Child("morph", {"pictures": ["a", "b"], "prompts": ["a", "b"]}, tmp_path / "s.json")
    turn.cancel()
    with pytest.raises(Cancelled):
        list(child.lines(turn))
    assert child.output == ""


@pytest.mark.slow
def test_what_a_process_refuses_is_a_users_mistake(tmp_path):
    settings = {"pictures": [str(tmp_path / "a"), "b"], "prompts": ["a", "b"], "model": "tiny-sd"}
    child = Child("morph", settings, tmp_path / "s.json")
    with pytest.raises(UserError, match="a is not there; check the path"):
        list(child.lines(Turn()))


def test_turns_end_by_session_and_kind():
    turns = Turns()
    with (
        turns.begin("one", "draw") as draw,
        turns.begin("one", "cache") as cache,
        turns.begin("two", "draw") as other,
    ):
        turns.cancel("one", "draw")
        assert (draw.cancelled, cache.cancelled, other.cancelled) == (True, False, False)
        turns.cancel("one")
        assert (cache.cancelled, other.cancelled) == (True, False)
        with pytest.raises(Cancelled):
            cache.check()
        turns.end(0)
        assert other.cancelled
    turns.end(10)  # nobody is waited for
    turns.cancel("one")
