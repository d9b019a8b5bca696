"""Pictures of the repository to learn, and one with the statistics of a photograph."""

import io
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.learn import redrawn
from tests.conftest import ROOT
from tests.support import warm

REDRAWN = 2  # steps in which a learned picture is drawn anew, where its figures do not matter


def few_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redrawn, "STEPS", REDRAWN)
    monkeypatch.setattr(redrawn, "PASSES", 4 * REDRAWN)


def run_infer(words: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m infer WORDS` in a process of its own that redraws in few steps."""
    code = (
        "import sys; from infer.learn import redrawn; from infer.__main__ import main\n"
        f"redrawn.STEPS, redrawn.PASSES = {REDRAWN}, {4 * REDRAWN}\n"
        f"sys.argv = ['infer', *{list(map(str, words))!r}]\n"
        "main()\n"
    )
    return warm.run(["-c", code], folder, OMP_NUM_THREADS="1")


def shapes(count: int, folder: Path) -> list[tuple[Path, str]]:
    """The first pictures of data/pictures/train as files, each with its caption."""
    found = []
    with tarfile.open(ROOT / "data/pictures/train/00000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    for name in sorted(one for one in files if one.endswith(".jpg"))[:count]:
        path = folder / name
        path.write_bytes(files[name])
        found.append((path, files[f"{name[:-4]}.txt"].decode().strip()))
    return found


def photograph(path: Path, seed: int, size: tuple[int, int] = (160, 120)) -> Path:
    """A picture whose amplitudes fall as 1 / frequency, as those of nature do; in colours."""
    rng = np.random.default_rng(seed)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(size))
    planes = [
        np.fft.ifft2(amplitude * np.fft.fft2(rng.standard_normal((height, width)))).real
        for _ in range(3)
    ]
    light, *tints = [plane / plane.std() for plane in planes]
    red, blue = (0.4 * tint for tint in tints)
    colours = np.stack([light + red, light - 0.5 * (red + blue), light + blue], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((128 + 50 * colours).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    return path
