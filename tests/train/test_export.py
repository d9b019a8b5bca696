"""Exports in the hands of stock diffusers, which must draw what `train sample` draws."""

import json
import logging
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file

from shared.cache.conditioning import load_conditioning
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.models.vae import decode_latents
from tests.support.exports import (
    PARAMS,
    RANK,
    Run,
    assert_same_picture,
    draw_ours,
    draw_stock,
    make_run,
)
from train.config import SampleConfig
from train.evaluation.artist import open_artist


@pytest.fixture(scope="module", params=PARAMS, ids="-".join)
def run(request, tmp_path_factory) -> Run:
    family, kind = request.param
    names = {"sd": ("tiny_cache", "tiny_sd"), "xl": ("tiny_xl_cache", "tiny_xl")}[family]
    cache, model = map(request.getfixturevalue, names)
    return make_run(tmp_path_factory.mktemp(f"{family}-{kind}"), cache, model, family, kind)


@pytest.fixture
def warnings(caplog):
    """What diffusers, peft and transformers warn of."""
    diffusers.utils.logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    diffusers.utils.logging.disable_propagation()


def test_stock_diffusers_draws_what_train_sample_draws(run, cli, tmp_path):
    for steps, seed in ((4, 0), (1, 3)):
        ours = draw_ours(cli, run, tmp_path, "--steps", steps, "--seed", seed)
        assert_same_picture(ours, draw_stock(run.student, run, steps, seed=seed))
    bare = draw_stock(run.teacher, run, scale=1.0)
    assert np.abs(draw_stock(run.student, run) - bare).mean() > 5  # and it is not the teacher's


def test_everything_loads_without_a_warning(run, warnings, recwarn):
    pipe = run.load_student()
    # That the text encoders have no adapters is said of every LoRA that adapts the UNet alone.
    complaints = [text for text in warnings() if "text_encoder" not in text]
    assert complaints == []
    assert [str(warning.message) for warning in recwarn if "lora" in str(warning.message)] == []
    if run.kind == "full":
        stored = load_file(run.folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert set(stored) == set(pipe.unet.state_dict())
        assert all(torch.equal(stored[n], t) for n, t in pipe.unet.state_dict().items())
        assert pipe.unet.config.time_cond_proj_dim == 32
        assert stored["time_embedding.cond_proj.weight"].any()
        return
    stored = load_file(run.folder / "pytorch_lora_weights.safetensors")
    layers = {n: m for n, m in pipe.unet.named_modules() if hasattr(m, "lora_A")}
    teacher = UNet2DConditionModel.from_pretrained(run.model / "unet")
    ends = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")
    adaptable = [
        name for name, module in teacher.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not name.startswith(ends)
    ]  # fmt: skip
    assert sorted(layers) == sorted(adaptable)
    assert len(stored) == 2 * len(layers)
    loaded = {p.data_ptr(): p for m in layers.values() for p in m.parameters() if p.requires_grad}
    assert len(loaded) >= len(stored)
    for name, layer in layers.items():
        adapter = next(iter(layer.lora_A))
        assert layer.scaling[adapter] == 1  # alpha is part of the weights
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[adapter].weight
            assert torch.equal(weight, stored[f"unet.{name}.{part}.weight"])


def test_lora_strength_can_be_turned_down(run):
    """What people do with a LoRA: switch it off and on, fuse it."""
    if run.kind == "full":
        pytest.skip("no adapters")
    pipe = run.load_student()
    pipe.disable_lora()
    assert_same_picture(draw_stock(pipe, run), draw_stock(run.teacher, run))
    pipe.enable_lora()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_same_picture(draw_stock(pipe, run), draw_stock(run.student, run))


def test_guidance_scale_means_what_it_means_in_diffusers(run, cli, tmp_path):
    if run.kind == "lora":
        pytest.skip("a LoRA student has its guidance built in")
    drawn = []
    for scale in (1.5, 6.0):
        ours = draw_ours(cli, run, tmp_path, "--guidance-scale", scale)
        assert_same_picture(ours, draw_stock(run.student, run, scale=scale))
        drawn.append(ours)
    assert (drawn[0] != drawn[1]).any()  # a little: five steps of training tell little


def test_lora_metadata_name_the_adapter(run):
    if run.kind == "full":
        assert json.loads((run.folder / "unet" / "config.json").read_text())["_class_name"]
        return
    from safetensors import safe_open

    with safe_open(run.folder / "pytorch_lora_weights.safetensors", "pt") as file:
        stored = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (stored["unet.r"], stored["unet.lora_alpha"]) == (RANK, RANK)


def test_a_picture_does_not_depend_on_its_neighbours(run, cli, tmp_path):
    """Seeds 5 and 6 together, and 6 alone."""
    artist = open_artist(run.folder, SampleConfig(threads=1, device="cpu"))
    texts = load_conditioning(CachePaths(run.cache).conditioning).find([run.prompt] * 2)
    shape = (4, *open_manifest(run.cache).layouts[0].latent_size)
    both = artist.for_shape(shape).draw("student", 4, texts, [5, 6])
    alone = draw_ours(cli, run, tmp_path, "--seed", 6)
    scale = artist.vae.config.scaling_factor
    assert_same_picture(decode_latents(artist.vae, both[1:] / scale)[0].astype(int), alone)
    assert (both[0] - both[1]).abs().max() > 0.1
    answer = cli("train", "sample", "--run", run.folder, "--prompt", run.prompt, "--seed", 5,
                 "--num-images", 2, "--threads", 1, "--output", tmp_path / "two.png")  # fmt: skip
    assert answer.status == 0
    sheet = np.asarray(Image.open(tmp_path / "two.png")).astype(int)
    tile = np.kron(alone, np.ones((2, 2, 1), dtype=int))  # enlarged twice, pixel by pixel
    found = [sheet[y : y + 128, x : x + 128] for y in range(20, 45) for x in range(120, 150)]
    assert min(np.abs(tile - part).mean() for part in found if part.shape == tile.shape) < 1


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 1), ("ddim", 8), ("dpmsolver++", 8)])
def test_the_teachers_rows_are_those_of_a_stock_pipeline(run, sampler, steps):
    """What students are compared with is the teacher at its best, not a weakened copy."""
    artist = open_artist(run.folder, SampleConfig(guidance_scale=4.0, threads=1, device="cpu"))
    conditioning = load_conditioning(CachePaths(run.cache).conditioning)
    shape = (4, *open_manifest(run.cache).layouts[0].latent_size)
    artist = artist.with_teacher(conditioning.unconditional).for_shape(shape)
    artist = artist.with_spacings({(sampler, steps): "leading"})
    z = artist.draw(sampler, steps, conditioning.find([run.prompt]), [3])
    ours = decode_latents(artist.vae, z / artist.vae.config.scaling_factor)[0].astype(int)
    kind, more = {
        "ddim": (DDIMScheduler, {}),
        "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    }[sampler]
    more["timestep_spacing"] = "leading"
    stock = draw_stock(run.teacher, run, steps, scale=4.0, seed=3, scheduler=kind, **more)
    assert_same_picture(ours, stock)


def test_exporting_a_checkpoint_again_gives_the_same_files(run, cli, tmp_path):
    again = tmp_path / "again"
    answer = cli("train", "export", "--run", run.folder, "--output", again)
    assert answer.status == 0, answer.err
    name = "unet/diffusion_pytorch_model" if run.kind == "full" else "pytorch_lora_weights"
    first, second = (load_file(where / f"{name}.safetensors") for where in (run.folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert Path(answer.out.strip()).exists()
    assert not any((again / "tmp").iterdir())


def test_the_export_replaces_the_former_one(run, cli, tmp_path):
    again = tmp_path / "again"
    words = ("export", "--run", run.folder, "--output", again, "--checkpoint")
    folder = next((run.folder / "checkpoints").iterdir())
    first, second = (cli("train", *words, checkpoint) for checkpoint in ("latest", folder))
    assert (first.status, second.status) == (0, 0)
    assert first.out == second.out
    assert sorted(path.name for path in again.iterdir()) in (
        ["README.md", "scheduler", "tmp", "unet"],
        [
            "README.md",
            "kohya_lora_weights.safetensors",
            "pytorch_lora_weights.safetensors",
            "scheduler",
            "tmp",
        ],
    )


def edited(run, folder, **changes) -> Path:
    """A run that differs in its settings and has no checkpoint."""
    config = json.loads((run.folder / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_checkpoint_of_another_run_is_not_exported(run, cli, tmp_path, tiny_sd, tiny_xl):
    other = {"lora": "full", "full": "lora"}[run.kind]
    model = str({"sd": tiny_xl, "xl": tiny_sd}[run.family])
    checkpoint = next((run.folder / "checkpoints").iterdir())
    for number, (said, changes) in enumerate({
        "lora_rank is 4 there, 2 here": {"lora_rank": 2},
        "lora_alpha is 6.0 there, 1.0 here": {"lora_alpha": 1.0},
        "seed is 0 there, 5 here": {"seed": 5},
        f"student is {run.kind} there, {other} here": {"student": other},
        "teacher is ": {"model": model},
    }.items()):  # fmt: skip
        folder = edited(run, tmp_path / str(number), **changes)
        answer = cli("train", "export", "--run", folder, "--checkpoint", checkpoint)
        assert answer.status == 1
        assert answer.err.startswith(f"error: {checkpoint} belongs to another run: ")
        assert said in answer.err
        assert answer.err.count("\n") == 1
        assert [path.name for path in folder.iterdir() if path.is_file()] == ["config.json"]
    answer = cli("train", "export", "--run", run.folder, "--checkpoint", tmp_path)
    assert answer.err.startswith(f"error: --checkpoint {tmp_path}: not a whole checkpoint")
    file = tmp_path / "0/config.json"
    answer = cli("train", "export", "--run", run.folder, "--output", file)
    assert answer.err == (
        f"error: {file}: part of the path is a file, not a folder; choose another path\n"
    )


def test_an_export_needs_no_cache(run, cli, tmp_path):
    folder = edited(run, tmp_path / "run", cache=str(tmp_path / "gone"))
    checkpoint = next((run.folder / "checkpoints").iterdir())
    answer = cli("train", "export", "--run", folder, "--checkpoint", checkpoint)
    assert answer.status == 0, answer.err
    assert "a photograph of a lighthouse" in (folder / "README.md").read_text()


def test_sampling_before_the_end_says_what_to_do(run, cli, tmp_path):
    (tmp_path / "config.json").write_bytes((run.folder / "config.json").read_bytes())
    answer = cli("train", "sample", "--run", tmp_path, "--prompt", run.prompt)
    assert answer.status == 1
    assert "has no " in answer.err
    assert "python -m train export --run" in answer.err
    answer = cli("train", "export", "--run", tmp_path)
    assert (answer.status, answer.err) == (1, f"error: {tmp_path} has no checkpoint yet\n")
