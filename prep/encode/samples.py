"""What a row becomes on its way through the pipeline: Decoded, Embedded, then Encoded.

A row that is rejected goes the whole way too, with the reason, because every row is accounted for.
"""

from __future__ import annotations

from dataclasses import dataclass

from prep.cache.reuse import Arrays, Latents
from prep.images.crop import Picture
from prep.rows.row import Row


@dataclass(frozen=True)
class Decoded:
    """A row whose picture is decoded, found in the cache or rejected."""

    row: Row  # without its bytes, its captions shuffled where the flags say so
    image_sha256: str
    pictures: tuple[Picture, ...] = ()  # one per view, all of one size; none if copied or rejected
    copied: Latents | None = None  # what the cache has of the picture
    reason: str = ""  # why the row is rejected, if it is


@dataclass(frozen=True)
class Embeds:
    """The embeddings of a sample's captions, `[captions, ...]`."""

    arrays: Arrays  # `prompt_embeds` `[captions, L, D]`, `pooled_prompt_embeds` `[captions, P]`
    truncated: int  # captions that are longer than the encoder reads


@dataclass(frozen=True)
class Embedded:
    """A decoded row with the embeddings of its captions; None if it was rejected before."""

    decoded: Decoded
    embeds: Embeds | None = None
    reason: str = ""

    @property
    def needs_vae(self) -> bool:
        """Are there pixels that are to become latents?"""
        return bool(self.decoded.pictures) and not self.reason


@dataclass(frozen=True)
class Encoded:
    """A finished sample, or a rejected row with what was made of it until then."""

    row: Row
    image_sha256: str
    embeds: Embeds | None
    latents: Latents | None
    reason: str = ""

    @property
    def arrays(self) -> Arrays:
        """The arrays of a finished sample under their names in the cache."""
        assert self.embeds is not None
        assert self.latents is not None
        found, latents = self.embeds.arrays, self.latents
        return found | {"latents": latents.values, "time_ids": latents.time_ids}
