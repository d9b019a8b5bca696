"""The page: one HTML file with everything in it, which reads nothing from anywhere.

Everything in it that others wrote (names, prompts, paths) goes through `visible` and is escaped; no
script runs but BokehJS and the page's own, told by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from infer.compare import plots
from infer.compare.contents import Contents, gather
from infer.compare.previews import Gallery
from shared.sanitize import visible

USUAL = "4 steps"  # in which previews are shown at first
LONGEST = 1000  # characters of a note
TEMPLATE, STYLE, SCRIPT = "page.html.jinja", "page.css", "page.js"


def html_of(runs: Sequence[Path]) -> str:
    """The page of these runs. Raises UserError as `gather`, and where Bokeh is not installed."""
    plots.need_bokeh()
    return html(gather(runs))


def html(contents: Contents, refresh: int = 0) -> str:
    """Render the page; it loads itself again every `refresh` seconds, if that is not 0."""
    folder = files("infer.compare")
    style, own = ((folder / name).read_text("utf-8") for name in (STYLE, SCRIPT))
    bokeh = plots.bokeh_script() if contents.charts else ""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters["code"] = code
    template = environment.from_string((folder / TEMPLATE).read_text("utf-8"))
    items = {chart.key: plots.item(chart, contents.names) for chart in contents.charts}
    return template.render(
        c=contents, style=Markup(style), scripts=[Markup(bokeh), Markup(own)],
        hashes=[sha256(script) for script in (bokeh, own)], refresh=refresh,
        items=data(items), shown=data(shown_previews(contents.gallery)),
        first=first_sheets(contents.gallery), colour=plots.colour_of, dash=plots.dash_of,
        read=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
    )  # fmt: skip


def sha256(script: str) -> str:
    """A script's hash, as a Content-Security-Policy has it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def code(text: str) -> Markup:
    """Escaped text whose `backticks` mark code."""
    parts = visible(text, LONGEST).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )


def data(value: Any) -> Markup:
    """JSON that can stand in a page: no character of it is one of HTML's."""
    text = json.dumps(value, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def shown_previews(gallery: Gallery) -> dict[str, Any]:
    """The previews, as the page's script takes them."""
    return {
        "steps": gallery.steps,
        "prompts": first_sheets(gallery)["prompts"],
        "runs": [
            [
                {"step": sheet.step, "columns": sheet.columns, "prompts": sheet.prompts,
                 "pictures": sheet.pictures}
                for sheet in sheets
            ]
            for sheets in gallery.runs
        ],
    }  # fmt: skip


def first_sheets(gallery: Gallery) -> dict[str, Any]:
    """What the grid of previews consists of: its columns of steps, and its prompts."""
    sheets = [sheet for one in gallery.runs for sheet in one]
    columns = dict.fromkeys(title for sheet in sheets for title in sheet.columns)
    prompts = dict.fromkeys(prompt for sheet in sheets for prompt in sheet.prompts)
    titles = sorted(columns, key=steps_in)
    return {
        "columns": titles, "prompts": list(prompts),
        "chosen": USUAL if USUAL in columns else titles[-1] if titles else "",
        "whole": [any(not sheet.columns for sheet in one) for one in gallery.runs],
        "small": all(sheet.side <= 128 for sheet in sheets),
    }  # fmt: skip


def steps_in(title: str) -> tuple[int, str]:
    """The number in a column's title, to sort by."""
    first = title.split(" ")[0]
    return (int(first) if first.isdecimal() else 0), title
