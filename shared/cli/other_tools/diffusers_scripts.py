"""Flags of diffusers' scripts: those for LCM, train_text_to_image*, train_dreambooth_lora*.

Those not here have the same name as ours. flags.py explains the tables.
"""

from __future__ import annotations

from shared.cli.other_tools import values
from shared.cli.other_tools.values import Reader, Switch, Taken, refusals

TAKEN: dict[str, Taken] = {
    "pretrained_teacher_model": "model",
    "pretrained_model_name_or_path": "model",
    "pretrained_vae_model_name_or_path": "vae",
    "output_dir": "run",
    "enable_xformers_memory_efficient_attention": Switch("attention", "xformers"),
    "train_shards_path_or_url": "shards",
    "train_data_dir": "shards",
    "instance_data_dir": "shards",
    "num_inference_steps": "steps",
    "vae_encode_batch_size": "vae_batch_size",
    "rank": "lora_rank",
    "validation_prompt": Reader("validation_prompts", values.prompts),
    "optimizer": Reader("use_8bit_adam", values.optimizer),
}

REFUSED = refusals({
    "teacher_revision revision non_ema_revision": "download that revision (`hf download OWNER/NAME "
        "--revision REVISION --local-dir FOLDER`) and pass --model FOLDER",
    "variant": "the weights without a variant are read, in full precision; leave it out",
    "cache_dir": "set HF_HUB_CACHE, or pass --model the folder of a downloaded model",
    "local_rank": "`accelerate launch` and torchrun tell every process its rank; leave it out",
    "interpolation_type image_interpolation_mode": "`prep encode` always resizes with antialiased "
        "Lanczos; leave it out",
    "cast_teacher_unet": "frozen weights always follow --mixed-precision; leave it out",
    "use_fix_crop_and_size": "time ids are those of the crop that `prep encode` made; leave it out",
    "encode_batch_size": "`prep encode` has --vae-batch-size and --text-batch-size",
    "dataset_name": "`python -m prep encode --shards hf://OWNER/NAME` reads a dataset of the hub",
    "num_inference_steps": "of drawing: `prep synthesize` and `train sample` have --steps",
    "output_dir": "the cache's folder is --cache",
    "prediction_type": "the model's scheduler_config.json says it; leave it out",
    "num_validation_images": "a preview has one picture of each of --validation-prompts; `python "
        "-m train sample` draws several",
    "validation_epochs": "previews come by steps: --validation-steps; `--dry-run` says how many "
        "make an epoch",
    "input_perturbation": "not offered; --noise-offset is, with --objective denoise",
    "dream_training dream_detail_preservation": "DREAM is not offered; --snr-gamma is, with "
        "--objective denoise",
    "use_ema foreach_ema": "only `--student full` keeps an average, always: --ema-decay, "
        "--offload-ema",
    "timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin timestep_bias_end "
    "timestep_bias_portion": "timesteps are drawn evenly; leave it out",
    "enable_npu_flash_attention": "torch's own attention or xformers': --attention",
    "debug_loss": "metrics.jsonl has the loss, every --logging-steps; leave it out",
    "train_text_encoder text_encoder_lr adam_weight_decay_text_encoder":
        "text encoders are not trained, their output is in the cache; leave it out, "
        "--learning-rate is the UNet's",
    "class_data_dir class_prompt with_prior_preservation prior_loss_weight num_class_images "
    "sample_batch_size prior_generation_precision": "there is no prior preservation; pictures of "
        "the class, captioned, can be further --shards of `prep encode`",
    "instance_prompt": "every picture has its own caption: write the prompt into NAME.txt beside "
        "each, or into a metadata.jsonl",
    "tokenizer_name tokenizer_max_length text_encoder_use_attention_mask":
        "captions are tokenized as the model's own tokenizers say; leave it out",
    "pre_compute_text_embeddings": "`prep encode` always does; leave it out",
    "validation_images": "previews are drawn of prompts alone: --validation-prompts",
    "class_labels_conditioning": "models with class labels are not of a family known here",
    "repeats": "more passes are the same: --num-train-epochs, or --max-train-steps",
    "do_edm_style_training": "models of the EDM kind are not known here; leave it out",
    "output_kohya_format": "a LoRA is always written in kohya's format, too; leave it out",
    "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup":
        "of the optimizer Prodigy; `train distill` has AdamW, --use-8bit-adam or not",
    "use_dora": "a plain LoRA is trained; leave it out",
})  # fmt: skip
