"""`--init-student`: a run begins where another student ended, whatever file that comes in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tests.support.exports import make_run
from tests.support.runs import tensors, train
from tests.support.students import build, disturb, make_batch, stock_unet
from train.config import DistillConfig
from train.export.weights import exported_student, folded_adapter
from train.networks.build import build_student
from train.state.checkpoint import latest_checkpoint, read_progress
from train.trainer.init_student import begin
from train.trainer.resume import as_left, finished_message
from train.trainer.setup import prepare

FAMILIES = {"sd": ("tiny_cache", "tiny_sd"), "xl": ("tiny_xl_cache", "tiny_xl")}
WIDTH = 32  # of their guidance embedding
LORA, KOHYA = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """Finished LCD runs: `made("sd", "lora")`. LoRA: rank 4, alpha 6."""
    runs = {}

    def run(family: str, kind: str):
        if (family, kind) not in runs:
            cache, model = map(request.getfixturevalue, FAMILIES[family])
            folder = tmp_path_factory.mktemp(f"{family}-{kind}") / "lcd-run"
            runs[family, kind] = make_run(folder, cache, model, family, kind, report_to=())
        return runs[family, kind]

    return run


def settings(run, folder, **more) -> DistillConfig:
    flags = {
        "model": str(run.model), "cache": run.cache, "run": folder, "student": run.kind,
        "objective": "lcf", "init_student": run.folder, "train_batch_size": 2, "threads": 1,
        "max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 0, "report_to": (),
        "logging_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    flags |= {"unet_time_cond_proj_dim": WIDTH} if run.kind == "full" else {"lora_rank": 4}
    return DistillConfig(**flags | more)


def begun(model, init, kind="lora", **more):
    """A student of this model that begins with what lies at `init`."""
    more = {"objective": "lcf", "run": init.parent / "nothing", "init_student": init,
            "unet_time_cond_proj_dim": WIDTH} | more  # fmt: skip
    config = DistillConfig(str(model), cache=None, student=kind, **more)
    student = build_student(str(model), config)
    return student, begin(student, config, None)


# ---- What is read.


@pytest.mark.parametrize("file", ["", LORA, KOHYA])
@pytest.mark.parametrize(
    ("family", "rank", "alpha"),
    [("sd", 4, None), pytest.param("xl", 6, 9.0, marks=pytest.mark.slow)],
)
def test_a_lora_goes_on_from_each_of_its_files(made, family, rank, alpha, file):
    """What is added to each layer is the same, at another rank and alpha as well."""
    run = made(family, "lora")
    student, fingerprint = begun(run.model, run.folder / file, lora_rank=rank, lora_alpha=alpha)
    wanted, found = load_file(run.folder / LORA), folded_adapter(student.unet)
    assert {f"unet.{name}" for name in found} == set(wanted)
    for name in (name for name in found if name.endswith("lora_A.weight")):
        up = name.replace("lora_A", "lora_B")
        assert torch.equal(found[name][:4], wanted[f"unet.{name}"])
        torch.testing.assert_close(found[up][:, :4], wanted[f"unet.{up}"], rtol=1e-6, atol=1e-9)
        assert not found[up][:, 4:].any()
    assert fingerprint == exported_student(run.folder, "lora")
    assert all(p.requires_grad for p in student.trainable().values())


@pytest.mark.parametrize("family", ["sd", pytest.param("xl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", ["lcf", "pcm"])
def test_a_full_student_goes_on_with_its_guidance_input(made, family, objective):
    run = made(family, "full")
    student, fingerprint = begun(run.model, run.folder, "full", objective=objective)
    stored = load_file(run.folder / "unet/diffusion_pytorch_model.safetensors")
    assert stored["time_embedding.cond_proj.weight"].any()
    for unet in (student.unet, student.target_unet):
        assert all(torch.equal(stored[n], t) for n, t in unet.state_dict().items())
    assert fingerprint == exported_student(run.folder, "full")
    half, _ = begun(run.model, run.folder / "unet", "full", objective=objective, offload_ema=True,
                    mixed_precision="bf16")  # fmt: skip
    assert all(torch.equal(stored[n], t) for n, t in half.average.weights.items())


def test_an_ordinary_unet_leaves_the_guidance_input_as_it_starts(tiny_sd, tmp_path):
    unet = stock_unet(tiny_sd)
    disturb(unet.parameters())
    unet.save_pretrained(tmp_path / "mine")
    for objective in ("lcd", "denoise"):
        student, _ = begun(tiny_sd, tmp_path / "mine", "full", objective=objective)
        found = student.unet.state_dict()
        assert all(torch.equal(found[n], t) for n, t in unet.state_dict().items())
        extra = found.keys() - unet.state_dict().keys()
        assert extra == ({"time_embedding.cond_proj.weight"} if objective == "lcd" else set())
        assert not any(found[name].any() for name in extra)


@pytest.mark.parametrize(
    "form", ["metadata", pytest.param("plain", marks=pytest.mark.slow), "old", "fp16"]
)
def test_a_lora_of_diffusers_is_what_diffusers_draws_with_it(tiny_sd, tmp_path, form):
    """Another's: attention alone, alpha twice the rank where metadata say so."""
    unet = stock_unet(tiny_sd)
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_out.0"]))
    disturb(p for p in unet.parameters() if p.requires_grad)
    layers = get_peft_model_state_dict(unet)
    if form == "fp16":
        layers = {name: tensor.half() for name, tensor in layers.items()}
    if form == "old":
        names = {"lora_A": "lora.down", "lora_B": "lora.up"}
        renamed = {f"unet.{k}": v.contiguous() for k, v in layers.items()}
        for ours, theirs in names.items():
            renamed = {k.replace(ours, theirs): v for k, v in renamed.items()}
        save_file(renamed, tmp_path / LORA)
    else:
        metadata = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
        more = metadata if form == "metadata" else {}
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **more)
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd, dtype=torch.float32)
    stock.load_lora_weights(tmp_path, weight_name=LORA)

    student, _ = begun(tiny_sd, tmp_path, lora_rank=8, lora_alpha=2.0)
    batch, _ = make_batch(stock_unet(tiny_sd))
    t = torch.tensor([999, 499, 19])
    ours = student.target(batch.latents, t, batch)
    with torch.no_grad():
        theirs = stock.unet(batch.latents, t, batch.prompt_embeds.float()).sample
        bare = stock_unet(tiny_sd)(batch.latents, t, batch.prompt_embeds.float()).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - bare).abs().max() > 0.1


def test_text_encoders_adapters_are_left_out_with_a_note(made, tmp_path, capsys):
    run = made("sd", "lora")
    kohya = load_file(run.folder / KOHYA)
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    parts = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    more = {f"{text}.{name}": tensor for name, tensor in parts.items()}
    more[f"{text}.alpha"] = torch.tensor(2.0)
    save_file(kohya | more, tmp_path / "both.safetensors")
    _, fingerprint = begun(run.model, tmp_path / "both.safetensors", lora_rank=4)
    assert fingerprint == exported_student(run.folder, "lora")
    assert "both.safetensors adapts text encoders too" in capsys.readouterr().err


# ---- What is refused.


def refused(says, *given, **more):
    with pytest.raises(UserError, match=says) as error:
        begun(*given, **more)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused_in_one_line(made, tiny_sd, tiny_xl, tmp_path):
    lora, full = made("sd", "lora").folder, made("sd", "full").folder
    refused("is a LoRA; go on with it by --student lora", tiny_sd, lora, "full")
    refused("is a whole UNet; go on with it by --student full", tiny_sd, full)
    refused("is a whole UNet", tiny_sd, tiny_sd / "unet")
    refused("has rank 4; give --lora-rank 4, or more", tiny_sd, lora, lora_rank=2)
    refused("adapts .*, which this student does not; give --lora-target-modules", tiny_sd, lora,
            lora_rank=4, lora_target_modules="to_q")  # fmt: skip
    refused("is of another model", tiny_xl, lora)
    refused("wants --unet-time-cond-proj-dim 32", tiny_sd, full, "full", unet_time_cond_proj_dim=16)
    refused("is told its guidance, for which", tiny_sd, full, "full", objective="denoise")
    refused("is of another model: its ", tiny_xl, full, "full")
    refused("there is no such file; give a run, ", tiny_sd, tmp_path / "gone")
    (tmp_path / "checkpoints").mkdir()
    refused("has no exported student yet; `python -m train export --run", tiny_sd, tmp_path)
    (tmp_path / "checkpoints").rmdir()
    refused("holds no student: neither a LoRA nor a UNet", tiny_sd, tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    refused("is a pickle, which can run code; give it as .safetensors", tiny_sd, tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {"other.weight": torch.ones(2)}, "holds no LoRA of a UNet; give another file"),
        (lambda t: dict(list(t.items())[1:]), "has no pair of matrices of one rank"),
        (lambda t: {n: v * float("nan") for n, v in t.items()}, "numbers that are not finite"),
        (lambda t: t | {"unet.conv_in.weight": torch.ones(2)}, "holds conv_in.weight, which is no"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_lora(made, tmp_path, change, says):
    run = made("sd", "lora")
    file = tmp_path / "mine.safetensors"
    save_file(change(load_file(run.folder / LORA)), file)
    refused(says, run.model, file, lora_rank=4)
    file.write_bytes(b"nothing")
    refused("is damaged", run.model, file, lora_rank=4)


# ---- Runs.


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_says_what_it_began_with_and_goes_on_without_it(made, kind, tmp_path, capsys):
    run = made("sd", kind)
    source = shutil.copytree(run.folder, tmp_path / "lcd-run")
    whole = settings(run, tmp_path / "whole", init_student=source)
    train(whole)
    assert f"from {source}" in capsys.readouterr().err
    fingerprint = exported_student(source, kind)
    stored = json.loads((whole.run / "config.json").read_text())
    assert (stored["init_student"], stored["init_fingerprint"]) == (str(source), fingerprint)
    assert f", started from `lcd-run` ({fingerprint})." in (whole.run / "README.md").read_text()
    assert read_progress(latest_checkpoint(whole.run)).terms["init_student"] == fingerprint

    halves = settings(run, tmp_path / "halves", init_student=source)
    train(replace(halves, max_train_steps=2))
    latest = {"resume_from_checkpoint": "latest"}
    taught = "began with another student's weights; give --init-student"
    other = {"lora": "is a whole UNet; go on with it by --student full", "full": "init_student is "}
    for init, says in ((None, f"{taught} {source}"), (run.model, other[kind])):
        with pytest.raises(UserError, match=says):
            prepare(replace(halves, **latest, init_student=init))
    again = replace(halves, **latest, init_student=run.folder)  # the same weights, elsewhere
    assert prepare(replace(again, dry_run=True)).step == 2
    shutil.rmtree(source)
    train(replace(halves, **latest))
    first, second = (tensors(tmp_path / name, 4) for name in ("whole", "halves"))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    plain = settings(run, tmp_path / "plain", init_student=None, max_train_steps=1)
    train(plain)
    more = replace(plain, max_train_steps=2, init_student=run.folder, **latest)
    with pytest.raises(UserError, match="began with the teacher's; leave --init-student out"):
        prepare(more)


def test_the_same_command_goes_on_however_the_path_was_typed(made, tmp_path, monkeypatch):
    run = made("sd", "lora")
    monkeypatch.chdir(run.folder.parent)
    more = {"init_student": Path("lcd-run"), "max_train_steps": 1, "mixed_precision": "no"}
    config = settings(run, tmp_path / "run", **more)
    train(config)
    stored = json.loads((config.run / "config.json").read_text())
    assert stored["init_student"] == str(run.folder)  # from wherever the run is opened
    assert "is finished" in finished_message(config)
    assert as_left(config).resume_from_checkpoint == "latest"
    with pytest.raises(UserError, match="begun with other flags: init_student is"):
        as_left(replace(config, init_student=run.model))


def test_kohyas_name_of_the_flag(cli, made, tmp_path):
    run = made("sd", "lora")
    answer = cli(
        "train", "distill", "--model", run.model, "--cache", run.cache, "--run", tmp_path / "run",
        "--objective", "tcd", "--network-weights", run.folder / KOHYA, "--network-dim", 4,
        "--train-batch-size", 2, "--threads", 1, "--validation-steps", 0, "--dry-run",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    assert f"from {run.folder / KOHYA}\n" in answer.err


def test_the_student_draws_what_it_drew_before_its_first_step(made):
    """The teacher, as ever, is the bare model."""
    run = made("sd", "lora")
    student, _ = begun(run.model, run.folder, lora_rank=4)
    batch, empty = make_batch(student.unet)
    t = torch.tensor([999, 499, 19])
    plain = build(run.model, "lora")
    found = student.teacher(batch.latents, t, batch, empty)
    for one, other in zip(found, plain.teacher(batch.latents, t, batch, empty), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        moved = student.target(batch.latents, t, batch) - plain.target(batch.latents, t, batch)
    assert moved.abs().max() > 1e-3
