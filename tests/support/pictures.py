"""Pictures of every odd kind, and bombs, with what should become of them."""

import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from tests.support.sources import SIDE, file_of, photo

# --- colour profiles ----------------------------------------------------------------------------


def icc(space, tags):
    """An ICC v2 monitor profile, written by hand from the specification (ICC.1:2001-04)."""
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ",
        bytes(12), b"acsp",
    )  # fmt: skip
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)  # D50
    return header.ljust(128, b"\0") + table + body


def xyz(*values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def gamma(value):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


WHITE = {b"wtpt": xyz(0.9642, 1.0, 0.8249)}
ADOBE = icc(  # Adobe RGB (1998), its primaries adapted to D50
    b"RGB ",
    WHITE
    | {b"rXYZ": xyz(0.60974, 0.31111, 0.01947), b"gXYZ": xyz(0.20528, 0.62567, 0.06087)}
    | {b"bXYZ": xyz(0.14919, 0.06322, 0.74457)}
    | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(2.2)),
)
LINEAR_GREY = icc(b"GRAY", WHITE | {b"kTRC": gamma(1.0)})
DISPLAY_P3 = icc(
    b"RGB ",
    WHITE
    | {b"rXYZ": xyz(0.51512, 0.24120, -0.00105), b"gXYZ": xyz(0.29198, 0.69225, 0.04189)}
    | {b"bXYZ": xyz(0.15710, 0.06657, 0.78407)}
    | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(2.2)),
)

# --- bombs --------------------------------------------------------------------------------------


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(*chunks, size=(8, 8)):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    rows = zlib.compress(b"\0" * 8 * 25)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(
        b"IEND", b""
    )  # fmt: skip


ZEROS = zlib.compress(bytes(200_000_000), 9)  # 200 kB


def many_scans():
    """A progressive JPEG of 168 megapixels whose last scan comes 200 times."""
    content = file_of(photo(1), "JPEG", progressive=True)
    frame, last = content.index(b"\xff\xc2"), content.rindex(b"\xff\xda")
    size = struct.pack(">HH", 12_000, 14_000)
    scans = content[last:-2] * 200
    return content[: frame + 5] + size + content[frame + 9 : last] + scans + content[-2:]


BOMBS = {
    "large png": (png_with(size=(60_000, 60_000)), "too many pixels"),
    "text bomb": (png_with(chunk(b"zTXt", b"a\0\0" + ZEROS)), "cannot be decoded"),
    "itxt bomb": (png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)), "cannot be decoded"),
    "profile bomb": (png_with(chunk(b"iCCP", b"a\0\0" + ZEROS)), "cannot be decoded"),
    "scan bomb": (many_scans(), "too many pixels"),
    "truncated jpeg": (file_of(photo(1, 300, 300), "JPEG")[:-2000], "cannot be decoded"),
    "nothing": (b"", "empty file"),
}


# --- every kind of picture ----------------------------------------------------------------------


def sixteen_bit_rgb() -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    levels = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0))
    body = header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def faded(mode: str) -> Image.Image:
    """A picture with an alpha channel, RGBA or LA."""
    image = photo(5).convert(mode.removesuffix("A"))
    image.putalpha(photo(6).convert("L"))
    return image


def animation(kind: str, frames: int, **options) -> bytes:
    """A picture of several frames."""
    pictures = [photo(n, SIDE, SIDE) for n in range(frames)]
    return file_of(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)


def turned(kind: str, orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return file_of(photo(7, 90, 70), kind, exif=tags)


def many_texts() -> bytes:
    """A PNG whose texts are each within the limits of one, and far too long together."""
    info = PngImagePlugin.PngInfo()
    for number in range(100):
        info.add_itxt(f"text {number}", "x" * 900_000, zip=True)
    return file_of(photo(1), pnginfo=info)


def tiff_that_is_its_own_next_page() -> bytes:
    """Its directory names itself as the following one: pages without end."""
    content = bytearray(file_of(photo(8), "TIFF"))
    (start,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, start)
    struct.pack_into("<I", content, start + 2 + 12 * entries, start)
    return bytes(content)


def good_pictures() -> dict[str, bytes]:
    """Those that any viewer shows."""
    palette = photo(3).quantize(32)
    levels = np.arange(0, SIDE**2 * 16, 16, dtype=np.uint16).reshape(SIDE, SIDE)
    return {
        **{f"jpeg turned {n}": turned("JPEG", n) for n in range(10)},  # 0 and 9 mean nothing
        **{f"png turned {n}": turned("PNG", n) for n in range(1, 9)},
        "alpha": file_of(faded("RGBA")), "grey and alpha": file_of(faded("LA")),
        "alpha webp": file_of(faded("RGBA"), "WEBP"), "grey": file_of(photo(1).convert("L")),
        "grey jpeg": file_of(photo(1).convert("L"), "JPEG"),
        "one bit": file_of(photo(1).convert("1")),
        "cmyk": file_of(photo(2).convert("CMYK"), "JPEG"),
        "cmyk tiff": file_of(photo(2).convert("CMYK"), "TIFF"),
        "16 bit grey": file_of(Image.fromarray(levels)),
        "16 bit tiff": file_of(Image.fromarray(np.full((80, 80), 999, np.uint16)), "TIFF"),
        "16 bit rgb": sixteen_bit_rgb(), "float tiff": file_of(photo(1).convert("F"), "TIFF"),
        "lab tiff": file_of(photo(1).convert("LAB"), "TIFF"),
        "ycbcr": file_of(photo(1).convert("YCbCr"), "JPEG"),
        "palette": file_of(palette),
        "palette and alpha": file_of(palette, transparency=bytes(range(32))),
        "one transparent colour": file_of(photo(1), transparency=(1, 2, 3)),
        "display p3": file_of(photo(2), "JPEG", icc_profile=DISPLAY_P3),
        "adobe rgb": file_of(photo(2), icc_profile=ADOBE),
        "broken profile": file_of(photo(2), "JPEG", icc_profile=DISPLAY_P3[:150]),
        "profile that is none": file_of(photo(2), icc_profile=b"no profile"),
        "broken exif": file_of(photo(2), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        "animated gif": animation("GIF", 3), "animated webp": animation("WEBP", 3),
        "animated png": animation("PNG", 3), "many frames": animation("GIF", 60),
        "pages of tiff": animation("TIFF", 3), "endless tiff": tiff_that_is_its_own_next_page(),
        "progressive": file_of(photo(1), "JPEG", progressive=True),
        "1x1": file_of(Image.new("RGB", (1, 1))), "1x20000": file_of(Image.new("RGB", (1, 20_000))),
        "20000x1": file_of(Image.new("RGB", (20_000, 1))), "bmp": file_of(photo(1), "BMP"),
        "words behind": file_of(photo(1), "JPEG") + b"<script>alert(1)</script>" * 1000,
    }  # fmt: skip


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Those that none shows whole, and why they are rejected."""
    broken = "cannot be decoded"
    return {
        **BOMBS,
        "many texts": (many_texts(), broken),
        "truncated png": (file_of(photo(1))[:-3000], broken),
        "truncated webp": (file_of(photo(1), "WEBP")[:-300], broken),
        "truncated gif": (file_of(photo(1), "GIF")[:-3000], broken),
        "truncated header": (file_of(photo(1))[:20], broken),
        "text": (b"this is no picture at all", broken),
        "page": (b"<!doctype html><title>404</title>",
                 "a web page instead of a picture: download it again"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>',
                "SVG is not read: convert it to PNG or JPEG"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                "PostScript is not read: convert it to PNG or JPEG"),
        "wrong crc": (file_of(photo(1)).replace(b"IHDR", b"IHDS"), broken),
        "no pixels": (png_with(size=(0, 0)), broken),
        "large gif": (b"GIF89a" + b"\xff" * 4 + b"\0\0\0,\0\0\0\0" + b"\xff" * 4 + b"\0\2\0;",
                      "too many pixels"),
        "nulls": (bytes(5000), broken),
    }  # fmt: skip
