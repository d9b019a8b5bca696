"""Models of the published sizes with random weights, and caches for them: nothing is downloaded.

A model here is a folder of configurations alone. `random_weights` makes the loaders of both stages
build the networks of such a folder where they will run, with the same numbers every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train.networks.build
from benchmarks.common.public_unets import SD15, SDXL
from shared.cache.answers import (
    AnswersIdentity,
    AnswersManifest,
    AnswersShard,
    answers_layout,
    embedding_hash,
)
from shared.cache.answers_store import answers_of, write_answers_manifest
from shared.cache.conditioning import (
    Conditioning,
    TextEmbeds,
    load_conditioning,
    save_conditioning,
)
from shared.cache.identity import Identity, Preprocessing, Shapes, TextIdentity, VaeIdentity
from shared.cache.layout import TRAILER, Layout, cache_layout
from shared.cache.manifest import commit_unit, fold, open_manifest, read_units, write_manifest
from shared.cache.paths import CachePaths
from shared.cache.sums import ChannelSums
from shared.cache.units import Shard, UnitRecord
from shared.diffusion import schedule_settings
from shared.models.family import FAMILIES, force_zeros, load_config, resolve_model
from shared.models.fingerprint import signs

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENS = 77
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
          "intermediate_size": 3072, "projection_dim": 768, "hidden_act": "quick_gelu"}  # fmt: skip
CLIP_BIG_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20,
              "intermediate_size": 5120, "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
# UNet, the VAE's scaling factor, text encoders.
PUBLISHED = {
    "sd15": (SD15, 0.18215, {"": CLIP_L}),
    "sdxl": (SDXL, 0.13025, {"": CLIP_L, "_2": CLIP_BIG_G}),
}


def model_folder(name: str, root: Path) -> Path:
    """Where the configurations of `sd15` or `sdxl` lie, written to `root` if they must; else the
    project's own tiny model of that name."""
    if name not in PUBLISHED:
        return Path(FAMILIES[name].pretrained)
    folder = root / name
    if folder.exists():
        return folder
    unet, scaling_factor, texts = PUBLISHED[name]
    write_json(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel", **unet})
    vae = {"_class_name": "AutoencoderKL", **VAE, "scaling_factor": scaling_factor}
    write_json(folder / "vae/config.json", vae)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", {"force_zeros_for_empty_prompt": name == "sdxl"})
    for number, encoder in texts.items():
        write_text_encoder(folder, number, encoder)
    return folder


def write_text_encoder(folder: Path, number: str, encoder: dict[str, Any]) -> None:
    """Its configuration, and the tiny model's tokenizer made as long as the real one."""
    tokenizer = DATA / "tiny-sd/tokenizer"
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    write_json(
        folder / f"tokenizer{number}/tokenizer_config.json",
        {**settings, "model_max_length": TOKENS},
    )
    (folder / f"tokenizer{number}/tokenizer.json").write_bytes(
        (tokenizer / "tokenizer.json").read_bytes()
    )
    tiny = json.loads((DATA / "tiny-sd/text_encoder/config.json").read_text())
    ends = {name: tiny[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    lengths = {"vocab_size": 49408, "max_position_embeddings": TOKENS}
    write_json(folder / f"text_encoder{number}/config.json", encoder | lengths | ends)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def random_unet(
    source: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """As `shared.networks.denoiser.load_unet` gives it; two calls give the same weights."""
    config = load_config(source, "unet/config.json")
    return frozen(lambda: UNet2DConditionModel.from_config(config), device, dtype)


def random_vae(
    source: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> AutoencoderKL:
    """As `shared.models.vae.load_vae` gives it."""
    config = load_config(source, "vae/config.json")
    return frozen(lambda: AutoencoderKL.from_config(config), device, dtype)


def random_text_encoder(
    source: str, part: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The text encoder in a model's folder `part`, frozen."""
    config = CLIPTextConfig.from_pretrained(source, subfolder=part, dtype=dtype)
    kind = CLIPTextModelWithProjection if part.endswith("_2") else CLIPTextModel
    encoder: nn.Module = frozen(lambda: kind(config), device, dtype)
    return encoder


def frozen(build: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The module that `build` makes, its weights drawn on `device`."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = build()
    finally:
        torch.set_default_dtype(torch.float32)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Both stages build what they would load, on `device`."""
    build_student = train.networks.build.build_student

    def build_there(*args: Any) -> Any:
        with torch.device(device):
            return build_student(*args)

    def build_unet(source: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        return random_unet(source, device, dtype)

    class TextEncoders:
        @staticmethod
        def from_pretrained(
            source: str, subfolder: str, **_: Any
        ) -> tuple[nn.Module, dict[str, Any]]:
            return random_text_encoder(source, subfolder, device), {}  # and nothing is missing

    with ExitStack() as patches:
        for name, value in (
            ("train.trainer.setup.build_student", build_there),
            ("train.networks.build.load_run_teacher", lambda source, _: build_unet(source)),
            ("prep.encoders.vae.load_vae", lambda source: random_vae(source, device)),
            ("prep.encoders.clip.CLIPTextModel", TextEncoders),
            ("prep.encoders.clip.CLIPTextModelWithProjection", TextEncoders),
        ):
            patches.enter_context(patch(name, value))
        yield


def text_shapes(source: Path) -> tuple[int, int, int | None]:
    """L and D of a model's prompt embeddings, and P of its pooled ones, if it has any."""
    family = resolve_model(str(source)).family
    config = load_config(str(source), f"{family.text_encoders[-1]}/config.json")
    pooled = config["projection_dim"] if family.micro_conditioning else None
    return config["max_position_embeddings"], family.cross_attention_dim, pooled


def write_cache(source: Path, root: Path, resolution: int, count: int) -> Path:
    """A cache of `count` random samples as `prep encode` would leave it for this model."""
    vae = load_config(str(source), "vae/config.json")
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    length, width, pooled = text_shapes(source)
    layout = cache_layout(
        (1, vae["latent_channels"], side, side),
        (1, length, width),
        None if pooled is None else (1, pooled),
        micro_conditioning=pooled is not None,
    )
    cache = CachePaths(root)
    cache.shards.mkdir(parents=True)
    rng = np.random.default_rng(0)
    content = b"".join(sample(layout, i, resolution, rng) for i in range(count)) + TRAILER
    (root / "shards/random.tar").write_bytes(content)
    shard = Shard("shards/random.tar", layout, count, len(content), "")
    channels = vae["latent_channels"]
    sums = ChannelSums(1, (0.0,) * channels, (1.0,) * channels)
    commit_unit(
        cache,
        UnitRecord("random", "random", {}, (shard,), "", "", count, count, {}, sums=sums),
    )
    empty = TextEmbeds(
        torch.zeros(1, length, width), None if pooled is None else torch.zeros(1, pooled)
    )
    save_conditioning(Conditioning(empty, (), empty[:0]), cache.conditioning, cache.tmp)
    model = resolve_model(str(source))
    scale = vae["scaling_factor"]
    identity = Identity(
        1, model.family.name, model.source, "mean",
        VaeIdentity("", channels, downscale=8, scaling_factor=scale, dtype="float32"),
        TextIdentity((), length, width, force_zeros(model)),
        Preprocessing(resolution, views=1, max_captions=1, center_crop=True),
        Shapes(1, 1, "cpu"),
    )  # fmt: skip
    write_manifest(cache, fold(identity, read_units(cache), {}))
    return root


def write_answers(source: Path, root: Path, device: torch.device, count: int = 2) -> None:
    """Random answers of this model's teacher, `count` of each sample of the cache at `root`."""
    cache, manifest = CachePaths(root), open_manifest(root)
    (shard,) = manifest.shards
    layout = answers_layout(count, manifest.identity.vae.channels, shard.layout.latent_size)
    rng = np.random.default_rng(1)
    shape = layout.fields[0].shape
    content = b"".join(
        layout.pack(f"{i:016x}", {}, {"answers": rng.standard_normal(shape)})
        for i in range(shard.count)
    )
    content += TRAILER
    folder = answers_of(cache).root
    (folder / "shards").mkdir(parents=True)
    (folder / "shards/random.tar").write_bytes(content)
    teacher = signs(random_unet(str(source), device).parameters())
    schedule = schedule_settings(load_config(str(source), "scheduler/scheduler_config.json"))
    empty = load_conditioning(cache.conditioning).unconditional
    identity = AnswersIdentity(
        1, str(source), teacher, schedule, num_ddim_timesteps=50, seed=0, mixed_precision="no",
        dtype="<f2", unconditional=embedding_hash(empty), batch_size=1, device=device.type,
    )  # fmt: skip
    row = AnswersShard("shards/random.tar", shard.file, layout, shard.count, len(content), "")
    write_answers_manifest(cache, AnswersManifest(identity, count, (row,)))


def sample(layout: Layout, number: int, resolution: int, rng: np.random.Generator) -> bytes:
    """The bytes of a sample with normal values."""
    arrays = {field.name: rng.standard_normal(field.shape) for field in layout.fields}
    arrays["time_ids"] = np.array([[resolution, resolution, 0, 0, resolution, resolution]])
    return layout.pack(f"{number:016x}", {"num_captions": 1}, arrays)
