"""The flags of `python -m train`, a group for each component; names are diffusers' and kohya's."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from shared.cli.paths import LocalPath, NameOrPath, PlaceFlag, StyleFlag, Texts
from shared.cli.ranges import (
    BelowOne,
    Count,
    Fraction,
    Natural,
    NotNegative,
    Numbers,
    Positive,
    Precision,
    Seed,
)

ExportDtype = Literal["both", "fp32", "fp16"]
TeacherSource = Literal["cached", "online"]
CACHED: TeacherSource = "cached"
ONLINE: TeacherSource = "online"
# The name of an objective is that of its file in train/objectives/.
ObjectiveName = Literal["lcd", "pcm", "tcd", "lcf", "dmd", "denoise"]
Guidance = Annotated[float, Numbers(float, -1)]  # the papers' w: guidance_scale - 1


def names_of(*groups: type) -> tuple[str, ...]:
    """The flags of these groups, by their names in the code."""
    return tuple(one.name for group in groups for one in fields(group))


@dataclass(frozen=True)
class RunFlags:
    """What a run is made from, its folder; what is trained, how, and for how long."""

    model: NameOrPath | None = None
    """The teacher: sd15, sd21, sdxl, tiny-sd, tiny-xl, a diffusers folder, a hub id or a file. sdxl
    unless given, or what the --cache was made for."""
    cache: PlaceFlag | None = None
    """A cache made by `python -m prep encode` for this model: a folder or a URL. caches/MODEL
    unless given."""
    run: LocalPath | None = None
    """Folder for checkpoints, metrics, previews and the exported student. runs/MODEL-STUDENT unless
    given, followed by the flags that differ from the defaults."""
    vae: NameOrPath | None = None
    """The VAE that decodes pictures, if the cache was made with another VAE than the model's."""
    student: Literal["lora", "full"] = "lora"
    """lora: adapters on the teacher. full: a UNet of its own; of a few-step objective it has a
    guidance input and an average (EMA)."""
    objective: ObjectiveName = "lcd"
    """lcd: latent consistency distillation. pcm, tcd: its successors with trajectory targets. lcf:
    consistency fine-tuning on data alone. dmd: distribution matching. denoise: the ordinary
    diffusion loss, to fine-tune."""
    init_student: LocalPath | None = None
    """Begin where another student ended: a run, a UNet in diffusers' format, or a LoRA file in
    diffusers' or kohya's form."""
    train_batch_size: Count = 8
    """Samples per device and micro-step."""
    gradient_accumulation_steps: Count = 1
    """Micro-steps of an optimizer step. They follow from --global-batch-size if that is given, and
    from the run's own global batch on resume."""
    global_batch_size: Count | None = None
    """Samples per optimizer step over all processes; a resumed run keeps its own unless given."""
    max_train_steps: Count = 1000
    """Optimizer steps."""
    num_train_epochs: Count | None = None
    """Passes over the cache, instead of --max-train-steps."""
    seed: Seed = 0


@dataclass(frozen=True)
class OptimizerFlags:
    """AdamW, its learning rate, and clipping."""

    learning_rate: Positive | None = None
    """The objective's for this kind of student unless given (docs/objectives.md)."""
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
    """Clip the gradient's norm to this; 0 for no clipping."""


@dataclass(frozen=True)
class SolverFlags:
    """Distillation along the teacher's solver: guidance, steps, the loss."""

    w_min: Guidance | None = None
    """Smallest guidance w drawn; the family's unless given. diffusers' guidance_scale is w + 1."""
    w_max: Guidance | None = None
    num_ddim_timesteps: Count = 50
    """Solver steps N that the schedule is divided into."""
    loss_type: Literal["huber", "l2"] = "huber"
    huber_c: Positive = 1e-3


@dataclass(frozen=True)
class ConsistencyFlags:
    """The consistency function of LCM."""

    timestep_scaling_factor: Positive = 10.0


@dataclass(frozen=True)
class PhaseFlags:
    """Phased consistency."""

    num_phases: Count = 4
    """pcm: phases that the solver's steps are divided into; the student jumps within each."""


@dataclass(frozen=True)
class TargetFlags:
    """Trajectory consistency distillation."""

    target_steps: tuple[Count, ...] = ()
    """tcd: let targets lie where schedules of so many steps go, such as 4 8; anywhere unless
    given."""


@dataclass(frozen=True)
class TeacherFlags:
    """Where the teacher's predictions come from."""

    teacher: TeacherSource | None = None
    """cached: read what `prep teach` or `prep synthesize` has left in the cache. online: compute it
    in every step. cached where there is something to read unless given; a resumed run keeps its
    own."""


@dataclass(frozen=True)
class StyleFlags:
    """What the teacher wears."""

    teacher_lora: StyleFlag = ()
    """Distil a teacher that wears this LoRA (diffusers' or kohya's file), so that the student has
    its style; with a scale, 1 unless given. It may be given again."""


@dataclass(frozen=True)
class FullStudentFlags:
    """A full student that is distilled: its average, its guidance input."""

    ema_decay: BelowOne = 0.95
    """Decay of the average that is the full student's target."""
    offload_ema: bool = False
    """Keep the full student's average in fp32 on the CPU, and a half-precision copy on the
    device."""
    guidance_init: Literal["zero", "random"] = "zero"
    """How the guidance embedding's projection starts; with zero the student starts as the
    teacher."""
    unet_time_cond_proj_dim: Annotated[int, Numbers(int, 4)] = 256
    """Width of the guidance embedding."""


@dataclass(frozen=True)
class DistributionFlags:
    """Distribution matching: the student's steps, the fake score, the GAN term."""

    num_student_steps: Count = 1
    """dmd: steps N that the student is trained to draw in."""
    fake: Literal["lora", "full"] = "lora"
    """dmd: what the fake score is. lora: adapters on the teacher. full: a UNet of its own."""
    fake_lora_rank: Count | None = None
    """dmd: rank of the fake score's adapters; --lora-rank unless given."""
    fake_learning_rate: Positive | None = None
    """dmd: 4e-4 for --fake lora, 1e-5 for full unless given."""
    fake_updates: Count = 5
    """dmd: the fake score learns in every step, the student in each so-manieth."""
    fake_warmup_steps: Natural = 100
    """dmd: steps at the start in which the fake score learns and the student stays."""
    gan_weight: NotNegative = 0.0
    """dmd: weight of a GAN term against the cache's latents, such as 5e-3; its critic has twice."""


@dataclass(frozen=True)
class DiffusionLossFlags:
    """The ordinary diffusion loss."""

    noise_offset: BelowOne = 0.0
    """denoise: add one normal number per channel, times this, to the noise; usually 0.05 to 0.1."""
    snr_gamma: Positive | None = None
    """denoise: gamma of the min-SNR loss weights, usually 5; unweighted unless given."""


@dataclass(frozen=True)
class LoraFlags:
    """The adapters of a LoRA student."""

    lora_rank: Count = 64
    lora_alpha: Positive | None = None
    """The rank unless given."""
    lora_dropout: BelowOne = 0.0
    lora_target_modules: str | None = None
    """Ends of the names of the layers to adapt, comma-separated; LCM's fourteen unless given."""


@dataclass(frozen=True)
class DataFlags:
    """What is read of the cache, and how."""

    proportion_empty_prompts: Fraction = 0.0
    """Fraction of captions replaced by the unconditional embedding."""
    dataloader_num_workers: Count = 4
    """Reader threads. A remote cache has one for each batch that it reads ahead."""
    max_train_samples: Count | None = None
    """Train on this many samples only: the cache's first, in the order of its manifest."""
    local_cache: LocalPath | None = None
    """Folder that keeps the samples read from a remote cache."""


@dataclass(frozen=True)
class SpeedFlags:
    """How small and how fast the networks run."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """torch's own attention, or xformers' (an extra: pip install '.[gpu]')."""
    compile: bool = False
    """torch.compile the blocks of the networks; the first steps take minutes."""
    allow_tf32: bool = False
    """Let fp32 matrix products on the GPU use TF32."""
    mixed_precision: Precision | None = None
    """Autocast dtype of student, teacher and target alike; trainables and losses stay fp32. bf16
    where a GPU has it, fp16 on an older one, no on a CPU unless given; a run keeps its own."""


@dataclass(frozen=True)
class ProgressFlags:
    """When a run is saved and where it goes on; what it shows meanwhile."""

    checkpointing_steps: Natural = 500
    """Steps between checkpoints; 0 for the last one alone."""
    checkpoints_total_limit: Count | None = None
    """Older checkpoints beyond this many are removed."""
    resume_from_checkpoint: NameOrPath | None = None
    """latest, step-N, or the folder of a checkpoint. The same command goes on by itself."""
    take_over: bool = False
    """Take the run over from a process that hangs."""
    validation_steps: Natural = 250
    """Steps between preview pictures; 0 for none."""
    validation_prompts: Texts = ()
    """Prompts of the previews, from those embedded in the cache; its first four unless given."""
    logging_steps: Count = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    """tensorboard, wandb and the other trackers that accelerate knows; none for no tracker."""
    logging_dir: LocalPath | None = None
    """Folder of the trackers; RUN/logs unless given."""
    tracker_project_name: str = "latent-distillery"


@dataclass(frozen=True)
class MachineFlags:
    """Where the networks run."""

    threads: Count | None = None
    """CPU threads of the networks; as many as the process may use unless given."""
    device: str = "auto"


@dataclass(frozen=True)
class PublishFlags:
    """What becomes of the exported student."""

    export_dtype: ExportDtype = "both"
    """Dtype of the exported weights. both: a UNet in fp32 and as variant="fp16", a LoRA in fp32."""
    push_to_hub: bool = False
    """Publish the student on the Hugging Face hub, with a model card."""
    hub_model_id: str | None = None
    """Repository to publish in; the run's name under your account unless given."""
    hub_token: str | None = field(default=None, repr=False)
    """A token with write access, never stored; the one of `hf auth login` unless given."""
