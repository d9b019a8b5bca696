"""Reads a whole cache the way a trainer does: manifest, prompts, then every byte of every sample.

    python tests/support/reader.py CACHE STOP

opens and reads it over and over until the file STOP appears, and prints JSON: how often each
manifest was seen, and what went wrong.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run by path, so the repository is not on it

from shared.cache.answers_store import open_answers  # noqa: E402
from shared.cache.conditioning import load_conditioning  # noqa: E402
from shared.cache.manifest import open_manifest  # noqa: E402
from shared.cache.paths import CachePaths  # noqa: E402
from shared.errors import UserError  # noqa: E402
from shared.storage.files import dump_json  # noqa: E402
from train.data.bucket import Bucket, open_buckets  # noqa: E402


def read_cache(root: Path) -> str:
    """A digest of manifest and prompts. Raises UserError for anything missing or damaged."""
    manifest = open_manifest(root)
    prompts = load_conditioning(CachePaths(root).conditioning).prompts
    for bucket in open_buckets(root, manifest):
        read_bucket(bucket)
    return hashlib.sha256(dump_json([manifest.to_json(), prompts])).hexdigest()


def read_answers(root: Path) -> str:
    """A digest of the answers, or what keeps a trainer from them. Raises UserError for damage."""
    try:
        answers = open_answers(root, open_manifest(root))
    except UserError as error:
        if "has changed since its answers were written" in str(error):
            return "of another state"
        raise
    if answers is None:
        return "none"
    for shard in answers.shards:
        for number in range(shard.count):
            try:
                _, record, arrays = shard.layout.read(root / "answers" / shard.file, number)
            except (OSError, ValueError) as error:
                raise UserError(f"answers/{shard.file} is damaged: {error}") from None
            if shard.layout.crc32(arrays) != record["crc32"]:
                raise UserError(f"answers/{shard.file} is damaged: sample {number}'s checksum")
    return hashlib.sha256(dump_json(answers.to_json())).hexdigest()


def read_bucket(bucket: Bucket) -> None:
    """Every array of every sample, compared with its KEY.json."""
    try:
        for number in range(len(bucket)):
            arrays = {
                field.name: np.empty(field.shape, field.dtype) for field in bucket.layout.fields
            }
            for name, array in arrays.items():
                for row in range(len(array)):
                    bucket.read(number, name, row, array[row])
            if bucket.layout.crc32(arrays) != bucket.record(number)["crc32"]:
                raise UserError(f"{bucket.name(number)} is damaged: its checksum differs")
    finally:
        bucket.close()


def main() -> None:
    root, stop = Path(sys.argv[1]), Path(sys.argv[2])
    views: Counter[str] = Counter()
    problems = []
    while not stop.exists():
        try:
            views[read_cache(root)] += 1
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    print(json.dumps({"views": views, "problems": problems}))


if __name__ == "__main__":
    main()
