"""`infer page`: a page in the browser to draw, compare, look into caches and morph."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from infer.config import PageConfig
from infer.page.folders import Folders
from infer.page.room import Room
from infer.page.work.held import Held
from infer.page.work.turns import Turns
from shared.errors import UserError
from shared.machine.device import pick_device, set_threads
from shared.models.family import resolve_model

EXTRA = "pip install 'latent-distillery[page]'"
PATIENCE = 20.0  # seconds for what is under way when the page is closed


def page(config: PageConfig) -> None:
    """Serve the page until Ctrl-C. Raises UserError for what is in its way."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"the page needs Gradio: {EXTRA}")
    folders = Folders.of(config)
    check(config, folders)
    set_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="latent-distillery-page-") as temporary:
        settle(Path(temporary))
        from infer.page.app import serving  # slow to import, and reads what was settled

        turns = Turns()
        room = Room(config, folders, Held(), turns, Path(temporary).resolve())
        with serving(room) as address:
            print(told(config, folders, address), file=sys.stderr)
            print(address, flush=True)
            try:
                while True:
                    time.sleep(3600)  # until Ctrl-C or SIGTERM
            finally:
                turns.end(PATIENCE)


def told(config: PageConfig, folders: Folders, address: str) -> str:
    """What the page is opened on."""
    more = f", models {', '.join(folders.models)}" if folders.models else ""
    return (
        f"page of {folders.runs}/ and {folders.caches}/{more}, on "
        f"{pick_device(config.device).type}; open {address} in a browser, Ctrl-C ends it"
    )


def check(config: PageConfig, folders: Folders) -> None:
    """Raise UserError for models that are not there, and for an address that cannot be had."""
    for text in folders.models:
        if not Path(text).is_dir():
            resolve_model(text)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(why_not(config, error)) from None


def why_not(config: PageConfig, error: Exception) -> str:
    """Why nothing can listen there, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return (
            f"--port {config.port} is in use, perhaps by another page; give another, such as "
            f"--port {config.port + 1 if config.port < 65535 else 7860}"
        )
    if number == errno.EACCES:
        return f"--port {config.port} is not for ordinary users; give one from 1024 on"
    return f"--host {config.host} is no address of this machine; 127.0.0.1 is for it alone"


def settle(temporary: Path) -> None:
    """Tell Gradio, before it is imported, where files go, and to ask nobody about anything."""
    for name in [one for one in os.environ if one.startswith("GRADIO_")]:
        del os.environ[name]  # GRADIO_SHARE or GRADIO_ALLOWED_PATHS would open what is closed here
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
