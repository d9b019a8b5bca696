"""A cache for other people's trainers: as a stock webdataset pipeline, and as a torch Dataset.

Both give the same samples, ready to train on: one view and one caption of each, drawn by torch's
random numbers, which a DataLoader seeds in each worker anew. The trainer of this project reads with
`train.data` instead, which is faster and draws by position.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import IO, Any

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from webdataset.gopen import gopen_schemes

from shared.cache.latents import finish_latents
from shared.cache.manifest import Manifest, open_manifest
from shared.cache.units import Shard
from shared.errors import UserError
from shared.storage.urls import Place, RemotePlace, place

Size = tuple[int, int]  # height and width of the latents
ARRAYS = ("prompt_embeds", "pooled_prompt_embeds", "time_ids")
FIELDS = ("latents", *ARRAYS)


def open_webdataset(
    cache: Place | str, latent_size: Size | None = None, shuffle: int = 1000, heldout: bool = False
) -> webdataset.WebDataset:
    """A cache, local or behind a URL, as a stock webdataset pipeline.

    Shards are shuffled and divided among nodes and a DataLoader's workers; samples are shuffled in
    a buffer of `shuffle` (0 keeps the order of both). A sample is a dict:

    - `__key__`, `caption` and `record` (docs/cache-format.md);
    - `latents` `[C, h, w]` fp32: sampled from the VAE's posterior and scaled, as a UNet takes them;
    - `prompt_embeds` `[L, D]` fp16; for SDXL `pooled_prompt_embeds` `[P]` fp16 and `time_ids` `[6]`
      int32.

    Append stock stages, such as `.batched(16)`. A cache with several latent sizes gives those of
    `latent_size` alone, since a batch has one. Samples that were held out are left out; `heldout`
    gives these alone. Raises UserError for what is no finished cache, and where nothing is left.
    """
    root = place(str(cache))
    manifest = open_manifest(root)
    shards = chosen_shards(manifest, latent_size, heldout)
    wanted = {str(root / shard.file): set(numbers_of(shard, heldout)) for shard in shards}
    if isinstance(root, RemotePlace):
        gopen_schemes.setdefault(root.protocol, open_remote)  # as webdataset is taught a scheme
    pipeline = webdataset.WebDataset(
        list(wanted),
        shardshuffle=len(wanted) if shuffle else False,
        nodesplitter=webdataset.split_by_node,
        empty_check=False,
    )
    pipeline = pipeline.compose(partial(kept, wanted=wanted))
    if shuffle:
        pipeline = pipeline.shuffle(shuffle)
    return pipeline.decode().map(finish_of(manifest).members)


def kept(
    samples: Iterable[dict[str, Any]], wanted: Mapping[str, Collection[int]]
) -> Iterator[dict[str, Any]]:
    """Those samples of each shard, which come in its order, that are wanted by their numbers."""
    for url, shard in groupby(samples, lambda sample: str(sample["__url__"])):
        yield from (sample for number, sample in enumerate(shard) if number in wanted[url])


def open_remote(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> IO[bytes]:
    """Open a shard behind a URL, with retries and the credentials of other commands."""
    return place(url).open(mode)


@dataclass(frozen=True)
class Finish:
    """One view and one caption of a stored sample, its latents sampled and scaled."""

    channels: int
    scaling_factor: float

    def __call__(
        self, key: str, record: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        """Make the sample that `open_webdataset` describes."""
        view, caption = below(len(arrays["latents"])), below(record["num_captions"])
        raw = arrays["latents"][view].copy()
        latents = torch.empty(self.channels, *raw.shape[1:])
        posterior = len(raw) == 2 * self.channels
        noise = torch.randn_like(latents).numpy() if posterior else None
        finish_latents(raw, noise, self.scaling_factor, latents)
        chosen = {
            name: view if name == "time_ids" else caption for name in ARRAYS if name in arrays
        }
        captions = record.get("captions", ())  # none where they did not fit
        return {
            "__key__": key,
            "caption": captions[caption] if caption < len(captions) else "",
            "record": record,
            "latents": latents,
            **{name: torch.from_numpy(arrays[name][row].copy()) for name, row in chosen.items()},
        }

    def members(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The same of what webdataset has decoded."""
        arrays = {name: sample[f"{name}.npy"] for name in FIELDS if f"{name}.npy" in sample}
        return self(sample["__key__"], sample["json"], arrays)


def below(count: int) -> int:
    """A number below `count`, of torch's random ones."""
    return int(torch.randint(count, ()))


class CacheDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """A cache as a map-style torch Dataset; its samples are those of `open_webdataset`."""

    def __init__(
        self, cache: Place | str, latent_size: Size | None = None, heldout: bool = False
    ) -> None:
        """Open it. Raises UserError as `open_webdataset` does."""
        self.root = place(str(cache))
        manifest = open_manifest(self.root)
        self.finish = finish_of(manifest)
        self.shards = chosen_shards(manifest, latent_size, heldout)
        self.numbers = [numbers_of(shard, heldout) for shard in self.shards]
        self.ends = list(accumulate(map(len, self.numbers)))

    def __len__(self) -> int:
        """How many samples there are."""
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one sample, and no other byte. Raises IndexError beyond the last."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard, numbers = self.shards[number], self.numbers[number]
        sample = numbers[index - self.ends[number]]  # counted from the shard's last one
        return self.finish(*shard.layout.read(self.root / shard.file, sample))


def finish_of(manifest: Manifest) -> Finish:
    """How the samples of a cache are finished."""
    return Finish(manifest.identity.vae.channels, manifest.identity.vae.scaling_factor)


def chosen_shards(manifest: Manifest, latent_size: Size | None, heldout: bool) -> list[Shard]:
    """The shards with samples of this kind. Raises UserError where there are none."""
    sizes = sorted({shard.layout.latent_size for shard in manifest.shards})
    found = [
        shard
        for shard in manifest.shards
        if latent_size in (None, shard.layout.latent_size) and len(numbers_of(shard, heldout))
    ]
    if not found:
        kind = "held out" if heldout else "to train on"
        raise UserError(f"there are no samples {kind} of latent_size {latent_size}; sizes: {sizes}")
    return found


def numbers_of(shard: Shard, heldout: bool) -> Sequence[int]:
    """Which of a shard's samples were held out, or all the others."""
    aside = set(shard.heldout)
    return [number for number in range(shard.count) if (number in aside) == heldout]
