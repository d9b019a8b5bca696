"""The teacher of a run, with the LoRAs that it wears."""

from __future__ import annotations

from shared.errors import UserError
from shared.networks.denoiser import Denoiser
from shared.networks.styled import load_teacher
from shared.style import FLAG, Style, open_styles
from train.config import DistillConfig, RunConfig


def styles_of(config: DistillConfig) -> tuple[Style, ...]:
    """What the teacher wears. Raises UserError where a file is not what it was when a run began."""
    found = open_styles(config.teacher_lora)
    recorded = config.teacher_lora_sha256 if isinstance(config, RunConfig) else ()
    for style, sha256 in zip(found, recorded, strict=False):
        if style.sha256 != sha256:
            raise UserError(
                f"{FLAG} {style.file} is another file than the run began with ({sha256[:16]}, now "
                f"{style.sha256[:16]}); restore it"
            )
    return found


def load_run_teacher(source: str, config: DistillConfig) -> Denoiser:
    """Load the UNet of a run's teacher from `source`, frozen, with what it wears."""
    return load_teacher(source, styles_of(config))
