"""The teacher's answers in a cache: what it says of each sample, with the caption and without.

    CACHE/answers/
      identity.json              created first: teacher, schedule, timesteps, seed, precision
      units/NAME.json            commit record of one unit, named as the samples' unit
      shards/NAME-HxW-SHA12.tar  for each of the samples' shards, with the same keys in order
      manifest.json              all units folded, once every one has its answers

A shard is laid out as the samples' are (shared.cache.layout): member `KEY.answers.npy` holds K
answers `[K, 2, C, h, w]`, first the conditional output, then the unconditional one. Neither z_t nor
what it was made of is stored: `answer_generator` draws view, caption, timestep and noises again.

Answers that a solver's own steps gave (`prep synthesize --answers`) are `[K, 3, C, h, w]`: z_t is a
point of the sample's trajectory, which nobody can draw again, so it lies behind the outputs.
`answer_intervals` says at which steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from shared.cache.conditioning import TextEmbeds
from shared.cache.draws import DrawSpec
from shared.cache.identity import Identity
from shared.cache.layout import Field, Layout
from shared.cache.units import HEX
from shared.storage.typed_json import inside, not_negative, record_of, typed
from shared.style import Style, marks

FORMAT = 1
RECORD_BYTES = 512  # of a sample's KEY.json among the answers


def answers_layout(
    count: int,
    channels: int,
    size: tuple[int, int],
    dtype: str = "<f2",
    trajectory: bool = False,
) -> Layout:
    """Return the layout of a shard with `count` answers `[count, 2, C, h, w]` of each sample.

    Those of a `trajectory` are `[count, 3, C, h, w]`.
    """
    shape = (count, parts(trajectory), channels, *size)
    return Layout((Field("answers", dtype, shape),), RECORD_BYTES)


def parts(trajectory: bool) -> int:
    """Return of how many arrays an answer consists: two outputs, and z_t where it is kept."""
    return 3 if trajectory else 2


@dataclass(frozen=True)
class AnswersIdentity:
    """What all answers have in common: the content of answers/identity.json."""

    format: int
    model: str  # where the teacher was; it may lie elsewhere now
    teacher: str  # a hash over its weights (shared.models.fingerprint.signs)
    schedule: Mapping[str, Any]  # what of its scheduler's config decides z_t and what it predicts
    num_ddim_timesteps: int  # N: timesteps are drawn from the N of the solver; T for all there are
    seed: int
    mixed_precision: str  # in which it computed: no, bf16 or fp16
    dtype: str  # as kept: <f2, in tests also <f4
    unconditional: str  # a hash of the embedding that it was asked with beside the captions
    batch_size: int  # answers at a time; the last batch is filled up
    device: str  # its kind
    threads: int | None = None  # a CPU's
    trajectory: bool = False  # kept while the teacher drew the samples: z_t is stored, too
    styles: tuple[Style, ...] = ()  # LoRAs that the teacher wears

    @property
    def command(self) -> str:
        """Which command makes such answers, and missing ones again."""
        return "prep synthesize" if self.trajectory else "prep teach"

    def compared(self) -> dict[str, Any]:
        """Return what two must share: all but where the teacher and what it wears lay."""
        worn = {"styles": marks(self.styles)} if self.styles else {}
        return {**self.to_json(), "model": None, **worn}

    def to_json(self) -> dict[str, Any]:
        """Return it as stored: without what is younger than the first answers and not in use."""
        value = asdict(self)
        unused = [name for name in ("trajectory", "styles") if not value[name]]
        return {name: item for name, item in value.items() if name not in unused}

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> AnswersIdentity:
        """Invert `to_json`. Raises ValueError, naming what is wrong, for no identity."""
        found = record_of(AnswersIdentity, stored)
        if min(found.num_ddim_timesteps, found.batch_size, found.threads or 1) < 1:
            raise ValueError("a number in it is zero or below")
        if found.dtype not in ("<f2", "<f4"):
            raise ValueError(f"dtype is {found.dtype!r:.60}")
        return found


@dataclass(frozen=True)
class AnswersShard:
    """One shard of answers."""

    file: str  # relative to answers/
    samples: str  # the shard whose samples it answers for, relative to the cache
    layout: Layout
    count: int  # samples
    size: int
    sha256: str
    without: tuple[int, ...] = ()  # samples whose answers are not finite: zeros stand for them

    @property
    def answers(self) -> int:
        """K: answers of each sample."""
        return self.layout.fields[0].shape[0]

    def to_json(self) -> dict[str, Any]:
        """Return it as stored."""
        value = {**vars(self), "layout": self.layout.to_json(), "without": list(self.without)}
        return value if self.without else {k: v for k, v in value.items() if k != "without"}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> AnswersShard:
        """Invert `to_json`. Raises ValueError for what no command here writes."""
        layout = Layout.from_json(typed(value.get("layout"), Mapping[str, Any], "layout"))
        shard = record_of(AnswersShard, {**value, "layout": layout})
        not_negative(count=shard.count, size=shard.size)
        inside("shards", shard.file)
        inside("shards", shard.samples)
        if any(not 0 <= number < shard.count for number in shard.without):
            raise ValueError(f"without names samples beyond the {shard.count} there are")
        if [field.name for field in layout.fields] != ["answers"]:
            raise ValueError("its layout is none of answers")
        if shard.size != layout.shard_bytes(shard.count):
            raise ValueError(f"{shard.count} samples do not take {shard.size} bytes")
        if not HEX.fullmatch(shard.sha256):
            raise ValueError(f"sha256 is {shard.sha256!r:.100}")
        return shard


@dataclass(frozen=True)
class AnswersRecord:
    """The commit record of the answers of one unit."""

    name: str
    shards: tuple[AnswersShard, ...]
    retried: int = 0  # answers that were asked for again in fp32

    def to_json(self) -> dict[str, Any]:
        """Return it as stored in answers/units/NAME.json."""
        return {**vars(self), "shards": [shard.to_json() for shard in self.shards]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> AnswersRecord:
        """Invert `to_json`. Raises ValueError or NewerRecord for what is no record."""
        shards = typed(value.get("shards"), list[Any], "shards")
        record = record_of(AnswersRecord, {**value, "shards": []})
        not_negative(retried=record.retried)
        return replace(record, shards=tuple(map(AnswersShard.from_json, shards)))


@dataclass(frozen=True)
class AnswersManifest:
    """All answers at a glance, K of every sample but those that go without."""

    identity: AnswersIdentity
    answers: int  # K; a shard may hold more, where adding was interrupted
    shards: tuple[AnswersShard, ...]  # in the order of the samples' manifest
    retried: int = 0

    @property
    def without(self) -> int:
        """Samples that have none."""
        return sum(len(shard.without) for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return it as stored in answers/manifest.json."""
        return {
            "identity": self.identity.to_json(),
            "answers": self.answers,
            "shards": [shard.to_json() for shard in self.shards],
            "retried": self.retried,
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> AnswersManifest:
        """Invert `to_json`. Raises ValueError where it is none."""
        rows = typed(stored["shards"], list[Any], "shards")
        shards = tuple(map(AnswersShard.from_json, rows))
        count = typed(stored["answers"], int, "answers")
        if count < 1 or any(shard.answers < count for shard in shards):
            raise ValueError(f"not every shard has {count} answers")
        identity = AnswersIdentity.from_json(
            typed(stored["identity"], Mapping[str, Any], "identity")
        )
        return AnswersManifest(identity, count, shards, typed(stored["retried"], int, "retried"))


def answers_spec(answers: AnswersIdentity, samples: Identity) -> DrawSpec:
    """Return what the answers' draws are drawn from; guidance and dropout are not theirs."""
    return DrawSpec(
        seed=answers.seed,
        views=samples.preprocessing.views,
        num_ddim_timesteps=answers.num_ddim_timesteps,
        w_min=0.0,
        w_max=0.0,
        proportion_empty_prompts=0.0,
        latent_noise=samples.posterior,
    )


def embedding_hash(text: TextEmbeds) -> str:
    """Hash an embedding, as fp16, to 16 hex digits."""
    digest = hashlib.sha256()
    for tensor in (text.prompt_embeds, text.pooled_prompt_embeds):
        if tensor is not None:
            digest.update(tensor.cpu().half().contiguous().numpy().data)
    return digest.hexdigest()[:16]
