"""`infer draw` in tests, and stock pipelines that draw the same."""

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from tests.support.students import disturb, stock_unet

PIPELINES = {"tiny-sd": StableDiffusionPipeline, "tiny-xl": StableDiffusionXLPipeline}
PROMPT = "a blue star on a green field"


def draw(cli, output: Path, *words) -> np.ndarray:
    """One picture `[H, W, 3]`, drawn by the command."""
    answer = cli("infer", "draw", "--threads", 1, "--output", output, *words)
    assert answer.status == 0, answer.err
    assert answer.out == f"{output}\n"
    return np.asarray(Image.open(output)).astype(int)


def refusal(cli, *words) -> tuple[int, str]:
    """The status and the one line of a command that draws nothing."""
    answer = cli("infer", "draw", *words)
    assert answer.out == ""
    assert answer.err.count("\n") == 1, answer.err
    return answer.status, answer.err


def stock(model: Path, kind=None, **parts):
    """A stock pipeline of a tiny model, fp32; `kind` is diffusers' class."""
    kind = kind or PIPELINES[model.name]
    pipe = kind.from_pretrained(model, torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_by(pipe, prompt: str = PROMPT, seed: int = 0, **more) -> np.ndarray:
    """The pixels of a picture that a stock pipeline draws."""
    if more.get("image") is None and "control_image" not in more:
        more = {"height": 64, "width": 64} | more
    picture = pipe(prompt, generator=torch.Generator().manual_seed(seed), **more).images[0]
    return np.asarray(picture).astype(int)


def assert_equal_pictures(a: np.ndarray, b: np.ndarray) -> None:
    """To the rounding of one level in a few places."""
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1
    assert (a != b).mean() < 0.01


def write_controlnet(model: Path, folder: Path) -> Path:
    """A ControlNet made from a tiny model's UNet, its weights random where they would be zero."""
    network = ControlNetModel.from_unet(stock_unet(model), conditioning_channels=3)
    disturb(network.parameters(), scale=0.05)
    disturb(network.controlnet_cond_embedding.parameters(), scale=0.2)  # so that it sees well
    network.save_pretrained(folder)
    return folder


def write_picture(path: Path, size=(64, 64), seed: int = 0) -> Path:
    """A smooth picture in colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path)
    return path
