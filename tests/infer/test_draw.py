"""`infer draw` against `train sample` and against stock pipelines written by hand."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)

from tests.support.drawing import (
    PROMPT,
    assert_equal_pictures,
    draw,
    drawn_by,
    stock,
)
from tests.support.exports import PARAMS, assert_same_picture, draw_ours, make_run
from tests.support.styles import write_style


@pytest.fixture(scope="module", params=PARAMS, ids="-".join)
def run(request, tmp_path_factory):
    family, kind = request.param
    names = {"sd": ("tiny_cache", "tiny_sd"), "xl": ("tiny_xl_cache", "tiny_xl")}[family]
    cache, model = map(request.getfixturevalue, names)
    folder = tmp_path_factory.mktemp(f"{family}-{kind}")
    return make_run(folder, cache, model, family, kind, report_to=())


def student_of(run):
    """The student in a stock pipeline, with the scheduler of its export."""
    pipe = run.load_student()
    pipe.scheduler = LCMScheduler.from_pretrained(run.folder, subfolder="scheduler")
    return pipe


def usual_guidance(run) -> float:
    return 1.0 if run.kind == "lora" else 3.0


def test_a_student_is_drawn_as_it_was_trained(run, cli, tmp_path):
    ours = draw(cli, tmp_path / "a.png", "--run", run.folder, "--prompt", PROMPT, "--seed", 3)
    guidance = usual_guidance(run)
    pipe = student_of(run)
    wanted = drawn_by(pipe, seed=3, num_inference_steps=4, guidance_scale=guidance)
    assert_equal_pictures(ours, wanted)
    bare = drawn_by(stock(run.model), seed=3, num_inference_steps=4, guidance_scale=guidance)
    assert np.abs(ours - bare).mean() > 5  # the teacher's is another


def test_it_draws_what_train_sample_draws_from_the_cache(run, cli, tmp_path):
    words = ("--steps", 2, "--seed", 1)
    ours = draw(cli, tmp_path / "a.png", "--run", run.folder, "--prompt", run.prompt, *words)
    assert_same_picture(ours, draw_ours(cli, run, tmp_path, *words))


def test_two_loras_are_mixed_as_stock_adapters_are(run, cli, tmp_path):
    """Onto a LoRA student its own and two styles; onto a full one the styles."""
    second = "kohya" if run.family == "sd" else "diffusers"
    ink = write_style(run.model, tmp_path / "ink.safetensors", seed=5)
    oil = write_style(run.model, tmp_path / "oil.safetensors", second, seed=6)
    ours = draw(
        cli, tmp_path / "a.png", "--run", run.folder, "--prompt", PROMPT,
        "--lora", f"{ink}:0.7", "--lora", f"{oil}:-0.4",
    )  # fmt: skip
    pipe = (
        run.load(
            UNet2DConditionModel.from_pretrained(run.folder / "unet", torch_dtype=torch.float32)
        )
        if run.kind == "full"
        else run.load()
    )
    files, scales = [ink, oil], [0.7, -0.4]
    if run.kind == "lora":
        files, scales = [run.folder / "pytorch_lora_weights.safetensors", *files], [1, *scales]
    names = [f"style{number}" for number in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, scales)
    pipe.scheduler = LCMScheduler.from_pretrained(run.folder, subfolder="scheduler")
    wanted = drawn_by(pipe, num_inference_steps=4, guidance_scale=usual_guidance(run))
    assert_equal_pictures(ours, wanted)
    plain = draw(cli, tmp_path / "b.png", "--run", run.folder, "--prompt", PROMPT)
    assert np.abs(ours - plain).mean() > 5


def test_an_export_without_its_run_draws_the_same(run, cli, tmp_path):
    """As people find it on the hub: weights and scheduler, and no config.json."""
    folder = tmp_path / "found"
    folder.mkdir()
    weights = "unet" if run.kind == "full" else "pytorch_lora_weights.safetensors"
    for name in (weights, "scheduler"):
        (folder / name).symlink_to(run.folder / name)
    words = ("--prompt", PROMPT, "--steps", 2)
    ours = draw(cli, tmp_path / "a.png", "--run", folder, "--model", f"tiny-{run.family}", *words)
    assert_equal_pictures(ours, draw(cli, tmp_path / "b.png", "--run", run.folder, *words))
    answer = cli("infer", "draw", "--run", folder, *words)
    assert answer.status == 1
    assert "an export without its run's config.json, which names the model; say --model" in (
        answer.err
    )


def test_a_student_of_another_kind_of_model_is_refused_in_a_line(run, cli):
    other = {"sd": "tiny-xl", "xl": "tiny-sd"}[run.family]
    answer = cli("infer", "draw", "--run", run.folder, "--model", other, "--prompt", PROMPT)
    assert answer.status == 1
    last = answer.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert ("is no student of" if run.kind == "full" else "is of another model than") in last


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-xl"])
def test_a_model_is_drawn_with_guidance_by_its_own_scheduler(cli, repo, tmp_path, name):
    words = ("--prompt", PROMPT, "--negative-prompt", "red", "--steps", 3, "--seed", 5)
    ours = draw(cli, tmp_path / "a.png", "--model", name, *words)
    pipe = stock(repo / "data" / name)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "seed": 5}
    assert_equal_pictures(ours, drawn_by(pipe, negative_prompt="red", **options))
    assert np.abs(ours - drawn_by(pipe, **options)).mean() > 1


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-xl"])
def test_layers_of_the_text_encoders_are_left_out(cli, repo, tmp_path, name):
    """As stock diffusers counts them; that of SD looks for the last norm where it no longer is."""
    words = ("--model", name, "--prompt", PROMPT, "--steps", 2)
    ours = draw(cli, tmp_path / "a.png", *words, "--clip-skip", 1)
    assert np.abs(ours - draw(cli, tmp_path / "b.png", *words)).mean() > 0.5
    pipe = stock(repo / "data" / name)
    if name == "tiny-sd":
        vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
    wanted = drawn_by(pipe, num_inference_steps=2, guidance_scale=3.0, clip_skip=1)
    assert_equal_pictures(ours, wanted)


@pytest.mark.parametrize(
    ("typed", "kind", "guidance", "steps"),
    [
        ("lcm", LCMScheduler, 1.0, 4),
        ("TCDScheduler", TCDScheduler, 1.0, 4),
        ("euler-ancestral", EulerAncestralDiscreteScheduler, 3.0, 50),
    ],
)
def test_another_scheduler_of_diffusers(cli, repo, tmp_path, typed, kind, guidance, steps):
    """LCM's and TCD's draw as for a few-step student, which a LoRA from elsewhere may make."""
    more = () if steps == 4 else ("--steps", 3)
    ours = draw(
        cli, tmp_path / "a.png", "--model", "tiny-sd", "--prompt", PROMPT, "--scheduler", typed,
        *more,
    )  # fmt: skip
    pipe = stock(repo / "data/tiny-sd")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    wanted = drawn_by(pipe, num_inference_steps=4 if steps == 4 else 3, guidance_scale=guidance)
    assert_equal_pictures(ours, wanted)


def test_a_lora_run_makes_a_few_step_model_of_a_base(cli, tiny_cache, tiny_sd, tmp_path):
    """`--model M --lora RUN` is drawn as `--run RUN` is, at the scale that is given."""
    run = make_run(tmp_path / "run", tiny_cache, tiny_sd, "sd", "lora", report_to=())
    words = ("--prompt", PROMPT)
    ours = draw(cli, tmp_path / "a.png", "--model", "tiny-sd", "--lora", run.folder, *words)
    assert_equal_pictures(ours, draw(cli, tmp_path / "b.png", "--run", run.folder, *words))
    half = draw(
        cli, tmp_path / "c.png", "--model", "tiny-sd", "--lora", f"{run.folder}:0.5", *words
    )
    pipe = student_of(run)
    pipe.set_adapters(pipe.get_active_adapters(), [0.5])
    assert_equal_pictures(half, drawn_by(pipe, num_inference_steps=4, guidance_scale=1.0))


def test_half_precision_draws_nearly_the_same(cli, tmp_path):
    words = ("--model", "tiny-sd", "--prompt", PROMPT, "--steps", 2)
    whole = draw(cli, tmp_path / "a.png", *words)
    for dtype in ("float16", "bfloat16"):
        half = draw(cli, tmp_path / f"{dtype}.png", "--dtype", dtype, *words)
        assert 0 < np.abs(half - whole).mean() < 4


def test_a_single_file_is_a_model_too(cli, repo, tmp_path):
    """As `infer merge` writes it, and people download it."""
    style = write_style(repo / "data/tiny-sd", tmp_path / "ink.safetensors")
    file = tmp_path / "one.safetensors"
    answer = cli(
        "infer", "merge", style, "--model", "tiny-sd", "--form", "single-file", "--output", file
    )
    assert answer.status == 0, answer.err
    (tmp_path / "one").symlink_to(repo / "data/tiny-sd")  # its configuration, beside it
    words = ("--prompt", PROMPT, "--steps", 2)
    ours = draw(cli, tmp_path / "a.png", "--model", file, *words)
    mixed = draw(cli, tmp_path / "b.png", "--model", "tiny-sd", "--lora", style, *words)
    assert_equal_pictures(ours, mixed)


def test_ddim_is_what_a_plain_model_is_drawn_by(cli, repo, tmp_path):
    """The first line says how; 50 steps unless given."""
    answer = cli("infer", "draw", "--model", "tiny-sd", "--prompt", PROMPT,
                 "--output", tmp_path / "a.png")  # fmt: skip
    assert answer.status == 0
    said = answer.err.splitlines()
    assert said[0] == (
        "draw 1 picture of 64x64 px: tiny-sd, 50 steps of DDIMScheduler, guidance_scale 3 "
        f"(classifier-free), float32 on cpu, into {tmp_path / 'a.png'}"
    )
    assert said[1].startswith("this takes about ")
    assert isinstance(stock(repo / "data/tiny-sd").scheduler, DDIMScheduler)
    assert answer.out == f"{tmp_path / 'a.png'}\n"
