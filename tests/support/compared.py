"""Runs for `infer compare`, and what a page of them shows."""

import base64
import gzip
import html.parser
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.runs import train
from train.config import DistillConfig

COMMON = {
    "train_batch_size": 2, "max_train_steps": 4, "logging_steps": 1, "lora_rank": 2, "threads": 1,
    "device": "cpu", "report_to": ("none",), "learning_rate": 1e-3,
}  # fmt: skip
FEATURES = "thumb48-edges16-percent"


def make_runs(folder: Path, model: Path, cache: Path) -> dict[str, Path]:
    """Two small runs that differ in objective and learning rate, one of them with previews."""
    more = {
        "lcd": {"validation_steps": 2, "validation_prompts": ()},
        "pcm": {"validation_steps": 0, "objective": "pcm", "learning_rate": 2e-3},
    }
    for name, flags in more.items():
        flags = COMMON | flags
        train(DistillConfig(model=str(model), cache=cache, run=folder / name, **flags))
    return {name: folder / name for name in more}


def copied(run: Path, folder: Path) -> Path:
    """A run of one's own, to spoil, without its heavy files."""
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def evaluations(run: Path, *figures: tuple[int, float, float | None], **more) -> None:
    """Lines of evaluations.jsonl: step, FD and accuracy of each."""
    told = {"drawing_steps": 4, "num_samples": 64, "features": FEATURES, "seconds": 1.5} | more
    lines = [{"step": step, "samples": 2 * step, "fd": fd, "accuracy": accuracy, **told}
             for step, fd, accuracy in figures]  # fmt: skip
    with (run / "evaluations.jsonl").open("a") as file:
        file.write("".join(f"{json.dumps(line)}\n" for line in lines))


class Page(html.parser.HTMLParser):
    """Elements, their attributes, texts and data of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.inside: list[tuple[str, dict]] = []
        self.blocks: dict[str, Any] = {}  # JSON by id
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = [(tag, dict(attributes))]

    def handle_endtag(self, tag):
        self.inside = []

    def handle_data(self, data):
        tag, attributes = self.inside[0] if self.inside else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.blocks[attributes["id"]] = json.loads(data)
        elif tag not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def curves(self, key: str) -> list[dict[str, np.ndarray]]:
        """The columns of each curve of a chart, in the order of the runs."""
        found: dict[int, dict[str, np.ndarray]] = {}
        walk(self.blocks["items"][key], lambda node: keep(node, found))
        return [found[place] for place in sorted(found)]


def keep(node: dict, found: dict) -> None:
    if node.get("name") == "ColumnDataSource":
        entries = dict(node["attributes"]["data"]["entries"])
        [place] = node["attributes"]["tags"]
        found[place] = {name: numbers(value) for name, value in entries.items()}


def walk(node: Any, see: Callable[[dict], None]) -> None:
    if isinstance(node, dict):
        see(node)
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        walk(part, see)


def numbers(value: dict) -> np.ndarray:
    """An array as Bokeh writes it."""
    data = gzip.decompress(base64.b64decode(value["array"]["data"]))
    return np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"])
