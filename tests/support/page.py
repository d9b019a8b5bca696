"""The page of `infer page` in tests: opened on folders, in this process, without a browser."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from infer.config import PageConfig
from infer.page import command
from infer.page.folders import Folders
from infer.page.room import Room
from infer.page.work.held import Held
from infer.page.work.turns import Turns
from tests.support.drawing import PROMPT

HOSTILE = "<img src=x onerror=\"document.title='owned'\">${7*7}{{7*7}}"


class Opened(NamedTuple):
    """A page that is served."""

    address: str
    room: Room


def form(what: str | None, **more: object) -> dict[str, object]:
    """What the tab Draw sends, by name: two steps of one picture alone unless told."""
    values: dict[str, object] = {
        "what": what, "prompt": PROMPT, "negative_prompt": "", "steps": 2, "guidance_scale": 2.0,
        "seed": 3, "scheduler": "as trained", "teacher": False, "teacher_steps": 2, "image": None,
        "strength": 0.5, "lora_1": "", "lora_2": "", "lora_3": "", "lora_1_scale": 1,
        "lora_2_scale": 1, "lora_3_scale": 1,
    }  # fmt: skip
    assert not set(more) - set(values)
    return values | more


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def room_of(temporary: Path, runs: Path, caches: Path, *models: object) -> Room:
    """What the tabs share."""
    config = PageConfig(runs=runs, caches=caches, models=tuple(map(str, models)), threads=1,
                        port=free_port())  # fmt: skip
    return Room(config, Folders.of(config), Held(), Turns(), temporary.resolve())


@contextlib.contextmanager
def opened(temporary: Path, runs: Path, caches: Path, *models: object) -> Iterator[Opened]:
    """Serve the page as the command does."""
    before = dict(os.environ)
    temporary.mkdir(exist_ok=True)
    command.settle(temporary)
    from infer.page.app import serving

    try:
        room = room_of(temporary, runs, caches, *models)
        with serving(room) as address:
            yield Opened(address, room)
    finally:
        os.environ.clear()
        os.environ.update(before)
