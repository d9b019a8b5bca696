"""Runs whose teacher wears a LoRA: exported with its style, resumed with the same, or refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prep.config import TeachConfig
from prep.teach.command import teach
from shared.cache.answers import AnswersIdentity
from shared.cache.answers_store import open_answers
from shared.cache.manifest import open_manifest
from shared.errors import UserError
from shared.models.lora_files import read_lora
from shared.networks.styled import load_teacher
from shared.style import open_styles
from tests.support.answers import an_answers_identity
from tests.support.exports import (
    Run,
    assert_same_picture,
    draw_ours,
    draw_stock,
    make_run,
)
from tests.support.runs import tensors, train
from tests.support.students import stock_unet
from tests.support.styles import RANK as STYLE_RANK
from tests.support.styles import write_style
from train.config import DistillConfig, SampleConfig
from train.evaluation.artist import open_artist
from train.evaluation.heldout import load_heldout
from train.export.kohya import KOHYA_FILE
from train.export.weights import LORA_FILE
from train.state.run_config import run_config
from train.trainer.setup import prepare

SCALE = 0.5


@pytest.fixture(scope="module")
def style(tmp_path_factory, tiny_sd) -> Path:
    return write_style(tiny_sd, tmp_path_factory.mktemp("styles") / "ink.safetensors")


@pytest.fixture(scope="module")
def styled(tmp_path_factory, tiny_sd, tiny_cache, style) -> Run:
    """A LoRA student of five steps whose teacher wears the style; alpha is not its rank."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    worn = (f"{style}:{SCALE}",)
    return make_run(folder, tiny_cache, tiny_sd, "sd", "lora", teacher_lora=worn, report_to=())


def adapters(run: Run) -> dict[str, torch.Tensor]:
    """The student's own, as the last checkpoint has them."""
    last = sorted((run.folder / "checkpoints").iterdir())[-1]
    return load_file(last / "networks.safetensors")


@pytest.mark.parametrize("file", [LORA_FILE, pytest.param(KOHYA_FILE, marks=pytest.mark.slow)])
def test_stock_diffusers_draws_style_and_student_from_one_file(cli, styled, style, tmp_path, file):
    pipe = styled.load()
    pipe.load_lora_weights(styled.folder, weight_name=file)
    theirs = draw_stock(pipe, styled)
    assert_same_picture(theirs, draw_ours(cli, styled, tmp_path, "--steps", 4))
    # And that is the student on the teacher that it was trained with.
    unet = load_teacher(str(styled.model), open_styles([f"{style}:{SCALE}"]))
    state = adapters(styled)
    for name, down in state.items():
        if ".lora_A." in name:
            up = state[name.replace("lora_A", "lora_B")]
            layer = unet.get_submodule(name.partition(".lora_A.")[0])
            product = up.flatten(1) @ down.flatten(1) * (6.0 / len(down))
            layer.weight.data += product.reshape(layer.weight.shape)
    assert_same_picture(theirs, draw_stock(styled.load(unet), styled))
    assert np.abs(theirs - draw_stock(styled.load(), styled)).mean() > 3


def test_ranks_stand_side_by_side_and_the_card_says_whose(styled, style, tiny_sd):
    stored = load_file(styled.folder / LORA_FILE)
    ranks = {name: len(tensor) for name, tensor in stored.items() if ".lora_A." in name}
    assert "unet.conv_in.lora_A.weight" in ranks  # which the student itself does not adapt
    assert set(ranks.values()) == {4 + STYLE_RANK}  # filled up with zeros
    unet = stock_unet(tiny_sd)
    both = [read_lora(styled.folder / name, unet.config) for name in (LORA_FILE, KOHYA_FILE)]
    assert both[0].keys() == both[1].keys()
    for name, tensor in both[0].items():
        torch.testing.assert_close(tensor, both[1][name], rtol=0, atol=1e-6)
    card = (styled.folder / "README.md").read_text()
    sha256 = run_config(styled.folder).teacher_lora_sha256[0]
    assert f"The teacher wore `ink.safetensors` at 0.5 ({sha256[:16]})" in card


def test_an_evaluation_compares_with_the_styled_teacher(styled, style, tiny_sd):
    heldout = load_heldout(styled.cache, open_manifest(styled.cache), 65)
    artist = open_artist(styled.folder, SampleConfig(threads=1, device="cpu"))
    found = artist.with_teacher(heldout.empty).teacher.state_dict()
    wanted = load_teacher(str(tiny_sd), open_styles([f"{style}:{SCALE}"])).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def settings(model, cache, run, style, **more) -> DistillConfig:
    flags = {
        "train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 2, "lora_rank": 2,
        "validation_steps": 0, "report_to": (), "threads": 1, "logging_steps": 1,
        "learning_rate": 1e-2,
    } | more  # fmt: skip
    worn = () if style is None else (f"{style}:{SCALE}",)
    return DistillConfig(model=str(model), cache=cache, run=run, teacher_lora=worn, **flags)


def test_a_run_goes_on_with_the_same_style_and_no_other(tiny_sd, tiny_cache, tmp_path, style):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(settings(tiny_sd, tiny_cache, straight, style))
    train(settings(tiny_sd, tiny_cache, broken, style, max_train_steps=2))
    more = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    weaker = settings(tiny_sd, tiny_cache, broken, None, **more)
    for worn in ((), (f"{style}:0.25",), (f"{style}:{SCALE}", str(style))):
        config = DistillConfig(**vars(weaker) | {"teacher_lora": worn})
        with pytest.raises(UserError, match=r"teacher_lora is .* there, .* here"):
            prepare(config)
    moved = shutil.copy(style, tmp_path / "elsewhere.safetensors")
    train(settings(tiny_sd, tiny_cache, broken, moved, **more))
    ends = tensors(straight, 4), tensors(broken, 4)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert len(run_config(broken).teacher_lora_sha256[0]) == 64


def test_the_same_command_knows_the_style_by_its_content(cli, styled, style, tmp_path, monkeypatch):
    """A finished run says so from anywhere; another file of the name is another style."""
    run = Path(shutil.copytree(styled.folder, tmp_path / "run"))
    worn = Path(shutil.copy(style, tmp_path / "ink.safetensors"))
    stored = json.loads((run / "config.json").read_text())
    usual = {"ema_decay": 0.95, "guidance_init": "zero", "unet_time_cond_proj_dim": 256}
    (run / "config.json").write_text(json.dumps(stored | usual))  # no flags of a LoRA's
    words = [
        word
        for name in (
            "train_batch_size",
            "max_train_steps",
            "lora_rank",
            "lora_alpha",
            "learning_rate",
        )
        for word in ("--" + name, stored[name])
    ]
    words = ["distill", "--model", styled.model, "--cache", styled.cache, "--run", run, *words,
             "--validation-steps", 0, "--report-to", "none", "--threads", 1]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    answer = cli("train", *words, "--teacher-lora", f"{worn.name}:{SCALE}")
    assert answer.status == 0, answer.err
    assert "is finished" in answer.out
    answer = cli("train", *words, "--teacher-lora", worn.name)
    assert answer.status == 1
    assert "teacher_lora is" in answer.err.splitlines()[-1]


def test_a_file_that_changed_is_not_taken_for_the_style(styled, tiny_sd, tmp_path, cli):
    run = Path(shutil.copytree(styled.folder, tmp_path / "run"))
    other = write_style(tiny_sd, tmp_path / "other.safetensors", seed=9)
    stored = json.loads((run / "config.json").read_text())
    stored["teacher_lora"] = [f"{other}:{SCALE}"]
    (run / "config.json").write_text(json.dumps(stored))
    answer = cli("train", "export", "--run", run, "--output", tmp_path / "out")
    assert answer.status == 1
    assert "is another file than the run began with" in answer.err
    assert answer.err.count("\n") == 1


def test_a_styled_student_goes_on_without_wearing_its_style_twice(styled, style, tiny_sd, tmp_path):
    more = {"init_student": styled.folder, "lora_rank": 4, "lora_alpha": 6.0}
    run = prepare(settings(tiny_sd, styled.cache, tmp_path / "a", style, **more, dry_run=True))
    state = adapters(styled)
    found = run.student.state()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    config = settings(tiny_sd, styled.cache, tmp_path / "b", None, **more, dry_run=True)
    with pytest.raises(UserError, match=r"--init-student .* wore .*; give the same"):
        prepare(DistillConfig(**vars(config) | {"teacher_lora": (str(style),)}))


def test_answers_are_of_a_teacher_and_what_it_wears(tiny_sd, tiny_cache, tmp_path, style):
    cache = Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
    flags = {"cache": cache, "model": str(tiny_sd), "threads": 1, "answers": 1}
    worn = (f"{style}:{SCALE}",)
    teach(TeachConfig(teacher_lora=worn, **flags))
    identity = open_answers(cache).identity
    assert [(one.file, one.scale) for one in identity.styles] == [(str(style), SCALE)]
    teach(TeachConfig(teacher_lora=worn, **flags))  # nothing to ask
    with pytest.raises(UserError, match=r"wears ink.safetensors at 0.5 .*wears no LoRA"):
        teach(TeachConfig(**flags))
    config = settings(tiny_sd, cache, tmp_path / "run", style, dry_run=True)
    assert prepare(config).config.teacher == "cached"
    plain = settings(tiny_sd, cache, tmp_path / "run", None, dry_run=True)
    for other in (plain, DistillConfig(**vars(plain) | {"teacher_lora": (str(style),)})):
        with pytest.raises(UserError, match=r"give --teacher-lora .*:0.5, or --teacher online"):
            prepare(other)
    online = DistillConfig(**vars(plain) | {"teacher": "online"})
    assert prepare(online).config.teacher == "online"


def test_answers_of_before_are_as_they_were(tiny_cache, style):
    plain = an_answers_identity(tiny_cache)
    assert "styles" not in plain.to_json()
    assert AnswersIdentity.from_json(plain.to_json()) == plain
    assert plain.compared() == {**plain.to_json(), "model": None}
    worn = an_answers_identity(tiny_cache, styles=open_styles([str(style)]))
    assert AnswersIdentity.from_json(json.loads(json.dumps(worn.to_json()))) == worn
    assert worn.compared() != plain.compared()
