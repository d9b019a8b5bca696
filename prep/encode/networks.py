"""Which encoders fill a cache, on which device, in which batch shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from prep.config import EncodeConfig
from prep.encoders.text import TextEncoder
from prep.encoders.vae import VaeEncoder
from shared.cache.identity import Identity, Shapes
from shared.errors import UserError
from shared.machine import cpus
from shared.machine.device import pick_device, set_threads
from shared.models.family import Model, recorded_model, unet_config
from shared.storage.urls import Place


@dataclass(frozen=True)
class Encoders:
    """The frozen networks."""

    vae: VaeEncoder
    text: TextEncoder


class MachineFlags(Protocol):
    """The flags about the machine, which several commands have."""

    @property
    def cache(self) -> Place | None:
        """Where the cache is."""

    @property
    def device(self) -> str:
        """cuda, cpu or auto."""

    @property
    def threads(self) -> int | None:
        """CPU threads of the networks."""

    @property
    def cpus_per_worker(self) -> int | None:
        """CPU cores of a Ray worker."""


class Begun(Protocol):
    """On what a cache, or its answers, were begun."""

    @property
    def device(self) -> str:
        """The kind of device."""

    @property
    def threads(self) -> int | None:
        """A CPU's."""


def choose_device(
    config: MachineFlags, begun: Begun | None, remedy: str = "choose another --cache"
) -> torch.device:
    """Take the flag, else the kind that was begun on, else a GPU where there is one.

    Raises UserError for a device that is not here; `remedy` ends the sentence.
    """
    if config.device != "auto" or begun is None:
        return pick_device(config.device)
    try:
        return pick_device(begun.device)
    except UserError:
        raise UserError(
            f"{config.cache} was begun on {begun.device}, which decides its bytes, and there is "
            f"none here; go on where there is one, or {remedy}"
        ) from None


def choose_shapes(
    config: EncodeConfig, stored: Identity | None, device: torch.device, resolution: int
) -> Shapes:
    """Take the flags, else what the cache was started with, else defaults."""
    default = Shapes(default_vae_batch_size(device, resolution), 32, device.type)
    begun = stored.shapes if stored else default
    return Shapes(
        config.vae_batch_size or begun.vae_batch_size,
        config.text_batch_size or begun.text_batch_size,
        device.type,
        choose_threads(config, begun if stored else None, device),
    )


def choose_threads(config: MachineFlags, begun: Begun | None, device: torch.device) -> int | None:
    """Choose likewise; None on a GPU, where they decide nothing."""
    if device.type != "cpu":
        return None
    before = begun.threads if begun else None
    return config.threads or before or config.cpus_per_worker or cpus.threads()


def taken_over(config: MachineFlags, stored: Identity | None) -> str:
    """Note that the cache was started on a machine so unlike this one that it is slow here."""
    if not stored:
        return ""
    begun, here = stored.shapes, cpus.threads()
    if begun.device == "cpu" and config.device == "auto" and pick_device("auto").type != "cpu":
        return (
            f"note: {config.cache} was begun on a CPU, which decides its bytes, so the GPU here "
            "is not used; a cache for it is another --cache, or begins with --overwrite --device"
        )
    threads = begun.threads or 0
    if begun.device == "cpu" and config.threads is None and threads > here:
        return (
            f"note: {config.cache} was begun with {threads} threads, which decide its bytes; they "
            f"share {here} here and are slow; for unlike machines begin a cache with "
            f"--threads {here}"
        )
    return ""


def default_vae_batch_size(device: torch.device, resolution: int) -> int:
    """On a GPU 16 pictures of 512 px, or as many larger ones as have so many pixels."""
    if device.type == "cpu":
        return 8
    return min(16, max(1, 16 * 512**2 // resolution**2))


@dataclass(frozen=True)
class VaeChoice:
    """Which VAE encodes, in what, and its stream's scale (None until it is calibrated)."""

    source: str
    dtype: str
    rescale: float | None


def choose_vae(
    config: EncodeConfig, stored: Identity | None, model: Model, device: str
) -> VaeChoice:
    """Take the flags, else what the cache was started with, else the model's VAE."""
    source, dtype, rescale = None, "float16" if device == "cuda" else "float32", None
    if stored is not None:
        source, dtype, rescale = stored.vae.source, stored.vae.dtype, stored.vae.rescale
    recorded = recorded_model(source, "--vae") if source and not config.vae else model.source
    if config.vae_dtype not in ("auto", dtype):
        dtype, rescale = config.vae_dtype, None
    return VaeChoice(config.vae or recorded, dtype, rescale)


def load_encoders(
    model: Model, shapes: Shapes, vae: VaeChoice, clip_skip: int, device: torch.device
) -> Encoders:
    """Both encoders on `device`, with the recorded batch shapes and number of threads.

    Raises UserError for a VAE whose latents the model does not take.
    """
    set_threads(shapes.threads)
    torch.backends.cudnn.allow_tf32 = False  # torch's default: 10 bits where fp32 has 23
    encoder = VaeEncoder(vae.source, device, shapes.vae_batch_size, vae.dtype, vae.rescale)
    refuse_other_channels(model, vae.source, encoder.channels)
    return Encoders(encoder, TextEncoder(model, device, shapes.text_batch_size, clip_skip))


def refuse_other_channels(model: Model, vae: str, channels: int) -> None:
    """Raise UserError where the model's UNet does not take latents of so many channels."""
    wanted = unet_config(model.source)["in_channels"]
    if channels == wanted:
        return
    remedy = "pass a VAE made for this model"
    if vae == model.source:
        remedy = "one that also takes a picture or a mask is no teacher: pass its base model"
    raise UserError(
        f"{vae}: its VAE's latents have {channels} channels, the UNet of "
        f"{model.source} takes {wanted}; {remedy}"
    )
