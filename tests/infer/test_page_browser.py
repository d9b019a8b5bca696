"""The page in a real Chromium, as people use it: on a screen and a phone, in light and in dark."""

import re
import shutil
import threading
import time
from typing import NamedTuple

import pytest

from infer.draw.artist import draw_one
from infer.page.work import studio
from tests.support.drawing import write_picture
from tests.support.exports import make_run
from tests.support.learned import shapes
from tests.support.page import HOSTILE, opened
from tests.support.sources import captioned, encode, png, write_tar
from tests.support.styles import write_style

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
NAMED = HOSTILE.replace("/", "")
STYLE = "<img src=x onerror=alert(1)>.safetensors"
WAIT = 180_000  # ms, on a machine that does other things, too
SCREENS = {"screen": (1200, 900, "light"), "phone": (360, 740, "dark")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory, small_cache, tiny_sd):
    folder = tmp_path_factory.mktemp("shown")
    make_run(folder / "runs/lora", small_cache, tiny_sd, "sd", "lora", report_to=())
    make_run(folder / "runs" / NAMED, small_cache, tiny_sd, "sd", "lora", report_to=())
    (folder / "models").mkdir()
    write_style(tiny_sd, folder / "models/ink.safetensors")
    write_style(tiny_sd, folder / "models" / STYLE)
    files = [*captioned(range(1)), ("x.png", png(40)), ("x.txt", HOSTILE.encode()),
             (f"{NAMED}.png", b"no picture"), (f"{NAMED}.txt", HOSTILE.encode())]  # fmt: skip
    encode([write_tar(folder / "a.tar", files)], folder / "caches" / NAMED)
    with opened(folder / "page", folder / "runs", folder / "caches", folder / "models") as page:
        yield page


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


class Tab(NamedTuple):
    """A tab of the browser, and what went wrong in it."""

    page: object
    wrong: list

    def draw(self, *told: str) -> None:
        """Draw, and wait until the captions tell this."""
        self.page.click("#draw")
        for name, text in zip(("student", "teacher"), told, strict=False):
            self.page.wait_for_function(
                "([name, text]) => document.querySelector(name).innerText.includes(text)",
                arg=[f"#{name}-note", text],
            )

    def caption(self, name: str = "student") -> str:
        return self.page.inner_text(f"#{name}-note")

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()


@pytest.fixture
def visit(served, browser):
    """Open the page; in the end nothing went wrong, and nobody else was asked for anything."""
    tabs = []

    def open_(screen: str = "screen") -> Tab:
        width, height, scheme = SCREENS[screen]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(WAIT)
        tab = Tab(page, [])
        tabs.append(tab)
        page.on("console", lambda said: said.type == "error" and tab.wrong.append(said.text))
        page.on("pageerror", lambda error: tab.wrong.append(str(error)))
        page.on("request", lambda one: asked(one.url, served.address, tab))
        page.goto(served.address)
        page.wait_for_selector("#draw:not([disabled])")
        return tab

    yield open_
    for tab in tabs:
        if tab.page.is_closed():
            continue  # in the middle of something, which is no error
        assert tab.page.title() == "Latent Distillery"
        assert tab.page.locator("img[src='x']").count() == 0
        tab.page.close()
        assert tab.wrong == []


def asked(url: str, address: str, tab: Tab) -> None:
    """Note a request that goes elsewhere."""
    if not url.startswith((address, "data:", "blob:", "about:")):
        tab.wrong.append(url)


def choose_model(page) -> None:
    """Let the teacher draw alone, in its 50 steps."""
    choose(page, "#what", "tiny-sd")
    page.wait_for_selector("#steps input[type=range][max='50']")


def choose(page, field: str, label: str) -> None:
    """Choose from one of Gradio's lists."""
    page.click(f"{field} input")
    page.get_by_role("option", name=label, exact=True).click()


@pytest.mark.parametrize("screen", SCREENS)
def test_a_student_is_played_with(visit, screen, tmp_path):
    tab = visit(screen)
    page = tab.page
    choose(page, "#what", "lora (LoRA student)")
    page.fill("#prompt textarea", "a red circle on a blue field")
    tab.draw("4 steps of LCM", "50 steps of DDIM")
    assert re.search(r"Student: [\d,]+ m?s\s+4 steps of LCM, guidance built in", tab.caption())
    assert re.search(r"Teacher: .*\s+50 steps of DDIM, guidance 3", tab.caption("teacher"))
    widths = [page.locator(f"#{name} img").bounding_box()["width"] for name in
              ("student", "teacher")]  # fmt: skip
    assert widths[0] == pytest.approx(widths[1], abs=2)
    assert min(widths) > (100 if screen == "phone" else 250)

    slider = page.locator("#steps input[type=range]")  # moved by hand, it draws again
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.97, box["y"] + box["height"] / 2)
    page.wait_for_selector("#student-note >> text=8 steps of LCM")

    page.click("#loras > button, #loras .label-wrap")
    choose(page, "#lora1", "ink.safetensors")
    tab.draw("with ink.safetensors at 1", "with ink.safetensors at 1")

    before = page.get_attribute("#student img", "src")
    page.click("#begin > button, #begin .label-wrap")
    page.set_input_files("#picture input[type=file]", write_picture(tmp_path / f"{NAMED}.png"))
    page.wait_for_selector("#picture img")
    page.click("#draw")
    page.wait_for_function(
        "before => ![undefined, before].includes(document.querySelector('#student img')?.src)",
        arg=before,
    )
    page.wait_for_selector("#draw-note >> text=same noise")
    assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen][0]


@pytest.mark.parametrize("screen", SCREENS)
def test_all_tabs_open_and_hostile_text_does_nothing(visit, screen):
    tab = visit(screen)
    page = tab.page
    tab.open("Runs")
    page.click("#compare")
    frame = page.frame_locator("iframe.compared")
    frame.locator("h1").wait_for()
    assert NAMED in frame.locator("body").inner_text()
    tab.open("Cache")
    page.click("#show")
    page.wait_for_selector("#cache-page img")
    assert HOSTILE in page.inner_text("#cache-page")
    choose(page, "#kind", "rejected rows")
    page.wait_for_selector("#cache-page table.rows")
    assert '<img src=x onerror="document' in page.inner_text("#cache-page")
    tab.open("Morph")
    page.wait_for_selector("#morph")
    page.click("#morph")
    page.wait_for_selector("#morph-note >> text=choose both")
    tab.open("Draw")
    choose(page, "#what", f"{NAMED} (LoRA student)")
    page.fill("#prompt textarea", HOSTILE)
    page.click("#loras > button, #loras .label-wrap")
    choose(page, "#lora1", STYLE)
    tab.draw(f"with {STYLE} at 1", f"with {STYLE} at 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen][0]


def test_a_second_user_waits_and_sees_the_place(visit, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def held_up(*args):
        begun.set()
        go_on.wait(WAIT / 1000)
        return draw_one(*args)

    monkeypatch.setattr(studio, "draw_one", held_up)
    first, second, third = visit(), visit("phone"), visit()
    for tab in (first, second, third):
        choose_model(tab.page)
    first.page.click("#draw")
    assert begun.wait(WAIT / 1000)
    second.page.click("#draw")
    second.page.wait_for_selector("#draw-note >> text=/queue: 1\\/1/")
    third.page.click("#draw")
    third.page.wait_for_selector("#draw-note >> text=/queue: 2\\/2/")
    third.page.click("#cancel")  # who waits is out of the queue at once
    third.page.wait_for_selector("#draw-note >> text=Cancelled.")
    third.page.wait_for_selector("#draw-note >> text=queue:", state="hidden")
    go_on.set()
    second.page.wait_for_selector("#student-note >> text=50 steps of DDIM")
    assert "50 steps" in first.caption()
    assert "steps" not in third.caption()


def test_cancel_ends_a_drawing(visit, monkeypatch):
    def slowly(pipe, job, prompt, seed, on_step):
        return draw_one(pipe, job, prompt, seed, lambda: (time.sleep(0.1), on_step()))

    monkeypatch.setattr(studio, "draw_one", slowly)
    tab = visit()
    choose_model(tab.page)
    tab.page.click("#draw")
    tab.page.wait_for_selector("#draw-note >> text=/step \\d+ of 50/")
    tab.page.click("#cancel")
    tab.page.wait_for_selector("#draw-note >> text=Cancelled.")
    assert "steps" not in tab.caption()


def fill_morph(page, folder) -> None:
    """Choose two pictures, say what they show, and learn nothing."""
    for name, (picture, prompt) in zip(("first", "last"), shapes(2, folder), strict=True):
        page.set_input_files(f"#{name}-picture input[type=file]", picture)
        page.fill(f"#{name}-prompt textarea", prompt)
        page.wait_for_selector(f"#{name}-picture img")
    page.click("text=More >> visible=true")
    page.get_by_label("Learn each picture first").uncheck()


def test_a_film_is_made(visit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tab = visit()
    tab.open("Morph")
    fill_morph(tab.page, tmp_path)
    tab.page.click("#morph")
    tab.page.wait_for_selector("#film img")
    tab.page.wait_for_selector("#strip img")
    assert "dB from the VAE" in tab.page.inner_text("#morph-note")


def test_a_tab_that_is_closed_wants_no_more(visit, served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tab = visit()
    tab.open("Morph")
    fill_morph(tab.page, tmp_path)
    tab.page.get_by_label("Steps", exact=False).locator("visible=true").first.fill("100")
    tab.page.click("#morph")
    tab.page.wait_for_selector("#morph-note >> text=/frames of|takes about/")
    assert served.room.turns.busy
    tab.page.close()
    deadline = time.monotonic() + 40
    while served.room.turns.busy and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not served.room.turns.busy
    assert not (tmp_path / "morphed").exists()
