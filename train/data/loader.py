"""Batches from a cache: threads read exactly the bytes a step wants, straight into batch slots.

The stages of a batch; threads go through them several batches ahead of training (prefetch.py):

1. which samples: this rank's slice of a global batch (`Order.rank_batch`);
2. what of each: view, caption, dropout, timestep and guidance, drawn by position (`choose`), or
   as the teacher was asked (`Answers.draw`);
3. where it lies: a span of bytes per run of neighbouring fields (`Bucket.spans`);
4. reading starts (`Bucket.start`), and while the disk works the noise is drawn (`_draw`), unless
   it follows from a z_t that is read (`derive_noise`), and what else the objective wants
   (`draw_more`);
5. reading ends (`Bucket.finish`), and what no encoder gives is refused (`_check`);
6. x0 is sampled from the posterior, if that is stored, and scaled (`finish_latents`);
7. the batch is copied to the device, beside the step before it (`_fill_and_send`).

No worker processes and no mmap: both were measured several times slower (docs/loader.md).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cache.conditioning import TextEmbeds
from shared.cache.draws import Choice, DrawSpec, choose, draw_more, draw_noises, generator
from shared.cache.latents import finish_latents
from shared.cache.layout import Layout
from shared.cache.trajectory import derive_noise
from shared.errors import UserError
from shared.machine.device import use_device
from train.data.answers import Answers
from train.data.batch import Batch, Slot, allocate
from train.data.bucket import Bucket, Rows
from train.data.local import Span
from train.data.order import Order
from train.data.prefetch import Ring
from train.data.soundness import fault, fault_of_answer

Place = tuple[int, int]  # a shard of a bucket, and a sample in it
# Where a sample's noises come from, if they are drawn, and all else that is drawn of it.
Drawn = tuple[np.random.Generator | None, Choice]

CPU = torch.device("cpu")
AHEAD = 4  # batches being filled while one is in use
REMOTE_AHEAD = 16  # likewise of a remote cache, a thread each: what is far must be asked for early


@dataclass(frozen=True)
class LatentSpec:
    """How raw latents become x0: C channels, multiplied by the VAE's scaling factor."""

    channels: int
    scaling_factor: float


@dataclass
class RingEntry:
    """An entry of the ring: a slot for each bucket, all in the same memory."""

    slots: list[Slot]
    copied: torch.cuda.Event | None = None  # when the last copy to the device has ended


class Loader:
    """Iterates over a rank's batches from global batch `start` on, without end.

    Batches are on `device`. On the CPU a batch is valid until the next one is asked for: its
    memory is then filled again. `waited` is how many seconds the consumer has waited for batches.
    `threads` read and draw; a remote cache has as many as there are batches `ahead`. With `answers`
    a batch has one of each sample, and what it was drawn with.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        order: Order,
        spec: DrawSpec,
        latents: LatentSpec,
        unconditional: TextEmbeds,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 4,
        device: torch.device = CPU,
        ahead: int | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.buckets, self.order, self.spec, self.answers = buckets, order, spec, answers
        self.latents, self.unconditional = latents, unconditional
        self.start, self.rank, self.world, self.device = start, rank, world, device
        remote = any(bucket.remote for bucket in buckets)
        self.ahead = ahead or (REMOTE_AHEAD if remote else AHEAD)
        self.threads = max(threads, self.ahead) if remote else threads
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ring: Ring[RingEntry, tuple[Batch, torch.cuda.Event | None]] | None = None

    @property
    def waited(self) -> float:
        """Seconds that the consumer of `batches` has waited for the loader."""
        return self._ring.waited if self._ring else 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self) -> Generator[Batch, None, None]:
        """Yield the endless stream; closing it ends the threads."""
        entries = [RingEntry(self._allocate()) for _ in range(self.ahead + 1)]
        initializer = partial(use_device, self.device)
        self._ring = Ring(self._fill_and_send, entries, self.threads, initializer)
        stream = self._ring.run(self.start)
        try:
            for batch, copied in stream:
                if copied is not None:
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(copied)
                    for tensor in batch.tensors().values():
                        tensor.record_stream(current)  # its memory belongs to the copies' stream
                yield batch
        finally:
            stream.close()
            for bucket in self.buckets:
                bucket.close()
            if self.answers is not None:
                self.answers.close()

    def names(self, index: int) -> list[str]:
        """Return how errors call the samples of global batch `index`."""
        bucket, ids = self.order.batch(index)
        return [self.buckets[bucket].name(int(sample)) for sample in ids]

    def _fill_and_send(self, index: int, entry: RingEntry) -> tuple[Batch, torch.cuda.Event | None]:
        """Read a batch and start its copy to the device; with the event at the copy's end."""
        if entry.copied is not None:
            entry.copied.synchronize()  # the pinned memory is still being read until then
        batch = self.fill(index, entry.slots)
        if self._copies is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self._copies):
            sent = batch.to(self.device, non_blocking=True)
            entry.copied = self._copies.record_event()
        return sent, entry.copied

    def fill(self, index: int, slots: Sequence[Slot]) -> Batch:
        """Read global batch `index` into its bucket's slot. Raises UserError for damage."""
        number, ids, positions = self.order.rank_batch(index, self.rank, self.world)
        bucket, slot, samples = self.buckets[number], slots[number], ids.tolist()
        passes = None
        if self.answers is not None:
            passes = self.order.rank_passes(index, self.rank, self.world).tolist()
        drawn = self._choose(bucket, samples, positions.tolist(), passes)
        spans = []
        for at, (sample, (_, choice)) in enumerate(zip(samples, drawn, strict=True)):
            rows = wanted_rows(bucket.layout, choice)
            views = [slot.views[name][at] for name, _ in rows]
            spans += bucket.spans(sample, rows, views)
        rest = bucket.start(spans)
        asked = None if passes is None else self._ask(number, slot, samples, passes)
        # The noise is drawn while the disk works.
        latent_noises = [self._draw(slot, row, *pair) for row, pair in enumerate(drawn)]
        draw_more(self.spec, positions.tolist(), slot.arrays)
        bucket.finish(rest)
        if asked is not None:
            self._take_answers(number, slot, asked, [choice for _, choice in drawn])
        for row, (sample, noise) in enumerate(zip(samples, latent_noises, strict=True)):
            self._check(slot, row, bucket, sample, drawn[row][1])
            finish_latents(
                slot.arrays["raw"][row], noise, self.latents.scaling_factor,
                slot.batch.latents[row],
            )  # fmt: skip
            if self.answers is not None and self.answers.alphas_sigmas is not None:
                derive_noise(
                    slot.arrays["z"][row], slot.arrays["latents"][row],
                    self.answers.alphas_sigmas[drawn[row][1].index], slot.arrays["noise"][row],
                )  # fmt: skip
        return slot.batch

    def _choose(
        self,
        bucket: Bucket,
        samples: Sequence[int],
        positions: Sequence[int],
        passes: Sequence[int] | None,
    ) -> list[Drawn]:
        """What to read of each sample, and where its noises come from."""
        drawn: list[Drawn] = []
        if self.answers is None or passes is None:
            captions = bucket.num_captions(samples)
            for position, num_captions in zip(positions, captions, strict=True):
                rng = generator(self.spec, position)
                drawn.append((rng, choose(self.spec, rng, num_captions)))
            return drawn
        known = bucket.keys(samples)
        for position, number, (key, num_captions) in zip(positions, passes, known, strict=True):
            own = choose(self.spec, generator(self.spec, position), num_captions)
            drawn.append(self.answers.draw(key, number, num_captions, own))
        return drawn

    def _ask(
        self, number: int, slot: Slot, samples: Sequence[int], passes: Sequence[int]
    ) -> tuple[list[Place], list[Span]]:
        """Start reading a batch's answers; where they lie, and what is left to read."""
        assert self.answers is not None
        bucket, answers = self.buckets[number], self.answers.buckets[number]
        located = [bucket.locate(sample) for sample in samples]
        places = [(shard, start // bucket.layout.stride) for shard, start in located]
        views = [slot.views[name] for name in ("answers", "z") if name in slot.views]
        spans = [
            answers.span(*place, turn % self.answers.number, *into)
            for place, turn, *into in zip(places, passes, *views, strict=True)
        ]
        return places, answers.start(spans)

    def _take_answers(
        self,
        number: int,
        slot: Slot,
        asked: tuple[Sequence[Place], Sequence[Span]],
        choices: Sequence[Choice],
    ) -> None:
        """Wait for a batch's answers. Raises UserError, naming the sample, for damage."""
        assert self.answers is not None
        answers, (places, rest) = self.answers.buckets[number], asked
        answers.finish(rest)
        read = [slot.arrays[name] for name in ("answers", "z") if name in slot.arrays]
        for place, choice, values, *z in zip(places, choices, *read, strict=True):
            if wrong := fault_of_answer(values, *z):
                raise UserError(f"{answers.name(*place)} holds {wrong}; see `prep verify`")
            if choice.drop_caption:
                values[0] = values[1]  # asked with the same, so it is what the teacher would say

    def _draw(
        self, slot: Slot, row: int, rng: np.random.Generator | None, choice: Choice
    ) -> NDArray[np.float32] | None:
        """Draw everything that is not read; returns the VAE's noise, if there is any."""
        slot.arrays["index"][row] = choice.index
        slot.arrays["w"][row] = choice.w
        for name in ("pooled_prompt_embeds", "prompt_embeds"):
            if name in slot.arrays and choice.drop_caption:
                slot.arrays[name][row] = getattr(self.unconditional, name)[0].numpy()
        if rng is None:
            return None
        spec = self.spec if self.answers is None else self.answers.spec
        return draw_noises(spec, rng, slot.arrays["noise"][row])

    def _check(self, slot: Slot, row: int, bucket: Bucket, sample: int, choice: Choice) -> None:
        """Raise UserError, naming the sample, for values that no encoder gives."""
        read = [slot.arrays["raw"][row]]
        if not choice.drop_caption:
            texts = ("prompt_embeds", "pooled_prompt_embeds")
            read += [slot.arrays[name][row] for name in texts if name in slot.arrays]
        if wrong := fault(read, self.latents.channels):
            raise UserError(f"{bucket.name(sample)} holds {wrong}; see `prep verify`")

    def _allocate(self) -> list[Slot]:
        layouts = [bucket.layout for bucket in self.buckets]
        per_rank = self.order.batch_size // self.world
        pinned, answers = self._copies is not None, self.answers
        return allocate(
            layouts, self.latents.channels, per_rank, pinned,
            answers=None if answers is None else answers.dtype,
            trajectory=answers is not None and answers.trajectory,
            uniforms=self.spec.uniforms,
            noises=self.spec.noises,
        )  # fmt: skip


def wanted_rows(layout: Layout, choice: Choice) -> Rows:
    """Return what must be read of a sample."""
    rows = {
        "latents": choice.view,
        "pooled_prompt_embeds": None if choice.drop_caption else choice.caption,
        "prompt_embeds": None if choice.drop_caption else choice.caption,
        "time_ids": choice.view,
    }
    names = [(field.name, rows[field.name]) for field in layout.fields]
    return tuple((name, row) for name, row in names if row is not None)
