"""What a crash disturbs: for each command of stage one what was there before, and what it does."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep import commands, config, synthesize_command
from prep.archive import pack, unpack
from prep.cache import gc
from prep.encode import prompts
from prep.inspect import verify
from prep.synthesize.config import SynthesizeConfig
from prep.teach import command as teach
from shared.errors import UserError
from tests.support.sources import captioned, write_tar

SMALL_BATCHES = {"vae_batch_size": 2, "text_batch_size": 2}  # a unit takes several of them


@dataclass(frozen=True)
class Place:
    """Where a scenario plays: its sources, and the folder that it may change."""

    sources: Path
    root: Path

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def archive(self) -> Path:
        return self.root / "archive"

    def tar(self, name: str, *numbers: int) -> None:
        write_tar(self.sources / f"{name}.tar", captioned(numbers))

    def encode(self, *names: str, **flags: Any) -> None:
        flags = {"threads": 1, "decode_workers": 1, "report": False, **SMALL_BATCHES, **flags}
        shards = tuple(str(self.sources / f"{name}.tar") for name in names)
        commands.encode(config.EncodeConfig(shards, "tiny-sd", self.cache, **flags))

    def teach(self, answers: int) -> None:
        flags = {"threads": 1, "batch_size": 4, "answers": answers}
        teach.teach(config.TeachConfig(cache=self.cache, **flags))

    def synthesize(self, **flags: Any) -> None:
        flags = {"threads": 1, "report": False, "batch_size": 2, "text_batch_size": 2,
                 "folder_units": 2, "steps": 1, **flags}  # fmt: skip
        captions = (str(self.sources / "captions.txt"),)
        made = SynthesizeConfig(captions, "tiny-sd", self.cache, **flags)
        synthesize_command.synthesize(made)

    def synthesize_answers(self) -> None:
        self.synthesize(answers=1)

    def synthesize_many(self) -> None:
        self.synthesize(answers=1, folder_units=8)

    def gc(self) -> None:
        gc.gc(config.GcConfig(self.cache))

    def pack(self) -> None:
        pack.pack(config.PackConfig(self.cache, self.archive, threads=1))


@dataclass(frozen=True)
class Scenario:
    """What is there before, and the command that is disturbed."""

    begin: Callable[[Place], None]
    run: Callable[[Place], None]
    may_refuse: bool = False  # may a trainer find no finished cache in between?


def sources(place: Place, pictures: int = 2) -> None:
    place.tar("a", *range(pictures))
    place.tar("b", *range(10, 10 + pictures))


MANY = [f"{n:02d}" for n in range(12)]


def many(place: Place) -> None:
    """Twelve units, each done in a moment: enough to be in the middle of."""
    for n, name in enumerate(MANY):
        place.tar(name, *range(10 * n, 10 * n + 6))


def many_changed(place: Place) -> None:
    many(place)
    place.encode(*MANY)
    for n, name in enumerate(MANY):
        place.tar(name, *range(10 * n + 1, 10 * n + 7))


def first(place: Place) -> None:
    """A finished cache of a.tar, b.tar and c.tar."""
    sources(place)
    place.tar("c", 20)
    place.encode("a", "b", "c")


def changed(place: Place) -> None:
    """A finished cache whose sources have changed since: edited, and one is gone."""
    first(place)
    place.tar("a", 0, 2)


def unfolded(place: Place) -> None:
    """The manifest is the former one's, the units are new."""
    changed(place)
    place.encode("a", "b", prune=True, part="0/1")


def untidy(place: Place) -> None:
    """Shards that nothing names, two days old, and a stray."""
    unfolded(place)
    commands.finish(config.FinishConfig(place.cache, report=False))
    (place.cache / "tmp").mkdir(exist_ok=True)
    (place.cache / "tmp" / "elsewhere-4194305-spool").touch()
    age(place.cache)


def age(cache: Path) -> None:
    """Everything in the cache was last changed two days ago."""
    for path in cache.rglob("*"):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)


def archived(place: Place) -> None:
    """The archive of a cache, and no cache."""
    first(place)
    place.pack()
    shutil.rmtree(place.cache)


def archived_beside_an_older_cache(place: Place) -> None:
    changed(place)
    shutil.copytree(place.cache, place.root / "older")
    place.encode("a", "b", "c")
    place.pack()
    shutil.rmtree(place.cache)
    (place.root / "older").rename(place.cache)


def damaged(place: Place) -> None:
    """A byte of a shard is another one."""
    first(place)
    shard = next((place.cache / "shards").glob("a-*"))
    content = bytearray(shard.read_bytes())
    content[-3000] ^= 1
    shard.write_bytes(content)


def taught(place: Place) -> None:
    """A cache with an answer of each sample, and with other samples since."""
    first(place)
    place.teach(1)
    changed_since(place)


def changed_since(place: Place) -> None:
    place.tar("a", 0, 2)
    place.encode("a", "b", prune=True)


def many_encoded(place: Place) -> None:
    many(place)
    place.encode(*MANY)


def captions(place: Place) -> None:
    """Five captions, in two units."""
    (place.sources / "captions.txt").write_text("\n".join(f"kite {n}" for n in range(5)))


def captions_changed(place: Place, answers: int = 0) -> None:
    """A finished cache of captions, one of which has changed since."""
    captions(place)
    place.synthesize(answers=answers)
    (place.sources / "captions.txt").write_text("\n".join(f"kite {n}" for n in range(1, 6)))


def answered_captions_changed(place: Place) -> None:
    captions_changed(place, answers=1)


def many_captions(place: Place) -> None:
    """In eight units."""
    (place.sources / "captions.txt").write_text("\n".join(f"kite {n}" for n in range(40)))


def repair(place: Place) -> None:
    """What `verify` says is to be done."""
    with contextlib.suppress(UserError):  # without a manifest it says: run `prep encode`
        verify.verify(config.VerifyConfig(place.cache, repair=True))
    place.encode("a", "b", "c")


def unpacking(place: Place) -> None:
    unpack.unpack(config.UnpackConfig(place.archive, place.cache))


SCENARIOS = {
    "encode": Scenario(sources, lambda place: place.encode("a", "b")),
    "longer": Scenario(lambda place: sources(place, 5), lambda place: place.encode("a", "b")),
    "incremental": Scenario(changed, lambda place: place.encode("a", "b", prune=True)),
    "overwrite": Scenario(
        first,
        lambda place: place.encode("a", "b", resolution=32, overwrite=True),
        may_refuse=True,
    ),
    "synthesize": Scenario(captions, Place.synthesize),
    "synthesize more": Scenario(captions_changed, Place.synthesize),
    "synthesize answers": Scenario(captions, Place.synthesize_answers),
    "synthesize more answers": Scenario(answered_captions_changed, Place.synthesize_answers),
    "finish": Scenario(
        unfolded, lambda place: commands.finish(config.FinishConfig(place.cache, report=False))
    ),
    "report": Scenario(unfolded, lambda place: commands.finish(config.FinishConfig(place.cache))),
    "embed": Scenario(
        first,
        lambda place: prompts.embed(config.EmbedConfig(place.cache, ("a red kite", "a house"))),
    ),
    "teach": Scenario(first, lambda place: place.teach(2)),
    "teach more": Scenario(taught, lambda place: place.teach(2)),
    "gc": Scenario(untidy, Place.gc),
    "repair": Scenario(damaged, repair, may_refuse=True),
    "pack": Scenario(first, Place.pack),
    "unpack": Scenario(archived, unpacking),
    "unpack over": Scenario(archived_beside_an_older_cache, unpacking),
    "many": Scenario(many, lambda place: place.encode(*MANY)),
    "synthesize many": Scenario(many_captions, Place.synthesize_many),
    "teach many": Scenario(many_encoded, lambda place: place.teach(2)),
    "many changed": Scenario(many_changed, lambda place: place.encode(*MANY)),
}
