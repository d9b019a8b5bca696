"""An identity that no encoder made, for caches written by hand."""

from shared.cache.identity import Identity, Preprocessing, Shapes, TextIdentity, VaeIdentity


def an_identity(
    family="x", latents="mean", resolution=64, views=1, scaling_factor=1.0, width=64,
    force_zeros=False, fingerprint="", model="sd15",
):  # fmt: skip
    return Identity(
        1, family, model, latents,
        VaeIdentity(fingerprint, 4, 8, scaling_factor, "float32"),
        TextIdentity((), 16, width, force_zeros),
        Preprocessing(resolution, views, max_captions=1, center_crop=True),
        Shapes(1, 1, "cpu"),
    )  # fmt: skip
