"""Who waits for the model, and what stands on the page meanwhile."""

import threading

import gradio as gr
import httpx
import pytest
from gradio_client import Client

from infer.draw.artist import draw_one
from infer.page.tabs.draw import DrawTab
from infer.page.work import studio
from tests.support.exports import make_run
from tests.support.page import form, opened, room_of

WAIT = 60  # seconds, on a machine that does other things, too


def one_step(prompt):
    """What draws it in no time."""
    return form("model/tiny-sd", prompt=prompt, steps=1)


@pytest.fixture
def held_up(monkeypatch):
    """Drawings begin, and end when they are let go on."""
    begun, go_on, prompts = threading.Event(), threading.Event(), []

    def waiting(pipe, job, prompt, seed, on_step):
        prompts.append(prompt)
        begun.set()
        assert go_on.wait(WAIT)
        return draw_one(pipe, job, prompt, seed, on_step)

    monkeypatch.setattr(studio, "draw_one", waiting)
    yield begun, go_on, prompts
    go_on.set()


def test_what_is_cancelled_in_the_queue_is_never_drawn(tmp_path, tiny_sd, held_up):
    begun, go_on, prompts = held_up
    with (
        opened(tmp_path / "page", tmp_path / "runs", tmp_path / "caches", "tiny-sd") as page,
        httpx.Client(base_url=f"{page.address}gradio_api/", trust_env=False) as web,
    ):
        first = Client(page.address, verbose=False, analytics_enabled=False)
        drawing = first.submit(**one_step("first"), api_name="/draw")
        assert begun.wait(WAIT)
        (number,) = [one["id"] for one in first.config["dependencies"] if one["api_name"] == "draw"]
        second = {"session_hash": "two", "fn_index": number}
        joined = web.post("queue/join", json=second | {"data": list(one_step("second").values())})
        web.post("cancel", json=second | joined.json()).raise_for_status()  # as a browser does
        last = first.submit(**one_step("last"), api_name="/draw")
        go_on.set()
        assert "1 step of DDIM" in drawing.result(WAIT)[1]
        last.result(WAIT)
        assert prompts == ["first", "last"]


def test_cancel_ends_all_ways_to_begin_a_drawing(tmp_path):
    """The button, the keyboard, the slider and a new seed."""
    with gr.Blocks(analytics_enabled=False) as page:
        tab = DrawTab(room_of(tmp_path, tmp_path / "runs", tmp_path / "caches", "tiny-sd"))
    draws = {number for number, one in page.fns.items() if one.fn == tab.draw}
    (ended,) = [set(one.cancels) for one in page.fns.values() if one.cancels]
    assert ended == draws
    assert len(draws) == 4


def test_old_pictures_are_gone_when_a_drawing_begins(tmp_path, small_cache, tiny_sd):
    make_run(tmp_path / "runs/lora", small_cache, tiny_sd, "sd", "lora", report_to=())
    with gr.Blocks(analytics_enabled=False):
        tab = DrawTab(room_of(tmp_path, tmp_path / "runs", tmp_path / "caches"))
    request = gr.Request(session_hash="one")
    told = tab.draw(request, **form("run/lora", steps=1, teacher=True))
    begun = next(told)
    for picture, note, name in (
        (tab.form.student, tab.form.student_note, "Student"),
        (tab.form.teacher, tab.form.teacher_note, "Teacher"),
    ):
        assert begun[picture]["value"] is None
        said = begun[note]["value"] if isinstance(begun[note], dict) else begun[note]
        assert f"<b>{name}</b>" in said
    *_, drawn = told
    assert drawn[tab.form.student]["value"].endswith(".png")
    assert drawn[tab.form.teacher]["value"].endswith(".png")

    told = tab.draw(request, **form("run/lora", prompt="another", steps=1, teacher=True))
    next(told)
    assert "Cancelled." in tab.cancel(request)
    *_, last = told
    assert "Cancelled." in last[tab.form.note]
    assert last[tab.form.teacher]["value"] is None


def test_without_a_model_there_is_nothing_to_set(tmp_path):
    with gr.Blocks():
        tab = DrawTab(room_of(tmp_path / "page", tmp_path / "runs", tmp_path / "caches"))
    found = tab.load()
    assert not found[tab.form.draw]["interactive"]
    assert not found[tab.form.steps]["visible"]
    assert not found[tab.form.guidance]["visible"]
    assert f"There is no student under {tmp_path / 'runs'} yet" in found[tab.form.note]
