"""The model card: what a student is, how it did, and lines that draw with it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from shared.cache.conditioning import load_conditioning
from shared.cache.manifest import CachePaths, open_manifest
from shared.errors import UserError
from shared.models.family import Family, Model, native_resolution, resolve_model
from shared.models.single_file import is_single_file
from shared.storage.files import copy_durably, load_record, publish
from shared.storage.urls import place
from train.export.file_guide import file_guide, half_precision
from train.export.weights import LORA_FILE
from train.objectives import OBJECTIVES

ANY_PROMPT = "a photograph of a lighthouse at sunset"
CARD_FILE, PREVIEW_FILE = "README.md", "preview.png"
EVALUATION, AFTER_EVALUATION = "Evaluation", "Training"  # sections
READ = ("utf-8", "surrogateescape")  # what others wrote into a card stays as it is
SHOWN = (
    "objective", "student", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler", "w_min", "w_max", "num_ddim_timesteps", "loss_type",
    "lora_rank", "lora_alpha", "ema_decay", "noise_offset", "snr_gamma", "seed",
)  # fmt: skip
DEVICE = """device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
"""


def write_card(
    run: Path,
    folder: Path,
    tmp: Path,
    config: Mapping[str, Any],
    student: str | None,
    latest: bool,
    name: str,
) -> bool:
    """Write README.md beside an export, and the newest preview up to its step as `preview.png`.

    `config` is the run's resolved configuration, its `max_train_steps` those that the student
    took; `student` is its fingerprint, and `latest` whether it is what the run has come to; `name`
    is what a user loads it by: a hub id or the folder. Where the run's evaluation is of this
    student, the table is part of the card; returns whether it is.
    """
    family = resolve_model(str(config["teacher"])).family
    last = f"step-{config['max_train_steps']:08d}.png"
    previews = sorted(p for p in (run / "previews").glob("step-*.png") if p.name <= last)
    parts = [header(config), introduction(config, name)]
    if previews:
        copy_durably(previews[-1], folder / PREVIEW_FILE, tmp)
        shown = "Prompts at 1, 2, 4 and 8 steps" if few_steps(config) else "Prompts"
        parts.append(f"![{shown}]({PREVIEW_FILE})")
    lines = snippet(config, name, family, half_precision(folder))
    parts += ["## Use", f"```python\n{lines}```", guidance(config, family)]
    if uses := file_guide(folder, config):
        parts += ["## Files", "\n".join(f"- {line}" for line in uses)]
    if table := evaluation(run, student, latest):
        parts += [f"## {EVALUATION}", table]
    parts += [f"## {AFTER_EVALUATION}", settings(config), "## Licence", licence(config)]
    publish(["\n\n".join(parts).encode() + b"\n"], folder / CARD_FILE, tmp)
    return bool(table)


def evaluation(run: Path, student: str | None, latest: bool) -> str:
    """The table of a run's evaluation; nothing where there is none or it is of another student.

    An older version's does not say of whom it is, and is taken for the latest's.
    """
    figures, table = run / "evaluation.json", run / "evaluation.md"
    if not (figures.is_file() and table.is_file()):
        return ""
    try:
        told = load_record(figures, lambda record: record.get("weights"), "evaluate again")
    except UserError as error:
        print(f"note: the card has no table: {error}", file=sys.stderr)
        return ""
    mine = latest if told is None else told == student
    return table.read_bytes().decode().strip() if mine else ""


def update_card(folder: Path) -> None:
    """Put a folder's evaluation into its card, if there is one, and leave the rest of it alone."""
    card = folder / CARD_FILE
    if not card.is_file():
        return
    sections = re.split(r"^(?=## )", card.read_bytes().decode(*READ), flags=re.MULTILINE)
    titles = [section.partition("\n")[0].removeprefix("## ").strip() for section in sections]
    table = (folder / "evaluation.md").read_bytes().decode().strip()
    section = f"## {EVALUATION}\n\n{table}\n\n"
    if EVALUATION in titles:
        sections[titles.index(EVALUATION)] = section
    elif AFTER_EVALUATION in titles:
        sections.insert(titles.index(AFTER_EVALUATION), section)
    else:
        sections += ["\n", section]
    publish(["".join(sections).rstrip().encode(*READ) + b"\n"], card, folder / "tmp")
    print(card)


def header(config: Mapping[str, Any]) -> str:
    """The YAML that the hub reads."""
    lora = config["student"] == "lora"
    data = ModelCardData(
        base_model=hub_id(config),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image",
            "diffusers",
            *(["latent-consistency"] if few_steps(config) else []),
            *(["lora"] if lora else []),
        ],
        inference=False,  # a widget would draw with a sampler of its own
    )
    return f"---\n{data.to_yaml()}\n---"


def introduction(config: Mapping[str, Any], name: str) -> str:
    """Title and a sentence."""
    kind = "LoRA" if config["student"] == "lora" else "UNet"
    if not few_steps(config):
        return (
            f"# {Path(name).name}\n\nA {kind} that fine-tunes {base_name(config)} with the "
            "ordinary diffusion loss, trained with Latent Distillery."
        )
    return (
        f"# {Path(name).name}\n\nA {kind} that lets {base_name(config)} draw in 1 to 8 steps: "
        "[latent consistency distillation](https://arxiv.org/abs/2310.04378), trained with Latent "
        "Distillery."
    )


def snippet(config: Mapping[str, Any], name: str, family: Family, variant: str = "") -> str:
    """Python that draws one picture with stock diffusers.

    `variant` is Python for that of a full student's weights.
    """
    source = str(config["model"])
    kind = "StableDiffusionXLPipeline" if family.micro_conditioning else "StableDiffusionPipeline"
    lora = config["student"] == "lora"
    scheduler = "LCMScheduler" if few_steps(config) else "DDIMScheduler"
    classes = [kind, scheduler, *([] if lora else ["UNet2DConditionModel"])]
    lines = f"import torch\nfrom diffusers import {', '.join(sorted(classes))}\n\n{DEVICE}"
    lines += f'scheduler = {scheduler}.from_pretrained({quoted(name)}, subfolder="scheduler")\n'
    parts = ["scheduler=scheduler", "torch_dtype=dtype"]
    if not lora:
        lines += (
            "unet = UNet2DConditionModel.from_pretrained(\n"
            f'    {quoted(name)},\n    subfolder="unet",\n    torch_dtype=dtype,\n'
            + (f"    variant={variant},\n" if variant else "")
            + ")\n"
        )
        parts.insert(0, "unet=unet")
    load = "from_pretrained"
    if is_single_file(source):
        load = "from_single_file"
        parts.insert(0, f"config={quoted(pipeline_config(source, family))}")
    lines += (
        f"pipe = {kind}.{load}(\n"
        + "".join(f"    {part},\n" for part in [quoted(source), *parts])
        + ").to(device)\n"
    )
    if lora:
        lines += f"pipe.load_lora_weights({quoted(name)}, weight_name={quoted(LORA_FILE)})\n"
    side = resolution(config, family)
    built_in = lora and few_steps(config)
    return lines + (
        f"image = pipe(\n    {quoted(prompt(config))},\n"
        f"    num_inference_steps={OBJECTIVES[config['objective']].sample_steps},\n"
        f"    guidance_scale={1.0 if built_in else family.guidance_scale},\n"
        f"    height={side},\n    width={side},\n).images[0]\n"
        'image.save("picture.png")\n'
    )


def pipeline_config(source: str, family: Family) -> str:
    """Where diffusers finds what a single file does not say: beside it, else the family's own."""
    beside = Path(source).with_suffix("")
    return str(beside) if (beside / "model_index.json").is_file() else family.pretrained


def few_steps(config: Mapping[str, Any]) -> bool:
    """Is it drawn by LCMScheduler in a few steps, or as its teacher is?"""
    return OBJECTIVES[config["objective"]].few_steps


def quoted(text: str) -> str:
    """A Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def guidance(config: Mapping[str, Any], family: Family) -> str:
    """What guidance_scale means for this student."""
    if not few_steps(config):
        return "`guidance_scale` means what it means for the model it was fine-tuned from."
    low, high = w_range(config, family)
    if config["student"] == "lora":
        return (
            f"The guidance is built in (w between {low:g} and {high:g} in training): leave "
            "`guidance_scale` at 1."
        )
    return (
        f"`guidance_scale` may lie between {low + 1:g} and {high + 1:g}, the range it was trained "
        "for, and costs nothing: the UNet is told it, there is no second pass."
    )


def settings(config: Mapping[str, Any]) -> str:
    """The settings that matter, as a table."""
    other = "lora_" if config["student"] == "full" else "ema_"  # settings of the other kind
    foreign = {
        flag
        for name, objective in OBJECTIVES.items()
        for flag in objective.flags
        if name != config["objective"]
    }
    rows = [
        f"| {name} | {config[name]} |"
        for name in SHOWN
        if config[name] is not None and not name.startswith(other) and name not in foreign
    ]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def licence(config: Mapping[str, Any]) -> str:
    """Whose terms hold."""
    return (
        f"These weights derive from {base_name(config)} and are under its licence; read it before "
        "you use or share them."
    )


def hub_id(config: Mapping[str, Any]) -> str | None:
    """The teacher's repository, or None for a teacher of one's own."""
    source = str(config["model"])
    return None if Path(source).exists() else source


def base_name(config: Mapping[str, Any]) -> str:
    """The teacher as a reader knows it: its repository, or the name of its folder or file."""
    source = hub_id(config)
    if source is None:
        return Path(str(config["model"])).stem
    return f"[{source}](https://huggingface.co/{source})"


def w_range(config: Mapping[str, Any], family: Family) -> tuple[float, float]:
    """The w drawn in training: the flags, else the family's."""
    low, high = config["w_min"], config["w_max"]
    return family.w_min if low is None else low, family.w_max if high is None else high


def prompt(config: Mapping[str, Any]) -> str:
    """One that the run was watched with, else any."""
    if config["validation_prompts"]:
        return str(config["validation_prompts"][0])
    if config["cache"] is None:
        return ANY_PROMPT
    try:
        cache = CachePaths(place(str(config["cache"])))
        stored = load_conditioning(cache.conditioning).prompts
    except (OSError, UserError):  # gone or out of reach
        stored = ()
    return stored[0] if stored else ANY_PROMPT


def resolution(config: Mapping[str, Any], family: Family) -> int:
    """The pixels that the cache was made at; the model's own where it cannot be read any more."""
    own = Model(str(config.get("teacher", config["model"])), family)
    if config["cache"] is None:
        return native_resolution(own)
    try:
        manifest = open_manifest(place(str(config["cache"])), check_sizes=False)
    except (OSError, UserError):
        return native_resolution(own)
    return int(manifest.identity["preprocessing"]["resolution"])
