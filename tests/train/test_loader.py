"""Batches hold what the cache holds, as stock webdataset reads it from the same shards."""

import contextlib
import hashlib
import os
import threading
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset

from shared.cache.conditioning import Conditioning, TextEmbeds, load_conditioning, save_conditioning
from shared.cache.layout import TRAILER, cache_layout
from shared.cache.manifest import commit_unit, fold, open_manifest, read_units, write_manifest
from shared.cache.paths import CachePaths
from shared.cache.sums import ChannelSums
from shared.cache.units import Shard, UnitRecord
from shared.errors import UserError
from tests.support.identity import an_identity
from train.data.batch import Batch
from train.data.bucket import open_buckets
from train.data.draws import DrawSpec, choose, draw
from train.data.loader import LatentSpec, Loader
from train.data.order import Order

VIEWS, CAPTIONS, LENGTH, WIDTH, POOLED = 2, 3, 4, 6, 5
SENTINEL = 999.0  # stands in caption rows that a sample does not really have
SCALE = 0.18215


def make_cache(root, shards, xl=True, seed=0):
    """A posterior cache written with shared.cache.layout: `shards` lists (count, height, width)."""
    rng = np.random.default_rng(seed)
    cache = CachePaths(root)
    cache.shards.mkdir(parents=True)
    for number, (count, height, width) in enumerate(shards):
        layout = cache_layout(
            (VIEWS, 8, height, width),
            (CAPTIONS, LENGTH, WIDTH),
            (CAPTIONS, POOLED) if xl else None,
            micro_conditioning=xl,
        )
        content = b""
        for i in range(count):
            num_captions = 1 + (i + number) % CAPTIONS
            arrays = {
                "latents": rng.normal(0, 3, (VIEWS, 8, height, width)).clip(-8, 4),
                "prompt_embeds": rng.normal(0, 1, (CAPTIONS, LENGTH, WIDTH)),
                "pooled_prompt_embeds": rng.normal(0, 1, (CAPTIONS, POOLED)),
                # A time id that bf16 and fp16 would both round, and that tells the view.
                "time_ids": np.array([[1023, 2049, 0, view, i, number] for view in range(VIEWS)]),
            }
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                arrays[name][num_captions:] = SENTINEL
            content += layout.pack(f"{number:08x}{i:08x}", {"num_captions": num_captions}, arrays)
        content += TRAILER
        file = f"shards/unit{number}.tar"
        (root / file).write_bytes(content)
        shard = Shard(file, layout, count, len(content), hashlib.sha256(content).hexdigest())
        sums = ChannelSums(1, (0.0,) * 4, (1.0,) * 4)
        commit_unit(cache, UnitRecord(f"unit{number}", file, {}, (shard,), "", "", count, count, {},
                                      sums=sums))  # fmt: skip
    empty = TextEmbeds(torch.full((1, LENGTH, WIDTH), 7.0), torch.full((1, POOLED), 8.0))
    nothing = TextEmbeds(torch.zeros(0, LENGTH, WIDTH), torch.zeros(0, POOLED))
    if not xl:
        empty, nothing = TextEmbeds(empty.prompt_embeds), TextEmbeds(nothing.prompt_embeds)
    save_conditioning(Conditioning(empty, (), nothing), cache.conditioning, cache.tmp)
    identity = an_identity(latents="posterior", views=VIEWS, scaling_factor=SCALE)
    write_manifest(cache, fold(identity, read_units(cache), {}))
    return root


def open_loader(root, batch_size=6, seed=5, **more) -> Loader:
    manifest = open_manifest(root)
    identity = manifest.identity
    spec = DrawSpec(
        seed=seed,
        views=identity.preprocessing.views,
        num_ddim_timesteps=50,
        w_min=1.0,
        w_max=5.0,
        proportion_empty_prompts=more.pop("drop", 0.0),
        latent_noise=identity.posterior,
    )
    buckets = open_buckets(root, manifest)
    order = Order(tuple(map(len, buckets)), batch_size, seed)
    latents = LatentSpec(identity.vae.channels, identity.vae.scaling_factor)
    empty = load_conditioning(CachePaths(root).conditioning).unconditional
    return Loader(buckets, order, spec, latents, empty, **more)


def take(loader: Loader, count: int) -> list[Batch]:
    """Copies of the first batches; a batch's memory is used again."""
    batches = iter(loader)
    copies = []
    for _ in range(count):
        values = vars(next(batches)).items()
        copies.append(Batch(**{k: None if v is None else v.clone() for k, v in values}))
    batches.close()
    return copies


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    names = [f.name for f in fields(Batch) if getattr(batches[0], f.name) is not None]
    return {name: torch.cat([getattr(b, name) for b in batches]) for name in names}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stock_samples(root, bucket: int = 0) -> list[dict]:
    """A bucket's samples as stock webdataset decodes them, in the order of the manifest."""
    manifest = open_manifest(root)
    samples = []
    for shard in manifest.shards:
        if shard.layout == manifest.layouts[bucket]:
            samples += webdataset.WebDataset([str(root / shard.file)], shardshuffle=False).decode()
    return samples


@pytest.fixture
def posterior(tmp_path):
    """Two shards of 8 x 8 latents and one of 4 x 6, two views, up to three captions, SDXL."""
    return make_cache(tmp_path / "cache", [(7, 8, 8), (5, 4, 6), (9, 8, 8)])


@pytest.mark.parametrize("cache", ["tiny_cache", "tiny_xl_cache"])
def test_batches_hold_what_stock_webdataset_reads(cache, request):
    root = request.getfixturevalue(cache)
    loader = open_loader(root, batch_size=5)
    stock = stock_samples(root)
    scale = open_manifest(root).identity.vae.scaling_factor
    batches = take(loader, 2 * len(stock) // 5)  # two passes
    for index, batch in enumerate(batches):
        _, ids, positions = loader.order.rank_batch(index, 0, 1)
        for row, (number, position) in enumerate(zip(ids, positions, strict=True)):
            sample = stock[number]
            drawn = draw(loader.spec, int(position), 1, batch.noise.shape[1:])
            values = sample["latents.npy"][0].astype(np.float32)
            if drawn.latent_noise is None:  # tiny_cache holds means
                np.testing.assert_array_equal(batch.latents[row], values * np.float32(scale))
            else:
                wanted = scale * (values[:4] + np.exp(values[4:] / 2) * drawn.latent_noise)
                np.testing.assert_allclose(batch.latents[row], wanted, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(batch.prompt_embeds[row], sample["prompt_embeds.npy"][0])
            if "time_ids.npy" in sample:
                np.testing.assert_array_equal(batch.time_ids[row], sample["time_ids.npy"][0])
                pooled = sample["pooled_prompt_embeds.npy"][0]
                np.testing.assert_array_equal(batch.pooled_prompt_embeds[row], pooled)
            else:
                assert batch.time_ids is batch.pooled_prompt_embeds is None
            np.testing.assert_array_equal(batch.noise[row], drawn.noise)
            assert (int(batch.index[row]), float(batch.w[row])) == (
                drawn.index, pytest.approx(drawn.w)
            )  # fmt: skip
    kinds = {f.name: getattr(batches[0], f.name) for f in fields(Batch)}
    dtypes = {name: value.dtype for name, value in kinds.items() if value is not None}
    assert dtypes["latents"] == dtypes["noise"] == dtypes["w"] == torch.float32
    assert dtypes["prompt_embeds"] == torch.float16


def test_posteriors_are_sampled_views_and_captions_drawn(posterior):
    loader = open_loader(posterior)
    manifest = open_manifest(posterior)
    stock = [stock_samples(posterior, bucket) for bucket in range(len(manifest.layouts))]
    views, captions = set(), set()
    for index, batch in enumerate(take(loader, 30)):
        bucket, ids, positions = loader.order.rank_batch(index, 0, 1)
        for row, (number, position) in enumerate(zip(ids, positions, strict=True)):
            sample = stock[bucket][number]
            drawn = draw(loader.spec, int(position), sample["json"]["num_captions"],
                         batch.noise.shape[1:])  # fmt: skip
            mean, logvar = np.split(sample["latents.npy"][drawn.view].astype(np.float64), 2)
            wanted = SCALE * (mean + np.exp(logvar / 2) * drawn.latent_noise)
            np.testing.assert_allclose(batch.latents[row], wanted, rtol=1e-5, atol=1e-5)
            text = sample["prompt_embeds.npy"][drawn.caption]
            np.testing.assert_array_equal(batch.prompt_embeds[row], text)
            assert SENTINEL not in batch.prompt_embeds[row]
            assert SENTINEL not in batch.pooled_prompt_embeds[row]
            # int32 all the way; the picture's own row of the same view
            assert batch.time_ids[row].tolist() == sample["time_ids.npy"][drawn.view].tolist()
            assert batch.time_ids[row, 0] == 1023
            views.add(drawn.view)
            captions.add(drawn.caption)
    assert (views, captions) == ({0, 1}, {0, 1, 2})


def test_each_pass_draws_fresh_vae_noise_around_the_mean(tmp_path):
    root = make_cache(tmp_path / "cache", [(1, 8, 8)])
    batch = joined(take(open_loader(root, batch_size=8), 60))
    mean, logvar = np.split(stock_samples(root)[0]["latents.npy"].astype(float), 2, axis=1)
    view = batch["time_ids"][:, 3].numpy()
    deviations = (batch["latents"].numpy() / SCALE - mean[view]) / np.exp(logvar[view] / 2)
    assert deviations.mean() == pytest.approx(0, abs=0.02)
    assert deviations.std() == pytest.approx(1, abs=0.02)
    assert len(np.unique(deviations[:, 0, 0, 0])) == 480


def test_no_batch_mixes_latent_sizes(posterior):
    batches = take(open_loader(posterior, batch_size=4), 40)
    sizes = [tuple(batch.latents.shape[2:]) for batch in batches]
    assert set(sizes) == {(8, 8), (4, 6)}
    for batch, (height, width) in zip(batches, sizes, strict=True):
        assert batch.noise.shape == (4, 4, height, width)
        shards = {int(row[5]) for row in batch.time_ids}
        assert shards <= ({1} if (height, width) == (4, 6) else {0, 2})


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_do_not_matter(posterior, threads):
    one = joined_by_size(take(open_loader(posterior, threads=1), 20))
    other = joined_by_size(take(open_loader(posterior, threads=threads), 20))
    assert all(equal(a, b) for a, b in zip(one, other, strict=True))


def joined_by_size(batches: list[Batch]) -> list[dict]:
    return [joined([batch]) for batch in batches]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process(tiny_cache, world):
    whole = joined(take(open_loader(tiny_cache, batch_size=6), 8))
    ranks = [
        take(open_loader(tiny_cache, batch_size=6, rank=r, world=world), 8) for r in range(world)
    ]
    woven = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert equal(joined(woven), whole)


def test_batch_size_does_not_matter(tiny_cache):
    whole = joined(take(open_loader(tiny_cache, batch_size=12), 4))
    for batch_size in (1, 2, 8):
        parts = take(open_loader(tiny_cache, batch_size=batch_size), 48 // batch_size)
        assert equal(joined(parts), whole)


def test_a_resumed_stream_goes_on_where_it_stopped(posterior):
    whole = take(open_loader(posterior), 25)
    for start in (1, 7, 19):
        rest = take(open_loader(posterior, start=start), 25 - start)
        pairs = zip(rest, whole[start:], strict=True)
        assert all(equal(joined([a]), joined([b])) for a, b in pairs)


def test_another_seed_is_another_stream(tiny_cache):
    a, b = (joined(take(open_loader(tiny_cache, batch_size=8, seed=s), 9)) for s in (0, 1))
    assert not any(torch.equal(a[name], b[name]) for name in a)
    # the same 72 samples all the same
    assert torch.equal(a["latents"].sum((1, 2, 3)).sort()[0], b["latents"].sum((1, 2, 3)).sort()[0])


@pytest.mark.parametrize("xl", [True, False])
def test_dropped_captions_become_the_unconditional_embedding(tmp_path, xl):
    root = make_cache(tmp_path / "cache", [(9, 4, 4)], xl=xl)
    plain = joined(take(open_loader(root), 20))
    for share in (1.0, 0.4):
        loader = open_loader(root, drop=share)
        batch = joined(take(loader, 20))
        dropped = (batch["prompt_embeds"] == 7).flatten(1).all(1)
        assert dropped.double().mean() == pytest.approx(share, abs=0.15)
        assert torch.equal(batch["prompt_embeds"][~dropped], plain["prompt_embeds"][~dropped])
        if xl:
            assert torch.equal((batch["pooled_prompt_embeds"] == 8).all(1), dropped)
            assert torch.equal(batch["time_ids"], plain["time_ids"])
        for name in ("latents", "noise", "index", "w"):
            assert torch.equal(batch[name], plain[name])
    assert not (plain["prompt_embeds"] == 7).flatten(1).all(1).any()


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(posterior):
    batches = iter(open_loader(posterior, threads=4))
    for _ in range(12):
        batch = next(batches)
        before = joined([batch])
        time.sleep(0.02)  # all that is read ahead lands meanwhile
        assert equal(joined([batch]), before)
    batches.close()


def test_leaving_early_ends_the_threads(posterior):
    batches = iter(open_loader(posterior, threads=3))
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


# ---- Damage is fatal and named.


def sample_place(root, shard: int, number: int, name: str) -> tuple:
    """Path of a shard and the offset of a sample's field in it."""
    manifest = open_manifest(root)
    layout = manifest.shards[shard].layout
    return root / manifest.shards[shard].file, number * layout.stride + layout.offsets[name]


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "pooled_prompt_embeds"])
def test_a_non_finite_sample_is_named(posterior, name):
    path, offset = sample_place(posterior, 2, 4, name)
    manifest = open_manifest(posterior)
    field = manifest.shards[2].layout.field(name)
    with path.open("r+b") as file:  # the whole field, so that every view and caption shows it
        file.seek(offset)
        file.write(np.full(field.shape, np.nan, field.dtype).tobytes())
    with pytest.raises(UserError, match=r"unit2\.tar sample 4 holds non-finite values"):
        take(open_loader(posterior), 30)


def test_a_shard_cut_while_training_is_named(posterior):
    loader = open_loader(posterior)
    path, offset = sample_place(posterior, 2, 4, "prompt_embeds")
    with path.open("r+b") as file:
        file.truncate(offset + 10)
    with pytest.raises(UserError, match=r"unit2\.tar sample [45678] is cut short"):
        take(loader, 30)


def test_a_shard_cut_before_training_is_refused_at_once(posterior):
    path, offset = sample_place(posterior, 0, 3, "latents")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(offset)
    with pytest.raises(UserError, match=rf"unit0\.tar has {offset} bytes, {size} recorded"):
        open_loader(posterior)
    path.unlink()
    with pytest.raises(UserError, match=r"unit0\.tar is missing"):
        open_loader(posterior)


def test_error_comes_at_the_damaged_batch_not_before(posterior):
    """What was read ahead must not take down the steps before it."""
    loader = open_loader(posterior, batch_size=1, threads=4)
    good = take(loader, 9)
    order = [loader.order.rank_batch(i, 0, 1) for i in range(9)]
    bucket, ids, _ = order[8]
    shard, start = loader.buckets[bucket].locate(int(ids[0]))
    path = loader.buckets[bucket].paths[shard]
    earlier = [(b, int(i[0])) for b, i, _ in order[:8]]
    assert (bucket, int(ids[0])) not in earlier
    layout = loader.buckets[bucket].layout
    with path.open("r+b") as file:
        file.seek(start + layout.offsets["latents"])
        file.write(np.full(layout.fields[0].shape, np.inf, "<f2").tobytes())
    batches = iter(loader)
    for wanted in good[:8]:
        assert equal(joined([next(batches)]), joined([wanted]))
    with pytest.raises(UserError, match="non-finite"):
        next(batches)


def test_moving_to_the_cpu_keeps_every_field(posterior):
    batch = take(open_loader(posterior), 1)[0]
    moved = batch.to(torch.device("cpu"))
    assert equal(joined([moved]), joined([batch]))
    assert isinstance(batch.text, TextEmbeds)
    assert torch.equal(batch.text.prompt_embeds, batch.prompt_embeds)
    none = replace(batch, pooled_prompt_embeds=None, time_ids=None).to(torch.device("cpu"))
    assert none.time_ids is None


def test_draws_see_the_real_number_of_captions(posterior, monkeypatch):
    seen = set()

    def watching(spec, rng, num_captions):
        seen.add(num_captions)
        return choose(spec, rng, num_captions)

    monkeypatch.setattr("train.data.loader.choose", watching)
    take(open_loader(posterior), 10)
    assert seen == {1, 2, 3}


def test_records_are_not_read_where_one_caption_is_kept(tiny_cache):
    loader = open_loader(tiny_cache)
    loader.buckets[0].records = SimpleNamespace()  # calling it would fail
    assert len(take(loader, 3)) == 3


def test_waiting_is_counted_in_seconds(tiny_cache, monkeypatch):
    loader = open_loader(tiny_cache, threads=1)
    real = loader.fill

    def slow(index, slots):
        time.sleep(0.05)
        return real(index, slots)

    monkeypatch.setattr(loader, "fill", slow)
    assert loader.waited == 0
    start = time.perf_counter()
    take(loader, 8)
    assert 0.35 < loader.waited < time.perf_counter() - start


def test_a_consumer_that_is_slower_does_not_wait(tiny_cache):
    loader = open_loader(tiny_cache, threads=2)
    batches = iter(loader)
    next(batches)
    before = loader.waited
    for _ in range(10):
        time.sleep(0.1)
        next(batches)
    batches.close()
    assert loader.waited - before < 0.5


def test_what_is_not_in_the_page_cache_is_read_all_the_same(posterior, monkeypatch):
    wanted = take(open_loader(posterior), 12)
    real = os.preadv

    def cold(fd, views, offset, flags=0):
        if flags:
            raise BlockingIOError
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", cold)
    found = take(open_loader(posterior), 12)
    assert all(equal(joined([a]), joined([b])) for a, b in zip(found, wanted, strict=True))


def open_files(folder) -> int:
    count = 0
    for link in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += str(folder) in os.readlink(f"/proc/self/fd/{link}")
    return count


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    root = make_cache(tmp_path / "cache", [(2, 4, 4)] * 12)
    wanted = take(open_loader(root), 12)
    monkeypatch.setattr("train.data.local.OPEN_FILES", 3)
    batches = iter(open_loader(root, threads=4))
    for batch in wanted:
        assert equal(joined([next(batches)]), joined([batch]))
        assert open_files(root) <= 3 + 2 * 4  # those kept, and those that threads read or open
    batches.close()
    assert open_files(root) == 0


def test_readers_begin_on_the_device_of_their_batches(posterior, monkeypatch):
    """A new thread's current device is cuda:0, where it would take memory of another process."""
    told = []
    monkeypatch.setattr(
        "train.data.loader.use_device",
        lambda device: told.append((device.type, threading.current_thread().name)),
    )
    take(open_loader(posterior, threads=2), 8)
    assert ("cpu", "loader_0") in told
    assert len(set(told)) == len(told) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_batches_on_the_gpu_are_those_of_the_cpu(posterior, name):
    """A slot must not be filled again while its copy is under way."""
    device = torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count():
        pytest.skip("one GPU only")
    wanted = take(open_loader(posterior, batch_size=6), 60)
    batches = iter(open_loader(posterior, batch_size=6, threads=4, device=device))
    kept = [next(batches) for _ in range(60)]  # as fast as they come, all of them kept
    batches.close()
    torch.cuda.synchronize()
    for batch, same in zip(kept, wanted, strict=True):
        assert batch.latents.device.type == "cuda"
        assert equal(joined([batch.to(torch.device("cpu"))]), joined([same]))
