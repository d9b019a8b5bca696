"""The LoRAs to merge: found, and the model that they are for."""

from __future__ import annotations

from collections.abc import Sequence

from infer.pipelines.loras import LoraFile, find_lora
from shared.errors import UsageError
from shared.models.family import Model, resolve_model
from shared.storage.files import file_sha256
from shared.style import Style


def find_loras(texts: Sequence[str]) -> tuple[LoraFile, ...]:
    """Find the files that `FILE[:SCALE]` name; a folder stands for the LoRA that a run exported.

    Raises UsageError for none, and UserError for one that is not there.
    """
    if not texts:
        raise UsageError(
            "which LoRAs? For example: python -m infer merge style.safetensors:0.8 runs/sdxl-lora"
        )
    return tuple(find_lora(text, "the LoRA") for text in texts)


def find_model(name: str | None, loras: Sequence[LoraFile]) -> Model:
    """The model that the LoRAs are for: the one named, else the teacher of the first run's.

    Raises UsageError where nothing tells.
    """
    students = (lora.student for lora in loras)
    told = next((one for one in students if one is not None and one.config is not None), None)
    if name is None and told is not None:
        name = told.teacher(None)
    if name is None:
        raise UsageError("which model are these LoRAs for? Say --model sdxl, sd15, or where it is")
    return resolve_model(name)


def as_styles(loras: Sequence[LoraFile]) -> tuple[Style, ...]:
    """The same with the hashes of their files."""
    return tuple(Style(str(one.path), one.scale, file_sha256(one.path)) for one in loras)
