"""`--teacher-lora`: what it loads is what diffusers loads, and what cannot be is one line."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from prep.config import TeachConfig
from shared.cli.config import parse
from shared.errors import UsageError, UserError
from shared.models.fingerprint import signs
from shared.networks.styled import load_teacher
from shared.style import join_scale, marks, open_styles, split_scale
from tests.support.students import build, make_batch, stock_unet
from tests.support.styles import style_unet, write_style
from train.config import DistillConfig

PIPELINES = {"tiny_sd": StableDiffusionPipeline, "tiny_xl": StableDiffusionXLPipeline}


def output(unet, batch):
    added = None
    if batch.pooled_prompt_embeds is not None:
        added = {"text_embeds": batch.pooled_prompt_embeds.float(), "time_ids": batch.time_ids}
    t = torch.tensor([999, 499, 19])
    with torch.no_grad():
        return unet(batch.latents, t, batch.prompt_embeds.float(), added_cond_kwargs=added).sample


@pytest.mark.parametrize(
    ("name", "form", "scale"),
    [("tiny_sd", "diffusers", 1.0), ("tiny_sd", "kohya", 0.7), ("tiny_xl", "diffusers", -0.4)],
)
def test_the_teacher_wears_what_diffusers_loads(request, tmp_path, name, form, scale):
    model = request.getfixturevalue(name)
    path = write_style(model, tmp_path / "a.safetensors", form)
    stock = PIPELINES[name].from_pretrained(model, dtype=torch.float32)
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    stock.set_adapters(stock.get_active_adapters(), [scale])
    worn = load_teacher(str(model), open_styles([f"{path}:{scale}"]))
    batch, _ = make_batch(stock.unet)
    bare = output(stock_unet(model), batch)
    wanted = output(stock.unet, batch)
    torch.testing.assert_close(output(worn, batch), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - bare).abs().max() > 0.05
    assert not any(weight.requires_grad for weight in worn.parameters())
    assert signs(worn.parameters()) != signs(stock_unet(model).parameters())


def test_several_add_up(tiny_sd, tmp_path):
    paths = [write_style(tiny_sd, tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2)]
    worn = load_teacher(str(tiny_sd), open_styles([f"{paths[0]}:0.5", str(paths[1])]))
    bare = stock_unet(tiny_sd).state_dict()
    wanted = dict(bare)
    for seed, scale in ((1, 0.5), (2, 1.0)):
        unet = style_unet(tiny_sd, seed)
        unet.fuse_lora(lora_scale=scale)
        unet.unload_lora()
        for layer, weight in unet.state_dict().items():
            wanted[layer] = wanted[layer] + weight - bare[layer]
    for layer, weight in worn.state_dict().items():
        torch.testing.assert_close(weight, wanted[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["lcd", "tcd", "dmd"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_student_begins_as_the_styled_teacher(tiny_sd, tmp_path, kind, objective):
    path = write_style(tiny_sd, tmp_path / "a.safetensors")
    student = build(tiny_sd, kind, objective=objective, teacher_lora=(f"{path}:0.8",))
    worn = load_teacher(str(tiny_sd), open_styles([f"{path}:0.8"]))
    batch, empty = make_batch(worn)
    t = torch.tensor([999, 499, 19])
    with torch.no_grad():
        found = student.student(batch.latents, t, batch)
        cond, _ = student.teacher(batch.latents, t, batch, empty)
    for one in (found, cond):
        torch.testing.assert_close(one, output(worn, batch), rtol=1e-4, atol=1e-4)
    assert student.origin() == {"teacher": signs(worn.parameters())}


def test_a_scale_with_which_it_overflows_is_refused(tmp_path, tiny_sd):
    path = write_style(tiny_sd, tmp_path / "ink.safetensors")
    with pytest.raises(UserError, match=r"ink\.safetensors overflows at scale 1e\+39"):
        load_teacher(str(tiny_sd), open_styles([f"{path}:1e39"]))


def test_the_scale_is_what_stands_behind_the_last_colon(tmp_path):
    odd = tmp_path / "a:0.5"
    assert split_scale(f"{odd}") == (f"{tmp_path}/a", 0.5)
    odd.touch()
    assert split_scale(f"{odd}") == (f"{odd}", 1.0)  # a file of this name
    assert split_scale(f"{odd}:2") == (f"{odd}", 2.0)
    assert split_scale("style.safetensors:-1e-1") == ("style.safetensors", -0.1)
    assert split_scale("C:style.safetensors") == ("C:style.safetensors", 1.0)
    for file, scale in ((f"{odd}", 1.0), ("b", 1.0), ("b", 0.1), ("C:x", 0.3)):
        assert split_scale(join_scale(file, scale)) == (file, scale)
    for text in ("a:0", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="cannot be"):
            split_scale(text)


@pytest.mark.parametrize("kind", [DistillConfig, TeachConfig])
def test_it_is_given_once_for_each_or_several_at_once(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STYLES", "styles")
    file = tmp_path / "x.toml"
    file.write_text('teacher_lora = ["stored:0.5"]\n')
    flag = "--teacher-lora"
    for words, wanted in [
        ([], ()),
        ([flag, "a:0.5", "--seed", "3", "--teacher_lora", "b"], ("a:0.5", "b")),
        ([f"{flag}=a", f"{flag}=b:2"], ("a", "b:2.0")),
        ([flag, "a", "b", "--seed", "3"], ("a", "b")),
        ([flag, "$STYLES/a:0.50"], ("styles/a:0.5",)),
        (["--config", str(file)], ("stored:0.5",)),
        (["--config", str(file), flag, "a"], ("a",)),
    ]:
        assert parse(kind, words, "prog").teacher_lora == wanted
    for text, said in (("s3://b/a", "is a URL"), ("", "is empty"), ("a:0", "cannot be")):
        with pytest.raises(UsageError, match=f"--teacher-lora .*{said}"):
            parse(kind, [flag, text], "prog")


def test_files_that_cannot_be_worn(tiny_sd, tiny_xl, tmp_path, capsys):
    good = write_style(tiny_sd, tmp_path / "a.safetensors")
    write_style(tiny_xl, tmp_path / "xl.safetensors")
    tensors = load_file(good)
    save_file({"x": torch.ones(2)}, tmp_path / "no.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "pickle.bin").write_bytes(b"x")
    dora = {"unet.conv_in.dora_scale": torch.ones(1)}
    save_file(tensors | dora, tmp_path / "dora.safetensors")
    nan = {name: tensor * float("nan") for name, tensor in tensors.items()}
    save_file(nan, tmp_path / "nan.safetensors")
    for name, said in [
        ("gone.safetensors", "there is no such file"), (".", "is a folder"),
        ("pickle.bin", "no .safetensors file"), ("xl.safetensors", "is of another model"),
        ("no.safetensors", "no LoRA"), ("cut.safetensors", "is damaged"),
        ("dora.safetensors", "of a DoRA"), ("nan.safetensors", "not finite"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said) as error:
            load_teacher(str(tiny_sd), open_styles([str(tmp_path / name)]))
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)
    assert capsys.readouterr().err == ""


def test_text_encoders_parts_are_left_out_with_a_note(tiny_sd, tmp_path, capsys):
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    more = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.alpha": torch.tensor(2.0),
            f"{layer}.lora_up.weight": torch.ones(8, 2)}  # fmt: skip
    path = write_style(tiny_sd, tmp_path / "both.safetensors", "kohya", **more)
    same = load_teacher(str(tiny_sd), open_styles([str(path)])).state_dict()
    for _ in range(2):  # said once
        load_teacher(str(tiny_sd), open_styles([str(path)]))
    assert capsys.readouterr().err.count("text encoders") == 1
    alone = write_style(tiny_sd, tmp_path / "one.safetensors", "kohya")
    wanted = load_teacher(str(tiny_sd), open_styles([str(alone)])).state_dict()
    assert all(torch.equal(same[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize("objective", ["denoise", "lcf"])
def test_what_has_no_teacher_takes_none(cli, tmp_path, tiny_sd, tiny_cache, objective):
    path = write_style(tiny_sd, tmp_path / "a.safetensors")
    answer = cli("train", "distill", "--model", tiny_sd, "--cache", tiny_cache, "--run",
                 tmp_path / "run", "--objective", objective, "--teacher-lora", path)  # fmt: skip
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith("error: --teacher-lora is for --objective lcd")
    assert not (tmp_path / "run").exists()


def test_marks_tell_contents_not_places(tiny_sd, tmp_path):
    path = write_style(tiny_sd, tmp_path / "a.safetensors")
    other = shutil.copy(path, tmp_path / "b.safetensors")
    same = [marks(open_styles([f"{one}:0.5"])) for one in (path, other)]
    assert same[0] == same[1]
    assert marks(open_styles([str(path)])) != same[0]
