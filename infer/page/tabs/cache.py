"""The tab Cache: samples with their pictures and captions, and rows that were rejected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
import jinja2
import numpy as np
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from infer.page import given, words
from infer.page.folders import choices, chosen
from infer.page.room import MODEL_QUEUE, Room
from infer.page.work.browse import Browser, Found, Row, Sample
from infer.page.work.turns import Cancelled, Turn
from prep.config import OriginalsFlags
from prep.inspect.originals import vae_of
from prep.inspect.report import data_uri
from shared.cache.paths import CachePaths
from shared.sanitize import visible

KIND = "cache"
SAMPLES, REJECTED = "samples", "rejected rows"
TOGETHER = 4  # pictures that appear at once
LAST = 10**9  # page
Updates = dict[Any, Any]
Picture = NDArray[np.uint8] | None


class CacheTab:
    """The form, and a page of the cache below it."""

    def __init__(self, room: Room) -> None:
        self.room = room
        with gr.Row(equal_height=False):
            self.caches = gr.Dropdown([], label="Cache", scale=3, min_width=200, elem_id="caches")
            self.kind = gr.Dropdown([SAMPLES, REJECTED], value=SAMPLES, label="Show", scale=2,
                                    min_width=140, elem_id="kind")  # fmt: skip
            self.text = gr.Textbox("", label="Words in the caption", max_length=given.PROMPT,
                                   scale=4, min_width=200, elem_id="filter")  # fmt: skip
        with gr.Row(elem_classes="level"):
            self.page = gr.Number(1, label="Page", precision=0, minimum=1, min_width=90,
                                  elem_id="page-number")  # fmt: skip
            back = gr.Button("Back", size="md", min_width=80)
            on = gr.Button("Next", size="md", min_width=80, elem_id="next-page")
            show = gr.Button("Show", variant="primary", size="md", min_width=80, elem_id="show")
        self.note = gr.HTML(words.note(""), elem_id="cache-note", min_height=28)
        self.shown = gr.HTML("", elem_id="cache-page")
        self.connect(show, back, on)

    def connect(self, show: Any, back: Any, on: Any) -> None:
        """Let the buttons, Enter and a change of the list show a page."""
        own: dict[str, Any] = {"queue": False, "preprocess": False, "show_progress": "hidden",
               "api_visibility": "private"}  # fmt: skip
        look: dict[str, Any] = {"fn": self.look, 
                "inputs": [self.caches, self.kind, self.text, self.page],
                "outputs": [self.shown, self.note], "preprocess": False,
                "concurrency_id": MODEL_QUEUE, "show_progress_on": [self.note]}  # fmt: skip
        show.click(self.cancel, None, None, **own).then(**look, api_name="browse")
        for button, by in ((back, -1), (on, 1)):
            turned = button.click(turning(by), self.page, self.page, **own)
            turned.then(self.cancel, None, None, **own).then(**look, api_visibility="private")
        for changed in (self.text.submit, self.caches.input, self.kind.input):
            first = changed(self.first, None, self.page, **own)
            first.then(**look, api_visibility="private")

    @property
    def lists(self) -> list[Any]:
        """Lists of what lies under the folders."""
        return [self.caches, self.note]

    def load(self) -> Updates:
        """The list as the folder is now."""
        caches = self.room.folders.all_caches()
        empty = f"There are no caches under {self.room.folders.caches} yet: `make prep` makes one."
        return {
            self.caches: gr.update(choices=choices(caches), value=next(iter(caches), None)),
            self.note: words.note("" if caches else empty),
        }

    def cancel(self, request: gr.Request) -> None:
        """Decode no more pictures of a page that is left."""
        self.room.turns.cancel(request.session_hash or "", KIND)

    def first(self, request: gr.Request) -> int:
        """The first page of something new."""
        self.cancel(request)
        return 1

    def look(
        self, cache: Any, kind: Any, text: Any, page: Any, request: gr.Request
    ) -> Iterator[Updates]:
        """Show a page: captions at once, and pictures as they are decoded."""
        try:
            paths = CachePaths(chosen(cache, self.room.folders.all_caches(), "cache"))
            number = given.whole(page, "the page", 1, LAST) - 1
            wanted = given.text(text, "the text to look for")
            browser = Browser.open(paths)
            if kind == REJECTED:
                yield self.rows(browser, browser.rows(number, wanted))
                return
            found = browser.samples(number, wanted)
            with self.room.turns.begin(request.session_hash or "", KIND) as turn:
                yield from self.samples(browser, found, turn)
        except Cancelled:
            yield {self.note: words.note("")}
        except Exception as error:
            yield {self.shown: "", self.note: words.refusal(error)}

    def rows(self, browser: Browser, found: Found[Row]) -> Updates:
        """Rejected rows, and on their first page how many there are for each reason."""
        total = sorted(browser.manifest.totals.rejected.items(), key=lambda one: -one[1])
        if not total:
            return {self.shown: "", self.note: words.note("No row was rejected.")}
        page = render(rows=found.items, reasons=[] if found.first else total)
        return {self.shown: page, self.note: words.note(told(found))}

    def samples(self, browser: Browser, found: Found[Sample], turn: Turn) -> Iterator[Updates]:
        """Samples, their pictures a few at a time."""
        pictures: list[Picture] = [None] * len(found.items)
        yield self.shown_samples(found, pictures, "…")
        try:
            with self.room.one:
                vae = self.vae(browser)
        except Exception as error:
            yield self.shown_samples(found, pictures, "not decoded")
            yield {self.note: words.refusal(error)}
            return
        for number, sample in enumerate(found.items):
            turn.check()
            with self.room.one:
                pictures[number] = browser.picture(sample, vae)
            if number % TOGETHER == TOGETHER - 1 or number == len(pictures) - 1:
                yield self.shown_samples(found, pictures, "…")

    def vae(self, browser: Browser) -> AutoencoderKL:
        """The VAE that the cache was made with, held as the page's one model."""
        identity = browser.manifest.identity
        flags = OriginalsFlags(cache=browser.cache.root, device=self.room.config.device)
        vae: AutoencoderKL = self.room.held.get(
            ("vae", identity.vae.fingerprint, identity.vae.source or identity.model),
            lambda: vae_of(identity, flags),
        )
        return vae

    def shown_samples(
        self, found: Found[Sample], pictures: Sequence[Picture], pending: str
    ) -> Updates:
        """The page as far as its pictures are decoded."""
        pairs = list(zip(found.items, pictures, strict=True))
        page = render(samples=pairs, rows=None, pending=pending) if pairs else ""
        return {self.shown: page, self.note: words.note(told(found))}


def turning(by: int) -> Any:
    """Return what turns the page, from 1."""

    def turned(page: Any) -> int:
        number = int(page) if isinstance(page, int | float) and abs(page) < LAST else 1
        return max(1, number + by)

    return turned


def told(found: Found[Any]) -> str:
    """Which items are on the page, of how many."""
    last = found.first + len(found.items)
    shown = f"{found.first + 1:,} to {last:,}" if found.items else "Nothing on this page"
    more = "; more on the next page" if found.more and not found.looked else ""
    return f"{shown}{f' ({found.looked})' if found.looked else ''}{more}"


def render(**what: Any) -> str:
    """Render a page; everything in it that others wrote is text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters["picture"] = data_uri
    template = (files("infer.page.tabs") / "cache.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(**what)
