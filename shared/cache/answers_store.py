"""Reading and writing what a cache holds of its teacher (shared.cache.answers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shared.cache.answers import AnswersIdentity, AnswersManifest, AnswersRecord, AnswersShard
from shared.cache.identity import OtherSettings, differences
from shared.cache.manifest import Manifest, refuse_damage, unit_files
from shared.cache.paths import CachePaths, refuse_format
from shared.cache.units import Shard, UnitRecord
from shared.errors import UserError
from shared.storage.files import (
    create_exclusively,
    dump_json,
    parse_record,
    publish,
    read_all,
)
from shared.storage.reading import read_if_there
from shared.storage.urls import Place
from shared.wording import counted

AGAIN = "run the same command that made them, `prep teach` or `prep synthesize`, again"


def again(identity: AnswersIdentity) -> str:
    """How missing or damaged answers are made anew."""
    return f"run the same `{identity.command}` again"


def answers_of(cache: CachePaths) -> CachePaths:
    """Where the answers of a cache are: a folder that is laid out as the cache itself."""
    return CachePaths(cache.root / "answers")


def claim_answers(cache: CachePaths, identity: AnswersIdentity) -> None:
    """Begin a cache's answers, or check that they were begun with the same settings.

    Raises OtherSettings, naming what differs.
    """
    paths = answers_of(cache)
    if create_exclusively(dump_json(identity.to_json()), paths.identity, cache.tmp):
        return
    stored = read_answers_identity(cache)
    if stored is not None and (differing := other_answers(stored, identity)):
        raise OtherSettings(
            f"{paths.root} holds answers of other settings: {differing}; give the same, or delete "
            "that folder to ask anew"
        )


def other_answers(stored: AnswersIdentity, wanted: AnswersIdentity) -> str:
    """Return what differs, or an empty string; where the teacher lies does not count."""
    return differences(stored.compared(), wanted.compared())


def read_answers_identity(cache: CachePaths) -> AnswersIdentity | None:
    """Return what the answers were begun with, None where there are none.

    Raises UserError for a damaged file, or one of another format.
    """
    path = answers_of(cache).identity
    content = read_if_there(path)
    if content is None:
        return None

    def build(stored: Mapping[str, Any]) -> AnswersIdentity:
        refuse_format(stored, answers_of(cache).root)
        return AnswersIdentity.from_json(stored)

    return parse_record(content, path, build, "restore it, or delete its folder to ask anew")


def commit_answers(cache: CachePaths, record: AnswersRecord) -> None:
    """Make a unit's answers count: the record replaces the former one, atomically."""
    path = answers_of(cache).units / f"{record.name}.json"
    publish([dump_json(record.to_json())], path, cache.tmp)


def read_answers(cache: CachePaths) -> dict[str, AnswersRecord]:
    """Return all records by their units' names. Raises UserError for a damaged one."""
    paths = unit_files(answers_of(cache))
    found = {}
    for path, content in zip(paths, read_all(paths), strict=True):
        if content is not None:
            record = parse_answers(content, path)
            found[record.name] = record
    return found


def read_record(cache: CachePaths, unit: str) -> AnswersRecord | None:
    """Return a unit's record, None where there is none. Raises UserError for a damaged one."""
    path = answers_of(cache).units / f"{unit}.json"
    content = read_if_there(path)
    return None if content is None else parse_answers(content, path)


def parse_answers(content: bytes, path: Place) -> AnswersRecord:
    """Parse a record in a file's content. Raises UserError, naming the file, where it is none."""
    return parse_record(content, path, AnswersRecord.from_json, f"delete it and {AGAIN}")


def answered(record: AnswersRecord | None, unit: UnitRecord, count: int) -> bool:
    """Does a unit's record answer for all its shards as they are, `count` times or more?"""
    return (
        record is not None
        and [shard.samples for shard in record.shards] == [shard.file for shard in unit.shards]
        and all(shard.answers >= count for shard in record.shards)
    )


def fold_answers(identity: AnswersIdentity, records: Sequence[AnswersRecord]) -> AnswersManifest:
    """Return the manifest that the records of all units, in their order, add up to."""
    shards = tuple(shard for record in records for shard in record.shards)
    count = min((shard.answers for shard in shards), default=1)
    return AnswersManifest(identity, count, shards, sum(record.retried for record in records))


def write_answers_manifest(cache: CachePaths, manifest: AnswersManifest) -> None:
    """Publish answers/manifest.json."""
    publish([dump_json(manifest.to_json())], answers_of(cache).manifest, cache.tmp)


def open_answers(
    root: Place, manifest: Manifest | None = None, check_sizes: bool = True
) -> AnswersManifest | None:
    """Read the manifest of a cache's answers; None where there is none.

    With the samples' `manifest`, that they answer for all of its shards is checked. Raises
    UserError for damage, and for answers of an earlier state of the cache.
    """
    paths = answers_of(CachePaths(root))
    path = paths.manifest
    content = read_if_there(path)
    if content is None:
        return None
    found = parse_record(content, path, AnswersManifest.from_json, AGAIN)
    refuse_format(found.identity.to_json(), paths.root)
    if manifest is not None:
        found = replace(found, shards=_matching(found, manifest, root))
    if check_sizes:
        remedy = f"`prep verify` lists what is, then {again(found.identity)}"
        refuse_damage(paths, found.shards, remedy)
    return found


def _matching(
    answers: AnswersManifest, manifest: Manifest, root: Place
) -> tuple[AnswersShard, ...]:
    """Find each sample shard's answers. Raises UserError where some have none."""
    by_samples = {shard.samples: shard for shard in answers.shards}
    missing = [shard for shard in manifest.shards if not _answers_for(by_samples, shard)]
    if missing:
        raise UserError(
            f"{root} has changed since its answers were written: "
            f"{counted(len(missing), 'shard')} of {len(manifest.shards)} have none "
            f"(first: {missing[0].file}); {again(answers.identity)}, or train with --teacher online"
        )
    return tuple(by_samples[shard.file] for shard in manifest.shards)


def _answers_for(by_samples: Mapping[str, AnswersShard], shard: Shard) -> bool:
    found = by_samples.get(shard.file)
    return (
        found is not None
        and found.count == shard.count
        and found.layout.latent_size == shard.layout.latent_size
    )
