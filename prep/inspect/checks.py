"""What a stranger wants to know of a cache first: is it good? One line for each reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from prep.filters.filters import is_filter
from prep.inspect.stats import Summary
from shared.wording import percent

GOOD, LOOK, BAD = "good", "look", "bad"
VERDICTS = {
    GOOD: "This cache looks good.",
    LOOK: "This cache can be used, but look at what is marked below.",
    BAD: "Something is wrong with this cache.",
}
# Of rows that were rejected: a few broken files are usual, more is worth a look.
REJECTED_LOOK, REJECTED_BAD = 0.05, 0.5
# Median dB between pictures and decoded latents. Stable Diffusion's VAEs reach 24 to 32 on photos,
# less on fine texture; another picture or a wrong scale stays near 10.
PSNR_GOOD, PSNR_BAD = 20.0, 14.0
# RMS of the latents after scaling, which is about 1 for the pictures that a VAE was made for.
RMS_LOW, RMS_HIGH = 0.5, 1.6
TRUNCATED_LOOK = 0.25


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    level: str  # good, look or bad
    title: str
    detail: str


def verdict(checks: Sequence[Check]) -> tuple[str, str]:
    """Find the worst level and what it means."""
    worst = max((check.level for check in checks), key=(GOOD, LOOK, BAD).index)
    return worst, VERDICTS[worst]


def one_line(checks: Sequence[Check]) -> str:
    """Write the verdict in a line, with what it rests on unless all is good."""
    worst, sentence = verdict(checks)
    if worst == GOOD:
        return sentence
    why = " ".join(f"{check.title}: {check.detail}" for check in checks if check.level == worst)
    return f"{'worth a look' if worst == LOOK else 'something is wrong'}. {why}"


def check_all(
    summary: Summary, damage: str, psnrs: Sequence[float], no_pictures: str
) -> list[Check]:
    """Every check; `damage` and `no_pictures` say what is wrong, or are empty."""
    own = [check(summary) for check in (check_latents, check_rejected, check_captions)]
    if drawn := summary.identity.drawn:
        said = f"{str(drawn).capitalize()}: there are no pictures to compare with."
        pictures = Check(GOOD, "Pictures", said)
    else:
        pictures = check_pictures(psnrs, no_pictures)
    return [check_files(summary, damage), pictures, *own]


def check_files(summary: Summary, damage: str) -> Check:
    """Is the cache complete, and are its shards in place?"""
    if damage:
        return Check(BAD, "Files", f"{damage}; `prep verify` lists what is damaged")
    if summary.state != "complete":
        return Check(BAD, "Files", summary.state)
    return Check(
        GOOD, "Files", "Complete, and every shard has its size; `prep verify` reads every byte."
    )


def check_pictures(psnrs: Sequence[float], no_pictures: str) -> Check:
    """Do the latents decode to the pictures they were made from?"""
    if not psnrs:
        why = no_pictures or "the sources are gone or have changed"
        return Check(LOOK, "Pictures", f"None compared with its latents: {why}.")
    middle = median(psnrs)
    level = GOOD if middle >= PSNR_GOOD else LOOK if middle >= PSNR_BAD else BAD
    words = {
        GOOD: "the latents decode to the pictures",
        LOOK: "what the latents decode to differs from the pictures: compare them below",
        BAD: "the latents do not decode to the pictures",
    }
    exact = "exact" if math.isinf(middle) else f"{middle:.1f} dB"
    return Check(level, "Pictures", f"{exact} median PSNR of {len(psnrs)}: {words[level]}.")


def check_latents(summary: Summary) -> Check:
    """Have the latents about the size that the networks expect?"""
    scale = summary.identity.vae.scaling_factor
    means, stds = summary.latents_mean, summary.latents_std
    if not means:
        return Check(BAD, "Latents", "There are none.")
    squares = [m**2 + s**2 for m, s in zip(means, stds, strict=True)]
    rms = scale * math.sqrt(sum(squares) / len(squares))
    if RMS_LOW <= rms <= RMS_HIGH:
        return Check(GOOD, "Latents", f"Finite, and {rms:.2f} in size after scaling (1 is ideal).")
    return Check(LOOK, "Latents", f"{rms:.2f} in size after scaling, where 1 is ideal.")


def check_rejected(summary: Summary) -> Check:
    """How many rows could not be used? Those that the user's filters reject do not count."""
    if not summary.rejected:
        return Check(GOOD, "Rejected", "None: every row of the sources is in the cache.")
    unusable = [rejection for rejection in summary.rejected if not is_filter(rejection.reason)]
    count = sum(rejection.count for rejection in unusable)
    filtered = summary.rejected_count - count
    more = f" The filters reject {filtered:,} rows." if filtered else ""
    if not unusable:
        return Check(GOOD, "Rejected", f"Every row that the filters leave is in the cache.{more}")
    read = summary.read - filtered
    fraction = count / read
    level = GOOD if fraction <= REJECTED_LOOK else LOOK if fraction <= REJECTED_BAD else BAD
    part = f"{count:,} of {read:,} rows ({percent(count, read)})"
    detail = f"{part}, mostly for: {unusable[0].reason}."
    return Check(level, "Rejected", detail + more)


def check_captions(summary: Summary) -> Check:
    """How many captions are longer than the encoder reads?"""
    length = summary.identity.text.length
    if not summary.truncated_captions:
        return Check(GOOD, "Captions", f"All fit in the encoder's {length} tokens.")
    captions = summary.written * summary.identity.preprocessing.max_captions
    fraction = summary.truncated_captions / max(captions, 1)
    level = GOOD if fraction <= TRUNCATED_LOOK else LOOK
    return Check(
        level, "Captions",
        f"{summary.truncated_captions:,} ({percent(summary.truncated_captions, captions)}) are "
        f"longer than {length} tokens; the encoder does not read the rest.",
    )  # fmt: skip
