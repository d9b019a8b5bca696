"""Models given as one `.safetensors` file in the layout of the original Stable Diffusion code.

Such a file holds weights alone. What a diffusers folder says in its JSON files comes from a folder
that has the file's name without `.safetensors`, as far as it is there, else from `configs/` here,
the published configurations of the families; diffusers' own inference from the keys names the
family.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import UserError, first_line
from shared.models.weights import check_finite
from shared.storage.files import load_record
from shared.storage.reading import open_regular
from shared.wording import counted

CONFIGS = Path(__file__).resolve().parent / "configs"
FAMILIES = {"v1": "sd15", "v2": "sd21", "xl_base": "sdxl"}  # diffusers' names and ours
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"

M = TypeVar("M", bound=torch.nn.Module)


def is_single_file(source: str) -> bool:
    """Is this a model in one file? Raises UserError for a pickled one, which is never opened."""
    path = Path(source)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin") and path.is_file():
        raise UserError(f"{source} is a pickle, which can run code; pass it as .safetensors")
    return path.suffix == ".safetensors" and path.is_file()


def config_folder(source: str, file: str) -> Path:
    """Find the folder in diffusers format where `file` (`unet/config.json` ...) is for `source`.

    Raises UserError for a file that holds no model of a known family.
    """
    beside = Path(source).with_suffix("")
    return beside if (beside / file).is_file() else CONFIGS / family_name(source)


def single_file_config(source: str, file: str) -> dict[str, Any]:
    """Return what a diffusers folder with the same model would have as `file`.

    The keys `v_pred` and `ztsnr` mark SDXL models that predict v, with zero terminal SNR. A
    scheduler's config beside the file goes first; what it does not say is the family's.
    """
    folder = config_folder(source, file)
    config = load_record(folder / file, dict, "restore it, or remove it to take the family's")
    if not file.startswith("scheduler/"):
        return config
    published = load_record(CONFIGS / family_name(source) / file, dict, "install this anew")
    keys, marked = _shapes(source), dict[str, Any]()
    if "v_pred" in keys:
        marked["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        marked["rescale_betas_zero_snr"] = True
    return {**published, **marked, **({} if CONFIGS in folder.parents else config)}


def family_name(source: str) -> str:
    """Return sd15, sd21 or sdxl, by the names and shapes of the weights."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shapes = _shapes(source)
    if UNET_KEY not in shapes:
        raise UserError(
            f"{source} holds no Stable Diffusion model in its original layout (no {UNET_KEY}); "
            "pass a whole checkpoint or a diffusers folder"
        )
    kind = infer_diffusers_model_type(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )
    if kind not in FAMILIES:
        raise UserError(
            f"{source} is a model of type {kind}; single files can be SD 1.x, SD 2.x or SDXL base"
        )
    return FAMILIES[kind]


@cache
def _shapes(source: str) -> dict[str, list[int]]:
    """Return names and shapes of the weights, from the file's header alone."""
    try:
        with open_regular(Path(source)), safe_open(source, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source} is no safetensors file ({error}); fetch it anew") from None


def load_part(kind: Any, source: str, part: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load one diffusers model of the file: its `unet` or `vae`.

    Raises UserError where the file lacks it or does not fit its configuration.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    folder = config_folder(source, f"{part}/config.json")
    try:
        model = kind.from_single_file(
            source, config=str(folder), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SingleFileComponentError) as error:
        raise UserError(
            f"no {part} can be read from {source} ({first_line(error)}); if its architecture is "
            f"its own, put {part}/config.json into the folder {Path(source).with_suffix('')}"
        ) from None
    return whole(model, source, part)


def whole(model: M, source: str, part: str) -> M:
    """Return the model. Raises UserError where weights were not in the file, or are not finite."""
    missing = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if missing:
        raise UserError(
            f"{source} lacks {counted(len(missing), 'weight')} of its {part}, {missing[0]} first; "
            "pass a whole checkpoint"
        )
    return check_finite(model, source, part)
