"""Parts become one of diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL

from infer.pipelines.choose import Choice
from infer.pipelines.control import load_controlnet
from infer.pipelines.loras import load_loras
from prep.encoders.clip import load_clip
from shared.errors import UserError
from shared.models.family import Model, force_zeros, unet_config
from shared.models.rescale import Scales, rescale_vae, scales_of
from shared.models.vae import load_vae
from shared.networks.denoiser import Denoiser, load_unet
from train.export.student import load_exported_unet
from train.networks.full import plain_copy

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Exact for every VAE (docs/fp16-vae.md), and lets streams of 8 million pass through fp16.
FP16_SCALE = 2.0**-7


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The networks' precision: half on a GPU unless told otherwise."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "float16"
    return DTYPES[name]


def load_pipeline(
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    kind: str = "",
    controlnet: str | None = None,
    folded: float | None = None,
) -> Any:
    """Load a stock pipeline, its LoRAs fused.

    `kind` is "" for prompts alone, "Img2Img" or "Inpaint". LoRAs are added in fp32, so that half
    precision rounds their sum once. `folded` is a guidance_scale to build into a UNet that would
    have to be told it. Raises UserError for parts that are missing or do not fit.
    """
    quiet()
    parts = {"vae": half_safe(load_vae(choice.vae), dtype), **text_parts(choice.model)}
    unet = load_denoiser(choice, torch.float32 if choice.loras else dtype)
    parts["unet"] = unet if folded is None else plain_copy(unet, folded - 1)
    if controlnet is not None:
        parts["controlnet"] = load_controlnet(controlnet, parts["unet"].config, dtype)
    pipe = pipeline_class(choice, kind, controlnet is not None)(
        **parts, scheduler=choice.sampling.scheduler, **settings(choice.model)
    )
    load_loras(pipe, choice.loras, choice.model.source)
    pipe.to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_class(choice: Choice, kind: str, controlled: bool) -> Any:
    """Diffusers' class for a family and what goes in."""
    name = choice.model.family.pipeline.removesuffix("Pipeline")
    return getattr(diffusers, f"{name}{'ControlNet' * controlled}{kind}Pipeline")


def quiet() -> None:
    """Let the libraries be silent of what is told here in a line."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def settings(model: Model) -> Mapping[str, Any]:
    """What else a pipeline of this family wants; nobody's pictures are looked at or marked."""
    if model.family.micro_conditioning:
        zeros = force_zeros(model)
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text_parts(model: Model) -> dict[str, Any]:
    """Tokenizers and text encoders under the pipelines' names."""
    parts = dict[str, Any]()
    for name in model.family.text_encoders:
        tokenizer, encoder = load_clip(model, name)
        parts[name.replace("text_encoder", "tokenizer")] = tokenizer
        parts[name] = encoder.requires_grad_(False)
        if not hasattr(encoder, "text_model"):
            # Of transformers 5; for clip_skip diffusers looks there for the last norm. Not as a
            # module, which would be its own child.
            vars(encoder)["text_model"] = encoder
    return parts


def load_denoiser(choice: Choice, dtype: torch.dtype) -> Denoiser:
    """The UNet: a full student's, or the model's."""
    if choice.unet is None:
        return load_unet(choice.model.source, dtype)
    unet = load_exported_unet(choice.unet).eval().requires_grad_(False)
    check_family(unet, choice)
    return unet.to(dtype).to(memory_format=torch.channels_last)


def check_family(unet: Denoiser, choice: Choice) -> None:
    """Raise UserError for a student that was trained from another kind of model."""
    config = unet_config(choice.model.source)
    for name in ("cross_attention_dim", "addition_embed_type"):
        ours, theirs = unet.config.get(name), config.get(name)
        if ours != theirs:
            raise UserError(
                f"{choice.name} is no student of {choice.model_name}: its {name} is {ours}, the "
                f"model's {theirs}; leave --model out, or give one of its kind"
            )


def half_safe(vae: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE, made to work in this precision: fp16 would overflow in some.

    Raises UserError for one that is not built as AutoencoderKL is.
    """
    if dtype != torch.float16 or scales_of(vae) != Scales():
        return vae
    return rescale_vae(vae, FP16_SCALE, FP16_SCALE)
