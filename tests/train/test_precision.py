"""Precision and checkpointing change no gradient beyond rounding."""

import numpy as np
import pytest
import torch

from tests.support.students import (
    CPU,
    KINDS,
    MODELS,
    build,
    disturb,
    lcd_for,
    make_batch,
    stock_unet,
)
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.precision import speed_up


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_no_gradient(tiny_sd, kind):
    gradients = []
    for checkpointing in (False, True):
        student = build(tiny_sd, kind, gradient_checkpointing=checkpointing)
        disturb(student.trainable().values(), scale=0.02)
        lcd, batch, empty = lcd_for(tiny_sd, student)
        lcd(batch, empty, student).backward()
        gradients.append({n: p.grad for n, p in student.trainable().items()})
    assert student.unet.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_trains_with_fp32_weights(tiny_sd, kind):
    student = build(tiny_sd, kind)
    disturb(student.trainable().values(), scale=0.02)
    lcd, batch, empty = lcd_for(tiny_sd, student)
    exact = lcd(batch, empty, student).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = lcd(batch, empty, student)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() != exact
    assert loss.item() == pytest.approx(exact, rel=0.4)
    assert {p.grad.dtype for p in student.trainable().values()} == {torch.float32}


def test_gradients_of_the_adapters_are_those_of_the_weights_they_stand_for(tiny_sd):
    """W = W0 + (alpha / rank) B A: by the chain rule, from a student whose weights are merged."""
    student = build(tiny_sd, "lora", lora_alpha=2.0)
    disturb(student.trainable().values(), scale=0.05)
    merged = stock_unet(tiny_sd)
    weights, layers = dict(merged.named_parameters()), dict(student.unet.named_modules())
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    with torch.no_grad():
        for path in {n.partition(".lora_")[0] for n in student.trainable()}:
            weights[f"{path}.weight"] += layers[path].get_delta_weight("default")
    a, b = (student.trainable()[f"{name}.lora_{x}.default.weight"] for x in "AB")
    delta = layers[name].get_delta_weight("default")
    torch.testing.assert_close(delta, 0.5 * b @ a)  # alpha / rank = 2 / 4
    batch, _ = make_batch(merged)
    t = torch.tensor([999, 419, 19])
    student.student(batch.latents, t, batch).square().mean().backward()
    out = merged(batch.latents, t, batch.prompt_embeds.float()).sample
    gradient = torch.autograd.grad(out.square().mean(), weights[f"{name}.weight"])[0]
    assert gradient.abs().max() > 0
    scale = float(gradient.abs().max())
    np.testing.assert_allclose(a.grad, 0.5 * b.detach().T @ gradient, rtol=1e-3, atol=1e-3 * scale)
    np.testing.assert_allclose(b.grad, 0.5 * gradient @ a.detach().T, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_compute_what_autocast_computes(model, kind):
    """Frozen weights held in bf16 are those that autocast would cast in each forward: same bits."""
    held, plain = build(model, kind, mixed_precision="bf16"), build(model, kind)
    plain.load_state(held.state())
    batch, empty = make_batch(held.unet)
    t = torch.tensor([999, 419, 19])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        answers = [s.teacher(batch.latents, t, batch, empty) for s in (held, plain)]
        assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))
        for role in ("student", "target"):
            found = (getattr(s, role)(batch.latents, t, batch) for s in (held, plain))
            assert torch.equal(*found)
    frozen = held.teacher_unet if kind == "full" else held.unet
    halves = [p for p in frozen.parameters() if p.dtype == torch.bfloat16]
    assert sum(p.numel() for p in halves) > 0.9 * sum(
        p.numel() for p in frozen.parameters() if not p.requires_grad
    )
    assert {p.dtype for p in held.trainable().values()} == {torch.float32}
    assert {p.dtype for p in held.exported().parameters() if kind == "full"} <= {torch.float32}


def test_time_ids_are_never_rounded(tiny_xl):
    """bf16 would make 1023 of 1024's neighbours; the UNet must see the difference."""
    student = build(tiny_xl, "lora", mixed_precision="bf16")
    batch, _ = make_batch(student.unet)
    seen = []
    student.unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = batch.time_ids.clone()
    ids[:, 0] = 1023
    with torch.autocast("cpu", torch.bfloat16):
        student.target(batch.latents, batch.index, Batch(**{**vars(batch), "time_ids": ids}))
    assert seen[0].dtype == torch.float32
    assert seen[0][0] == 1023


def test_a_unet_in_float64_answers_in_float64(tiny_sd):
    student = build(tiny_sd, "lora")
    batch, _ = make_batch(student.unet)
    student.unet.double()
    t = torch.tensor([999, 419, 19])
    assert student.target(batch.latents.double(), t, batch).dtype == torch.float64


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("allowed", [False, True])
def test_convolutions_use_tf32_only_where_it_is_allowed(allowed):
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    speed_up([], DistillConfig("tiny-sd", None, None, allow_tf32=allowed), CPU)
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


@pytest.fixture
def exact():
    """fp32 that is fp32 when a test begins, and what it was when it has ended."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])
