"""Held-out captions and pictures, read from an evaluation cache."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.cache.conditioning import TextEmbeds, load_conditioning
from shared.cache.manifest import Manifest, open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.storage.urls import Place
from shared.wording import counted
from train.data.bucket import Bucket, largest_bucket
from train.data.shard_check import check_heads
from train.data.soundness import fault
from train.measures.space import LEAST
from train.state.checkpoint import latest_checkpoint, read_progress
from train.state.run_paths import recorded_cache


def open_eval_cache(given: Place | None, run: Path, trained_on: Place) -> tuple[Place, Manifest]:
    """Open the cache to evaluate on: what is given, else the run's own.

    Raises UserError where that one has nothing set aside, or had not when the run was trained.
    """
    cache = given or recorded_cache(trained_on, "--eval-cache")
    manifest = open_manifest(cache)
    if str(cache) != str(trained_on):
        return cache, manifest
    other = "pass --eval-cache a cache of other pictures"
    if not manifest.heldout:
        if given is not None:  # it was named, so it is meant
            return cache, manifest
        raise UserError(
            f"{cache}, on which {run} was trained, has no samples set aside; {other}, or "
            f"set some aside for runs to come: python -m prep finish --cache {cache} --holdout 1000"
        )
    latest = latest_checkpoint(run)
    if latest is None or read_progress(latest).terms.get("holdout") != manifest.holdout:
        raise UserError(
            f"{run} may have been trained on the samples that {cache} holds out now (they "
            f"were set aside later, or its checkpoints are gone); {other}, or train anew"
        )
    print(
        f"on {counted(manifest.heldout, 'sample')} held out of {cache} "
        "(--eval-cache chooses others)",
        file=sys.stderr,
    )
    return cache, manifest


@dataclass(frozen=True)
class HeldOut:
    """Captions with their embeddings, and the latents of the pictures they belong to."""

    captions: tuple[str, ...]
    texts: TextEmbeds
    latents: Tensor  # [N, C, h, w] fp32, scaled, the posterior's mean
    empty: TextEmbeds

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, count: int) -> HeldOut:
        """The first `count` of them."""
        few = slice(0, count)
        return HeldOut(self.captions[few], self.texts[few], self.latents[few], self.empty)

    def digest(self) -> str:
        """A hash over captions and latents, 16 hex digits."""
        found = hashlib.sha256(json.dumps(self.captions).encode())
        found.update(self.latents.contiguous().numpy().data)
        return found.hexdigest()[:16]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        channels, height, width = self.latents.shape[1:]
        return channels, height, width


def load_heldout(root: Place, manifest: Manifest, count: int, least: int = LEAST) -> HeldOut:
    """The first `count` samples of the cache's largest bucket, in the order of the shards.

    Of a cache that has samples set aside only these. Raises UserError where they are fewer than
    `least`, what the distance needs.
    """
    bucket = open_heldout(root, manifest)
    count = min(count, len(bucket))
    if count < least:
        kind = "Fréchet distance" if least == LEAST else "distance"
        raise UserError(
            f"{root}: {counted(count, 'sample')}; a {kind} needs at least {least}, better 1000"
        )
    return read_heldout(root, manifest, bucket, range(count))


def open_heldout(root: Place, manifest: Manifest) -> Bucket:
    """Open the cache's largest bucket, or what of it is set aside where anything is."""
    bucket = largest_bucket(root, manifest, heldout=manifest.heldout > 0)
    check_heads([bucket])
    return bucket


def read_heldout(root: Place, manifest: Manifest, bucket: Bucket, numbers: range) -> HeldOut:
    """Read the samples with these numbers and close the bucket.

    Raises UserError for a damaged one.
    """
    channels = manifest.identity.vae.channels
    arrays = {
        field.name: np.empty((len(numbers), *field.shape[1:]), dtype=np.float16)
        for field in bucket.layout.fields  # the latents first
        if field.name in ("latents", "prompt_embeds", "pooled_prompt_embeds")
    }
    for row, number in enumerate(numbers):
        for name, array in arrays.items():
            bucket.read(number, name, 0, array[row])
        if wrong := fault([array[row] for array in arrays.values()], channels):
            raise UserError(f"{bucket.name(number)} holds {wrong}; see `prep verify`")
    captions = tuple(caption_of(bucket, number) for number in numbers)
    bucket.close()
    means = arrays.pop("latents")[:, :channels].astype(np.float32)
    return HeldOut(
        captions,
        TextEmbeds(**{name: torch.from_numpy(array) for name, array in arrays.items()}),
        torch.from_numpy(means) * manifest.identity.vae.scaling_factor,
        load_conditioning(CachePaths(root).conditioning, manifest.layouts).unconditional,
    )


def caption_of(bucket: Bucket, number: int) -> str:
    """A sample's first caption; nothing where its record had no room for one."""
    captions = bucket.record(number).get("captions")
    return str(captions[0]) if isinstance(captions, list) and captions else ""
