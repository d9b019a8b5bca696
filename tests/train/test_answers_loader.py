"""Batches with the teacher's answers: whose they are, in which order, and what is refused."""

from collections import defaultdict
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import torch

from shared.cache.answers_store import open_answers
from shared.cache.draws import answer_generator, choose, draw_noises
from shared.cache.manifest import open_manifest
from shared.errors import UserError
from shared.storage.urls import place
from tests.support.answers import mark, write_answers
from tests.support.loader import cached_loader, equal, joined, make_cache, open_loader, take
from train.data.answers import answered, open_bucket_answers
from train.data.bucket import open_buckets
from train.data.order import Order
from train.data.shard_check import check_answer_heads

SHAPES = [(7, 8, 8), (5, 4, 6), (9, 8, 8)]


@pytest.fixture
def cache(tmp_path):
    """Two buckets in three shards; two views, up to three captions, posteriors."""
    return make_cache(tmp_path / "cache", SHAPES)


def samples(root):
    """By bucket and number: key, record and arrays, as `Layout.read` gives them."""
    found = []
    for bucket in open_buckets(root, open_manifest(root)):
        found.append([])
        for number in range(len(bucket)):
            shard, start = bucket.locate(number)
            index = start // bucket.layout.stride
            found[-1].append(bucket.layout.read(bucket.paths[shard], index))
    return found


@pytest.mark.parametrize("xl", [True, False])
def test_a_batch_holds_each_samples_answer_and_what_was_asked(tmp_path, xl):
    root = make_cache(tmp_path / "cache", SHAPES, xl)
    answers = write_answers(root, 3, held={1: 5})  # a shard may hold more
    loader, stock = cached_loader(root), samples(root)
    layouts = {s.layout.latent_size: s.layout for s in answers.shards}
    seen = defaultdict(list)
    for index, batch in enumerate(take(loader, 30)):
        bucket, ids, _ = loader.order.rank_batch(index, 0, 1)
        passes = loader.order.rank_passes(index, 0, 1)
        for row, number in enumerate(ids):
            key, record, arrays = stock[bucket][number]
            k = passes[row] % 3
            seen[key].append(k)
            layout = layouts[tuple(batch.noise.shape[2:])]
            np.testing.assert_array_equal(batch.answers[row], mark(layout, key, k))
            rng = answer_generator(loader.answers.spec, key, k)
            choice = choose(loader.answers.spec, rng, record["num_captions"])
            noise = np.empty(batch.noise.shape[1:], np.float32)
            latent_noise = draw_noises(loader.answers.spec, rng, noise)
            np.testing.assert_array_equal(batch.noise[row], noise)
            assert batch.index[row] == choice.index
            text = arrays["prompt_embeds"][choice.caption]
            np.testing.assert_array_equal(batch.prompt_embeds[row], text)
            if xl:
                assert batch.time_ids[row].tolist() == arrays["time_ids"][choice.view].tolist()
            mean, logvar = np.split(arrays["latents"][choice.view].astype(float), 2)
            wanted = 0.18215 * (mean + np.exp(logvar / 2) * latent_noise)
            np.testing.assert_allclose(batch.latents[row], wanted, rtol=1e-5, atol=1e-5)
    assert len(seen) == 21
    assert all({0, 1, 2} == set(numbers) for numbers in seen.values())
    assert batch.answers.dtype == torch.float16


def uses(order, ranks, start, stop):
    """(bucket, id) -> the passes in which global batches start to stop have brought it, in order.

    A pass over several buckets' batches is shuffled: one that begins in the pass before may come
    late, but no batch of a later epoch comes before it.
    """
    found = defaultdict(list)
    for index in range(start, stop):
        for rank in range(ranks):
            bucket, ids, _ = order.rank_batch(index, rank, ranks)
            passes = order.rank_passes(index, rank, ranks)
            for number, turn in zip(ids.tolist(), passes.tolist(), strict=True):
                found[bucket, number].append(turn)
    return found


@pytest.mark.parametrize("sizes", [(24,), (24, 36), (5, 64, 300)])
@pytest.mark.parametrize(("batch", "world"), [(12, 1), (12, 4), (24, 3)])
def test_each_answer_is_used_once_before_any_is_used_twice(sizes, batch, world):
    order = Order(sizes, batch, 3)
    for epochs in (1, 4, 9):
        found = uses(order, world, 0, order.batches_before(epochs))
        for given in found.values():
            turns = list(range(len(given)))
            assert (sorted(given) if len(sizes) > 1 else given) == turns  # modulo K: in turn
    assert len(found) == sum(sizes)


def test_another_batch_size_and_world_go_on_with_the_same_answers():
    before, after = Order((30,), 12, 5), Order((30,), 8, 5)
    found = uses(before, 4, 0, 10)
    for sample, given in uses(after, 2, 15, 45).items():  # position 120
        found[sample] += given
    assert all(given == list(range(len(given))) for given in found.values())


def test_ranks_threads_and_resumes_give_the_same_batches(cache):
    write_answers(cache, 2)
    whole = take(cached_loader(cache), 12)
    for threads in (1, 5):
        parts = [take(cached_loader(cache, rank=r, world=2, threads=threads), 12) for r in (0, 1)]
        both = [joined(list(pair)) for pair in zip(*parts, strict=True)]
        assert all(equal(joined([a]), b) for a, b in zip(whole, both, strict=True))
    later = take(cached_loader(cache, start=7), 5)
    assert all(equal(joined([a]), joined([b])) for a, b in zip(whole[7:], later, strict=True))


def test_a_dropped_caption_takes_the_unconditional_answer(cache):
    write_answers(cache, 2)
    kept, dropped = (joined(take(cached_loader(cache, 21, drop=d), 1)) for d in (0.0, 0.5))
    gone = (dropped["prompt_embeds"] == 7).flatten(1).all(1)
    assert 3 < gone.sum() < 18
    assert torch.equal(dropped["answers"][gone, 0], kept["answers"][gone, 1])
    assert torch.equal(dropped["answers"][~gone], kept["answers"][~gone])
    assert torch.equal(dropped["answers"][:, 1], kept["answers"][:, 1])
    assert torch.equal(dropped["noise"], kept["noise"])


def test_dropping_and_guidance_are_those_of_the_position(cache):
    online = joined(take(open_loader(cache, 21, drop=0.5), 1))
    write_answers(cache, 2)
    cached = joined(take(cached_loader(cache, 21, drop=0.5), 1))
    assert torch.equal(online["w"], cached["w"])
    for batch in (online, cached):
        batch["gone"] = (batch["prompt_embeds"] == 7).flatten(1).all(1)
    assert torch.equal(online["gone"], cached["gone"])
    assert not torch.equal(online["noise"], cached["noise"])


def test_answers_in_fp32_stay_fp32(cache):
    answers = write_answers(cache, 1, dtype="<f4")
    batch = take(cached_loader(cache), 1)[0]
    assert batch.answers.dtype == torch.float32
    assert answers.shards[0].layout.fields[0].dtype == "<f4"


def test_samples_without_answers_never_come(cache):
    write_answers(cache, 2, without={0: (0, 3), 2: (8,)})
    loader, stock = cached_loader(cache), samples(cache)
    assert sorted(loader.order.sizes) == [5, 13]
    manifest = answered(open_manifest(cache), open_answers(cache))
    assert sum(shard.trained for shard in manifest.shards) == 18
    seen = {name for index in range(30) for name in loader.names(index)}
    assert len(seen) == 18
    left_out = {f"{cache}/shards/unit{s}.tar sample {i}" for s, i in ((0, 0), (0, 3), (2, 8))}
    assert not seen & left_out
    zeros = [batch for batch in take(loader, 20) if not batch.answers.flatten(1).any(1).all()]
    assert not zeros
    assert len(stock) == 2


def test_a_remote_cache_gives_the_same_batches(cache):
    write_answers(cache, 2, held={0: 3})
    wanted = take(cached_loader(cache), 8)
    memory = fsspec.filesystem("memory")
    memory.put(str(cache), "/far-answers", recursive=True)
    try:
        remote = place("memory://far-answers")
        found = take(cached_loader(remote), 8)
        assert all(equal(joined([a]), joined([b])) for a, b in zip(wanted, found, strict=True))
    finally:
        memory.rm("/far-answers", recursive=True)


def test_damage_is_named(cache):
    answers = write_answers(cache, 2)
    (shard, *_) = [s for s in answers.shards if s.count == 5]
    path, layout = cache / "answers" / shard.file, shard.layout
    content = bytearray(path.read_bytes())
    at = 2 * layout.stride + layout.offsets["answers"]
    for bits, wrong in ((b"\x00\x7c", "non-finite values"), (b"\x00\x00", "one value alone")):
        half = layout.fields[0].nbytes // 2
        broken = content[:]
        broken[at : at + 2 * half] = bits * half
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"{path} sample 2 holds {wrong}; see `prep verify`"):
            take(cached_loader(cache), 20)
    loader = cached_loader(cache)
    path.write_bytes(content[: 3 * layout.stride])
    with pytest.raises(UserError, match=f"{path} sample .* is cut short"):
        take(loader, 20)


def test_a_damaged_key_is_named(cache):
    write_answers(cache, 2)
    path = cache / "shards/unit1.tar"
    content = bytearray(path.read_bytes())
    content[3] = ord("!")
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} sample 0 has a damaged record"):
        take(cached_loader(cache), 20)


def test_answers_of_another_shard_are_refused(cache):
    answers = write_answers(cache, 2)
    first, _, third = answers.shards
    ours, theirs = (cache / "answers" / shard.file for shard in (first, third))
    theirs.write_bytes(ours.read_bytes().ljust(third.size, b"\0"))
    loader = cached_loader(cache)
    with pytest.raises(UserError, match=r"begins with the answers to sample 0{16}, where"):
        check_answer_heads(loader.buckets, loader.answers)
    theirs.write_bytes(b"\0" * third.size)
    with pytest.raises(UserError, match="is damaged: where its first sample should be"):
        check_answer_heads(loader.buckets, loader.answers)


def test_answers_of_another_shape_are_refused(cache):
    write_answers(cache, 2)
    manifest = open_manifest(cache)
    answers = open_answers(cache, manifest)
    other = replace(answers, identity=replace(answers.identity, dtype="<f4"))
    with pytest.raises(UserError, match=r"holds answers <f2 .* in <f4; run the same `prep teach` "):
        open_bucket_answers(cache, open_buckets(cache, manifest), other, None)
    other = replace(answers, identity=replace(answers.identity, trajectory=True))  # without z_t
    with pytest.raises(UserError, match=r"holds answers <f2 .*; run the same `prep synthesize` ag"):
        open_bucket_answers(cache, open_buckets(cache, manifest), other, None)
