"""`infer compare`: runs, finished or not, side by side on one page, once or while they go on."""

from __future__ import annotations

import sys

from infer.compare.contents import Contents, gather
from infer.compare.markdown import markdown
from infer.compare.page import html
from infer.compare.plots import need_bokeh
from infer.compare.records import Record
from infer.compare.watch import REFRESH, watch
from infer.config import CompareConfig
from shared.errors import UserError
from shared.storage.files import guard, publish
from shared.wording import counted, size_of
from train.trainer.reporting.log_lines import METRICS

PAGE, TABLES = "index.html", "compare.md"


def compare(config: CompareConfig) -> None:
    """Write index.html and compare.md, and say so; with --watch again whenever a run changes.

    Runs that cannot be read are told and left out. Raises UserError, before anything is written,
    for what is no run, where no run can be read or has metrics, and where Bokeh is missing.
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
        for line in contents.unread:
            print(f"note: left out: {line}", file=sys.stderr)
        print(write(config, contents))


def check_begun(contents: Contents) -> None:
    """Raise UserError where no run has a line of metrics."""
    if not any(one.steps for one in contents.records):
        raise UserError(without_metrics(contents.records[0]))


def without_metrics(record: Record) -> str:
    """Why a run has no line of metrics, and what to do."""
    file = record.folder / METRICS
    if record.damaged[METRICS]:
        return f"{file} is damaged: none of its lines can be read; restore it, or train again"
    if record.trained and not record.running:
        return (
            f"{record.folder} has trained {counted(record.trained, 'step')}, but {METRICS} has no "
            "line of them; restore it, or train again"
        )
    return (
        f"{record.folder} has no metrics yet: the first line comes after "
        f"{counted(record.config.logging_steps, 'step')} (--logging-steps); --watch waits for it"
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
