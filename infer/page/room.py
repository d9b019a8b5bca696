"""What the tabs share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from infer.config import PageConfig
from infer.page.folders import Folders
from infer.page.work.held import Held
from infer.page.work.turns import Turns

MODEL_QUEUE = "model"  # those who use a model come one after the other


@dataclass(frozen=True)
class Room:
    """The page's folders, the model that is held, the work under way, and where files go."""

    config: PageConfig
    folders: Folders
    held: Held
    turns: Turns
    temporary: Path  # uploads and pictures, gone when the page is closed
    # Gradio forgets what a tab that was closed still computes. Never held while something is shown.
    one: threading.Lock = field(default_factory=threading.Lock)
