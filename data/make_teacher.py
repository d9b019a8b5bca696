"""Train the two small teachers, `data/tiny-sd` and `data/tiny-xl`, from fresh renders.

    python -m data.make_teacher vae        # AutoencoderKL, shared by both        (~20 minutes)
    python -m data.make_teacher tiny-sd    # Stable Diffusion 1.5 in miniature    (~45 minutes)
    python -m data.make_teacher tiny-xl    # SDXL in miniature                    (~45 minutes)

On two CPU cores. The pictures are drawn with another seed than those in `data/pictures`, so the
teachers have seen neither the training nor the held-out set. Work in progress goes to `--work`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from data.arguments import local_argument
from data.make_pictures import picture
from data.shapes import caption
from data.tiny_models import TEACHERS, Teacher, build_vae

HERE = Path(__file__).resolve().parent
SEED = 7  # of the pictures the teachers learn from
PICTURES = 24_000
SIDE = 64
EMPTY_CAPTIONS = 0.12
VAE_RATE = 3e-3
MIN_SIGNAL = 0.02  # abar below which the loss's weight stays as it is


# --- pictures ---------------------------------------------------------------------------------


def pictures(work: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Renders `[N, 64, 64, 3]` uint8, their captions, and `time_ids` `[N, 6]`; kept in `work`."""
    path = work / "pictures.npz"
    if not path.exists():
        with Pool() as pool:
            rows = pool.map(_prepared, range(PICTURES), chunksize=200)
        images, texts, ids = zip(*rows, strict=True)
        np.savez(path, images=np.stack(images), captions=np.array(texts), time_ids=np.array(ids))
    stored = np.load(path)
    return stored["images"], [str(text) for text in stored["captions"]], stored["time_ids"]


def _prepared(index: int) -> tuple[np.ndarray, str, list[int]]:
    """Resize the short side to 64 and crop the centre, as `prep` does."""
    scene, image = picture(SEED, index)
    scale = SIDE / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    time_ids = [image.height, image.width, top, left, SIDE, SIDE]
    image = image.resize((width, height)).crop((left, top, left + SIDE, top + SIDE))
    return np.asarray(image), caption(scene), time_ids


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 `[N, H, W, 3]` to float `[N, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- training ---------------------------------------------------------------------------------


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """`steps` batches of indices, drawn with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield rng.integers(0, count, size)


def train_vae(work: Path, steps: int) -> None:
    """L1 + L2 reconstruction, L1 on the edges, a light KL term; writes `work/vae`.

    Goes on from a VAE that is there already.
    """
    torch.manual_seed(0)
    images, _, _ = pictures(work)
    vae = AutoencoderKL.from_pretrained(work / "vae") if (work / "vae").exists() else build_vae()
    vae = vae.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=0.0
    )
    started = time.time()
    for step, index in enumerate(batches(len(images), 16, steps, seed=1)):
        for group in optimizer.param_groups:
            group["lr"] = VAE_RATE * cosine(step, steps)
        x = to_tensor(images[index]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        edges = F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + edges + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(
                f"vae {step} loss {loss:.4f} kl {kl:.2f} {time.time() - started:.0f}s", flush=True
            )
    latents = encode_all(vae, images[:2000])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior means `[N, 4, 8, 8]`, unscaled."""
    vae.eval()
    return torch.cat(
        [
            vae.encode(to_tensor(images[i : i + 250])).latent_dist.mean
            for i in range(0, len(images), 250)
        ]
    )


def train_teacher(name: str, work: Path, steps: int, batch: int) -> None:
    """Learn eps, UNet and text encoders together; the weights are averaged.

    The loss is weighted by 1 / abar, which is v-prediction's weighting: unweighted, what is decided
    at high noise (where the shape stands, which colour it has) hardly counts and is not learnt.
    Goes on from a teacher that is in `work` already.
    """
    torch.manual_seed(0)
    images, captions, time_ids = pictures(work)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    latents = encode_all(vae, images) * vae.config.scaling_factor
    teacher: Teacher = TEACHERS[name](sorted(set(captions)))
    if (work / name).exists():
        teacher.load(work / name)
    tokens = teacher.tokenize(captions)
    ids = torch.from_numpy(time_ids)
    parameters = teacher.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    abar = teacher.scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(1)
    started = time.time()
    for step, index in enumerate(batches(len(images), batch, steps, seed=2)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cosine(step, steps)
        x = latents[index]
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(0, len(abar), (batch,), generator=generator)
        signal = abar[t].view(-1, 1, 1, 1)
        empty = torch.rand(batch, generator=generator) < EMPTY_CAPTIONS
        z = signal.sqrt() * x + (1 - signal).sqrt() * noise
        error = teacher.predict(z, t, tokens[index], empty, ids[index]) - noise
        loss = (error**2 / signal.clamp(min=MIN_SIGNAL)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if step % 200 == 0:
            print(f"{name} {step} loss {loss:.4f} {time.time() - started:.0f}s", flush=True)
        if (step + 1) % 4000 == 0:
            save_average(teacher, average, work / name, vae)
    save_average(teacher, average, HERE / name, vae)


def save_average(teacher: Teacher, average: list[Tensor], folder: Path, vae: AutoencoderKL) -> None:
    """Write the pipeline with the averaged weights, and go on with the live ones."""
    weights = [p.data for p in teacher.parameters()]
    live = [p.clone() for p in weights]
    torch._foreach_copy_(weights, average)
    teacher.save(folder, vae)
    torch._foreach_copy_(weights, live)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["vae", *TEACHERS])
    parser.add_argument("--work", type=local_argument, default=HERE / "work")
    parser.add_argument("--steps", type=int, help="0 leaves a teacher's weights random")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        train_vae(args.work, args.steps or 7000)
    else:
        train_teacher(
            args.stage, args.work, 16_000 if args.steps is None else args.steps, args.batch
        )


if __name__ == "__main__":
    main()
