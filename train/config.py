"""The flags of `python -m train`; names are diffusers' and kohya's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared.cli.paths import LocalPath, NameOrPath, PlaceFlag
from shared.cli.ranges import (
    BelowOne,
    Count,
    Fraction,
    Natural,
    NotNegative,
    Numbers,
    Positive,
    Seed,
)

ExportDtype = Literal["both", "fp32", "fp16"]
Guidance = Annotated[float, Numbers(float, -1)]  # the papers' w: guidance_scale - 1


@dataclass(frozen=True)
class DistillConfig:
    """Distil a student from a teacher and a cache, or fine-tune the teacher on it."""

    model: NameOrPath | None = None
    """The teacher: sd15, sd21, sdxl, tiny-sd, tiny-xl, a diffusers folder, a hub id or a file.
    sdxl unless given, or what the --cache was made for."""
    cache: PlaceFlag | None = None
    """A cache made by `python -m prep encode` for this model: a folder or a URL. caches/MODEL
    unless given."""
    run: LocalPath | None = None
    """Folder for checkpoints, metrics, previews and the exported student. runs/MODEL-STUDENT
    unless given, with what else is not as usual: other flags make another run."""
    vae: NameOrPath | None = None
    """The VAE that decodes pictures, where the cache was made with another than the model's."""
    student: Literal["lora", "full"] = "lora"
    """lora: adapters on the teacher. full: a UNet of its own, for lcd with guidance and EMA."""
    objective: Literal["lcd", "denoise"] = "lcd"
    """lcd: latent consistency distillation. denoise: the ordinary diffusion loss, to fine-tune."""
    train_batch_size: Count = 8
    """Samples per device and micro-step."""
    gradient_accumulation_steps: Count = 1
    """Micro-steps of an optimizer step; they follow from --global-batch-size where that is given,
    and from the run's own global batch where it is resumed."""
    global_batch_size: Count | None = None
    """Samples per optimizer step over all processes; a resumed run keeps its own unless given."""
    max_train_steps: Count = 1000
    """Optimizer steps."""
    num_train_epochs: Count | None = None
    """Passes over the cache, from which the steps follow; instead of --max-train-steps."""
    seed: Seed = 0
    learning_rate: Positive | None = None
    """1e-4 for lora, 8e-6 (lcd) or 1e-5 (denoise) for full unless given."""
    scale_lr: bool = False
    """Multiply the learning rate by the samples of a step, over all processes."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """diffusers' schedules; every one of them begins with --lr-warmup-steps."""
    lr_warmup_steps: Natural = 0
    lr_num_cycles: Count = 1
    """Restarts of cosine_with_restarts."""
    lr_power: Positive = 1.0
    """Exponent of polynomial."""
    use_8bit_adam: bool = False
    """Keep AdamW's two averages in 8 bits (bitsandbytes, an extra: pip install '.[gpu]')."""
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.999
    adam_weight_decay: NotNegative = 0.0
    adam_epsilon: Positive = 1e-8
    max_grad_norm: NotNegative = 1.0
    """Gradients longer than that are shortened to it; 0 for never."""
    w_min: Guidance | None = None
    """Smallest guidance w drawn; the family's unless given. diffusers' guidance_scale is w + 1."""
    w_max: Guidance | None = None
    num_ddim_timesteps: Count = 50
    """Solver steps N that the schedule is divided into."""
    loss_type: Literal["huber", "l2"] = "huber"
    huber_c: Positive = 1e-3
    timestep_scaling_factor: Positive = 10.0
    ema_decay: BelowOne = 0.95
    """Of the full student's target network."""
    offload_ema: bool = False
    """Keep the full student's average in fp32 on the CPU, and a half-precision copy on the
    device."""
    guidance_init: Literal["zero", "random"] = "zero"
    """Of the guidance embedding's projection; with zero the student starts as the teacher."""
    unet_time_cond_proj_dim: Annotated[int, Numbers(int, 4)] = 256
    """Width of the guidance embedding."""
    noise_offset: BelowOne = 0.0
    """denoise: share of one normal number per channel added to the noise; 0.05 to 0.1 is usual."""
    snr_gamma: Positive | None = None
    """denoise: gamma of the min-SNR loss weights, usually 5; unweighted unless given."""
    lora_rank: Count = 64
    lora_alpha: Positive | None = None
    """The rank unless given."""
    lora_dropout: BelowOne = 0.0
    lora_target_modules: str | None = None
    """Ends of the names of the layers to adapt, comma-separated; LCM's fourteen unless given."""
    proportion_empty_prompts: Fraction = 0.0
    """Fraction of captions replaced by the unconditional embedding."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """torch's own attention, or xformers' (an extra: pip install '.[gpu]')."""
    compile: bool = False
    """torch.compile the blocks of the networks; the first steps take minutes."""
    allow_tf32: bool = False
    """Let fp32 matrix products on the GPU use TF32."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Autocast dtype of student, teacher and target alike; trainables and losses stay fp32. bf16
    where a GPU has it, fp16 on an older one, no on a CPU unless given; a run keeps its own."""
    checkpointing_steps: Natural = 500
    """Steps between checkpoints; 0 for the last one alone."""
    checkpoints_total_limit: Count | None = None
    """Older checkpoints beyond this many are removed."""
    resume_from_checkpoint: NameOrPath | None = None
    """latest, step-N, or the folder of a checkpoint. The same command goes on by itself."""
    take_over: bool = False
    """Take the run from the process that writes it, where that one hangs."""
    validation_steps: Natural = 250
    """Steps between preview pictures; 0 for none."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts of the previews, of those embedded in the cache; its first four unless given."""
    logging_steps: Count = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    """tensorboard, wandb and the other trackers that accelerate knows; none for no tracker."""
    logging_dir: LocalPath | None = None
    """Of the trackers; RUN/logs unless given."""
    tracker_project_name: str = "latent-distillery"
    dataloader_num_workers: Count = 4
    """Reader threads. A remote cache has one for each batch that it reads ahead."""
    max_train_samples: Count | None = None
    """Train on the cache's first so many samples, in the order of its manifest."""
    local_cache: LocalPath | None = None
    """Folder that keeps the samples read from a remote cache."""
    threads: Count | None = None
    """CPU threads of the networks; as many as the process may use unless given."""
    device: str = "auto"
    export_dtype: ExportDtype = "both"
    """Of the exported weights. both: a UNet in fp32 and as variant="fp16", a LoRA in fp32."""
    push_to_hub: bool = False
    """Publish the finished student on the Hugging Face hub, with a model card."""
    hub_model_id: str | None = None
    """Repository to publish in; the run's name under your account unless given."""
    hub_token: str | None = field(default=None, repr=False)
    """A token with write access, never stored; the one of `hf auth login` unless given."""
    dry_run: bool = False
    """Check everything, print the plan, and stop."""
    typed: tyro.conf.Suppress[frozenset[str]] = field(
        default=frozenset(), repr=False, compare=False
    )  # no flag; which were given, also with their default value: see train/flags.py


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare student and teacher: one table and one picture."""

    run: LocalPath | None = None
    """The one of runs/ whose student is the newest unless given."""
    eval_cache: PlaceFlag | None = None
    """Cache of held-out pictures: their captions are the prompts, their latents the real ones.
    What --holdout has set aside in the run's own cache unless given."""
    scorer: str | None = None
    """MODULE:FUNCTION taking (images [N, H, W, 3] uint8, captions) and giving a score per image."""
    model: NameOrPath | None = None
    """Where the teacher is; the run's own, if it is on this machine, unless given."""
    vae: NameOrPath | None = None
    """The VAE that decodes; the run's unless given."""
    num_samples: Annotated[int, Numbers(int, 65)] = 1000
    guidance_scale: NotNegative | None = None
    """diffusers' meaning (w + 1), for teacher and student alike; the family's unless given."""
    batch_size: Count | None = None
    """Pictures drawn at once; unless given 16 of 512 px, 4 of 1024, up to 100 small ones."""
    seed: Seed = 0
    output: LocalPath | None = None
    """Folder for evaluation.json, evaluation.md and evaluation.png; the run's own unless given."""
    threads: Count | None = None
    device: str = "auto"


@dataclass(frozen=True)
class SampleConfig:
    """Draw pictures with a student, for prompts whose embeddings are in its cache."""

    run: LocalPath | None = None
    """The one of runs/ whose student is the newest unless given."""
    prompt: tuple[str, ...] = ()
    """The prompts of the run's previews unless given."""
    cache: PlaceFlag | None = None
    """Cache that holds the prompts' embeddings; the run's own unless given."""
    model: NameOrPath | None = None
    """Where the teacher is; the run's own, if it is on this machine, unless given."""
    vae: NameOrPath | None = None
    """The VAE that decodes; the run's unless given."""
    steps: Count | None = None
    """4 for a distilled student, 50 for a fine-tuned one (--objective denoise) unless given."""
    guidance_scale: NotNegative | None = None
    """diffusers' meaning (w + 1), not for a distilled LoRA; the family's unless given."""
    seed: Seed = 0
    num_images: Count = 1
    """Pictures per prompt."""
    output: LocalPath = Path("sample.png")
    threads: Count | None = None
    device: str = "auto"


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint's student in diffusers format (`distill` does it at its end)."""

    run: LocalPath | None = None
    """The one of runs/ whose checkpoint is the newest unless given."""
    checkpoint: NameOrPath = "latest"
    """latest, step-N, or the folder of a checkpoint."""
    model: NameOrPath | None = None
    """Where the teacher is; the run's own, if it is on this machine, unless given."""
    output: LocalPath | None = None
    """The run's folder unless given."""
    export_dtype: ExportDtype = "both"
    """Of the exported weights. both: a UNet in fp32 and as variant="fp16", a LoRA in fp32."""
    push_to_hub: bool = False
    """Publish the student on the Hugging Face hub, with a model card."""
    hub_model_id: str | None = None
    """Repository to publish in; the run's name under your account unless given."""
    hub_token: str | None = field(default=None, repr=False)
    """A token with write access, never stored; the one of `hf auth login` unless given."""
