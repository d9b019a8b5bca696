"""Flags known from other tools: taken as ours, or refused with a hint; none is ignored.

One module per tool has its two tables: what is TAKEN, as which of ours (values.py), and what is
REFUSED, with what to use instead. docs/flags.md lists them all.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from shared.cli.other_tools import diffusers_scripts, kohya, tutorials
from shared.cli.other_tools.values import Reader, Switch, Taken
from shared.errors import UsageError

TOOLS = (diffusers_scripts, kohya, tutorials)
TAKEN: dict[str, Taken] = {name: ours for tool in TOOLS for name, ours in tool.TAKEN.items()}
REFUSED: dict[str, str] = {name: why for tool in TOOLS for name, why in tool.REFUSED.items()}

# Our own flags, for a command that lacks them.
ENCODE = frozenset({
    "shards", "resolution", "center_crop", "vae_dtype", "random_crop", "random_flip", "views",
    "buckets", "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale",
    "min_size", "latents", "max_captions", "shuffle_caption", "keep_tokens", "caption_separator",
    "clip_skip", "preview_prompts", "vae_batch_size", "text_batch_size", "decode_workers",
    "folder_units", "image_column", "caption_column", "caption_encoding", "key_column",
    "dataset_config_name", "allow_external_images", "streaming", "max_image_bytes", "where",
    "max_pwatermark", "max_reject_fraction", "engine", "ray_address", "cpus_per_worker", "report",
    "part", "prune", "overwrite", "holdout",
})  # fmt: skip
DISTILL = frozenset({
    "student", "objective", "teacher", "teacher_lora", "init_student", "train_batch_size",
    "gradient_accumulation_steps", "global_batch_size", "num_phases", "target_steps",
    "max_train_steps", "num_train_epochs", "learning_rate", "scale_lr", "lr_scheduler",
    "lr_warmup_steps", "lr_num_cycles", "lr_power", "use_8bit_adam", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "w_min", "w_max", "num_ddim_timesteps",
    "loss_type", "huber_c", "timestep_scaling_factor", "ema_decay", "offload_ema", "guidance_init",
    "unet_time_cond_proj_dim", "noise_offset", "snr_gamma", "lora_rank", "lora_alpha",
    "lora_dropout", "lora_target_modules", "proportion_empty_prompts", "gradient_checkpointing",
    "attention", "compile", "allow_tf32", "mixed_precision", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps", "validation_prompts",
    "logging_steps", "report_to", "logging_dir", "tracker_project_name", "dataloader_num_workers",
    "max_train_samples", "local_cache", "push_to_hub", "hub_model_id", "hub_token",
    "export_dtype", "take_over", "num_student_steps", "fake", "fake_lora_rank",
    "fake_learning_rate", "fake_updates", "fake_warmup_steps", "gan_weight", "evaluation_steps",
    "num_eval_samples", "eval_cache", "scorer", "features",
})  # fmt: skip

STAGES = (("one", "prep encode", ENCODE), ("two", "train distill", DISTILL))


class Translation:
    """What was typed becomes settings of a command whose names are `known`, one after the other.

    Raises UsageError, with what to use, for what is refused, for what nobody knows, and where two
    names of one setting are given.
    """

    def __init__(self, known: Collection[str]) -> None:
        self.known = frozenset(known)
        self.typed: dict[str, str] = {}  # our name -> the one that was typed

    def settings(self, name: str, value: Any) -> Mapping[str, Any]:
        """Return our settings for one that a file has. A switch that is off sets nothing."""
        name = name.replace("-", "_")
        rule = self._rule(name)
        if isinstance(rule, Reader):
            return self._read(rule, name, value)
        if isinstance(rule, Switch):
            if not isinstance(value, bool):
                raise UsageError(f"{name} is a switch, true or false, not {value!r}")
            return {rule.ours: rule.value} if value else {}
        return {rule: value}

    def words(self, argv: Sequence[str]) -> list[str]:
        """Return a command line in our names."""
        words, rest = list[str](), list(argv)
        while rest:
            word = rest.pop(0)
            if not word.startswith("--") or word in ("--", "--help"):
                words.append(word)
                continue
            typed, equals, value = word.partition("=")
            name, no = self._switched(typed[2:].replace("-", "_"))
            rule = self._rule(name)
            if isinstance(rule, Reader):
                if not equals and not (rest and not rest[0].startswith("--")):
                    raise UsageError(f"{typed} wants a value")
                words += as_words(self._read(rule, name, value if equals else rest.pop(0)))
            elif isinstance(rule, Switch):
                if equals:
                    raise UsageError(f"{typed} is a switch and takes no value")
                words += as_words({rule.ours: rule.value})
            else:
                words.append(f"{dashed(no + rule)}{equals}{value}")
        return words

    def is_unknown(self, name: str) -> bool:
        """Is it neither one of ours nor of a tool that is known?"""
        name = name.replace("-", "_")
        return name not in self.known | TAKEN.keys() | REFUSED.keys() | ENCODE | DISTILL

    def closest(self, name: str) -> str:
        """Return the name that was probably meant, or an empty string."""
        there = {name for name, rule in TAKEN.items() if _ours(rule) in self.known}
        return closest(name.replace("-", "_"), {*self.known, *there, *REFUSED, "config", "help"})

    def _switched(self, name: str) -> tuple[str, str]:
        """Return a name, and `no_` if that was in front of it."""
        positive = name.removeprefix("no_")
        off = positive != name and name not in self.known | TAKEN.keys() and positive in self.known
        return (positive, "no_") if off else (name, "")

    def _rule(self, name: str) -> Taken:
        """Return what becomes of a name; no setting may have two. Raises UsageError."""
        rule = TAKEN.get(name, name)
        if name in self.known and _ours(rule) not in self.known:
            rule = name  # merge's own --rank, where there is no --lora-rank
        ours = _ours(rule)
        if ours not in self.known:
            raise UsageError(self._refusal(name, ours))
        before = self.typed.setdefault(ours, name)
        if before != name:
            raise UsageError(f"{dashed(before)} and {dashed(name)} are one setting here; give one")
        return rule

    def _refusal(self, name: str, ours: str) -> str:
        if name in REFUSED:
            return f"{dashed(name)}: {REFUSED[name]}"
        for stage, command, flags in STAGES:
            if ours in flags:
                as_ours = f" {dashed(ours)}" if ours != name else ""
                return f"{dashed(name)}: a flag of stage {stage}: `python -m {command}{as_ours}`"
        near = self.closest(name)
        return f"{dashed(name)} is unknown{near and f'; did you mean {dashed(near)}?'}"

    def _read(self, rule: Reader, name: str, value: Any) -> Mapping[str, Any]:
        try:
            return rule.read(value)
        except UsageError as error:
            raise UsageError(f"{dashed(name)} {error}") from None


def _ours(rule: Taken) -> str:
    return rule if isinstance(rule, str) else rule.ours


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as they are typed."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(dashed(name if value else f"no_{name}"))
        else:
            words += [dashed(name), *map(str, value if isinstance(value, list) else [value])]
    return words


def dashed(name: str) -> str:
    """Return a flag as it is typed."""
    return f"--{name.replace('_', '-')}"


def closest(name: str, known: Collection[str]) -> str:
    """Return the one of `known` that was probably meant, or an empty string."""
    return next(iter(difflib.get_close_matches(name, sorted(known), 1)), "")
