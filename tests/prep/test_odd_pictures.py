"""Odd pictures are written, broken ones rejected, and none runs a program or eats the memory."""

import os
import struct
import subprocess
import sys

import pytest
from diffusers import AutoencoderKL
from PIL import Image

from shared.errors import UserError
from tests.support.accounts import account, encoded_tar
from tests.support.sources import (
    ROOT,
    TINY_SD,
    captioned,
    encode,
    file_of,
    photo,
    png,
    write_tar,
)

PNG = png(1)


def orientation_as_text():
    """A JPEG whose EXIF says that the orientation is the word `abc`."""
    entry = struct.pack("<HHI4s", 0x0112, 2, 4, b"abc\0")
    tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
    return file_of(photo(1), "JPEG", exif=tags)


AVIF = file_of(photo(1), "AVIF")
BAD_PICTURES = {
    "cut png": PNG[: len(PNG) // 2],
    "cut jpeg": file_of(photo(1), "JPEG")[:400],
    "cut avif": AVIF[: len(AVIF) // 2],
    # 30,000 x 30,000 pixels in a few bytes of header
    "bomb": b"BM" + struct.pack("<IHHIIiiHH24x", 0, 0, 0, 54, 40, 30000, 30000, 1, 24),
}
GOOD_PICTURES = {
    "1x1": png(1, 1, 1),
    "1x4000": png(1, 1, 4000),
    "4000x1": png(1, 4000, 1),
    "cmyk": file_of(photo(1).convert("CMYK"), "JPEG"),
    "16 bit": file_of(Image.new("I;16", (80, 70), 30000)),
    "palette": file_of(photo(1).quantize(16), "GIF"),
    "alpha": file_of(photo(1).convert("RGBA")),
    "grey": file_of(photo(1).convert("L"), "JPEG"),
    "grey alpha": file_of(photo(1).convert("LA")),
    "bits": file_of(photo(1).convert("1"), "TIFF"),
    "odd exif": orientation_as_text(),
}


# --- pictures -----------------------------------------------------------------------------------


def test_odd_pictures_are_written_and_broken_ones_rejected(tmp_path):
    pictures = GOOD_PICTURES | BAD_PICTURES
    files = [f for k, data in pictures.items() for f in ((f"{k}.jpg", data), (f"{k}.txt", b"a"))]
    reasons = account(encoded_tar(tmp_path, *files))
    assert {key: reasons[key] for key in GOOD_PICTURES} == dict.fromkeys(GOOD_PICTURES, "")
    assert reasons.pop("bomb") == "too many pixels"
    bad = [key for key in BAD_PICTURES if key != "bomb"]
    assert {key: reasons[key] for key in bad} == dict.fromkeys(bad, "cannot be decoded")


def test_a_line_of_pixels_does_not_eat_the_memory(tmp_path):
    """1 x 4000 to a short side of 512 would be 1 G pixels, 4 GB, before the crop."""
    (tmp_path / "line.png").write_bytes(png(1, 1, 4000))
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from prep.images.crop import BadImage, Framing, prepare\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: prepare(Path(sys.argv[1]).read_bytes(), Framing(512))\n"
        "except BadImage: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    words = [sys.executable, "-c", script, tmp_path / "line.png"]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    grown = int(answer.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 1_500_000_000


def test_mistakes_in_file_kinds_do_not_run_other_programs(tmp_path):
    """PIL would hand a PostScript file to Ghostscript, whatever its name says."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 72 72\n%%EndComments\nshowpage\n"
    marker = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / "a.jpg").write_bytes(postscript)
    script = (
        "import sys; from pathlib import Path\n"
        "from prep.images.crop import BadImage, Framing, prepare\n"
        "try: prepare(Path(sys.argv[1]).read_bytes(), Framing(64))\n"
        "except BadImage as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.jpg"],
        cwd=ROOT, env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert answer.stdout == "PostScript is not read: convert it to PNG or JPEG\n"
    assert not marker.exists()


# --- too many rejected --------------------------------------------------------------------------


def test_latents_that_fp16_cannot_hold_are_rejected(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for part in TINY_SD.iterdir():
        if part.name != "vae":
            (model / part.name).symlink_to(part)
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae")
    vae.quant_conv.weight.data *= 1e8
    vae.save_pretrained(model / "vae")
    tar = write_tar(tmp_path / "a.tar", captioned(range(3)))
    with pytest.raises(UserError, match=r"3 of 3 rows rejected.*'non-finite latents'"):
        encode(tar, tmp_path / "cache", model=str(model), max_reject_fraction=1.0)
