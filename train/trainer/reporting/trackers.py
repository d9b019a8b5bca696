"""Metrics and pictures for TensorBoard, wandb and what else accelerate knows by name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from numpy.typing import NDArray

from shared.errors import UserError, first_line
from shared.storage.errors import is_mistake
from shared.storage.files import guard

KNOWN = (
    "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio",
)  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that accelerate does not know or that is not installed."""
    if set(names) == {"none"}:
        return
    if "none" in names:
        raise UserError(f"--report-to {' '.join(names)}: leave out none, or the others")
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in KNOWN:
            raise UserError(f"--report-to {name}: not one of {', '.join(KNOWN)}, none")
        if name not in installed:
            raise UserError(f"--report-to {name} is not installed; pip install {name}, or use none")


class Trackers:
    """The trackers of a run, on its main process."""

    def __init__(
        self, names: Sequence[str], folder: Path, project: str, config: Mapping[str, Any], done: int
    ) -> None:
        """`done` steps are behind; TensorBoard forgets what lies beyond them.

        Raises UserError where a service cannot be had.
        """
        self.folder = folder
        # That it keeps no configuration is said to whoever runs the command, at every start.
        logging.getLogger("accelerate.tracking").setLevel(logging.ERROR)
        accelerator = Accelerator(log_with=list(names) or None, project_dir=folder)
        options = {"tensorboard": {"purge_step": done + 1}} if names else {}
        try:
            accelerator.init_trackers(project, init_kwargs=options)
        except Exception as error:  # each has kinds of its own: no key, no server, no such project
            if is_mistake(error):
                raise
            problem = first_line(error).rstrip(". ")
            raise UserError(f"--report-to {' '.join(names)}: {problem}; or use none") from None
        self.trackers = accelerator.trackers
        plain = {k: v for k, v in config.items() if isinstance(v, bool | int | float | str)}
        for tracker in self.trackers:
            if tracker.name != "tensorboard":  # which would make a folder a start
                tracker.store_init_configuration(plain)

    def log(self, values: Mapping[str, float], step: int, group: str = "train") -> None:
        """Numbers of a step, as GROUP/NAME. Raises UserError where a folder is not writable."""
        for tracker in self.trackers:
            with guard(self.folder):
                tracker.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def picture(self, name: str, sheet: NDArray[np.uint8], step: int) -> None:
        """A picture `[H, W, 3]`, for every tracker. Raises UserError as `log`."""
        for tracker in self.trackers:
            with guard(self.folder):
                log_picture(tracker, name, sheet, step)

    def close(self) -> None:
        """Let them write what they hold. One that fails now is told, for the export is to come."""
        for tracker in self.trackers:
            try:
                tracker.finish()
            except Exception as error:  # each has kinds of its own
                problem = first_line(error).rstrip(". ")
                print(f"note: {tracker.name} did not finish: {problem}", file=sys.stderr)


def log_picture(tracker: GeneralTracker, name: str, sheet: NDArray[np.uint8], step: int) -> None:
    """Each service in its own words; accelerate speaks for half of them."""
    own = tracker.tracker
    if tracker.name == "tensorboard":
        own.add_image(name, sheet, step, dataformats="HWC")
    elif tracker.name == "comet_ml":
        own.log_image(sheet, name=name, step=step)
    elif tracker.name == "mlflow":
        import mlflow

        mlflow.log_image(sheet, key=name, step=step)
    elif tracker.name == "dvclive":
        own.log_image(f"{name}.png", sheet)
    elif tracker.name == "trackio":
        import trackio

        own.log({name: trackio.Image(sheet)}, step=step)
    elif tracker.name in ("aim", "clearml"):
        tracker.log_images({name: sheet}, step=step)
    else:  # wandb, swanlab
        tracker.log_images({name: [sheet]}, step=step)
