"""Models written as one file in the original Stable Diffusion layout."""

from pathlib import Path

from safetensors.torch import save_file

from shared.models.family import family_of_unet
from shared.models.original_layout import original_model


def write_single_file(pipe, path: Path) -> Path:
    """A Stable Diffusion or SDXL pipeline as one file."""
    family = family_of_unet(pipe.unet.config, "the pipeline")
    encoders = {
        prefix: getattr(pipe, part).state_dict()
        for part, prefix in zip(family.text_encoders, family.original_encoders, strict=True)
    }
    tensors = original_model(
        pipe.unet.state_dict(), pipe.vae.state_dict(), encoders, pipe.unet.config.layers_per_block
    )
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path
