"""All answers of a cache in one manifest, and what the former one named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from prep.cache.answers_reuse import former_answers
from prep.cache.retire import date
from shared.cache.answers import AnswersIdentity, AnswersManifest, AnswersRecord
from shared.cache.answers_store import (
    again,
    answered,
    answers_of,
    fold_answers,
    read_answers,
    read_answers_identity,
    write_answers_manifest,
)
from shared.cache.paths import CachePaths
from shared.cache.units import UnitRecord
from shared.errors import UserError
from shared.storage.files import guard, sync_folder
from shared.wording import counted


def publish_fold(
    cache: CachePaths,
    identity: AnswersIdentity,
    units: Sequence[UnitRecord],
    records: Mapping[str, AnswersRecord],
) -> AnswersManifest:
    """Write the manifest of these units' answers, and drop those of units that are no more.

    A record that the former manifest does not know may be of a unit that another process is about
    to commit, and stays.
    """
    manifest = fold_answers(identity, [records[unit.name] for unit in units])
    if former := former_answers(cache):
        retire_former(cache, former, manifest)
    folded = {shard.file for shard in former.shards} if former else set()
    gone = records.keys() - {unit.name for unit in units}
    known = {name for name in gone if all(s.file in folded for s in records[name].shards)}
    drop_strangers(cache, known)  # first: the next manifest no longer tells whose they were
    write_answers_manifest(cache, manifest)
    return manifest


class KeptAnswers:
    """The answers that were kept while these units were drawn, on their way into the manifest.

    A trainer finds answers to the samples that it sees at any moment: first the answers' manifest
    names those of the former state and of the next (`announce`), then the samples' manifest is
    replaced, then the answers' names those of the next alone (`settle`).
    """

    def __init__(
        self, cache: CachePaths, identity: AnswersIdentity, units: Sequence[UnitRecord]
    ) -> None:
        """Read their records. Raises UserError where a unit's answers are missing."""
        self.cache, self.identity = cache, identity
        self.units = [unit for unit in units if unit.shards]
        self.records = read_answers(cache)
        lacking = [u for u in self.units if not answered(self.records.get(u.name), u, 1)]
        if lacking:
            raise UserError(
                f"{cache.root}: the answers of {counted(len(lacking), 'unit')} are missing (first: "
                f"{lacking[0].name}); {again(identity)}, or delete {answers_of(cache).root}"
            )

    @staticmethod
    def of(cache: CachePaths, units: Sequence[UnitRecord]) -> KeptAnswers | None:
        """Those of a cache; None where it keeps none."""
        identity = read_answers_identity(cache)
        if identity is None or not identity.trajectory:
            return None
        return KeptAnswers(cache, identity, units)

    def announce(self) -> None:
        """Let the manifest name the answers of both states, if they differ."""
        records = [self.records[unit.name] for unit in self.units]
        manifest, former = fold_answers(self.identity, records), former_answers(self.cache)
        both = manifest
        if former is not None and former.identity == self.identity:
            present = {shard.samples for shard in manifest.shards}
            gone = [shard for shard in former.shards if shard.samples not in present]
            both = replace(manifest, shards=(*manifest.shards, *gone))
        if both != former:
            write_answers_manifest(self.cache, both)

    def settle(self) -> str:
        """Let the manifest name these units' answers alone; returns a few words about them."""
        manifest = publish_fold(self.cache, self.identity, self.units, self.records)
        aside = f", of {counted(manifest.without, 'sample')} none" if manifest.without else ""
        return f"{counted(manifest.answers, 'answer')} of each{aside}"


def retire_former(cache: CachePaths, former: AnswersManifest, manifest: AnswersManifest) -> None:
    """Date the shards that the former manifest names and the next one does not (retire.py)."""
    kept = {shard.file for shard in manifest.shards}
    date(answers_of(cache), [s.file for s in former.shards if s.file not in kept])


def drop_strangers(cache: CachePaths, names: set[str]) -> None:
    """Remove the records of units that the cache has no more; their shards are left to gc."""
    folder = answers_of(cache).units
    if names:
        with guard(folder):
            for name in sorted(names):
                (folder / f"{name}.json").unlink(missing_ok=True)
            sync_folder(folder)
