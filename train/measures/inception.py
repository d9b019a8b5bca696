"""Inception features as torch-fidelity computes them, for FID."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import UserError, first_line
from shared.models.weights import check_finite

AT_ONCE = 32  # pictures
WIDTH = 2048
# torch-fidelity's, converted from the network of 2015 that FID was published with.
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
DIGEST = "6726825d"  # how the file's sha256 begins
ASKED = "--features inception"


class Inception:
    """The 2048 features before the last layer, of pictures resized as TensorFlow 1 did."""

    width = WIDTH

    def __init__(self, source: str | None, device: torch.device) -> None:
        """Open `source`, a file with weights; torch-fidelity's own, downloaded, without one."""
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            raise UserError(
                f"{ASKED} needs torch-fidelity and a torchvision that goes with this torch "
                f"({first_line(error)}): pip install '.[metrics]'"
            ) from None
        file = weights_file(source)
        check_harmless(file)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(WIDTH)], feature_extractor_weights_path=str(file)
            )
        except (RuntimeError, TypeError, KeyError) as error:
            raise UserError(
                f"{ASKED}: {file} holds other weights than torch-fidelity's Inception "
                f"({first_line(error)}); take {URL}"
            ) from None
        self.network = check_finite(network, str(file), "Inception").to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Features `[N, 2048]` of pictures `[N, H, W, 3]`."""
        found = []
        for start in range(0, len(images), AT_ONCE):
            pixels = torch.from_numpy(images[start : start + AT_ONCE]).permute(0, 3, 1, 2)
            (rows,) = self.network(pixels.contiguous().to(self.device))
            found.append(rows.double().cpu().numpy())
        return np.concatenate(found)


def weights_file(source: str | None) -> Path:
    """The file that is named, else torch-fidelity's own. Raises UserError where there is none."""
    if source is not None:
        file = Path(source).expanduser()
        if not file.is_file():
            raise UserError(f"{ASKED}:{source}: there is no file {source}; {URL} is one")
        return file
    file = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), hash_prefix=DIGEST)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{ASKED}: its weights cannot be downloaded ({first_line(error)}); where there is "
                f"a network, fetch {URL} and put it at {file}, or say {ASKED}:FILE"
            ) from None
    return file


def check_harmless(file: Path) -> None:
    """Raise UserError for a file that is more than tensors: torch-fidelity would unpickle it."""
    try:
        torch.load(file, weights_only=True, map_location="meta")
    except Exception as error:  # of pickle, zipfile, torch: whatever a stranger's file holds
        raise UserError(
            f"{ASKED}: {file} is no file of weights ({first_line(error)}); take {URL}"
        ) from None
