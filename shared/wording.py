"""Numbers as people say them: counts, bytes, durations, rates. One place, so that none reads 0."""

from __future__ import annotations


def counted(count: int, what: str, plural: str = "") -> str:
    """Say `1 file`, `2,000 files`; the plural is `what` with an s unless given."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def size_of(count: float) -> str:
    """Say bytes: `12.3 MB`."""
    if round(count) < 1000:
        return counted(round(count), "byte")
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def duration(seconds: float) -> str:
    """Say `0.3 s`, `45 s`, `12 min`, `3.4 h`, `2.1 days`; something never reads as nothing."""
    for size, unit, least in ((86400, "days", 2), (3600, "h", 2), (60, "min", 2)):
        if (amount := seconds / size) >= least:
            return f"{amount:.0f} {unit}" if amount >= 10 else f"{amount:.1f} {unit}"
    if seconds >= 9.5:
        return f"{seconds:.0f} s"
    if seconds >= 0.05 or not seconds:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.2g} ms"


def rate(per_second: float, what: str) -> str:
    """Say `1,234 pictures/s`, `3.4 pictures/s`; below one a second `2.5 s/picture`."""
    if per_second < 0.95:
        return f"{duration(1 / per_second)}/{what}"
    return f"{per_second:,.{0 if per_second >= 9.95 else 1}f} {what}s/s"


def percent(part: float, whole: float) -> str:
    """Say `12.5%`; something never reads as nothing, nor nearly all as all."""
    if not whole or not part:
        return "0%"
    amount = 100 * part / whole
    if amount < 0.1:
        return "<0.1%"
    if 99.9 < amount < 100:
        return ">99.9%"
    return f"{amount:.1f}%" if amount < 99.95 else "100%"
