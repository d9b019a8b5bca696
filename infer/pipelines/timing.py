"""How long a denoiser's pass takes here, measured before anybody waits for many."""

from __future__ import annotations

import time
from typing import Any

import torch

LONG = 2.0  # seconds; beside them warming up is little
TOKENS = 77  # of a prompt, as CLIP reads it


@torch.inference_mode()
def seconds_per_pass(unet: Any, height: int, width: int, batch: int = 1) -> float:
    """Time a pass over `batch` latents of this size, in seconds."""
    config, options = unet.config, {"device": unet.device, "dtype": unet.dtype}
    latents = torch.zeros(batch, config.in_channels, height, width, **options)
    states = torch.zeros(batch, TOKENS, config.cross_attention_dim, **options)
    more = dict[str, Any]()
    if config.addition_embed_type == "text_time":
        ids = torch.zeros(batch, 6, **options)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text = torch.zeros(batch, pooled, **options)
        more["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    if config.time_cond_proj_dim is not None:
        more["timestep_cond"] = torch.zeros(batch, config.time_cond_proj_dim, **options)
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        unet(latents, 1, states, **more).sample.cpu()
        seconds = time.perf_counter() - started
        if seconds > LONG:
            break
    return seconds
