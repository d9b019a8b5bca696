"""identity.json: what every sample of a cache has in common, claimed by whoever starts it.

Settings never mix. `prep encode --overwrite` replaces them as a whole: `generation` counts how
often that was done (it is missing where it never was), and a unit's record says which generation
made it. So the replacement of this one file makes every former unit stale at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from shared.cache.paths import CachePaths, refuse_format
from shared.errors import UserError
from shared.storage.files import create_exclusively, dump_json, parse_record
from shared.storage.reading import read_if_there
from shared.storage.typed_json import record_of

ADDED = ("config", "configs", "tokenizers")  # what older caches do not say of their encoders
# What is left out of the file where there is none of it; all else is null there.
OMITTED = ("source", "shuffle", "threads", "generation", "stored", "drawn", "answers", *ADDED)
REMEDY = "restore it, or choose another --cache"


@dataclass(frozen=True)
class VaeIdentity:
    """The VAE that made the latents."""

    fingerprint: str
    channels: int  # C of the latents
    downscale: int  # pixels per latent, each way
    scaling_factor: float
    dtype: str
    rescale: float | None = None  # of its stream; None until it is calibrated
    source: str | None = None  # where it is another than the model's own
    config: Mapping[str, Any] | None = None  # what its weights do not show


@dataclass(frozen=True)
class TextIdentity:
    """The text encoders that made the embeddings."""

    fingerprints: tuple[str, ...]
    length: int  # L, tokens
    width: int  # D, of the joined states
    force_zeros: bool  # is the unconditional embedding zeros?
    pooled_width: int | None = None  # P
    hidden_state: int | None = None
    clip_skip: int = 0
    dtype: str = "float32"
    configs: Mapping[str, Any] | None = None
    tokenizers: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of a picture and its captions, under the names of the flags."""

    resolution: int
    views: int
    max_captions: int
    center_crop: bool
    random_crop: bool = False
    random_flip: bool = False
    seed: int = 0
    min_size: int = 0
    buckets: Mapping[str, int | bool] | None = None
    where: str | None = None
    max_pwatermark: float | None = None
    shuffle: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Shapes:
    """Batch shapes and threads: with them the encoders give the same bytes every time.

    `device` is the kind alone: which of a machine's GPUs it is makes no difference. `threads` are
    a CPU's; where a GPU computes they decide nothing, and each process takes what it may use.
    """

    vae_batch_size: int
    text_batch_size: int
    device: str
    threads: int | None = None


@dataclass(frozen=True)
class Drawn:
    """How a teacher drew the samples of a cache without pictures (`prep synthesize`)."""

    teacher: str  # fingerprint of its UNet
    schedule: str  # a hash of what its scheduler's configuration decides
    sampler: str
    steps: int
    guidance_scale: float
    per_caption: int
    seed: int
    batch_size: int  # samples drawn at once
    mixed_precision: str
    answers: int = 0  # K: outputs of the solver's steps that are kept of each sample

    def __str__(self) -> str:
        return (
            f"drawn by the teacher ({self.sampler}, {self.steps} steps, "
            f"guidance scale {self.guidance_scale:g})"
        )


@dataclass(frozen=True)
class Identity:
    """The content of identity.json."""

    format: int
    family: str
    model: str
    latents: str  # "mean" or "posterior"
    vae: VaeIdentity
    text: TextIdentity
    preprocessing: Preprocessing
    shapes: Shapes
    generation: int = 0
    drawn: Drawn | None = None  # None where there were pictures
    # As read from a file, with what this version does not know and without what older ones did not.
    stored: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def posterior(self) -> bool:
        """Do the latents hold the posterior's logvar beside its mean?"""
        return self.latents == "posterior"

    @property
    def command(self) -> str:
        """Which command makes such a cache, and its missing units again."""
        return "prep synthesize" if self.drawn else "prep encode"

    def to_json(self) -> dict[str, Any]:
        """Return it as in the file it was read from, else as `prep encode` writes it."""
        if self.stored is not None:
            return dict(self.stored)
        value = {**asdict(self), "stored": None}
        value["text"]["fingerprints"] = list(self.text.fingerprints)
        return _without_omitted(value)

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Identity:
        """Invert `to_json`. Raises ValueError, naming what is wrong, for no identity."""
        known = {name: value for name, value in stored.items() if name != "stored"}
        found = record_of(Identity, known, ignore_unknown=True)
        made, vae, shapes = found.preprocessing, found.vae, found.shapes
        numbers = (
            vae.channels, vae.downscale, made.resolution, made.views, made.max_captions,
            found.text.length, found.text.width, shapes.vae_batch_size, shapes.text_batch_size,
            1 if shapes.threads is None else shapes.threads,
            *((found.drawn.steps, found.drawn.batch_size) if found.drawn else ()),
        )  # fmt: skip
        if min(numbers) < 1 or vae.scaling_factor <= 0 or found.generation < 0:
            raise ValueError("a number in it is zero or below")
        if found.latents not in ("mean", "posterior"):
            raise ValueError(f"latents is {found.latents!r:.60}, neither mean nor posterior")
        if found.drawn and not 0 <= found.drawn.answers <= found.drawn.steps:
            raise ValueError(f"drawn.answers is {found.drawn.answers}")
        if shapes.device != "cpu":  # older caches record a CPU's threads all the same
            shapes = replace(shapes, threads=None)
        return replace(found, shapes=shapes, stored=dict(stored))


OURS = {field.name for field in fields(Identity)} - {"generation", "drawn", "stored"}


def _without_omitted(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_omitted(item) if isinstance(item, dict) else item
        for name, item in value.items()
        if item or name not in OMITTED
    }


class OtherSettings(UserError):
    """The cache was made with settings that differ."""


def claim_identity(cache: CachePaths, identity: Identity, remedy: str) -> None:
    """Create `identity.json`, or check that the one there says the same.

    Model and VAE may lie elsewhere where their weights are the same. Raises OtherSettings that
    names what differs; `remedy` ends the sentence.
    """
    if create_exclusively(dump_json(identity.to_json()), cache.identity, cache.tmp):
        return
    stored = read_identity(cache)
    if stored is not None and (differing := other_settings(stored, identity)):
        raise OtherSettings(f"{cache.root} was made with other settings: {differing}; {remedy}")


def read_identity(cache: CachePaths) -> Identity | None:
    """Return what the cache was started with; None where there is none yet.

    Raises UserError for a file of that name that is damaged, of another format, or not ours: none
    of these is ever to be replaced.
    """
    content = read_if_there(cache.identity)
    if content is None:
        return None

    def build(stored: Mapping[str, Any]) -> Identity:
        if not stored.keys() >= OURS:
            raise UserError(
                f"{cache.identity} is not one that `prep encode` writes; choose another --cache"
            )
        refuse_format(stored, cache.root)
        return Identity.from_json(stored)

    return parse_record(content, cache.identity, build, REMEDY)


def command_of(cache: CachePaths) -> str:
    """Name the command that makes the cache, as far as its identity says."""
    with contextlib.suppress(UserError):
        if identity := read_identity(cache):
            return identity.command
    return "prep encode"


def refuse_other_kind(cache: CachePaths, stored: Identity | None, drawn: bool) -> None:
    """Raise UserError where samples of pictures and samples that a teacher draws would mix."""
    if stored is None or (stored.drawn is not None) == drawn:
        return
    made = "was drawn by the teacher" if stored.drawn else "was made from pictures"
    raise UserError(f"{cache.root} {made} (`{stored.command}`); choose another --cache")


def other_settings(stored: Identity, wanted: Identity) -> str:
    """Return what differs, or an empty string; what decides no bytes does not count."""
    return differences(_deciding(stored.to_json()), _deciding(wanted.to_json()))


def _deciding(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where the same weights lie, and the CPU's threads on a GPU."""
    vae = {name: value for name, value in identity["vae"].items() if name != "source"}
    shapes = identity["shapes"]
    if shapes["device"] != "cpu":  # older caches record them all the same
        shapes = {name: value for name, value in shapes.items() if name != "threads"}
    drawn = identity.get("drawn") and {"answers": 0, **identity["drawn"]}
    return {**identity, "model": None, "vae": vae, "shapes": shapes, "drawn": drawn}


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """Return `latents.size is 64 there, 32 here` for all that differs, or an empty string."""
    found = []
    for name in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(name), wanted.get(name)
        if name in ADDED and None in (old, new):
            continue  # one of them is too old to say
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if nested := differences(old, new, f"{prefix}{name}."):
                found.append(nested)
        elif old != new:
            found.append(f"{prefix}{name} is {_short(old)} there, {_short(new)} here")
    return "; ".join(found)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "..."
