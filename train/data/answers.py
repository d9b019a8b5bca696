"""The teacher's answers beside a cache's samples (shared.cache.answers), one for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cache.answers import AnswersIdentity, AnswersManifest, AnswersShard, parts
from shared.cache.answers_store import again, answers_of
from shared.cache.draws import Choice, DrawSpec, answer_generator, answer_intervals, choose
from shared.cache.manifest import Manifest
from shared.cache.paths import CachePaths
from shared.cache.trajectory import alphas_sigmas
from shared.errors import UserError
from train.data.bucket import Bucket, Reader, open_reader
from train.data.local import Span

DTYPES = {"<f2": torch.float16, "<f4": torch.float32}  # as kept


@dataclass(frozen=True)
class Answers:
    """What a loader must know of a cache's answers: K of each sample, those of each bucket."""

    number: int  # K, which may be fewer than the shards hold
    spec: DrawSpec  # what view, caption, timestep and noises were drawn from
    dtype: torch.dtype
    buckets: Sequence[BucketAnswers]
    alphas_sigmas: NDArray[np.float32] | None = None  # [N, 2]: z_t is read, and noise made of it

    @property
    def trajectory(self) -> bool:
        """Does z_t lie beside the outputs?"""
        return self.alphas_sigmas is not None

    def draw(
        self, key: str, passes: int, num_captions: int, own: Choice
    ) -> tuple[np.random.Generator | None, Choice]:
        """Draw again what was answered in pass `passes` over the sample with this key.

        Dropout and guidance are no part of it, and stay `own`. There is nothing to draw noise from
        where z_t is read; a sample that a teacher drew has one view and one caption.
        """
        if self.trajectory:
            intervals = answer_intervals(self.spec.seed, key, self.spec.num_ddim_timesteps)
            return None, replace(own, index=intervals[passes % self.number])
        rng = answer_generator(self.spec, key, passes % self.number)
        asked = choose(self.spec, rng, num_captions)
        return rng, replace(asked, drop_caption=own.drop_caption, w=own.w)

    def close(self) -> None:
        """Close the shards."""
        for bucket in self.buckets:
            bucket.close()


class BucketAnswers:
    """The answers of a bucket's samples, in shards beside the bucket's own."""

    def __init__(self, root: Any, shards: Sequence[AnswersShard]) -> None:
        folder = answers_of(CachePaths(root)).root
        self.paths = [folder / shard.file for shard in shards]
        self.layouts = [shard.layout for shard in shards]  # they may differ in how many they hold
        self.strides = [layout.stride for layout in self.layouts]
        self.offsets = [layout.offsets["answers"] for layout in self.layouts]
        field = self.layouts[0].fields[0]
        self.nbytes = field.nbytes // field.shape[0]
        self._reader: Reader = open_reader(self.paths, self.strides)

    def span(self, shard: int, index: int, number: int, *views: memoryview) -> Span:
        """Find where answer `number` of sample `index` of a shard lies.

        Its outputs fill the first view, its z_t, if kept, the second.
        """
        start = index * self.strides[shard] + self.offsets[shard] + number * self.nbytes
        return Span(shard, start, self.nbytes, views)

    def heads(self, shards: Sequence[int]) -> list[bytearray]:
        """Read header and record of these shards' first samples. Raises UserError for damage."""
        found = [bytearray(self.layouts[number].head_bytes) for number in shards]
        pairs = zip(shards, found, strict=True)
        self._reader.peek([Span(n, 0, len(head), (memoryview(head),)) for n, head in pairs])
        return found

    def start(self, spans: Sequence[Span]) -> list[Span]:
        """Start reading without waiting; returns what `finish` must still be given."""
        return self._reader.start(spans)

    def finish(self, spans: Sequence[Span]) -> None:
        """Wait until all is filled. Raises UserError, naming the sample, where it cannot be."""
        self._reader.finish(spans)

    def name(self, shard: int, index: int) -> str:
        """Return how errors call a sample's answers."""
        return f"{self.paths[shard]} sample {index}"

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()


def open_bucket_answers(
    root: Any, buckets: Sequence[Bucket], answers: AnswersManifest, spec: DrawSpec
) -> Answers:
    """Return the answers of these buckets of the cache at `root`.

    Raises UserError where one of the shards holds those of other samples.
    """
    by_samples = {shard.samples: shard for shard in answers.shards}
    found = []
    for bucket in buckets:
        shards = [by_samples[shard.file] for shard in bucket.shards]
        check_layouts(root, bucket, shards, answers.identity)
        found.append(BucketAnswers(root, shards))
    identity = answers.identity
    points = alphas_sigmas(identity) if identity.trajectory else None
    return Answers(answers.answers, spec, DTYPES[identity.dtype], found, points)


def check_layouts(
    root: Any, bucket: Bucket, shards: Sequence[AnswersShard], identity: AnswersIdentity
) -> None:
    """Raise UserError where answers have not the shape of their samples, or another dtype."""
    channels = bucket.layout.fields[0].shape[1]
    for shard in shards:
        field = shard.layout.fields[0]
        fits = field.shape[2] in (channels, channels // 2)
        fits = fits and field.shape[1] == parts(identity.trajectory)
        if not fits or field.dtype != identity.dtype:
            raise UserError(
                f"{answers_of(CachePaths(root)).root / shard.file} holds answers {field.dtype} "
                f"{field.shape}, which are none to latents {bucket.layout.fields[0].shape} in "
                f"{identity.dtype}; {again(identity)}, or train with --teacher online"
            )


def answered(manifest: Manifest, answers: AnswersManifest | None) -> Manifest:
    """Return the manifest with samples that have no answers set aside, as held-out ones are."""
    if answers is None or not answers.without:
        return manifest
    without = {shard.samples: shard.without for shard in answers.shards}
    shards = tuple(
        replace(shard, heldout=tuple(sorted({*shard.heldout, *without[shard.file]})))
        for shard in manifest.shards
    )
    return replace(manifest, shards=shards)
