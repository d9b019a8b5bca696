"""The model card: what a student is, how it did, and lines that draw with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from shared.errors import UserError
from shared.storage.files import copy_durably, load_record, publish
from shared.style import split_scale
from train.export.file_guide import file_guide, half_precision
from train.export.provenance import Provenance
from train.export.snippet import snippet
from train.objectives import guidance_learned, uses_guidance

CARD_FILE, PREVIEW_FILE = "README.md", "preview.png"
EVALUATION, AFTER_EVALUATION = "Evaluation", "Training"  # sections
READ = ("utf-8", "surrogateescape")  # what others wrote into a card stays as it is
SETTINGS = (  # before the objective's own
    "objective", "student", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler",
)  # fmt: skip


def write_card(
    run: Path,
    folder: Path,
    tmp: Path,
    origin: Provenance,
    student: str | None,
    latest: bool,
    name: str,
) -> bool:
    """Write README.md beside an export, and the newest preview up to its step as `preview.png`.

    `student` is the student's fingerprint, and `latest` whether it is what the run has come to;
    `name` is what a user loads it by: a hub id or the folder. Where the run's evaluation is of this
    student, the table is part of the card; returns whether it is.
    """
    last = f"step-{origin.steps:08d}.png"
    previews = sorted(p for p in (run / "previews").glob("step-*.png") if p.name <= last)
    parts = [header(origin), introduction(origin, name)]
    if previews:
        copy_durably(previews[-1], folder / PREVIEW_FILE, tmp)
        parts.append(f"![{preview_title(origin)}]({PREVIEW_FILE})")
    lines = snippet(origin, name, origin.family, half_precision(folder))
    parts += ["## Use", f"```python\n{lines}```", guidance(origin)]
    if files := file_guide(folder, origin):
        parts += ["## Files", "\n".join(f"- {line}" for line in files)]
    if table := evaluation(run, student, latest, origin.guidance_scale):
        parts += [f"## {EVALUATION}", table]
    parts += [f"## {AFTER_EVALUATION}", settings(origin), "## Licence", licence(origin)]
    publish(["\n\n".join(parts).encode() + b"\n"], folder / CARD_FILE, tmp)
    return bool(table)


def evaluation(
    run: Path, student: str | None, latest: bool, guidance_scale: float | None = None
) -> str:
    """The table of a run's evaluation; nothing where there is none or it is of another student.

    An older version's does not say of whom it is, and is taken for the latest's. With a guidance
    that is folded in, another guidance makes another student.
    """
    figures, table = run / "evaluation.json", run / "evaluation.md"
    if not (figures.is_file() and table.is_file()):
        return ""
    try:
        evaluated, guided = load_record(
            figures, lambda r: (r.get("weights"), r.get("guidance_scale")), "evaluate again"
        )
    except UserError as error:
        print(f"note: the card has no table: {error}", file=sys.stderr)
        return ""
    mine = latest if evaluated is None else evaluated == student
    mine = mine and guidance_scale in (None, guided)
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


def header(origin: Provenance) -> str:
    """The YAML that the hub reads."""
    data = ModelCardData(
        base_model=hub_id(origin),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *origin.objective.card.tags, *["lora"] * origin.lora],
        inference=False,  # a widget would draw with a sampler of its own
    )
    return f"---\n{data.to_yaml()}\n---"


def introduction(origin: Provenance, name: str) -> str:
    """Title and a sentence."""
    kind = "LoRA" if origin.lora else "UNet"
    purpose = origin.objective.card.purpose.format(teacher=base_name(origin))
    return (
        f"# {Path(name).name}\n\nA {kind} {purpose}, trained with Latent Distillery"
        f"{begun(origin)}.{styled(origin)}{alone(origin)}"
    )


def alone(origin: Provenance) -> str:
    """What was done so that it stands alone."""
    if origin.guidance_scale is not None:
        return (
            f" It draws with `guidance_scale` {origin.guidance_scale:g}, which was folded into its "
            "weights: no program has to tell it."
        )
    return " The LoRA is merged into the model." * (origin.standalone and origin.adapted)


def styled(origin: Provenance) -> str:
    """What the teacher wore, and that the student needs no file of it."""
    names = []
    for text, sha256 in zip(
        origin.config.teacher_lora, origin.config.teacher_lora_sha256, strict=False
    ):
        file, scale = split_scale(text)
        names.append(f"`{Path(file).name}` at {scale:g} ({sha256[:16]})")
    if not names:
        return ""
    return (
        f" The teacher wore {' and '.join(names)}; that style is in these weights, so load nothing "
        "else for it."
    )


def begun(origin: Provenance) -> str:
    """What it began with, where that was not the teacher: a name, and the weights' fingerprint."""
    if origin.config.init_student is None:
        return ""
    return f", started from `{origin.config.init_student.name}` ({origin.config.init_fingerprint})"


def preview_title(origin: Provenance) -> str:
    """What the picture shows."""
    *others, last = map(str, origin.objective.sampler.previewed_steps(origin.config))
    return f"Prompts at {', '.join(others)} and {last} steps" if others else "Prompts"


def guidance(origin: Provenance) -> str:
    """What guidance_scale means for this student."""
    config, more = origin.config, origin.objective.card.drawing
    if origin.objective.sampler.classifier_free:
        return "`guidance_scale` means what it means for the model it was fine-tuned from."
    if not uses_guidance(config):
        return "It is drawn as what it began with, without guidance: leave `guidance_scale` at 1."
    low, high = origin.guidance_range
    if origin.guidance_scale is not None:
        return (
            f"The guidance is inside: `guidance_scale` {origin.guidance_scale:g}, of the "
            f"{low + 1:g} to {high + 1:g} that it was trained for. Leave `guidance_scale` at 1. "
            f"{more}".rstrip()
        )
    if guidance_learned(config):
        return (
            f"The guidance is built in (w between {low:g} and {high:g} in training): leave "
            f"`guidance_scale` at 1. {more}".rstrip()
        )
    told = (
        f"`guidance_scale` may lie between {low + 1:g} and {high + 1:g}, the range it was trained "
        "for, and costs nothing: the UNet is told it, there is no second pass."
    )
    return f"{told} {more}".rstrip()


def settings(origin: Provenance) -> str:
    """The settings that matter, as a table."""
    other = "ema_" if origin.adapted else "lora_"  # settings of the other kind
    values = vars(origin.config) | {"max_train_steps": origin.steps}
    rows = [
        f"| {name} | {shown(values[name])} |"
        for name in (*SETTINGS, *origin.objective.card.settings, "seed")
        if values[name] not in (None, ()) and not name.startswith(other)
    ]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def shown(value: Any) -> str:
    """A flag's value as one types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def licence(origin: Provenance) -> str:
    """Whose terms hold."""
    return (
        f"These weights derive from {base_name(origin)} and are under its licence; read it before "
        "you use or share them."
    )


def hub_id(origin: Provenance) -> str | None:
    """The teacher's repository, or None for a teacher of one's own."""
    source = origin.config.model
    return None if Path(source).exists() else source


def base_name(origin: Provenance) -> str:
    """The teacher as a reader knows it: its repository, or the name of its folder or file."""
    source = hub_id(origin)
    if source is None:
        return Path(origin.config.model).stem
    return f"[{source}](https://huggingface.co/{source})"
