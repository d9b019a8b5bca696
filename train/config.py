"""The flags of `python -m train`; names are diffusers' and kohya's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DistillConfig:
    """Distil a student from a teacher and a cache."""

    model: str
    """The teacher: sd15, sd21, sdxl, tiny-sd, tiny-xl, a local diffusers folder or a hub id."""
    cache: Path
    """A cache made by `python -m prep encode` for this model."""
    run: Path
    """Folder for checkpoints, metrics, previews and the exported student."""
    vae: str | None = None
    """The VAE that decodes pictures, where the cache was made with another than the model's."""
    student: Literal["lora", "full"] = "lora"
    """lora: adapters on the teacher. full: a UNet of its own with guidance embedding and EMA."""
    train_batch_size: int = 8
    """Samples per device and micro-step."""
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000
    """Optimizer steps."""
    num_train_epochs: int | None = None
    """Passes over the cache, from which the steps follow; instead of --max-train-steps."""
    seed: int = 0
    learning_rate: float | None = None
    """1e-4 for lora, 8e-6 for full unless given."""
    scale_lr: bool = False
    """Multiply the learning rate by accumulation x batch size x processes."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """diffusers' schedules; every one of them begins with --lr-warmup-steps."""
    lr_warmup_steps: int = 0
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Exponent of polynomial."""
    use_8bit_adam: bool = False
    """Keep AdamW's two averages in 8 bits (bitsandbytes, an extra: pip install '.[gpu]')."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    w_min: float | None = None
    """Smallest guidance w drawn; the family's unless given. diffusers' guidance_scale is w + 1."""
    w_max: float | None = None
    num_ddim_timesteps: int = 50
    """Solver steps N that the schedule is divided into."""
    loss_type: Literal["huber", "l2"] = "huber"
    huber_c: float = 1e-3
    timestep_scaling_factor: float = 10.0
    ema_decay: float = 0.95
    """Of the full student's target network."""
    offload_ema: bool = False
    """Keep the full student's average in fp32 on the CPU, and a half-precision copy on the
    device."""
    guidance_init: Literal["zero", "random"] = "zero"
    """Of the guidance embedding's projection; with zero the student starts as the teacher."""
    unet_time_cond_proj_dim: int = 256
    """Width of the guidance embedding."""
    lora_rank: int = 64
    lora_alpha: float | None = None
    """The rank unless given."""
    lora_dropout: float = 0.0
    lora_target_modules: str | None = None
    """Ends of the names of the layers to adapt, comma-separated; LCM's fourteen unless given."""
    proportion_empty_prompts: float = 0.0
    """Share of captions replaced by the unconditional embedding."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """torch's own attention, or xformers' (an extra: pip install '.[gpu]')."""
    compile: bool = False
    """torch.compile the blocks of the networks; the first steps take minutes."""
    allow_tf32: bool = False
    """Let fp32 matrix products on the GPU use TF32."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast dtype of student, teacher and target alike; trainables and losses stay fp32."""
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    """Older checkpoints beyond this many are removed."""
    resume_from_checkpoint: str | None = None
    """latest, or the folder of a checkpoint."""
    validation_steps: int = 250
    """Steps between preview pictures; 0 for none."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts of the previews, of those embedded in the cache; its first four unless given."""
    logging_steps: int = 10
    dataloader_num_workers: int = 2
    """Reader threads."""
    threads: int | None = None
    """CPU threads of the networks; all cores unless given."""
    device: str = "auto"
    dry_run: bool = False
    """Check everything, print the plan, and stop."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare student and teacher: one table and one picture."""

    run: Path
    eval_cache: Path
    """Cache of held-out pictures: their captions are the prompts, their latents the real ones."""
    scorer: str | None = None
    """MODULE:FUNCTION taking (images [N, H, W, 3] uint8, captions) and giving a score per image."""
    vae: str | None = None
    """The VAE that decodes; the run's unless given."""
    num_samples: int = 1000
    guidance_scale: float | None = None
    """diffusers' meaning (w + 1), for teacher and student alike; the family's unless given."""
    batch_size: int = 100
    seed: int = 0
    output: Path | None = None
    """Folder for evaluation.json, evaluation.md and evaluation.png; the run's own unless given."""
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class SampleConfig:
    """Draw pictures with a student, for prompts whose embeddings are in its cache."""

    run: Path
    prompt: tuple[str, ...]
    cache: Path | None = None
    """Cache that holds the prompts' embeddings; the run's own unless given."""
    vae: str | None = None
    """The VAE that decodes; the run's unless given."""
    steps: int = 4
    guidance_scale: float | None = None
    """diffusers' meaning (w + 1), for a full student; the family's unless given."""
    seed: int = 0
    num_images: int = 1
    """Pictures per prompt."""
    output: Path = Path("sample.png")
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint's student in diffusers format (`distill` does it at its end)."""

    run: Path
    checkpoint: str = "latest"
    """latest, or the folder of a checkpoint."""
    output: Path | None = None
    """The run's folder unless given."""
