"""Is the cache made for this teacher, and by this VAE?"""

from __future__ import annotations

from diffusers import AutoencoderKL

from shared.cache import compatibility
from shared.cache.manifest import Manifest
from shared.errors import UserError
from shared.models.family import Model, force_zeros, unet_config
from shared.models.rescale import vae_fingerprint
from shared.storage.urls import Place


def check_fit(manifest: Manifest, model: Model, cache: Place) -> None:
    """Raise UserError, naming both sides, where the cache was made for another kind of teacher."""
    unet = unet_config(model.source)
    compatibility.check_fit(manifest, model.family.name, unet, cache)
    here, wanted = manifest.identity.text.force_zeros, force_zeros(model)
    if here != wanted:
        kinds = {True: "zeros", False: "the encoded empty prompt"}
        raise UserError(
            f"{cache} holds {kinds[here]} as unconditional embedding, {model.source} wants "
            f"{kinds[wanted]} (force_zeros_for_empty_prompt in its model_index.json); "
            "encode anew with this model"
        )


def check_vae(manifest: Manifest, vae: AutoencoderKL, cache: Place, source: str) -> None:
    """Raise UserError where the latents come from another VAE than the one at `source`."""
    recorded, present = manifest.identity.vae, vae_fingerprint(vae)
    if recorded.fingerprint != present:
        other = f"--vae {recorded.source}" if recorded.source else "the model"
        raise UserError(
            f"{cache} was encoded by another VAE ({recorded.fingerprint}) than {source}'s "
            f"({present}); pass {other} it was made with, or encode anew"
        )
