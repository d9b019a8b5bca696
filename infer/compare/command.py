"""`infer compare`: runs, finished or not, side by side on one page, once or while they go on."""

from __future__ import annotations

from infer.compare.contents import Contents, gather
from infer.compare.markdown import markdown
from infer.compare.page import html
from infer.compare.plots import need_bokeh
from infer.compare.watch import REFRESH, watch
from infer.config import CompareConfig
from shared.errors import UserError
from shared.storage.files import guard, publish
from shared.wording import counted, size_of

PAGE, TABLES = "index.html", "compare.md"


def compare(config: CompareConfig) -> None:
    """Write index.html and compare.md, and say so; with --watch again whenever a run changes.

    Raises UserError, before anything is written, for what is no run, runs without any metrics, and
    where Bokeh is missing.
    """
    need_bokeh()
    contents = gather(config.runs)
    if not config.watch:
        check_begun(contents)
    with guard(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
    if config.watch:
        watch(config.runs, contents, lambda seen, refresh: write(config, seen, refresh))
    else:
        print(write(config, contents))


def check_begun(contents: Contents) -> None:
    """Raise UserError where no run has a line of metrics yet."""
    if not any(one.steps for one in contents.records):
        first = contents.records[0]
        raise UserError(
            f"{first.folder} has no metrics yet: the first line comes after "
            f"{counted(first.config.logging_steps, 'step')} (--logging-steps); --watch waits for it"
        )


def write(config: CompareConfig, contents: Contents, refresh: bool = False) -> str:
    """Write both files, each whole or not at all; returns a line about them."""
    page = html(contents, REFRESH if refresh else 0).encode("utf-8", "backslashreplace")
    tables = markdown(contents).encode("utf-8", "backslashreplace")
    publish([tables], config.output / TABLES, config.output)
    publish([page], config.output / PAGE, config.output)
    running = [one.steps for one in contents.records if one.running]
    going = f", {len(running)} running at step {max(running):,}" if running else ""
    last = max(one.steps for one in contents.records)
    return (
        f"{config.output / PAGE}: {counted(len(contents.records), 'run')}{going}, up to step "
        f"{last:,}, {size_of(len(page))}"
    )
