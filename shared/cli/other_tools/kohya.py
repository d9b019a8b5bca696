"""Flags of kohya's sd-scripts: train_network.py, fine_tune.py and train_db.py, also for SDXL.

Those not here have the same name as ours or diffusers'. The tables are explained in
shared/cli/other_tools/flags.py.
"""

from __future__ import annotations

from shared.cli.other_tools import values
from shared.cli.other_tools.values import Reader, Switch, Taken, refusals

TAKEN: dict[str, Taken] = {
    "caption_dropout_rate": "proportion_empty_prompts",
    "min_snr_gamma": "snr_gamma",
    "no_half_vae": Switch("vae_dtype", "float32"),
    "enable_bucket": "buckets",
    "flip_aug": "random_flip",
    "resolution": Reader("resolution", values.square),
    "lr_warmup_steps": Reader("lr_warmup_steps", values.warmup),
    "network_dim": "lora_rank",
    "network_alpha": "lora_alpha",
    "network_weights": "init_student",
    "network_module": Reader("student", values.network),
    "unet_lr": "learning_rate",
    "optimizer_type": Reader("use_8bit_adam", values.optimizer),
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "max_train_epochs": "num_train_epochs",
    "max_data_loader_n_workers": "dataloader_num_workers",
    "save_every_n_steps": "checkpointing_steps",
    "resume": "resume_from_checkpoint",
    "sample_every_n_steps": "validation_steps",
    "log_with": Reader("report_to", values.trackers),
    "log_tracker_name": "tracker_project_name",
    "huggingface_repo_id": Reader("hub_model_id", values.repository),
    "huggingface_token": "hub_token",
    "xformers": Switch("attention", "xformers"),
    "diffusers_xformers": Switch("attention", "xformers"),
    "sdpa": Switch("attention", "sdpa"),
    "torch_compile": "compile",
    "text_encoder_batch_size": "text_batch_size",
}

REFUSED = refusals({
    "cache_latents cache_latents_to_disk cache_text_encoder_outputs "
    "cache_text_encoder_outputs_to_disk cache_info": "`python -m prep encode` caches latents and "
        "text once and for all; leave it out",
    "skip_cache_check": "a cache is trusted as it is; `prep verify` checks one; leave it out",
    "tokenizer_cache_dir": "set HF_HUB_CACHE; leave it out",
    "v2 v_parameterization zero_terminal_snr": "the model's own configuration says it; leave it "
        "out",
    # The network.
    "network_args block_lr": "--lora-target-modules says which layers are adapted",
    "base_weights base_weights_multiplier": "--teacher-lora FILE:SCALE gives the teacher that LoRA",
    "dim_from_weights": "--lora-rank says it, of adapters that begin anew",
    "network_dropout": "it drops values between the two matrices; --lora-dropout those before them",
    "network_train_unet_only": "the UNet alone is trained, always; leave it out",
    "scale_weight_norms": "not offered; --max-grad-norm and --lora-alpha keep weights small",
    "network_train_text_encoder_only learning_rate_te learning_rate_te1 learning_rate_te2 "
    "stop_text_encoder_training": "text encoders are not trained, their output is in the cache; "
        "leave it out, --learning-rate is the UNet's",
    # The optimizer.
    "use_lion_optimizer": "Lion is not offered; AdamW is, --use-8bit-adam or not",
    "optimizer_args": "AdamW is set by --adam-beta1, --adam-beta2, --adam-weight-decay and "
        "--adam-epsilon",
    "optimizer_schedulefree_wrapper schedulefree_wrapper_args lr_scheduler_type lr_scheduler_args "
    "lr_decay_steps lr_scheduler_timescale lr_scheduler_min_lr_ratio":
        "--lr-scheduler has diffusers' schedules, with --lr-warmup-steps alone",
    # Steps and files.
    "output_name": "files have fixed names in the run's folder, which is --run",
    "save_model_as": "a LoRA is written for diffusers and as kohya's, a UNet for diffusers, always "
        "as .safetensors; leave it out",
    "use_safetensors": "all files are .safetensors; leave it out",
    "save_precision": "docs/exports.md says in which precision a student is written; leave it out",
    "save_every_n_epochs save_n_epoch_ratio": "checkpoints come by steps: --checkpointing-steps; "
        "`--dry-run` says how many are an epoch",
    "save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state":
        "--checkpoints-total-limit says how many checkpoints stay",
    "save_state save_state_on_train_end": "every checkpoint holds the whole state of training; "
        "leave it out",
    "huggingface_repo_type huggingface_path_in_repo huggingface_repo_visibility "
    "save_state_to_huggingface async_upload": "--push-to-hub publishes the finished student under "
        "--hub-model-id; leave it out",
    "resume_from_huggingface": "download the run and give --resume-from-checkpoint its folder",
    "skip_until_initial_step initial_epoch initial_step": "a resumed run knows where it was: "
        "--resume-from-checkpoint latest; leave it out",
    "no_metadata training_comment": "a student's card and metadata say how it was made; leave it "
        "out",
    "config_file": "--config reads a file of our settings, TOML or JSON",
    "dataset_config": "its subsets' image_dir are --shards of `prep encode`, the rest are flags of "
        "the same names; --config reads a file of them, without sections",
    "output_config": "a run keeps its settings in RUN/config.json; leave it out",
    "dataset_class": "`prep encode` reads what docs/sources.md lists",
    # Memory and speed.
    "mem_eff_attn": "--attention takes torch's own or xformers', both are memory-efficient",
    "dynamo_backend": "--compile always takes inductor; leave it out",
    "persistent_data_loader_workers": "reader threads always stay; leave it out",
    "full_fp16 full_bf16 fp8_base fp8_base_unet": "trainable weights stay fp32, all else follows "
        "--mixed-precision",
    "lowram highvram blocks_to_swap cpu_offload_checkpointing disable_mmap_load_safetensors "
    "fused_backward_pass fused_optimizer_groups": "what saves memory is in docs/memory.md: "
        "--gradient-checkpointing, --mixed-precision",
    "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph": "`accelerate launch` and torchrun "
        "set processes up; leave it out",
    # Logs and samples.
    "log_prefix log_config log_tracker_config wandb_run_name": "trackers read their own settings, "
        "such as WANDB_NAME in the environment",
    "wandb_api_key": "`wandb login`, or WANDB_API_KEY in the environment",
    "sample_prompts sample_at_first": "previews are of prompts in the cache: `prep encode "
        "--preview-prompts`, then --validation-prompts",
    "sample_every_n_epochs": "previews come by steps: --validation-steps",
    "sample_sampler": "a student has its own sampler; leave it out",
    "validation_seed validation_split validate_every_n_steps validate_every_n_epochs "
    "max_validation_steps": "a student is judged by its pictures: --evaluation-steps on held-out "
        "ones, and `python -m train evaluate`",
    # The loss.
    "noise_offset_random_strength multires_noise_iterations multires_noise_discount ip_noise_gamma "
    "ip_noise_gamma_random_strength perlin_noise adaptive_noise_scale":
        "not offered; --noise-offset is, with --objective denoise",
    "scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss":
        "not offered; --snr-gamma is, with --objective denoise",
    "min_timestep max_timestep weighting_scheme logit_mean logit_std mode_scale":
        "timesteps are drawn evenly over the whole schedule; leave it out",
    "huber_schedule huber_scale": "--huber-c is the same for all timesteps; leave it out",
    "masked_loss alpha_mask conditioning_data_dir": "pictures without masks are read; leave it out",
    # Pictures and captions.
    "caption_prefix caption_suffix": "captions are taken as they are written: write it into them",
    "enable_wildcard secondary_separator": "list the alternatives as captions of the picture, and "
        "keep them with --max-captions",
    "keep_tokens_separator": "--keep-tokens says how many first tags stay in place",
    "caption_extension caption_extention": "captions beside pictures are NAME.txt; rename them, or "
        "list them in a metadata.jsonl",
    "caption_tag_dropout_rate caption_dropout_every_n_epochs": "whole captions are dropped at "
        "random: `train distill --proportion-empty-prompts`",
    "token_warmup_min token_warmup_step": "a cached caption has all its tags from the first step "
        "on; leave it out",
    "weighted_captions": "weights in brackets are not read; write captions without them",
    "max_token_length no_token_padding": "captions have the length that the model's text encoder "
        "reads; leave it out",
    "color_aug face_crop_aug_range": "`prep encode` has --random-crop and --random-flip",
    "resize_interpolation": "`prep encode` always resizes with antialiased Lanczos; leave it out",
    "debug_dataset": "`prep report` and `prep decode` show what is in a cache",
    "reg_data_dir": "there is no prior preservation; pictures of the class can be further --shards",
    "in_json": "captions come from NAME.txt or from a metadata.jsonl in the folder (lines of "
        "file_name and text)",
    "dataset_repeats": "more passes are the same: --num-train-epochs, or --max-train-steps",
})  # fmt: skip
