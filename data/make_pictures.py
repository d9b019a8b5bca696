"""Write the captioned pictures in `data/pictures`, byte for byte the same every time.

    python -m data.make_pictures                   # about half a minute

The layout is img2dataset's: tars of KEY.jpg (or .png, .webp), KEY.txt and KEY.json. Picture i of a
split is a pure function of (seed, i), so the number of tars is not part of what is drawn.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.shapes import Scene, caption, draw_scene, render

HERE = Path(__file__).resolve().parent
SPLITS = {"train": (1, 2048), "heldout": (2, 1024)}  # name -> (seed, pictures)
PER_TAR = 512
CANVASES = ((72, 72), (96, 96), (128, 128), (112, 84), (84, 112), (128, 80))  # width, height
FORMATS = {"jpg": 0.6, "png": 0.2, "webp": 0.2}  # extension -> share


def square_render(
    seed: int, index: int, side: int, style: str = "plain"
) -> tuple[Scene, NDArray[np.uint8]]:
    """Scene and picture `[side, side, 3]` number `index`, as `prep` would crop and resize it."""
    scene, image = picture(seed, index, style)
    crop = min(image.size)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    image = image.crop((left, top, left + crop, top + crop))
    return scene, np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def picture(seed: int, index: int, style: str = "plain") -> tuple[Scene, Image.Image]:
    """Scene and RGB picture number `index` of the split drawn with `seed`, in a style."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    scene = draw_scene(rng)
    width, height = CANVASES[int(rng.integers(len(CANVASES)))]
    return scene, Image.fromarray(render(scene, rng, width, height, style))


def encode(image: Image.Image, extension: str) -> bytes:
    """The picture as a file of the given kind."""
    buffer = io.BytesIO()
    if extension == "jpg":
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    elif extension == "webp":
        image.save(buffer, "WEBP", quality=92, method=4)
    else:
        image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_tar(path: Path, split: str, indices: range, style: str = "plain") -> None:
    """One img2dataset-style tar with the pictures `indices` of `split`, in a style."""
    seed = SPLITS[split][0]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            scene, image = picture(seed, index, style)
            choice = np.random.Generator(np.random.Philox(key=[seed + 1000, index]))
            extension = str(choice.choice(list(FORMATS), p=list(FORMATS.values())))
            data = encode(image, extension)
            key = f"{index:06d}"
            record = {
                "key": key,
                "caption": caption(scene),
                "status": "success",
                "url": f"shapes://{split}/{key}.{extension}",
                "width": image.width,
                "height": image.height,
                "original_width": image.width,
                "original_height": image.height,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            _add(tar, f"{key}.{extension}", data)
            _add(tar, f"{key}.txt", caption(scene).encode())
            _add(tar, f"{key}.json", json.dumps(record, sort_keys=True).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def main() -> None:
    """Write every split."""
    for split, (_, count) in SPLITS.items():
        folder = HERE / "pictures" / split
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, count, PER_TAR)):
            path = folder / f"{number:05d}.tar"
            write_tar(path, split, range(start, min(start + PER_TAR, count)))
            print(f"{path.relative_to(HERE)}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
