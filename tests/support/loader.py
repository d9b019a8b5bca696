"""A cache written by hand, and a loader of it."""

import hashlib
from dataclasses import fields

import numpy as np
import torch

from shared.cache.answers import answers_spec
from shared.cache.answers_store import open_answers
from shared.cache.conditioning import Conditioning, TextEmbeds, load_conditioning, save_conditioning
from shared.cache.draws import DrawSpec
from shared.cache.layout import TRAILER, cache_layout
from shared.cache.manifest import commit_unit, fold, open_manifest, read_units, write_manifest
from shared.cache.paths import CachePaths
from shared.cache.sums import ChannelSums
from shared.cache.units import Shard, UnitRecord
from tests.support.identity import an_identity
from train.data.answers import answered, open_bucket_answers
from train.data.batch import Batch
from train.data.bucket import open_buckets
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
        uniforms=more.pop("uniforms", 0),
        noises=more.pop("noises", 0),
    )
    buckets = open_buckets(root, manifest)
    order = Order(tuple(map(len, buckets)), batch_size, seed)
    latents = LatentSpec(identity.vae.channels, identity.vae.scaling_factor)
    empty = load_conditioning(CachePaths(root).conditioning).unconditional
    return Loader(buckets, order, spec, latents, empty, **more)


def cached_loader(root, batch_size=6, **more) -> Loader:
    """A loader with the answers that are beside the cache, as setup opens it."""
    manifest = open_manifest(root)
    answers = open_answers(root, manifest)
    loader = open_loader(root, batch_size, **more)
    loader.buckets = open_buckets(root, answered(manifest, answers))
    loader.order = Order(tuple(map(len, loader.buckets)), batch_size, loader.spec.seed)
    spec = answers_spec(answers.identity, manifest.identity)
    loader.answers = open_bucket_answers(root, loader.buckets, answers, spec)
    return loader


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


def joined_by_size(batches: list[Batch]) -> list[dict]:
    return [joined([batch]) for batch in batches]
