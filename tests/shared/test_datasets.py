"""A cache as a webdataset pipeline and as a torch Dataset, in other people's training loops."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from shared.cache.datasets import CacheDataset, open_webdataset
from shared.cache.manifest import open_manifest
from shared.errors import UserError
from tests.support.s3 import bucket, forget, serving
from tests.support.sources import captioned, encode, prep, write_tar


def stored(cache):
    """Key -> record and arrays, as they lie in the shards."""
    manifest = open_manifest(cache)
    samples = [
        shard.layout.read(cache / shard.file, number)
        for shard in manifest.shards for number in range(shard.count)
    ]  # fmt: skip
    return manifest, {key: (record, arrays) for key, record, arrays in samples}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Four shards of a few pictures."""
    folder = tmp_path_factory.mktemp("many")
    tars = [write_tar(folder / f"{n}.tar", captioned(range(5 * n, 5 * n + 5))) for n in range(4)]
    return encode(tars, folder / "cache")


def both(cache, **more):
    return list(open_webdataset(cache, **more)), list(CacheDataset(cache, **more))


def test_samples_are_those_of_the_cache_and_scaled(tiny_cache):
    manifest, wanted = stored(tiny_cache)
    for samples in both(tiny_cache):
        assert Counter(sample["__key__"] for sample in samples) == Counter(wanted.keys())
        for sample in samples:
            record, arrays = wanted[sample["__key__"]]
            x0 = arrays["latents"][0].astype(np.float64) * manifest.identity.vae.scaling_factor
            np.testing.assert_allclose(sample["latents"].numpy(), x0, rtol=1e-6)
            assert sample["latents"].dtype == torch.float32
            assert sample["caption"] == record["captions"][0]
            assert sample["record"] == record
            assert torch.equal(
                sample["prompt_embeds"], torch.from_numpy(arrays["prompt_embeds"][0].copy())
            )


def test_a_posterior_is_sampled_anew_each_time(tiny_xl_cache):
    manifest, wanted = stored(tiny_xl_cache)
    for samples in both(tiny_xl_cache):
        z = []
        for sample in samples:
            _, arrays = wanted[sample["__key__"]]
            mean, logvar = np.split(arrays["latents"][0].astype(np.float64), 2)
            x0 = sample["latents"].numpy() / manifest.identity.vae.scaling_factor
            z.append((x0 - mean) / np.exp(logvar / 2))
            assert (sample["time_ids"].numpy() == arrays["time_ids"][0]).all()
            assert sample["pooled_prompt_embeds"].shape == (64,)
        z = np.stack(z)
        assert abs(z.mean()) < 4 / z.size**0.5
        assert abs(z.std() - 1) < 4 / (2 * z.size) ** 0.5
    view = CacheDataset(tiny_xl_cache)
    assert not torch.equal(view[3]["latents"], view[3]["latents"])


def test_one_view_and_one_caption_of_several(tmp_path):
    """Each comes with its own embedding, and every one of them in time."""
    files = [file for file in captioned(range(3)) if file[0].endswith(".png")]
    for number in range(3):
        texts = [f"picture {number}", f"{number}, a picture", "nothing"]
        files.append((f"{number:04d}.json", json.dumps({"caption": texts}).encode()))
    source = write_tar(tmp_path / "0.tar", sorted(files))
    cache = encode(source, tmp_path / "cache", max_captions=3, views=2, random_flip=True)
    _, wanted = stored(cache)
    dataset, seen = CacheDataset(cache), set()
    for sample in (dataset[n % 3] for n in range(90)):
        record, arrays = wanted[sample["__key__"]]
        caption = record["captions"].index(sample["caption"])
        embedding = sample["prompt_embeds"].numpy()
        assert (embedding == arrays["prompt_embeds"][caption]).all()
        scaled = arrays["latents"].astype(np.float32) * np.float32(0.18215)
        near = [np.abs(view - sample["latents"].numpy()).max() for view in scaled]
        seen.add((sample["__key__"], caption, int(np.argmin(near))))
    assert len(seen) == 3 * 3 * 2


def test_what_is_held_out_is_left_out(many, tmp_path):
    cache = shutil.copytree(many, tmp_path / "cache")
    everything = {sample["__key__"] for sample in CacheDataset(cache)}
    assert prep("finish", "--cache", cache, "--holdout", 6).status == 0
    aside = set(json.loads((cache / "holdout.json").read_text())["keys"])
    assert len(aside) == 6
    for samples in both(cache):
        assert {sample["__key__"] for sample in samples} == everything - aside
    for samples in both(cache, heldout=True):
        assert {sample["__key__"] for sample in samples} == aside


def test_workers_divide_the_shards_and_order_changes(many):
    def keys(**more):
        batches = DataLoader(open_webdataset(many, **more), batch_size=None, num_workers=2)
        return [sample["__key__"] for sample in batches]

    found = keys(shuffle=8)
    assert sorted(found) == sorted(sample["__key__"] for sample in CacheDataset(many))
    assert found != keys(shuffle=8)
    assert [s["__key__"] for s in open_webdataset(many, shuffle=0)] == [
        s["__key__"] for s in CacheDataset(many)
    ]


def test_sizes_are_chosen(many):
    assert len(CacheDataset(many, latent_size=(8, 8))) == 20
    for opened in (open_webdataset, CacheDataset):
        with pytest.raises(UserError, match=r"no samples to train on of latent_size \(9, 9\)"):
            opened(many, latent_size=(9, 9))
        with pytest.raises(UserError, match="no samples held out of latent_size None"):
            opened(many, heldout=True)
        with pytest.raises(UserError, match="is not a cache"):
            opened(many / "shards")
    dataset = CacheDataset(many)
    assert dataset[-1]["__key__"] == dataset[19]["__key__"]
    for index in (20, -21):
        with pytest.raises(IndexError, match=f"sample {index} of 20"):
            dataset[index]


def toy_loop(batches) -> list[float]:
    """A denoiser of a few weights learns something: the loss falls."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    optimizer, losses = torch.optim.Adam(network.parameters(), 3e-2), []
    for batch in batches:
        x0 = batch["latents"]
        noise = torch.randn_like(x0)
        loss = (network(0.5 * x0 + noise) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_toy_loop_trains_from_a_local_cache_and_from_a_url(many, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def batches(cache):
        dataset = open_webdataset(cache, shuffle=100).repeat(15).batched(5)
        return webdataset.WebLoader(dataset, batch_size=None)

    losses = toy_loop(batches(many))
    assert len(losses) == 15 * 4
    assert np.mean(losses[-8:]) < 0.7 * losses[0]
    with serving():
        forget()
        for path in many.rglob("*"):
            if path.is_file():
                bucket().put_file(str(path), f"bucket/others/{path.relative_to(many)}")
        url = "s3://bucket/others"
        assert len(toy_loop(batches(url))) == 15 * 4
        there = [sample["__key__"] for sample in open_webdataset(url, shuffle=0)]
        assert there == [sample["__key__"] for sample in CacheDataset(url)]
        assert there == [sample["__key__"] for sample in CacheDataset(many)]
