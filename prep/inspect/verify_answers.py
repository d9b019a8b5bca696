"""Do a cache's answers hold what their records say, and what the teacher says?"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.config import VerifyConfig
from prep.encode.prefetch import chunks
from prep.inspect.reencode import TOLERANCE, relative
from prep.teach.questions import Asking, Question, Retracing, Sample
from prep.teach.teacher import Teacher
from prep.teach.unit import load_teacher
from shared.cache.answers import AnswersIdentity, AnswersShard, answers_spec
from shared.cache.answers_store import answers_of, parse_answers, read_answers
from shared.cache.conditioning import TextEmbeds, load_conditioning
from shared.cache.manifest import Manifest
from shared.cache.paths import CachePaths
from shared.cache.units import Shard
from shared.cli.progress import Progress
from shared.errors import UserError
from shared.models.family import recorded_model
from shared.storage.files import NewerVersion, file_sha256, file_sizes
from shared.storage.reading import NotAFile, read_file
from shared.storage.urls import Place
from shared.wording import counted

DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
Outputs = NDArray[Any]  # fp16, in tests also fp32
KEY_BYTES = 16  # of a sample's first bytes, the name of its record


def damages_of_answers(cache: CachePaths, manifest: Manifest) -> Iterator[tuple[Place, str]]:
    """Yield the record and a line for each damage among the answers.

    Answers of shards that the cache has no more are none: they are made again with the others.
    Raises UserError where a newer version wrote a record.
    """
    folder = answers_of(cache).units
    shards = {shard.file: shard for shard in manifest.shards}
    for name in file_sizes(folder):
        path = folder / name
        try:
            record = parse_answers(read_file(path), path)
        except NewerVersion:
            raise
        except UserError as error:
            yield path, f"answers/units/{name} is not a record of answers: {error}"
            continue
        for shard in record.shards:
            if shard.samples in shards:
                for damage in damages_of_shard(cache, shard, shards[shard.samples]):
                    yield path, damage


def damages_of_shard(cache: CachePaths, shard: AnswersShard, samples: Shard) -> Iterator[str]:
    """Yield a line for each answer whose bytes, checksum, values or sample are wrong."""
    path = answers_of(cache).root / shard.file
    try:
        digest = file_sha256(path)
    except (FileNotFoundError, NotAFile):
        yield f"answers/{shard.file} is missing"
        return
    if digest != shard.sha256:
        yield f"answers/{shard.file} is not the file that was committed (sha256 differs)"
    without, asked_about = set(shard.without), cache.root / samples.file
    if not asked_about.exists():
        return  # which is said of the samples
    with path.open("rb") as file, asked_about.open("rb") as asked:
        for number in range(shard.count):
            sample = f"answers/{shard.file} sample {number}"
            try:
                key, record, arrays = shard.layout.unpack(file.read(shard.layout.stride))
            except ValueError as error:
                yield f"{sample}: {error}"
                continue
            asked.seek(number * samples.layout.stride)
            if key != asked.read(KEY_BYTES).decode("ascii", "replace"):
                yield f"{sample} ({key}): the cache has another sample there"
            if shard.layout.crc32(arrays) != record.get("crc32"):
                yield f"{sample} ({key}): checksum differs"
            if number not in without and not np.isfinite(arrays["answers"]).all():
                yield f"{sample} ({key}): non-finite values"


def other_answers(
    config: VerifyConfig, manifest: Manifest, identity: AnswersIdentity, progress: Progress
) -> Iterator[tuple[Place, str]]:
    """Ask the teacher again about `config.reencode` samples, as `damages_of_answers` yields.

    Raises UserError where the teacher is another one.
    """
    cache = CachePaths(config.cache)
    source = config.model or recorded_model(identity.model)
    teacher = load_teacher(source, identity, config.device)
    if teacher.signs != identity.teacher:
        raise UserError(
            f"{cache.root} has the answers of another teacher ({identity.teacher}) than {source} "
            f"({teacher.signs}); pass --model with the one that was asked"
        )
    empty = load_conditioning(cache.conditioning, manifest.layouts).unconditional
    again = Again(teacher, empty, identity, manifest)
    samples = {shard.file: shard for shard in manifest.shards}
    spots = [
        (name, shard, number)
        for name, record in read_answers(cache).items()
        for shard in record.shards
        for number in range(shard.count if shard.samples in samples else 0)
        if number not in shard.without
    ]
    chosen = random.Random(config.seed).sample(spots, min(config.reencode, len(spots)))
    worst = 0.0
    for name, shard, number in chosen:
        of = samples[shard.samples]
        sample = Sample(*of.layout.read(cache.root / of.file, number))
        _, _, arrays = shard.layout.read(answers_of(cache).root / shard.file, number)
        for k, (error, allowed) in enumerate(again.errors(sample, arrays["answers"])):
            worst = max(worst, error)
            if not error <= allowed:
                yield (
                    answers_of(cache).units / f"{name}.json",
                    f"answers/{shard.file} sample {number} ({sample.key}): answer {k} differs by "
                    f"{error:.2%} from the teacher's now (up to {allowed:.1%} is rounding)",
                )
    progress.write(
        f"asked again: {counted(len(chosen), 'sample')}; largest relative difference: {worst:.1e}"
    )


class Again:
    """Asks a teacher again what a cache says that it has answered."""

    def __init__(
        self, teacher: Teacher, empty: TextEmbeds, identity: AnswersIdentity, manifest: Manifest
    ) -> None:
        self.teacher, self.empty, self.identity = teacher, empty, identity
        vae, spec = manifest.identity.vae, answers_spec(identity, manifest.identity)
        self.asking = Asking(spec, vae.channels, vae.scaling_factor)
        self.retracing = Retracing(identity, vae.scaling_factor)
        self.allowed = TOLERANCE[DTYPES[identity.mixed_precision]]

    def errors(self, sample: Sample, stored: Outputs) -> list[tuple[float, float]]:
        """Relative errors (RMS) of a sample's answers `[K, 2 or 3, C, h, w]`, and those allowed.

        The z_t of an answer that was kept while drawing was rounded to fp16 after the teacher had
        seen it: by half a step of fp16 at most. How much that may change the outputs is measured,
        by asking also a whole step away.
        """
        numbers = range(len(stored))
        if not self.identity.trajectory:
            found = self._ask([self.asking.question(sample, k) for k in numbers])
            pairs = zip(stored, found, strict=True)
            return [(relative(outputs, now), self.allowed) for outputs, now in pairs]
        outputs, z = stored[:, :2], stored[:, 2]
        here, beside = (
            self._ask([self.retracing.question(sample, k, points[k]) for k in numbers])
            for points in (z, one_step_away(z, sample.key))
        )
        return [
            (relative(outputs[k], here[k]), self.allowed + relative(here[k], beside[k]))
            for k in numbers
        ]

    def _ask(self, questions: Sequence[Question]) -> list[NDArray[np.float32]]:
        batches = chunks(questions, self.teacher.batch_size)
        answers = (one for batch in batches for one in self.teacher.ask(batch, self.empty))
        return [answer.outputs for answer in answers]


def one_step_away(values: Outputs, key: str) -> Outputs:
    """Move each value to its neighbour in fp16, up or down as `key` decides."""
    up = np.random.default_rng(int(key, 16)).random(values.shape) < 0.5
    beside: Outputs = np.nextafter(values, np.where(up, np.inf, -np.inf).astype(values.dtype))
    return beside
