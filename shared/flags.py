"""Flags known from diffusers' and kohya's scripts: taken as ours, or refused with a hint.

docs/flags.md lists them all; nothing is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from shared.errors import UserError

# Their name -> ours. A value stands for a switch that turned into a choice.
ALIASES: dict[str, tuple[str, ...]] = {
    "pretrained_teacher_model": ("model",),
    "pretrained_model_name_or_path": ("model",),
    "pretrained_vae_model_name_or_path": ("vae",),
    "output_dir": ("run",),
    "enable_xformers_memory_efficient_attention": ("attention", "xformers"),
    "caption_dropout_rate": ("proportion_empty_prompts",),
    "min_snr_gamma": ("snr_gamma",),
    "train_shards_path_or_url": ("shards",),
    "train_data_dir": ("shards",),
    "vae_encode_batch_size": ("vae_batch_size",),
    "no_half_vae": ("vae_dtype", "float32"),
    "enable_bucket": ("buckets",),
    "flip_aug": ("random_flip",),
}

_REVISION = (
    "download that revision (`hf download OWNER/NAME --revision REVISION --local-dir FOLDER`) "
    "and pass --model FOLDER"
)
_SHARDS = "`python -m prep encode --shards ...` reads pictures; `train` reads the cache it makes"

REFUSED: dict[str, str] = {
    "teacher_revision": _REVISION,
    "revision": _REVISION,
    "cache_dir": "set HF_HUB_CACHE, or pass --model the folder of a downloaded model",
    "local_rank": "`accelerate launch` and torchrun tell every process its rank; leave it out",
    "interpolation_type": "`prep encode` always resizes with antialiased Lanczos; leave it out",
    "cast_teacher_unet": "frozen weights always follow --mixed-precision; leave it out",
    "use_fix_crop_and_size": "time ids are those of the crop that `prep encode` made; leave it out",
    "encode_batch_size": "`prep encode` has --vae-batch-size and --text-batch-size",
    "dataset_name": "`python -m prep encode --shards hf://OWNER/NAME` reads a dataset of the hub",
    "dataset_config_name": "pass `prep encode --shards` the files: hf://datasets/OWNER/NAME/CONFIG/*.parquet",
    "cache_latents": "`python -m prep encode` caches latents once and for all; leave it out",
    "cache_text_encoder_outputs": "`python -m prep encode` caches them too; leave it out",
    "caption_extension": "captions beside pictures are NAME.txt; rename them, or list them in a "
    "metadata.jsonl",
    "output_dir": "the cache's folder is --cache",
    "train_shards_path_or_url": _SHARDS,
    "train_data_dir": _SHARDS,
    "vae_encode_batch_size": "`prep encode` encodes; pass it --vae-batch-size",
    "no_half_vae": "`prep encode` encodes; pass it --vae-dtype float32",
    "enable_bucket": "`prep encode` sorts into buckets; pass it --buckets",
    "flip_aug": "`prep encode` mirrors pictures; pass it --random-flip",
    "enable_xformers_memory_efficient_attention": "`train distill` has --attention xformers",
    "caption_dropout_rate": "`train distill` drops captions: --proportion-empty-prompts",
    "min_snr_gamma": "belongs to the ordinary diffusion loss: `train distill --objective denoise`",
    "noise_offset": "belongs to the ordinary diffusion loss: `train distill --objective denoise`",
}

STAGE_ONE = (
    "resolution", "center_crop", "random_flip", "image_column", "caption_column", "vae_batch_size",
    "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale", "clip_skip",
)  # fmt: skip
STAGE_TWO = (
    "logging_dir", "report_to", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "dataloader_num_workers", "train_batch_size", "num_train_epochs",
    "max_train_steps", "max_train_samples", "learning_rate", "scale_lr", "lr_scheduler",
    "lr_warmup_steps", "gradient_accumulation_steps", "use_8bit_adam", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "w_min", "w_max", "num_ddim_timesteps",
    "loss_type", "huber_c", "timestep_scaling_factor", "mixed_precision", "allow_tf32",
    "gradient_checkpointing", "validation_steps", "push_to_hub", "hub_token", "hub_model_id",
    "tracker_project_name", "proportion_empty_prompts", "unet_time_cond_proj_dim", "ema_decay",
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules",
)  # fmt: skip
REFUSED |= {name: "a flag of stage one: `python -m prep encode`" for name in STAGE_ONE}
REFUSED |= {name: "a flag of stage two: `python -m train distill`" for name in STAGE_TWO}


def translate(name: str, known: Collection[str]) -> tuple[str, ...]:
    """Our name, and the value if the name implies one, for a flag or a setting as it was typed.

    `known` are the command's own names; one that is neither there nor here comes back as it is.
    Raises UserError, with what to use, for one that is refused.
    """
    name = name.replace("-", "_")
    if name in known:
        return (name,)
    if name in ALIASES and ALIASES[name][0] in known:
        return ALIASES[name]
    if name in REFUSED:
        raise UserError(f"--{name.replace('_', '-')}: {REFUSED[name]}")
    return (name,)


def translate_arguments(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """A command line with all flags translated."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        ours = translate(flag[2:], known) if flag.startswith("--") else ()
        if not ours or ours[0] not in known:
            words.append(word)
        else:
            words.append(f"--{ours[0].replace('_', '-')}{equals}{value}")
            words.extend(ours[1:])
    return words
