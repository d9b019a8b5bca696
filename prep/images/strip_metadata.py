"""A picture's pixels without what is said about them, which may be broken while they are fine."""

from __future__ import annotations

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
# Chunks of PNG that are packed: one that unpacks to gigabytes is no mistake, and not forgiven.
PACKED = (b"iCCP", b"zTXt", b"iTXt")
SCAN, COMMENT, APPLICATIONS = 0xDA, 0xFE, range(0xE0, 0xF0)  # markers of JPEG


def strip_metadata(data: bytes) -> bytes | None:
    """Leave only the pixels of a picture; None where there is nothing to leave out.

    Of a PNG the ancillary chunks go (gamma, resolution, EXIF ...), of a JPEG the segments of
    applications and comments (JFIF, EXIF, Adobe's).
    """
    if data.startswith(PNG):
        kept = _critical_chunks(data)
    elif data.startswith(JPEG):
        kept = _pixels_segments(data)
    else:
        return None
    return kept if len(kept) < len(data) else None


def _critical_chunks(data: bytes) -> bytes:
    """Of a PNG; a critical chunk's name begins with a capital letter."""
    kept, at = [PNG], len(PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        if name[:1].isupper() or name in PACKED:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _pixels_segments(data: bytes) -> bytes:
    """Of a JPEG: tables and frame header, then all from the first scan on."""
    kept, at = [JPEG], len(JPEG)
    while at < len(data) and data[at] == 0xFF and data[at + 1 : at + 2] != bytes([SCAN]):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] not in (*APPLICATIONS, COMMENT):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])
