"""The page itself: its tabs, its looks, and the server that hands it out."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from infer.page.guard import Guard
from infer.page.room import Room
from infer.page.tabs.cache import CacheTab
from infer.page.tabs.draw import DrawTab
from infer.page.tabs.morph import MorphTab
from infer.page.tabs.runs import RunsTab

TITLE = "Latent Distillery"
LARGEST = "64mb"  # of an upload
SWEEP, KEPT = 600, 3600  # seconds between two looks for old files, and that a file is kept
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
BLUE = gr.themes.Color(
    "#eef5fa", "#d9e9f4", "#b9d5e9", "#9fc3dc", "#7db8e0", "#4f93c4", "#2f6f9f", "#285d86",
    "#214c6d", "#1a3c57", "#132c40",
)  # fmt: skip


def build(room: Room) -> gr.Blocks:
    """Put the tabs together."""
    page: gr.Blocks
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(SWEEP, KEPT)
    ) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title")
        tabs: list[Any] = []
        for name, kind in (
            ("Draw", DrawTab), ("Runs", RunsTab), ("Cache", CacheTab), ("Morph", MorphTab),
        ):  # fmt: skip
            with gr.Tab(name, id=name.lower()):
                tabs.append(kind(room))
        draw, *others = tabs
        for tab in others:
            page.load(tab.load, None, tab.lists, queue=False, api_visibility="private",
                      show_progress="hidden")  # fmt: skip
        page.load(draw.load, None, list(dict.fromkeys([*draw.lists, *draw.suited])), queue=False,
                  api_visibility="private", show_progress="hidden")  # fmt: skip
        page.unload(leave(room))
    page.queue(default_concurrency_limit=1)
    return page


def leave(room: Room) -> Any:
    """Return what ends the work of a session whose tab is closed."""

    def left(request: gr.Request) -> None:
        room.turns.cancel(request.session_hash or "")

    return left


def theme() -> Any:
    """The colours of report.html, and the fonts that are there: none is fetched."""
    base = gr.themes.Base(
        primary_hue=BLUE, neutral_hue="stone", font=SANS, font_mono=MONO, text_size="md"
    )
    paper, card, rule = ("#fbfaf8", "#14171a"), ("#ffffff", "#1c2024"), ("#e2dfd9", "#30363c")
    return base.set(
        body_background_fill=paper[0], body_background_fill_dark=paper[1],
        background_fill_primary=card[0], background_fill_primary_dark=card[1],
        background_fill_secondary=paper[0], background_fill_secondary_dark=paper[1],
        block_background_fill=card[0], block_background_fill_dark=card[1],
        input_background_fill=paper[0], input_background_fill_dark=paper[1],
        border_color_primary=rule[0], border_color_primary_dark=rule[1],
        input_border_color=rule[0], input_border_color_dark=rule[1], input_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        button_secondary_background_fill="#ece9e3", button_secondary_background_fill_dark="#30363c",
        button_secondary_background_fill_hover="#e2dfd9",
        button_secondary_background_fill_hover_dark="#3c434a",
        slider_color="*primary_600", slider_color_dark="*primary_400",
        button_large_text_weight="500", button_medium_text_weight="500",
        body_text_color_subdued="#626a73", body_text_color_subdued_dark="#9aa3ac",
    )  # fmt: skip


@contextmanager
def serving(room: Room) -> Iterator[str]:
    """Serve the page while the body runs, which is given its address."""
    page, config = build(room), room.config
    page.launch(
        server_name=config.host, server_port=config.port, share=False, inbrowser=False,
        quiet=True, prevent_thread_lock=True, show_error=False, footer_links=[],
        run_history=False, enable_monitoring=False, pwa=False, mcp_server=False, ssr_mode=False,
        num_workers=0, max_file_size=LARGEST, strict_cors=True, theme=theme(),
        css=(files("infer.page") / "page.css").read_text("utf-8"),
        app_kwargs={
            "middleware": [Middleware(Guard, hosts=names_of(config.host))],
            "docs_url": None, "redoc_url": None, "openapi_url": None,
        },
    )  # fmt: skip
    try:
        yield str(page.local_url)
    finally:
        page.close(verbose=False)


def names_of(host: str) -> frozenset[str] | None:
    """The names by which a page that is for this machine alone may be called; None for any."""
    bare = host.strip("[]")
    try:
        local = ipaddress.ip_address(bare).is_loopback
    except ValueError:
        local = bare == "localhost"
    return frozenset({"localhost", "127.0.0.1", "[::1]", host}) if local else None
