"""Do a cache's answers hold what their records say, and what the teacher says?"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from prep.config import VerifyConfig
from prep.encode.prefetch import chunks
from prep.inspect.reencode import TOLERANCE, relative
from prep.teach.questions import Asking, Sample
from prep.teach.unit import load_teacher
from shared.cache.answers import AnswersIdentity, AnswersShard, answers_spec
from shared.cache.answers_store import answers_of, parse_answers, read_answers
from shared.cache.conditioning import load_conditioning
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
KEY_BYTES = 16  # of a sample's first bytes, the name of its record


def damages_of_answers(cache: CachePaths, manifest: Manifest) -> Iterator[tuple[Place, str]]:
    """Yield the record and a line for each damage among the answers.

    Answers of shards that the cache has no more are none: `prep teach` asks again. Raises UserError
    where a newer version wrote a record.
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
    vae = manifest.identity.vae
    asking = Asking(answers_spec(identity, manifest.identity), vae.channels, vae.scaling_factor)
    empty = load_conditioning(cache.conditioning, manifest.layouts).unconditional
    samples = {shard.file: shard for shard in manifest.shards}
    spots = [
        (name, shard, number)
        for name, record in read_answers(cache).items()
        for shard in record.shards
        for number in range(shard.count if shard.samples in samples else 0)
        if number not in shard.without
    ]
    chosen = random.Random(config.seed).sample(spots, min(config.reencode, len(spots)))
    allowed, worst = TOLERANCE[DTYPES[identity.mixed_precision]], 0.0
    for name, shard, number in chosen:
        of = samples[shard.samples]
        sample = Sample(*of.layout.read(cache.root / of.file, number))
        _, _, arrays = shard.layout.read(answers_of(cache).root / shard.file, number)
        questions = [asking.question(sample, k) for k in range(shard.answers)]
        batches = chunks(questions, teacher.batch_size)
        again = [answer for batch in batches for answer in teacher.ask(batch, empty)]
        for k, (stored, answer) in enumerate(zip(arrays["answers"], again, strict=True)):
            error = relative(stored, answer.outputs)
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
