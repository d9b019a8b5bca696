"""Both kinds of student on the tiny teachers: where they start, what moves, what stays."""

import json
import shutil

import pytest
import torch
from torch import nn

from tests.support.students import (
    KINDS,
    MODELS,
    build,
    disturb,
    lcd_for,
    make_batch,
    stock_unet,
)
from train.data.batch import Batch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def model(request):
    return request.getfixturevalue(request.param)


def call_stock(unet, z, t, batch: Batch) -> torch.Tensor:
    added = None
    if batch.time_ids is not None:
        pooled = batch.pooled_prompt_embeds.float()
        added = {"text_embeds": pooled, "time_ids": batch.time_ids.float()}
    with torch.no_grad():
        return unet(z, t, batch.prompt_embeds.float(), added_cond_kwargs=added).sample


@pytest.mark.parametrize("kind", KINDS)
def test_at_step_0_the_student_is_the_teacher(model, kind):
    student, stock = build(model, kind), stock_unet(model)
    batch, empty = make_batch(stock)
    t = torch.tensor([999, 419, 19])
    wanted = call_stock(stock, batch.latents, t, batch)
    assert wanted.std() > 0.01
    for role in (student.student, student.target):
        with torch.no_grad():
            torch.testing.assert_close(role(batch.latents, t, batch), wanted, rtol=1e-5, atol=1e-5)
    cond, _ = student.teacher(batch.latents, t, batch, empty)
    torch.testing.assert_close(cond, wanted, rtol=1e-5, atol=1e-5)


def test_random_guidance_init_is_not_the_teacher(tiny_sd):
    student = build(tiny_sd, "full", guidance_init="random")
    batch, empty = make_batch(student.unet)
    t = torch.tensor([999, 419, 19])
    with torch.no_grad():
        mine, aim = (role(batch.latents, t, batch) for role in (student.student, student.target))
    cond, _ = student.teacher(batch.latents, t, batch, empty)
    assert (mine - cond).abs().max() > 1e-3
    torch.testing.assert_close(mine, aim)  # the target starts as the student, whatever the init


@pytest.mark.parametrize("kind", KINDS)
def test_the_guidance_reaches_only_the_full_student(tiny_sd, kind):
    student = build(tiny_sd, kind)
    disturb(student.trainable().values(), scale=0.05)
    batch, _ = make_batch(student.unet)
    other = Batch(**{**vars(batch), "w": batch.w + 1})
    t = torch.tensor([999, 419, 19])
    with torch.no_grad():
        a, b = (student.student(batch.latents, t, told) for told in (batch, other))
    assert torch.equal(a, b) == (kind == "lora")


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_stays_the_teacher(model, kind):
    """Conditional and unconditional in one forward, untouched by what the student has learnt."""
    student, stock = build(model, kind), stock_unet(model)
    batch, empty = make_batch(stock)
    t = torch.tensor([999, 419, 19])
    disturb(student.trainable().values())
    rows = {
        "prompt_embeds": empty.prompt_embeds,
        "pooled_prompt_embeds": empty.pooled_prompt_embeds,
    }
    nothing = {name: v if v is None else v.expand(3, *v.shape[1:]) for name, v in rows.items()}
    cond, uncond = student.teacher(batch.latents, t, batch, empty)
    wanted = call_stock(stock, batch.latents, t, batch)
    torch.testing.assert_close(cond, wanted, rtol=1e-5, atol=1e-5)
    wanted = call_stock(stock, batch.latents, t, Batch(**{**vars(batch), **nothing}))
    torch.testing.assert_close(uncond, wanted, rtol=1e-5, atol=1e-5)
    assert (cond - uncond).abs().max() > 1e-4
    with torch.no_grad():
        moved = student.student(batch.latents, t, batch)
    assert (moved - cond).abs().max() > 1e-2  # and afterwards the adapters are on again


def test_adapters_off_leaves_requires_grad_alone(tiny_sd):
    student = build(tiny_sd, "lora")
    trainable = set(student.trainable())
    with student.adapters_off():
        assert set(student.trainable()) == trainable
    with pytest.raises(RuntimeError, match="in between"), student.adapters_off():
        raise RuntimeError("in between")
    disturb(student.trainable().values())
    batch, empty = make_batch(student.unet)
    t = torch.tensor([999, 419, 19])
    assert set(student.trainable()) == trainable
    cond, _ = student.teacher(batch.latents, t, batch, empty)
    assert (student.student(batch.latents, t, batch) - cond).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_everything_trainable_gets_a_gradient_in_fp32_and_nothing_else(model, kind):
    student = build(model, kind)
    disturb(student.trainable().values(), scale=0.02)
    lcd, batch, empty = lcd_for(model, student)
    loss = lcd(batch, empty, student)
    loss.backward()
    parameters = student.trainable()
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert [n for n, p in parameters.items() if p.grad is None or not p.grad.any()] == []
    assert all(("lora_" in name) == (kind == "lora") for name in parameters)
    if kind == "full":
        assert set(parameters) == set(dict(student.unet.named_parameters()))
        assert "time_embedding.cond_proj.weight" in parameters
    networks = [v for v in vars(student).values() if isinstance(v, nn.Module)]
    trained = set(map(id, parameters.values()))
    rest = [p for n in networks for p in n.parameters() if id(p) not in trained]
    assert rest
    assert not any(p.requires_grad or p.grad is not None for p in rest)


def test_lora_adapts_all_of_the_unet_but_its_ends_and_embeddings(model):
    """LCM's list is every linear and convolution of the blocks: nothing is missed by its name."""
    student, stock = build(model, "lora"), stock_unet(model)
    ends = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")
    wanted = {
        name
        for name, module in stock.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(ends)
    }
    adapted = {name.partition(".lora_")[0] for name in student.trainable()}
    assert adapted == wanted
    assert len(adapted) > 40
    assert len(student.layers) == len(wanted)
    ranks = {p.shape[0] for n, p in student.trainable().items() if ".lora_A." in n}
    assert ranks == {4}


def test_ema_moves_the_target_by_the_formula(tiny_sd):
    student = build(tiny_sd, "full", ema_decay=0.9)
    names = [name for name, _ in student.unet.named_parameters()]
    wanted = {n: p.detach().double() for n, p in student.target_unet.named_parameters()}
    assert list(wanted) == names
    for step in range(3):
        disturb(student.trainable().values(), seed=step)
        live = {n: p.detach().double() for n, p in student.unet.named_parameters()}
        wanted = {n: 0.9 * wanted[n] + 0.1 * live[n] for n in names}
        student.after_step()
        for name, parameter in student.target_unet.named_parameters():
            torch.testing.assert_close(parameter.double(), wanted[name], rtol=1e-5, atol=1e-6)
    for name, parameter in student.unet.named_parameters():
        assert torch.equal(parameter.double(), live[name])  # the student is not touched
    assert student.exported() is student.target_unet


def test_the_lora_target_is_the_student_itself(tiny_sd):
    student = build(tiny_sd, "lora")
    disturb(student.trainable().values())
    student.after_step()
    batch, _ = make_batch(student.unet)
    t = torch.tensor([999, 419, 19])
    aim = student.target(batch.latents, t, batch)
    assert not aim.requires_grad
    assert torch.equal(aim, student.student(batch.latents, t, batch).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_out_and_in_again(tiny_sd, kind):
    first, second = build(tiny_sd, kind), build(tiny_sd, kind, seed=5)
    disturb(first.trainable().values())
    first.after_step()
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    assert list(first.trainable()) == list(second.trainable())
    for network in ("unet", "target_unet"):
        if hasattr(first, network):
            pairs = zip(getattr(first, network).parameters(), getattr(second, network).parameters(),
                        strict=True)  # fmt: skip
            assert all(torch.equal(a, b) for a, b in pairs)
    if kind == "lora":  # a checkpoint of adapters does not carry the teacher along
        assert sum(v.numel() for v in first.state().values()) < 200_000


@pytest.mark.parametrize(
    ("kind", "more"), [("lora", {}), ("full", {}), ("full", {"guidance_init": "random"})]
)
def test_the_start_depends_on_the_seed_alone(tiny_sd, kind, more):
    torch.manual_seed(1)
    first = build(tiny_sd, kind, **more)
    torch.manual_seed(2)
    second = build(tiny_sd, kind, **more)
    pairs = zip(first.trainable().values(), second.trainable().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_another_seed_starts_elsewhere(tiny_sd):
    first, second = build(tiny_sd, "lora", seed=0), build(tiny_sd, "lora", seed=1)
    a, b = first.trainable(), second.trainable()
    assert all(not torch.equal(a[name], b[name]) for name in a if ".lora_A." in name)


def test_an_offloaded_average_is_the_average(tiny_sd):
    """fp32 on the CPU; the network that draws and aims holds it in half precision."""
    here = build(tiny_sd, "full", mixed_precision="bf16", ema_decay=0.9)
    away = build(tiny_sd, "full", mixed_precision="bf16", ema_decay=0.9, offload_ema=True)
    for step in range(3):
        for student in (here, away):
            disturb(student.trainable().values(), seed=step, scale=1e-3)
            student.after_step()
    wanted, found = here.state(), away.state()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    assert torch.bfloat16 in {p.dtype for p in away.drawing().parameters()}
    exported, kept = away.exported().state_dict(), here.exported().state_dict()
    for name, tensor in kept.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-6, atol=1e-7)
    batch, _ = make_batch(here.unet)
    t = torch.tensor([999, 419, 19])
    with torch.autocast("cpu", torch.bfloat16):
        both = [student.target(batch.latents, t, batch) for student in (here, away)]
    torch.testing.assert_close(*both, rtol=1e-2, atol=1e-2)
    again = build(tiny_sd, "full", mixed_precision="bf16", offload_ema=True)
    again.load_state(wanted)  # of a run without the flag
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in wanted.items())


def test_a_teacher_whose_config_says_little(tiny_sd, tmp_path):
    """Old repositories, SD 1.5's among them, leave out what was not known in their day."""
    shutil.copytree(tiny_sd / "unet", tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config.pop("time_cond_proj_dim", 0) is None
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    student = build(tmp_path, "full")
    assert student.unet.config.time_cond_proj_dim == 16
