"""The tab Runs: the comparison that `infer compare` makes, in the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from markupsafe import Markup

from infer.page import words
from infer.page.folders import choices, chosen
from infer.page.room import Room
from shared.errors import UserError

FIRST = 4  # runs that are chosen at first
MOST = 20  # at once
# Its scripts run in a world of their own: no cookies, no storage, nothing of the page around it.
FRAME = Markup('<iframe class="compared" sandbox="allow-scripts" title="Runs compared" srcdoc="{}">'
               "</iframe>")  # fmt: skip
Updates = dict[Any, Any]


class RunsTab:
    """The list of runs, and what they have in common and not."""

    def __init__(self, room: Room) -> None:
        self.room = room
        with gr.Row(elem_classes="level"):
            self.runs = gr.Dropdown([], multiselect=True, label="Runs", max_choices=MOST, scale=5,
                                    min_width=280, elem_id="runs")  # fmt: skip
            compare = gr.Button("Compare", variant="primary", size="md", scale=1, min_width=120,
                                elem_id="compare")  # fmt: skip
        self.note = gr.HTML(words.note(""), elem_id="runs-note", min_height=28)
        self.shown = gr.HTML("", elem_id="compared")
        compare.click(
            self.compare, self.runs, [self.shown, self.note], preprocess=False, api_name="compare",
            show_progress_on=[self.note],
        )  # fmt: skip

    @property
    def lists(self) -> list[Any]:
        """Lists of what lies under the folders."""
        return [self.runs, self.note]

    def load(self) -> Updates:
        """The list as the folder is now; some are chosen."""
        runs = self.room.folders.trainings()
        empty = f"There are no runs under {self.room.folders.runs} yet: `make train` makes one."
        return {
            self.runs: gr.update(choices=choices(runs), value=list(runs)[:FIRST]),
            self.note: words.note("" if runs else empty),
        }

    def compare(self, runs: Any) -> Iterator[Updates]:
        """Compare the runs that are chosen."""
        yield {self.note: words.note("Reading the runs…")}
        try:
            listed = self.room.folders.trainings()
            several = runs if isinstance(runs, list) else []
            if len(several) > MOST:
                raise UserError(f"{len(several)} runs are too many; choose {MOST} at the most")
            folders = [chosen(name, listed, "run") for name in several or [None]]
            from infer.compare.page import html_of  # slow to import, so only now

            with self.room.one:
                page = html_of(folders)
            yield {self.shown: str(FRAME.format(page)), self.note: words.note("")}
        except Exception as error:
            yield {self.note: words.refusal(error)}
