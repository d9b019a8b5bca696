"""A pipeline of Stable Diffusion 1.5's size, with random weights: a folder of photographs at 512 px
becomes a cache, and the cache trains a LoRA for one step."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.support.sources import ROOT, TINY_SD, accounts, manifest, photo, samples, write_rows

# width x height, and the crop at 512: original_h, original_w, top, left, 512, 512
PHOTOS = {
    "wide.jpg": ((1920, 1080), [1080, 1920, 0, 199]),
    "tall.jpg": ((768, 1366), [1366, 768, 199, 0]),
    "small.png": ((300, 200), [200, 300, 0, 128]),
}


def save_sd15(folder, unet_channels=(320, 640, 1280, 1280), vae_channels=(128, 256, 512, 512)):
    """A pipeline with SD 1.5's published configuration, in fp16."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer", model_max_length=77)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)  # 2 GB instead of 4
    try:
        vae = AutoencoderKL(
            block_out_channels=vae_channels,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                projection_dim=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
                hidden_act="quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=unet_channels,
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path / "model", ignore_errors=True)  # 2 GB that nobody looks at again


def command(*words):
    words = [sys.executable, "-m", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sd15_size_at_512_from_photographs_to_one_training_step(folder):
    save_sd15(folder / "model")
    check(folder)


def check(folder):
    (folder / "photos").mkdir()
    for number, (name, (size, _)) in enumerate(PHOTOS.items()):
        photo(number, *size).save(folder / "photos" / name)
    write_rows(
        folder / "photos",
        [{"file_name": name, "text": f"a photograph of {name}"} for name in PHOTOS],
    )
    cache, run = folder / "cache", folder / "run"
    command(
        "prep", "encode", "--shards", folder / "photos", "--model", folder / "model",
        "--cache", cache, "--vae-batch-size", 1, "--text-batch-size", 4,
    )  # fmt: skip
    identity = manifest(cache)["identity"]
    assert identity["family"] == "sd15"
    assert identity["preprocessing"]["resolution"] == 512
    assert {row["source_key"]: row["time_ids"] for row in accounts(cache)} == {
        name: [*ids, 512, 512] for name, (_, ids) in PHOTOS.items()
    }
    channels = 8 if identity["latents"] == "posterior" else 4
    found = samples(cache)
    assert set(found) == set(PHOTOS)
    for sample in found.values():
        assert sample.arrays["latents"].shape == (1, channels, 64, 64)
        assert sample.arrays["prompt_embeds"].shape == (1, 77, 768)
        assert all(np.isfinite(array).all() for array in sample.arrays.values())
        assert sample.arrays["latents"].std() > 0
    command(
        "train", "distill", "--model", folder / "model", "--cache", cache, "--run", run,
        "--student", "lora", "--train-batch-size", 1, "--max-train-steps", 1,
        "--validation-steps", 0, "--logging-steps", 1,
    )  # fmt: skip
    weights = load_file(run / "pytorch_lora_weights.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.any()]
    assert moved  # lora_B starts at zero
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 1
    assert np.isfinite(row["loss"])
