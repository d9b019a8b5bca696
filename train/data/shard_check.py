"""A look at the beginning of every shard before training starts: is it the shard it is said to be?

A size alone does not show that a disk gave zeros, or that two shards were exchanged. One page of
each does, at a cost that a cache of ten thousand shards does not notice; bit rot further inside is
for `prep verify`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from shared.errors import UserError
from train.data.answers import Answers, BucketAnswers
from train.data.bucket import Bucket

TOGETHER = 64  # shards looked at in one call, of which
THREADS = 16  # go out side by side


def check_answer_heads(buckets: Sequence[Bucket], answers: Answers) -> None:
    """Raise UserError, naming the shard, for one of the teacher's answers to other samples."""
    for bucket, beside in zip(buckets, answers.buckets, strict=True):
        filled = [number for number, shard in enumerate(bucket.shards) if shard.count]
        asked = dict(first_keys(bucket, filled))
        for number, key in first_keys(beside, filled):
            if key != asked[number]:
                raise UserError(
                    f"{beside.paths[number]} begins with the answers to sample {key}, where "
                    f"{bucket.paths[number]} has {asked[number]}; `prep verify` tells how to mend "
                    "it, or train with --teacher online"
                )


def check_heads(buckets: Sequence[Bucket]) -> None:
    """Look at the first sample of every shard, by its header, its record and its key.

    Raises UserError, naming the shard, where there is no sample, or another shard's: by the key
    that the manifest has, or, of a cache too old to say it, by a key that two shards begin with.
    """
    seen: dict[str, str] = {}
    for bucket in buckets:
        filled = [number for number, shard in enumerate(bucket.shards) if shard.count]
        for number, key in first_keys(bucket, filled):
            path, recorded = str(bucket.paths[number]), bucket.shards[number].first_key
            if recorded and key != recorded:
                raise UserError(
                    f"{path} begins with sample {key}, where the manifest has {recorded}: it holds "
                    "another shard's samples; `prep verify` lists the damage"
                )
            if key in seen:
                raise UserError(
                    f"{path} begins with the same sample ({key}) as {seen[key]}: one is a copy of "
                    "the other; `prep verify` lists the damage"
                )
            seen[key] = path


def first_keys(bucket: Bucket | BucketAnswers, shards: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield number and first key of these shards. Raises UserError where there is no sample."""
    parts = [shards[start : start + TOGETHER] for start in range(0, len(shards), TOGETHER)]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="heads") as pool:
        for part, heads in zip(parts, pool.map(bucket.heads, parts), strict=True):
            for number, head in zip(part, heads, strict=True):
                try:
                    key, _ = bucket.layouts[number].unpack_head(head)
                except ValueError as error:
                    raise UserError(
                        f"{bucket.paths[number]} is damaged: where its first sample should be is "
                        f"none ({error}); `prep verify` lists the damage"
                    ) from None
                yield number, key
