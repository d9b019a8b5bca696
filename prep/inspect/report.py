"""report.html: a page that shows whether a cache is good.

It is derived from the cache and safe to delete, and needs nothing beside itself: no scripts, no
network, pictures within. Everything in it that others wrote goes through `visible` and is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import numpy as np
from diffusers import AutoencoderKL
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from prep.config import OriginalsFlags
from prep.inspect.charts import HEIGHT, LIMIT, WIDTH, Histogram, histograms
from prep.inspect.checks import Check, check_all, one_line, verdict
from prep.inspect.find_originals import Originals, WrongShards
from prep.inspect.originals import Pair, draw, pairs, vae_of
from prep.inspect.stats import Summary, flat, speed, summarize
from prep.rows.unit import Unit
from shared.cache.manifest import Manifest, check_shards, open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.sanitize import visible
from shared.storage.files import dump_json, publish
from shared.storage.temporary import sweep
from shared.wording import percent, size_of

PICTURES = 12
SEED = 0  # every report of a cache shows the same samples
SHOWN_SIDE = 512  # pixels of a picture in the page, at most
LOSSLESS_SIDE = 128
ENCODE_SECONDS = 60.0  # that the pictures may take at the end of an encode


@dataclass(frozen=True)
class Contents:
    """What the page shows beside the summary."""

    pairs: Sequence[Pair] = ()
    histograms: Sequence[Histogram] = ()
    no_pictures: str = ""  # why there are none or fewer
    damage: str = ""
    unasked: str = ""  # where originals may be that were not asked for

    @property
    def psnrs(self) -> list[float]:
        """PSNR in dB of the pairs that have an original."""
        return [pair.psnr for pair in self.pairs if pair.psnr is not None]


def report(config: OriginalsFlags) -> None:
    """Write CACHE/report.html. Raises UserError where there is no cache."""
    cache = CachePaths(config.cache)
    vae = load_vae_for(cache, config)
    sweep(cache.tmp)
    print(write_report(cache, vae, Originals(config.shards)))


def load_vae_for(cache: CachePaths, flags: OriginalsFlags) -> AutoencoderKL | str:
    """Load the cache's VAE, or say why it cannot be had. Raises UserError without a cache."""
    identity = open_manifest(cache.root, check_sizes=False).identity
    try:
        return vae_of(identity, flags)
    except UserError as error:
        return str(error)


def write_after_encode(
    cache: CachePaths, vae: AutoencoderKL, images: int, seconds: float,
    units: Sequence[Unit] = (),
) -> None:  # fmt: skip
    """Write the report at the end of `prep encode`, which it never makes fail, and the speed.

    `units` are those that were named: the originals of others are looked for in local files.
    """
    try:
        if images:
            row = {"images": images, "seconds": round(seconds, 3), "device": str(vae.device)}
            publish([dump_json(row)], cache.root / "throughput.json", cache.tmp)
        print(write_report(cache, vae, Originals(units=units), ENCODE_SECONDS))
    except UserError as error:
        print(f"no report: {error}", file=sys.stderr)


def write_report(
    cache: CachePaths, vae: AutoencoderKL | str, originals: Originals,
    seconds: float = float("inf"),
) -> str:  # fmt: skip
    """Write the page, with pictures if `vae` is one (else it says why); returns a line about it.

    Looking for originals and decoding stops after `seconds`.
    """
    manifest = open_manifest(cache.root, check_sizes=False)
    summary = summarize(cache)
    contents = gather(cache, manifest, vae, originals, seconds)
    path = cache.root / "report.html"
    publish([page(summary, contents).encode("utf-8", "backslashreplace")], path, cache.tmp)
    return f"{path}: {one_line(checks_of(summary, contents))}"


def gather(
    cache: CachePaths, manifest: Manifest, vae: AutoencoderKL | str, originals: Originals,
    seconds: float,
) -> Contents:  # fmt: skip
    """Pictures and histograms, or what is in their way."""
    try:
        check_shards(cache, manifest)
        charts = histograms(cache, manifest.identity.vae, manifest.shards)
        if isinstance(vae, str):
            return Contents(histograms=charts, no_pictures=vae)
        stored = draw(cache, manifest.shards, PICTURES, SEED)
        found = list(pairs(cache, manifest.identity, vae, stored, originals, seconds))
        return Contents(found, charts, unasked=originals.unasked_note())
    except WrongShards:
        raise
    except UserError as error:
        damage = str(error).partition(": the cache")[0]
        return Contents(no_pictures="the cache is damaged", damage=damage)


def checks_of(summary: Summary, contents: Contents) -> list[Check]:
    """Make the checks that the page lists."""
    why_none = contents.no_pictures or contents.unasked
    return check_all(summary, contents.damage, contents.psnrs, why_none)


def page(summary: Summary, contents: Contents) -> str:
    """Render the HTML."""
    folder = files("prep.inspect")
    style = (folder / "report.css").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    own = {"size": size_of, "speed": speed, "picture": data_uri, "number": number, "code": code}
    environment.filters |= own
    checks = checks_of(summary, contents)
    level, sentence = verdict(checks)
    return environment.from_string((folder / "report.html.jinja").read_text("utf-8")).render(
        style=Markup(style),
        # The one style sheet that the page may use, by its hash; scripts and network: none.
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        s=summary, c=contents, checks=checks, level=level, sentence=sentence,
        name=Path(summary.cache).resolve().name, groups=identity_groups(summary.identity.to_json()),
        missing=missing_pictures(summary, contents),
        psnr=median(contents.psnrs) if contents.psnrs else None,
        most=max((bucket.samples for bucket in summary.buckets), default=1),
        percent=percent, infinity=math.inf, plot={"width": WIDTH, "height": HEIGHT, "limit": LIMIT},
    )  # fmt: skip


def missing_pictures(summary: Summary, contents: Contents) -> str:
    """Say why there are fewer pictures than there could be, or nothing."""
    wanted = min(PICTURES, summary.written)
    if contents.no_pictures:
        return f"Not shown: {contents.no_pictures}."
    if len(contents.pairs) < wanted:
        return (
            f"{len(contents.pairs)} of {wanted} are shown, because the encode was not to wait "
            "for more; `python -m prep report` shows all."
        )
    return f"Without their originals: {contents.unasked}." if contents.unasked else ""


def identity_groups(identity: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title and names with values for each part of the identity."""
    titles = {"vae": "VAE", "text": "Text encoders", "shapes": "Batches and device"}
    plain = {name: item for name, item in identity.items() if not isinstance(item, Mapping)}
    groups = [("Cache", plain)] + [
        (titles.get(name, name.replace("_", " ").capitalize()), item)
        for name, item in identity.items()
        if isinstance(item, Mapping)
    ]
    return [
        (title, [(name.replace("_", " "), value) for name, value in flat(item)])
        for title, item in groups
    ]


def number(value: float) -> str:
    """Two decimals, with a real minus sign."""
    return f"{value:.2f}".replace("-", "−")


def code(text: str) -> Markup:
    """Escaped text whose `backticks` mark code."""
    parts = visible(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )


def data_uri(pixels: NDArray[np.uint8]) -> Markup:
    """Write a picture `[H, W, 3]` as a URI that holds it: PNG if it is small, else JPEG."""
    image = Image.fromarray(pixels)
    small = max(image.size) <= LOSSLESS_SIDE
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=88)
    kind = "png" if small else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
