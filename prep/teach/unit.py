"""The answers of one unit: those that are there are copied, the others asked for; then a record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np

from prep.engines.job import Outcome, Tick
from prep.teach.questions import Asking, Question, Sample, read_samples
from prep.teach.teacher import Answer, Teacher, fits_fp16
from shared.cache.answers import (
    AnswersIdentity,
    AnswersRecord,
    AnswersShard,
    answers_layout,
)
from shared.cache.answers_store import answers_of, commit_answers, read_record
from shared.cache.conditioning import TextEmbeds
from shared.cache.layout import TRAILER, Layout
from shared.cache.paths import CachePaths
from shared.cache.units import Shard, UnitRecord
from shared.machine.device import pick_device
from shared.storage.files import move, staged
from shared.style import as_recorded
from shared.wording import counted

MOST_WAITING = 4  # batches of samples whose answers wait for those of one before them


@dataclass(frozen=True)
class Work:
    """What was asked, and what was there."""

    asked: int = 0
    copied: int = 0
    retried: int = 0  # in fp32
    without: int = 0  # samples

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        if not (self.asked or self.copied):
            return "nothing had to be asked"
        text = f"{counted(self.asked, 'answer')} asked for"
        text += f", {self.copied:,} copied" if self.copied else ""
        text += f"; {self.retried:,} asked again in float32" if self.retried else ""
        if self.without:
            text += f"; {counted(self.without, 'sample')} without, for they are not finite"
        return text


@dataclass(frozen=True)
class TeachJob:
    """All that a worker needs to know; it can be sent to another machine."""

    cache: CachePaths
    source: str  # of the teacher
    identity: AnswersIdentity
    asking: Asking
    empty: TextEmbeds
    answers: int  # K

    @property
    def device(self) -> str:
        """The kind of device that the teacher runs on."""
        return self.identity.device

    def load(self) -> Teacher:
        """The teacher, on a device that is free for it."""
        return load_teacher(self.source, self.identity, self.device)

    def do(self, unit: UnitRecord, networks: Teacher, tick: Tick) -> Outcome:
        """Ask for and commit a unit's answers."""
        return teach_unit(self, unit, networks, tick)


def load_teacher(source: str, identity: AnswersIdentity, device: str) -> Teacher:
    """Load the teacher as the identity says."""
    return Teacher(
        source, pick_device(device), identity.batch_size, identity.mixed_precision,
        identity.num_ddim_timesteps, identity.threads, as_recorded(identity.styles),
    )  # fmt: skip


def teach_unit(job: TeachJob, unit: UnitRecord, teacher: Teacher, tick: Tick) -> Outcome:
    """Publish a shard of answers for each of the unit's shards, then the record that counts.

    It shares nothing with other units, and doing it twice gives the same files.
    """
    asked = teacher.asked
    known = Known(job.cache, read_record(job.cache, unit.name))
    shards, without, retried = [], 0, 0
    for shard in unit.shards:
        writer = ShardWriter(job, shard, known, teacher)

        def told(count: int, so_far: int = without, writer: ShardWriter = writer) -> None:
            tick(count, so_far + len(writer.without))

        shards.append(writer.publish(unit.name, told))
        without += len(writer.without)
        retried += writer.retried
    commit_answers(job.cache, AnswersRecord(unit.name, tuple(shards), retried))
    work = Work(teacher.asked - asked, known.copied, retried, without)
    return Outcome(unit.written, work)


class Known:
    """The answers that a unit has, found by the sample's key and content."""

    def __init__(self, cache: CachePaths, record: AnswersRecord | None) -> None:
        self.cache, self.copied = cache, 0
        self.shards = record.shards if record else ()
        self._spots: dict[tuple[str, int], tuple[AnswersShard, int]] = {}
        for shard in self.shards:
            self._index(shard)

    def _index(self, shard: AnswersShard) -> None:
        """Note where each sample's answers lie; a shard that is damaged or gone has none."""
        try:
            with (answers_of(self.cache).root / shard.file).open("rb") as file:
                for number in range(shard.count):
                    file.seek(number * shard.layout.stride)
                    key, record = shard.layout.unpack_head(file.read(shard.layout.head_bytes))
                    self._spots[key, record["of"]] = shard, number
        except (OSError, ValueError, KeyError):
            return

    def find(self, sample: Sample, layout: Layout) -> list[Answer]:
        """Return up to K answers of a sample; none where it or they changed or are damaged.

        Where some were not finite, all are asked for again.
        """
        spot = self._spots.get((sample.key, sample.record["crc32"]))
        if spot is None:
            return []
        shard, number = spot
        try:
            path = answers_of(self.cache).root / shard.file
            _, record, arrays = shard.layout.read(path, number)
        except (OSError, ValueError):
            return []
        answers, wanted = arrays["answers"], layout.fields[0]
        sound = shard.layout.crc32(arrays) == record.get("crc32") and number not in shard.without
        if not sound or answers.shape[1:] != wanted.shape[1:] or answers.dtype != wanted.dtype:
            return []
        again = record.get("retried", [])
        answers = answers[: wanted.shape[0]].astype(np.float32)
        self.copied += len(answers)
        return [Answer(outputs, n in again) for n, outputs in enumerate(answers)]


class ShardWriter:
    """Asks for what one shard's samples lack, a batch at a time, in the shard's order."""

    def __init__(self, job: TeachJob, shard: Shard, known: Known, teacher: Teacher) -> None:
        self.job, self.shard, self.known, self.teacher = job, shard, known, teacher
        dtype = job.identity.dtype
        size = shard.layout.latent_size
        self.layout = answers_layout(job.answers, job.asking.channels, size, dtype)
        self.without: list[int] = []
        self.retried = 0

    def publish(self, unit: str, tick: Tick) -> AnswersShard:
        """Write the shard under the name that its content gives it."""
        height, width = self.layout.latent_size
        with staged(self._packed(tick), self.job.cache.tmp) as (file, digest):
            name = f"{unit}-{height}x{width}-{digest[:12]}.tar"
            move(file, answers_of(self.job.cache).shards / name)
        return AnswersShard(
            f"shards/{name}", self.shard.file, self.layout, self.shard.count,
            self.layout.shard_bytes(self.shard.count), digest, tuple(self.without),
        )  # fmt: skip

    def _packed(self, tick: Tick) -> Iterator[bytes]:
        """Yield the samples' answers as they lie in the shard, then the end of the tar."""
        for number, (sample, answers) in enumerate(self._answered()):
            outputs = np.stack([answer.outputs for answer in answers])
            if not fits_fp16(outputs):
                self.without.append(number)
                outputs = np.zeros_like(outputs)
            arrays = {"answers": outputs.astype(self.layout.fields[0].dtype)}
            record = {"of": sample.record["crc32"], "crc32": self.layout.crc32(arrays)}
            if again := [n for n, answer in enumerate(answers) if answer.retried]:
                record["retried"] = again
                self.retried += len(again)
            yield self.layout.pack(sample.key, record, arrays)
            tick(1, len(self.without))
        yield TRAILER

    def _answered(self) -> Iterator[tuple[Sample, list[Answer]]]:
        """Yield each sample with its K answers, in order; those that wait are few."""
        waiting: list[tuple[Sample, list[Answer]]] = []
        batch: list[tuple[list[Answer], Question]] = []  # where the answer goes, and the question
        most = MOST_WAITING * self.teacher.batch_size

        for sample in self._samples():
            answers = self.known.find(sample, self.layout)
            waiting.append((sample, answers))
            for number in range(len(answers), self.job.answers):
                batch.append((answers, self.job.asking.question(sample, number)))
                if len(batch) == self.teacher.batch_size:
                    self._ask(batch)
            if len(waiting) == most:
                self._ask(batch)
            if not batch:
                yield from waiting
                waiting.clear()
        self._ask(batch)
        yield from waiting

    def _ask(self, batch: list[tuple[list[Answer], Question]]) -> None:
        """Ask what there is to ask, if anything, and empty the batch."""
        if batch:
            found = self.teacher.ask([question for _, question in batch], self.job.empty)
            for (answers, _), answer in zip(batch, found, strict=True):
                answers.append(answer)
            batch.clear()

    def _samples(self) -> Iterator[Sample]:
        path = self.job.cache.root / self.shard.file
        return read_samples(path, self.shard.layout, self.shard.count)
