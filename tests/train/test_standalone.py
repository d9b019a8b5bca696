"""Students exported as models of their own, in the hands of stock diffusers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from shared.models.family import resolve_model
from shared.models.whole_model import beside_unet
from tests.support.exports import Run, make_run
from tests.support.single_file import write_single_file
from tests.support.styles import write_style
from train.export.weights import exported_student

GUIDANCE = 2.5
CACHES = {"sd": ("tiny_cache", "tiny_sd"), "xl": ("tiny_xl_cache", "tiny_xl")}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """(family, kind) -> a run of five steps, made when it is first asked for."""
    made = {}

    def run(family: str, kind: str) -> Run:
        if (family, kind) not in made:
            cache, model = map(request.getfixturevalue, CACHES[family])
            folder = tmp_path_factory.mktemp(f"{family}-{kind}")
            more = {}
            if kind == "lora" and family == "sd":
                more["teacher_lora"] = (f"{write_style(model, folder / 'ink.safetensors')}:0.5",)
            made[family, kind] = make_run(
                folder / "run", cache, model, family, kind, report_to=(), **more
            )
        return made[family, kind]

    return run


def export(cli, run: Run, *words) -> tuple[Path, str]:
    answer = cli("train", "export", "--run", run.folder, *words)
    assert answer.status == 0, answer.err
    return Path(answer.out.strip()).parent, answer.err


def draw(pipe, run: Run, scale: float, steps: int = 4) -> np.ndarray:
    """Pictures in [0, 1], before they are rounded to pixels."""
    pipe.scheduler = LCMScheduler.from_pretrained(run.folder, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        run.prompt, num_inference_steps=steps, guidance_scale=scale, output_type="np",
        generator=torch.Generator().manual_seed(3), height=64, width=64,
    ).images  # fmt: skip


def load_unet(folder: Path, **more) -> UNet2DConditionModel:
    more = {"torch_dtype": torch.float32} | more
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **more)


@pytest.mark.parametrize("family", [pytest.param("sd", marks=pytest.mark.slow), "xl"])
def test_a_plain_pipeline_draws_what_the_told_student_draws(runs, family, cli):
    run = runs(family, "full")
    folder, said = export(cli, run, "--guidance-scale", GUIDANCE)
    assert folder == run.folder / f"guidance-{GUIDANCE}"
    plain = load_unet(folder)
    assert plain.config.time_cond_proj_dim is None
    assert set(plain.state_dict()) == set(run.teacher.unet.state_dict())  # any program knows these
    wanted = draw(run.student, run, GUIDANCE)
    # guidance_scale 1 means no second pass: the guidance is inside.
    np.testing.assert_allclose(draw(run.load(plain), run, 1.0), wanted, atol=1e-5)
    assert np.abs(draw(run.student, run, GUIDANCE + 1) - wanted).max() > 1e-4  # it is told much
    assert "outside" not in said


def test_diffusers_opens_the_one_file_and_draws_the_same(runs, cli, tmp_path):
    run = runs("sd", "full")
    folder, _ = export(cli, run, "--guidance-scale", GUIDANCE, "--output", tmp_path / "out")
    pipe = StableDiffusionPipeline.from_single_file(
        folder / "student.safetensors", config=str(run.model), torch_dtype=torch.float32
    )
    teacher = run.teacher
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(teacher, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = pipe.unet.state_dict(), load_unet(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    wanted = draw(run.student, run, GUIDANCE)
    np.testing.assert_allclose(draw(pipe, run, 1.0), wanted, atol=1e-5)


def test_the_halves_are_the_same_in_fp16(runs, cli, tmp_path):
    run = runs("xl", "full")
    folder, _ = export(cli, run, "--guidance-scale", GUIDANCE, "--output", tmp_path)
    whole = load_file(folder / "student.safetensors")
    half = load_file(folder / "student.fp16.safetensors")
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in whole.items())
    variant = load_unet(folder, variant="fp16", torch_dtype=torch.float16)
    original = UNet2DConditionModel.from_single_file(
        str(folder / "student.fp16.safetensors"), config=str(run.model), subfolder="unet",
        torch_dtype=torch.float16,
    )  # fmt: skip
    ours, theirs = original.state_dict(), variant.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    only, _ = export(cli, run, "--guidance-scale", GUIDANCE, "--output", tmp_path,
                     "--export-dtype", "fp16")  # fmt: skip
    assert not (only / "student.safetensors").exists()  # the former export is gone as a whole
    assert (only / "student.fp16.safetensors").is_file()


@pytest.mark.parametrize("family", ["sd", pytest.param("xl", marks=pytest.mark.slow)])
def test_a_merged_lora_draws_what_the_lora_draws(runs, family, cli):
    """That of sd has a style in it, which its teacher wore."""
    run = runs(family, "lora")
    folder, said = export(cli, run, "--standalone")
    assert folder == run.folder / "standalone"
    pipe = run.load()
    pipe.load_lora_weights(run.folder, weight_name="pytorch_lora_weights.safetensors")
    wanted = draw(pipe, run, 1.0)
    merged = run.load(load_unet(folder))
    np.testing.assert_allclose(draw(merged, run, 1.0), wanted, atol=1e-5)
    assert np.abs(draw(run.load(), run, 1.0) - wanted).max() > 0.05
    assert "`student.safetensors` or, half as large, `student.fp16.safetensors` is" in said
    assert "CFG 1, sampler LCM" in said
    assert "strength" not in said
    with safe_open(folder / "student.safetensors", "pt") as file:
        assert file.metadata()["distillery.student"] == exported_student(run.folder, "lora")


def test_the_card_says_what_is_inside_and_its_code_runs(runs, cli, tmp_path, monkeypatch):
    run = runs("sd", "full")
    folder, _ = export(cli, run, "--guidance-scale", GUIDANCE, "--output", tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "draws with `guidance_scale` 2.5, which was folded into its weights" in card
    assert "of the 2 to 3.5 that it was trained for. Leave `guidance_scale` at 1." in card
    assert (
        "`student.safetensors` or, half as large, `student.fp16.safetensors` is the whole" in card
    )
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "guidance_scale=1.0" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Image.open("picture.png").size == (64, 64)
    with safe_open(folder / "student.safetensors", "pt") as file:
        assert file.metadata()["distillery.guidance_scale"] == "2.5"


def test_an_evaluation_is_shown_where_it_is_of_this_guidance(runs, cli, tmp_path):
    run = runs("sd", "full")
    record = {"weights": exported_student(run.folder, "full"), "guidance_scale": GUIDANCE}
    files = run.folder / "evaluation.json", run.folder / "evaluation.md"
    files[0].write_text(json.dumps(record))
    files[1].write_text("| FD | 1.5 |\n")
    try:
        for scale, shown in ((GUIDANCE, True), (3.0, False)):
            folder, _ = export(cli, run, "--guidance-scale", scale, "--output", tmp_path / "out")
            assert ("| FD | 1.5 |" in (folder / "README.md").read_text()) == shown
    finally:
        for file in files:
            file.unlink()


def test_what_cannot_be_is_refused_in_a_line(runs, cli, tmp_path):
    for kind, words, cause in (
        ("lora", ("--guidance-scale", 3), "a LoRA of --objective lcd has learned its own guidance"),
        ("full", ("--standalone",), "say which one to fold in, such as --guidance-scale 7.5"),
    ):
        run = runs("xl", kind)
        answer = cli("train", "export", "--run", run.folder, "--output", tmp_path / "out", *words)
        assert answer.status == 1
        assert cause in answer.err
        assert answer.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "model_index.json").write_text("{}")
    run = runs("xl", "full").folder
    before = sorted(run.rglob("*"))
    other = runs("xl", "lora").folder
    answer = cli(
        "train", "export", "--run", other, "--output", run
    )  # an ordinary one, into another
    assert answer.status == 1
    assert "is a run, whose own student would be replaced" in answer.err
    for output, cause in (
        (run, "is a run, whose own student would be"),
        (whole, "is a whole model"),
    ):
        answer = cli("train", "export", "--run", run, "--guidance-scale", 3, "--output", output)
        assert (answer.status, answer.err.count("\n")) == (1, 1)
        assert cause in answer.err
    assert sorted(run.rglob("*")) == before
    _, said = export(cli, runs("xl", "full"), "--guidance-scale", 9, "--output", tmp_path / "out")
    assert "note: --guidance-scale 9 is outside of 2 to 3.5, which the student was" in said


def test_the_ordinary_export_stays_as_it_was(runs, cli):
    """`train sample` and `evaluate` go on with it."""
    run = runs("xl", "full")
    before = (run.folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    export(cli, run, "--guidance-scale", GUIDANCE)
    assert (run.folder / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before
    assert not (run.folder / "student.safetensors").exists()


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-xl"])
def test_all_but_the_unet_is_read_from_a_folder_and_from_one_file(name, repo, tmp_path):
    from diffusers import DiffusionPipeline

    model = repo / "data" / name
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    file = write_single_file(pipe, tmp_path / "one.safetensors")
    wanted = {n: t for n, t in load_file(file).items() if not n.startswith("model.diffusion")}
    for source in (model, file):
        if source == file:
            (tmp_path / "one").symlink_to(model)  # its configs
        found = beside_unet(resolve_model(str(source)))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n].float(), tensor) for n, tensor in wanted.items())
