"""Learned measures of pictures: the only place in `train` that knows transformers.

Pictures are prepared by transformers' image processors with PIL, as published figures were. Those
with torchvision resize a little differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
)
from transformers.utils import logging

from shared.errors import UserError, first_line
from shared.models.weights import UNUSABLE, load_whole

Pictures = NDArray[np.uint8]  # [N, H, W, 3], RGB
Rows = NDArray[np.float64]

AT_ONCE = 16  # pictures
DINOV2_SIDE = 224
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BICUBIC = 3  # PIL's number

logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar at a time


class Dinov2:
    """DINOv2's CLS token after the last norm, of pictures squeezed to 224 px (FD-DINOv2).

    Bicubic, not cropped, normalised as ImageNet is: as dgm-eval does (Stein et al., 2023).
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.network = loaded(Dinov2Model, folder, device)
        self.width = int(self.network.config.hidden_size)
        self.prepare = image_processor("BitImageProcessor")(
            size={"height": DINOV2_SIDE, "width": DINOV2_SIDE}, do_center_crop=False,
            resample=BICUBIC, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD,
        )  # fmt: skip

    def __call__(self, images: Pictures) -> Rows:
        """Features `[N, D]`."""
        return in_portions(
            lambda pixels: self.network(pixels).last_hidden_state[:, 0],
            prepared(self.prepare, images, self.network.device),
        )


class ClipImages:
    """CLIP's image embeddings of unit length (CMMD).

    The short side is resized to the network's, then the middle is cut out.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.network = loaded(CLIPVisionModelWithProjection, folder, device)
        self.width, self.side = (
            int(getattr(self.network.config, name)) for name in ("projection_dim", "image_size")
        )
        self.prepare = image_processor("CLIPImageProcessor")(
            size={"shortest_edge": self.side}, crop_size={"height": self.side, "width": self.side}
        )

    def __call__(self, images: Pictures) -> Rows:
        """Features `[N, D]`."""
        return in_portions(
            lambda pixels: unit_length(self.network(pixels).image_embeds),
            prepared(self.prepare, images, self.network.device),
        )


class ClipScores:
    """The cosine of CLIP's embeddings of a picture and its caption.

    `finish` makes the score of cosines `[N]` and the network's temperature, exp(logit_scale).
    """

    def __init__(
        self,
        folder: Path,
        processor: Path,
        device: torch.device,
        finish: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.network = loaded(CLIPModel, folder, device)
        self.finish = finish
        self.prepare = opened(image_processor("CLIPImageProcessor"), processor)
        self.tokenizer = opened(AutoTokenizer, processor)

    def __call__(self, images: Pictures, captions: Sequence[str]) -> Rows:
        """Scores `[N]`; a caption that is too long is cut."""
        seen = in_portions(
            lambda pixels: unit_length(embedding(self.network.get_image_features(pixels))),
            prepared(self.prepare, images, self.network.device),
        )
        read = in_portions(
            lambda tokens: unit_length(embedding(self.network.get_text_features(**tokens))),
            (self.tokens(part) for part in portions(captions)),
        )
        cosines = torch.from_numpy((seen * read).sum(1))
        return np.asarray(self.finish(cosines, self.network.logit_scale.exp().double().cpu()))

    def tokens(self, captions: Sequence[str]) -> Any:
        """The captions as the network takes them."""
        length = self.network.config.text_config.max_position_embeddings
        found = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return found.to(self.network.device)


def loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    """The network in fp32. Raises UserError where a weight is missing."""
    network = load_whole(kind.from_pretrained, str(folder), kind.__name__, local_files_only=True)
    return network.float().to(device).eval().requires_grad_(False)


def opened(kind: Any, folder: Path) -> Any:
    """A tokenizer or image processor. Raises UserError where its files are damaged."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except UNUSABLE as error:  # nothing of ours is called in there
        raise UserError(
            f"no {kind.__name__} can be read from {folder} ({first_line(error)}); fetch its files "
            "anew"
        ) from None


def image_processor(name: str) -> Any:
    """Transformers' class that prepares pictures with PIL; before transformers 5 there was one."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def portions(items: Any) -> Iterator[Any]:
    """A few at a time."""
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]


def prepared(prepare: Any, images: Pictures, device: torch.device) -> Iterator[Tensor]:
    """A few pictures at a time as a network takes them, `[n, 3, h, w]`."""
    for part in portions(images):
        found = prepare(list(part), return_tensors="pt", input_data_format="channels_last")
        yield found["pixel_values"].to(device)


@torch.inference_mode()
def in_portions(network: Callable[[Any], Tensor], inputs: Iterator[Any]) -> Rows:
    """What a network makes of each portion, one below the other, in float64."""
    return np.concatenate([network(part).double().cpu().numpy() for part in inputs])


def embedding(output: Any) -> Tensor:
    """The projected embedding, which transformers 5 puts into an object."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def unit_length(rows: Tensor) -> Tensor:
    """The same directions `[N, D]`, of length 1."""
    return functional.normalize(rows, dim=-1)
