"""A cache from elsewhere is refused with the reason, before anything is computed."""

import json
import re
import shutil

import pytest

from shared.cache.compatibility import check_fit
from shared.cache.layout import Field, Layout
from shared.cache.manifest import open_manifest
from shared.errors import UserError
from shared.models.family import load_config


@pytest.fixture
def cache(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache, tmp_path / "cache")


def edit(cache, change):
    path = cache / "manifest.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def refusal(cache, model) -> str:
    def prepare():
        manifest = open_manifest(cache)
        check_fit(manifest, model.name, load_config(str(model), "unet/config.json"), cache)

    with pytest.raises(UserError) as error:
        prepare()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_cache_fits_its_own_teacher(tiny_cache, tiny_xl_cache, tiny_sd, tiny_xl):
    for cache, model in ((tiny_cache, tiny_sd), (tiny_xl_cache, tiny_xl)):
        unet = load_config(str(model), "unet/config.json")
        check_fit(open_manifest(cache), model.name, unet, cache)


def test_another_family(tiny_cache, tiny_xl):
    assert "its family is tiny-sd, the teacher wants tiny-xl" in refusal(tiny_cache, tiny_xl)


def reshape(name, shape):
    """A layout whose offsets follow from a field of another shape."""

    def change(stored):
        old = Layout.from_json(stored["layouts"][0])
        new = [Field(f.name, f.dtype, shape if f.name == name else f.shape) for f in old.fields]
        stored["layouts"][0] = Layout(tuple(new), old.record_bytes).to_json()

    return change


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("latents", (1, 8, 8, 8), r"latents are <f2 \(1, 8, 8, 8\), the teacher wants <f2 \(1, 4,"),
        ("latents", (3, 4, 8, 8), r"latents are <f2 \(3, 4, 8, 8\)"),
        ("prompt_embeds", (1, 77, 65), r"prompt_embeds are .*65\), the teacher wants .*64\)"),
    ],
)
def test_shapes_that_the_teacher_cannot_take(cache, tiny_sd, name, shape, said):
    edit(cache, reshape(name, shape))
    assert re.search(said, refusal(cache, tiny_sd))


def test_fields_that_the_teacher_needs(tiny_cache, tiny_sd, tiny_xl):
    """A cache that calls itself one of SDXL, without SDXL's fields."""
    manifest = open_manifest(tiny_cache)
    unet = load_config(str(tiny_sd), "unet/config.json")
    xl = load_config(str(tiny_xl), "unet/config.json")
    parts = ("addition_embed_type", "addition_time_embed_dim",
             "projection_class_embeddings_input_dim")  # fmt: skip
    unet = {**unet, **{part: xl[part] for part in parts}}
    with pytest.raises(UserError, match=r"pooled_prompt_embeds are missing, the teacher wants <f2"):
        check_fit(manifest, "tiny-sd", unet, tiny_cache)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(format=2), "has cache format 2, this version reads 1: update"),
        (lambda s: s.update(format="1.0"), "has cache format 1.0, this version reads 1: encode"),
        (lambda s: s.pop("layouts"), "manifest.json is damaged (KeyError('layouts')); run"),
        (lambda s: s["layouts"][0].update(stride=512), "offsets do not follow from its fields"),
        (lambda s: s["shards"][0].update(layout=7), "manifest.json is damaged"),
        (lambda s: s["shards"][0].update(size=5), "bytes, 5 recorded"),
        (lambda s: s["shards"][0].update(count=10_000), "10000 samples of its layout take"),
        (lambda s: s["shards"][0].update(file="shards/x.tar"), "x.tar is missing"),
        (lambda s: s["identity"].pop("vae"), "its identity is not one that"),
        (lambda s: s["identity"]["vae"].update(channels=16), "latent channels is 16"),
        (lambda s: s["identity"]["text"].update(width=768), "embedding width is 768"),
    ],
)
def test_what_else_is_refused(cache, tiny_sd, change, said):
    edit(cache, change)
    assert said in refusal(cache, tiny_sd)
