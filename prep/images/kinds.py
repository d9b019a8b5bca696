"""What a file is, told from its first bytes: its name may say something else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

HEAD_BYTES = 4096  # that tell


class Sort(Enum):
    """What can be done with a kind of file."""

    READ = "a picture that is read"
    HEIF = "a picture that is read with the extra heif"
    PICTURE = "a picture that is not read"
    DRAWING = "a document or a drawing, which may hold pictures"
    VIDEO = "a video or sound"
    ARCHIVE = "other files in one"
    TAR = "a tar, or something packed that may be one"
    TABLE = "rows"
    PAGE = "what a server sends instead of a file"
    POINTER = "what git keeps instead of a file"
    TEXT = "text"
    OTHER = "something else"


NO_PICTURE = "no picture"


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, with an article where a sentence needs one."""

    name: str
    sort: Sort

    @property
    def is_picture(self) -> bool:
        """Is it one, whether it can be read or not?"""
        return self.sort in (Sort.READ, Sort.HEIF, Sort.PICTURE)


def kind_of(head: bytes) -> Kind | None:
    """Tell what begins with these bytes (`HEAD_BYTES`, or all there are); None if unknown."""
    for matches, name, sort in _KINDS:
        if matches(head):
            return Kind(name, sort)
    return None


def why_no_picture(head: bytes) -> str:
    """Why a file that should be a picture, and that begins so, cannot be decoded."""
    if not head:
        return "empty file"
    kind = kind_of(head)
    if kind is None or kind.sort is Sort.READ:
        return "cannot be decoded"
    if kind.sort is Sort.POINTER:
        return f"{kind.name} instead of a picture: get the files with `git lfs pull`"
    if kind.sort is Sort.PAGE:
        return f"{kind.name} instead of a picture: download it again"
    if kind.sort in (Sort.PICTURE, Sort.DRAWING):
        return f"{kind.name} is not read: convert it to PNG or JPEG"
    return f"{kind.name}, no picture"


def no_picture_in(head: bytes) -> str:
    """Why a file whose name does not say that it is a picture is none; nothing if it is one.

    `NO_PICTURE` where it may be anything: it stands for no picture.
    """
    kind = kind_of(head)
    if kind is not None and kind.sort in (Sort.PICTURE, Sort.DRAWING, Sort.VIDEO):
        return why_no_picture(head)
    return "" if kind is not None and kind.is_picture else NO_PICTURE


def not_a_source(head: bytes, again: str = "download it again") -> str:
    """Say what a file that is no source is, and what to pass instead; nothing where it may be one.

    `again`: what to do where the right file was not sent.
    """
    kind = kind_of(head)
    if kind is None or kind.sort in (Sort.TAR, Sort.TABLE):
        return ""
    if kind.is_picture:
        return f"a picture ({kind.name}); pass the folder that it is in"
    advice = {
        Sort.ARCHIVE: "unpack it and pass the folder",
        Sort.PAGE: again,
        Sort.POINTER: "get the files with `git lfs pull`",
        Sort.TEXT: "if it lists pictures, pass the folder that it is in",
    }
    return f"{kind.name}; {advice.get(kind.sort, 'leave it out of --shards')}"


def _starts(*beginnings: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(beginnings)


def _matches(pattern: bytes) -> Callable[[bytes], bool]:
    return re.compile(pattern, re.DOTALL).match  # type: ignore[return-value]


def _riff(*forms: bytes) -> Callable[[bytes], bool]:
    return lambda head: head[:4] == b"RIFF" and head[8:12] in forms


def _brands(*wanted: bytes, major: bool = False) -> Callable[[bytes], bool]:
    """Match an ISO base media file of one of these brands; by the first brand alone, or by any."""

    def matches(head: bytes) -> bool:
        if head[4:8] != b"ftyp":
            return False
        if major:
            return head[8:12] in wanted
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}
        return not brands.isdisjoint(wanted)

    return matches


def _markup(head: bytes) -> bytes:
    """Take the text of a page or a drawing in lower case; nothing where it is neither."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_markup = text.startswith((b"<!", b"<?", b"<s", b"<S", b"<h", b"<H", b"<b", b"<B"))
    return text.lower() if is_markup else b""


def is_tga(head: bytes) -> bool:
    """Is it a Targa, which has no mark at its beginning: do all fields of a header make sense?"""
    if len(head) < 18:
        return False
    mapped, image, depth, flags = head[1], head[2], head[16], head[17]
    depths = {1: (8,), 2: (16, 24, 32), 3: (8, 16), 9: (8,), 10: (16, 24, 32), 11: (8, 16)}
    sized = head[12:14] != b"\0\0" and head[14:16] != b"\0\0"
    # One of colours by number has a table of them, any other none.
    table = head[5:7] != b"\0\0" and head[7] in (15, 16, 24, 32)
    fits = table if mapped == 1 else mapped == 0 and head[3:8] == bytes(5)
    return (
        depth in depths.get(image, ())
        and fits
        and sized
        and (image in (1, 9)) == (mapped == 1)
        and flags & 0xC7 == 0  # no interleaving, no odd number of bits of alpha
    )


_KINDS: tuple[tuple[Callable[[bytes], bool], str, Sort], ...] = (
    (_starts(b"\xff\xd8\xff"), "JPEG", Sort.READ),
    (_starts(b"\x89PNG\r\n\x1a\n"), "PNG", Sort.READ),
    (_riff(b"WEBP"), "WebP", Sort.READ),
    (_starts(b"GIF87a", b"GIF89a"), "GIF", Sort.READ),
    (_matches(rb"BM.{4}\x00{4}"), "BMP", Sort.READ),
    (_matches(rb"II\*\x00.{4}CR"), "camera raw (CR2)", Sort.PICTURE),
    (_starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF", Sort.READ),
    (_brands(b"avif", b"avis"), "AVIF", Sort.READ),
    (_brands(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1",
             b"msf1"), "HEIC", Sort.HEIF),
    (_starts(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0"), "JPEG 2000", Sort.READ),
    (_matches(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s"), "PPM", Sort.READ),
    (_starts(b"qoif"), "QOI", Sort.READ),
    (_starts(b"DDS "), "DDS", Sort.READ),
    (_starts(b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"), "JPEG XL", Sort.PICTURE),
    (_starts(b"8BPS"), "Photoshop", Sort.PICTURE),
    (_starts(b"gimp xcf"), "GIMP", Sort.PICTURE),
    (_starts(b"v/1\x01"), "OpenEXR", Sort.PICTURE),
    (_starts(b"#?RADIANCE", b"#?RGBE"), "Radiance HDR", Sort.PICTURE),
    (_brands(b"crx ", major=True), "camera raw (CR3)", Sort.PICTURE),
    (_starts(b"FUJIFILMCCD-RAW"), "camera raw (RAF)", Sort.PICTURE),
    (_starts(b"IIRO", b"IIRS", b"MMOR"), "camera raw (ORF)", Sort.PICTURE),
    (_starts(b"IIU\0"), "camera raw (RW2)", Sort.PICTURE),
    (_starts(b"FOVb"), "camera raw (X3F)", Sort.PICTURE),
    (_starts(b"\0MRM"), "camera raw (MRW)", Sort.PICTURE),
    (_starts(b"BPG\xfb"), "BPG", Sort.PICTURE),
    (_starts(b"FLIF"), "FLIF", Sort.PICTURE),
    (_starts(b"II\xbc"), "JPEG XR", Sort.PICTURE),
    (_starts(b"\0\0\1\0", b"icns"), "ICO or ICNS", Sort.PICTURE),
    (_matches(rb"\x00\x00\x02\x00[\x01-\xff]\x00.{3}\x00"), "ICO or ICNS", Sort.PICTURE),
    (_matches(rb"\x0a[\x00\x02-\x05]\x01[\x01\x02\x04\x08]"), "PCX", Sort.PICTURE),
    (_starts(b"\x01\xda\0", b"\x01\xda\1"), "SGI", Sort.PICTURE),
    (_starts(b"SIMPLE  ="), "FITS", Sort.PICTURE),
    (_matches(rb"P[F7f]\n"), "PFM or PAM", Sort.PICTURE),
    (_starts(b"AT&TFORM"), "DjVu", Sort.DRAWING),
    (_starts(b"%PDF"), "PDF", Sort.DRAWING),
    (_starts(b"%!PS", b"\xc5\xd0\xd3\xc6"), "PostScript", Sort.DRAWING),
    (_starts(b"\xd7\xcd\xc6\x9a"), "WMF", Sort.DRAWING),
    (_matches(rb"\x01\x00\x00\x00.{36} EMF"), "EMF", Sort.DRAWING),
    (lambda head: b"<svg" in _markup(head) and b"<html" not in _markup(head), "SVG", Sort.DRAWING),
    (lambda head: head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"), "a video (MP4, MOV)",
     Sort.VIDEO),
    (_starts(b"\x1aE\xdf\xa3"), "a video (WebM, Matroska)", Sort.VIDEO),
    (_riff(b"AVI "), "a video (AVI)", Sort.VIDEO),
    (_starts(b"\0\0\1\xba", b"\0\0\1\xb3"), "a video (MPEG)", Sort.VIDEO),
    (_matches(rb"\x47.{187}\x47.{187}\x47"), "a video (MPEG)", Sort.VIDEO),
    (_starts(b"FLV\1"), "a video (FLV)", Sort.VIDEO),
    (_starts(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), "a video (WMV)", Sort.VIDEO),
    (_starts(b"OggS"), "a video or sound (Ogg)", Sort.VIDEO),
    (_starts(b"ID3", b"fLaC", b"\xff\xfb", b"\xff\xf3", b"\xff\xf1"), "sound", Sort.VIDEO),
    (_riff(b"WAVE"), "sound", Sort.VIDEO),
    (_starts(b"PK\3\4", b"PK\5\6"), "a zip archive", Sort.ARCHIVE),
    (_starts(b"Rar!\x1a\x07"), "a RAR archive", Sort.ARCHIVE),
    (_starts(b"7z\xbc\xaf\x27\x1c"), "a 7z archive", Sort.ARCHIVE),
    (_starts(b"BZh"), "a file packed with bzip2", Sort.ARCHIVE),
    (_starts(b"\xfd7zXZ\0"), "a file packed with xz", Sort.ARCHIVE),
    (_starts(b"\x04\x22\x4d\x18"), "a file packed with lz4", Sort.ARCHIVE),
    (lambda head: head[257:262] == b"ustar" or head[:2] == b"\x1f\x8b"
     or head[:4] == b"\x28\xb5\x2f\xfd", "a tar", Sort.TAR),
    (_starts(b"PAR1"), "a Parquet file", Sort.TABLE),
    (_starts(b"ARROW1"), "an Arrow file", Sort.TABLE),
    (_starts(b"SQLite format 3\0"), "an SQLite database", Sort.OTHER),
    (_starts(b"\x89HDF\r\n\x1a\n"), "an HDF5 file", Sort.OTHER),
    (_starts(b"\x93NUMPY"), "a NumPy array", Sort.OTHER),
    (_starts(b"\0\5\x16\x07"), "a macOS resource fork", Sort.OTHER),
    (_matches(rb".{6}\x00\x00\{\""), "a safetensors file", Sort.OTHER),
    (_starts(b"version https://git-lfs.github.com/"), "a Git LFS pointer", Sort.POINTER),
    (lambda head: _markup(head).startswith((b"<!doctype html", b"<head", b"<body", b"<script"))
     or b"<html" in _markup(head), "a web page", Sort.PAGE),
    (lambda head: _markup(head).startswith(b"<?xml"), "XML", Sort.PAGE),
    (_matches(rb"(\xef\xbb\xbf)?\s*[\[{]\s*[\"{\[\]}]"), "JSON", Sort.TEXT),
    (is_tga, "Targa", Sort.READ),
)  # fmt: skip
