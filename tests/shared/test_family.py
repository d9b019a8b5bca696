"""Models are recognised by what they are, and refused in one line."""

import json
import shutil

import pytest

from shared.errors import UserError
from shared.models import family, hub
from shared.models.family import FAMILIES, family_of_unet, load_config, resolve_model

# (cross_attention_dim, addition_embed_type) as published.
PUBLISHED = {
    "sd15": (768, None),
    "sd21": (1024, None),
    "sdxl": (2048, "text_time"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_unets_are_recognised(name):
    width, embed = PUBLISHED[name]
    config = {"cross_attention_dim": width, "addition_embed_type": embed}
    assert family_of_unet(config, "x").name == name


def test_families_are_told_apart():
    keys = {(f.cross_attention_dim, f.micro_conditioning) for f in FAMILIES.values()}
    assert len(keys) == len(FAMILIES)
    for name, entry in FAMILIES.items():
        assert entry.name == name
        assert 0 <= entry.w_min <= entry.w_max
        assert entry.w_min <= entry.guidance_scale - 1 <= entry.w_max  # drawn as it was trained
        assert (len(entry.text_encoders) == 2) == entry.micro_conditioning


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-xl"])
def test_presets_folders_and_copies_resolve_alike(name, repo, tmp_path):
    folder = repo / "data" / name
    assert resolve_model(name).family is FAMILIES[name]
    assert resolve_model(name).source == str(folder)
    (tmp_path / "mine").mkdir()
    shutil.copytree(folder / "unet", tmp_path / "mine" / "unet")
    assert resolve_model(str(tmp_path / "mine")).family is FAMILIES[name]
    index = load_config(str(folder), "model_index.json")
    assert ("text_encoder_2" in index) == FAMILIES[name].micro_conditioning


def test_a_relative_folder(tmp_path, tiny_sd, monkeypatch):
    shutil.copytree(tiny_sd / "unet", tmp_path / "a" / "b" / "unet")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("a/b").family.name == "tiny-sd"  # a folder here before a hub id


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sd51", ["'sd51'", "sd15, sd21, sdxl", "hub id (owner/name)"]),
        ("./models/mine", ["'./models/mine'", "neither a folder here"]),
        ("~/models", ["'~/models'", "neither a folder here"]),
        ("a/b/c", ["'a/b/c'", "neither a folder here"]),
    ],
)
def test_what_is_no_model(name, parts):
    with pytest.raises(UserError) as error:
        resolve_model(name)
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_unet_and_a_unet_of_no_family(tmp_path):
    with pytest.raises(UserError, match=r"has no unet/config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "unet").mkdir()
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({"cross_attention_dim": 4096, "addition_embed_type": None}))
    with pytest.raises(UserError, match=r"cross_attention_dim 4096 .* no known family .*sd15 768"):
        resolve_model(str(tmp_path))
    config.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        resolve_model(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch):
    """Offline, mistyped, taken down: huggingface_hub's long stories end in one line."""
    import huggingface_hub

    def refuse(source, file):
        raise OSError("404 Client Error.\nEntry Not Found for url: ...")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    with pytest.raises(UserError) as error:
        resolve_model("stable-diffusion-v1-5/no-such-model")
    assert "\n" not in str(error.value)
    assert "404 Client Error." in str(error.value)
    assert "check the name" in str(error.value)


def test_a_hub_id_is_read_from_the_hub(monkeypatch, tiny_xl):
    import huggingface_hub

    asked = []

    def download(source, file):
        asked.append((source, file))
        return str(tiny_xl / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve_model("someone/their-model").family.name == "tiny-xl"
    assert asked == [("someone/their-model", "unet/config.json")]
    assert family.resolve_model("sdxl").source == "stabilityai/stable-diffusion-xl-base-1.0"
