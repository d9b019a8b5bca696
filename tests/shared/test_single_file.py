"""A teacher in one `.safetensors` file is what the same model is as a diffusers folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prep.encoders.text import TextEncoder
from shared.errors import UserError
from shared.models.family import load_config, resolve_model
from shared.models.fingerprint import fingerprint
from shared.models.vae import load_vae
from shared.networks.denoiser import load_schedule, load_unet
from tests.support.models import SD15, SD21, SDXL
from tests.support.single_file import write_single_file
from tests.support.sources import captioned, samples, write_tar

CONFIGS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def copy_configs(model: Path, folder: Path) -> None:
    """What a user puts beside a file whose architecture is its own: everything but weights."""
    folder.mkdir()
    for part in CONFIGS:
        if (model / part).is_dir():
            shutil.copytree(model / part, folder / part, ignore=shutil.ignore_patterns("*.safet*"))
    shutil.copy(model / "model_index.json", folder)


@pytest.fixture(scope="module")
def models(repo, tmp_path_factory):
    """Family -> (a diffusers folder, the same as one file)."""
    found = {}
    for name in ("tiny-sd", "tiny-xl"):
        folder = tmp_path_factory.mktemp(name)
        model = folder / "model"
        pipe = DiffusionPipeline.from_pretrained(repo / "data" / name, torch_dtype=torch.float16)
        if name == "tiny-xl":  # diffusers tells the two encoders apart by their widths
            pipe = unlike_encoders(pipe)
        pipe.save_pretrained(model)
        file = write_single_file(pipe, folder / "one.safetensors")
        copy_configs(model, folder / "one")
        found[name] = (model, file)
    return found


def unlike_encoders(pipe: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """Widths 32 and 96 instead of twice 64, random weights."""
    torch.manual_seed(0)
    config = pipe.text_encoder.config.to_dict()
    narrow = CLIPTextConfig(**{**config, "hidden_size": 32})
    wide = CLIPTextConfig(**{**config, "hidden_size": 96, "projection_dim": 96})
    unet = {**pipe.unet.config, "projection_class_embeddings_input_dim": 96 + 6 * 32}
    parts = {
        "text_encoder": CLIPTextModel(narrow).half(),
        "text_encoder_2": CLIPTextModelWithProjection(wide).half(),
        "unet": UNet2DConditionModel.from_config(unet).half(),
    }
    return StableDiffusionXLPipeline(**{**pipe.components, **parts})


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-xl"])
def test_every_part_is_the_folders_own(models, name):
    folder, file = models[name]
    one, many = resolve_model(str(file)), resolve_model(str(folder))
    assert one.family == many.family
    assert one.source == str(file)
    assert fingerprint(load_unet(str(file))) == fingerprint(load_unet(str(folder)))
    assert fingerprint(load_vae(str(file))) == fingerprint(load_vae(str(folder)))
    ours, theirs = (TextEncoder(m, torch.device("cpu"), 4) for m in (one, many))
    assert ours.identity() == theirs.identity()
    a, b = (encoder.encode(["a red square", ""]) for encoder in (ours, theirs))
    assert torch.equal(a.prompt_embeds, b.prompt_embeds)
    assert load_config(str(file), "model_index.json") == load_config(
        str(folder), "model_index.json"
    )


def test_prep_and_train_take_the_file(models, cli, tmp_path):
    """The same samples as from the folder, and a LoRA."""
    shards = write_tar(tmp_path / "some.tar", captioned(range(8)))
    caches = []
    for source in models["tiny-sd"]:
        caches.append(tmp_path / f"cache{len(caches)}")
        answer = cli("prep", "encode", "--shards", shards, "--model", source, "--cache",
                     caches[-1], "--threads", 1, "--no-report")  # fmt: skip
        assert answer.status == 0, answer.err
    a, b = map(samples, caches)
    assert a.keys() == b.keys()
    assert all((a[key].arrays["latents"] == b[key].arrays["latents"]).all() for key in a)
    assert all((a[k].arrays["prompt_embeds"] == b[k].arrays["prompt_embeds"]).all() for k in a)
    run = tmp_path / "run"
    answer = cli("train", "distill", "--model", models["tiny-sd"][1], "--cache", caches[1],
                 "--run", run, "--max-train-steps", 1, "--threads", 1,
                 "--lora-rank", 4, "--train-batch-size", 2, "--validation-steps", 0)  # fmt: skip
    assert answer.status == 0, answer.err
    assert (run / "pytorch_lora_weights.safetensors").is_file()


# The published models, told by their weights' names and shapes.
HINTS = {
    "sd15": {},
    "sd21": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)
    },
    "sdxl": {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (8,)},
}
PUBLISHED = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
FIRST = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}


def write_hints(path: Path, **shapes: tuple[int, ...]) -> str:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return str(path)


@pytest.mark.parametrize("family", HINTS)
def test_the_family_is_told_by_the_keys(family, tmp_path):
    source = write_hints(tmp_path / "model.safetensors", **FIRST, **HINTS[family])
    assert resolve_model(source).family.name == family
    with torch.device("meta"):
        ours = UNet2DConditionModel.from_config(load_config(source, "unet/config.json"))
        theirs = UNet2DConditionModel(**PUBLISHED[family])
        vae = AutoencoderKL.from_config(load_config(source, "vae/config.json"))
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    schedule = load_schedule(source)
    assert schedule.prediction_type == ("v_prediction" if family == "sd21" else "epsilon")
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)


def test_v_prediction_models_of_sdxl_are_marked_by_a_key(tmp_path):
    marks = {"v_pred": (1,), "ztsnr": (1,)}
    source = write_hints(tmp_path / "model.safetensors", **FIRST, **HINTS["sdxl"], **marks)
    schedule = load_schedule(source)
    assert schedule.prediction_type == "v_prediction"
    assert schedule.alphas_cumprod[-1] == 0


def test_what_lies_beside_the_file_goes_first(tmp_path):
    source = write_hints(tmp_path / "model.safetensors", **FIRST)
    own = tmp_path / "model/scheduler/scheduler_config.json"
    own.parent.mkdir(parents=True)
    published = load_schedule(source)
    own.write_text(json.dumps({"prediction_type": "v_prediction"}))
    schedule = load_schedule(source)
    assert schedule.prediction_type == "v_prediction"
    assert torch.equal(schedule.alphas_cumprod, published.alphas_cumprod)  # of which it is silent
    own.write_text(json.dumps({"beta_schedule": "linear"}))
    schedule = load_schedule(source)
    betas = torch.linspace(0.00085, 0.012, 1000)
    torch.testing.assert_close(schedule.alphas_cumprod, torch.cumprod(1 - betas, 0))
    assert resolve_model(source).family.name == "sd15"


def test_files_that_are_no_such_model_are_refused_in_a_line(models, tmp_path, cli):
    lora = write_hints(tmp_path / "lora.safetensors", **{"lora_unet_x.lora_down.weight": (4, 4)})
    with pytest.raises(UserError, match="no Stable Diffusion model in its original layout"):
        resolve_model(lora)
    (tmp_path / "broken.safetensors").write_bytes(b"not at all")
    with pytest.raises(UserError, match="no safetensors file"):
        resolve_model(str(tmp_path / "broken.safetensors"))
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickle"):
        resolve_model(str(tmp_path / "old.ckpt"))
    inpaint = write_hints(
        tmp_path / "inpaint.safetensors",
        **{"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)},
    )
    with pytest.raises(UserError, match="type inpainting"):
        resolve_model(inpaint)
    hollow = write_hints(tmp_path / "hollow.safetensors", **FIRST)
    with pytest.raises(UserError, match=r"lacks \d+ weights of its unet|no unet can be read"):
        load_unet(hollow)
    answer = cli("train", "distill", "--model", lora, "--cache", tmp_path, "--run", tmp_path)
    assert answer.status == 1
    assert answer.err.count("\n") == 1


def test_without_a_tokenizer_it_is_said_where_one_goes(models, tmp_path, monkeypatch):
    import prep.encoders.clip

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(prep.encoders.clip, "with_files", offline)
    file = tmp_path / "one.safetensors"
    shutil.copy(models["tiny-sd"][1], file)
    copy_configs(models["tiny-sd"][0], tmp_path / "one")
    shutil.rmtree(tmp_path / "one/tokenizer")
    with pytest.raises(UserError, match=r"holds no tokenizer.*put its tokenizer into the folder"):
        TextEncoder(resolve_model(str(file)), torch.device("cpu"), 4)
