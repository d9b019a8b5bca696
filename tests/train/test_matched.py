"""The networks of distribution matching: who speaks, who learns, and what a checkpoint holds."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.support.students import KINDS, build, disturb, make_batch, stock_unet, two_of
from train.memory.meta import LiveBytes
from train.networks.fake import Head, first_half
from train.networks.lora import LoraStudent
from train.networks.matched import MatchedStudent

FAKES = ["lora", "full"]
PAIRS = list(itertools.product(KINDS, FAKES))
TWO_PAIRS = two_of(("lora", "lora"), ("full", "full"))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def networks(tiny_sd):
    """Build some; both that learn as if they had."""

    def make(kind: str, fake: str, **more) -> MatchedStudent:
        student = build(tiny_sd, kind, objective="dmd", fake=fake, **more)
        assert isinstance(student, MatchedStudent)
        disturb(student.trainable().values(), seed=1, scale=0.05)
        disturb(student.partner.trainable().values(), seed=2, scale=0.05)
        return student

    return make


def ask(student: MatchedStudent, seed: int = 0):
    """z, t, the batch and the empty caption of three samples."""
    batch, empty = make_batch(student.unet, seed=seed)
    return batch.latents, torch.tensor([999, 500, 20]), batch, empty


@pytest.mark.parametrize(("kind", "fake"), TWO_PAIRS)
def test_each_speaks_for_itself_in_any_order(networks, tiny_sd, kind, fake):
    student = networks(kind, fake, gan_weight=0.1)
    z, t, batch, empty = ask(student)
    with torch.no_grad():
        said = {
            "student": lambda: student.student(z, t, batch),
            "target": lambda: student.target(z, t, batch),
            "teacher": lambda: student.teacher(z, t, batch, empty)[0],
            "fake": lambda: student.fake(z, t, batch)[0],
            "learning fake": lambda: student.learning_fake(z, t, batch, z)[0],
        }
        first = {name: say() for name, say in said.items()}
        again = {name: said[name]() for name in [*reversed(said), *said]}
        stock = stock_unet(tiny_sd)(z, t, batch.prompt_embeds.float()).sample
    assert [name for name in said if not torch.equal(first[name], again[name])] == []
    torch.testing.assert_close(first["teacher"], stock, rtol=1e-4, atol=1e-5)
    assert torch.equal(first["student"], first["target"])
    assert torch.equal(first["fake"], first["learning fake"])
    for one, other in (("student", "teacher"), ("student", "fake"), ("teacher", "fake")):
        assert (first[one] - first[other]).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "fake"), PAIRS)
def test_all_begin_as_the_teacher_in_as_few_unets_as_can_be(tiny_sd, kind, fake):
    student = build(tiny_sd, kind, objective="dmd", fake=fake)
    assert len(student.networks()) == 1 + (kind == "full") + (fake == "full")
    z, t, batch, empty = ask(student)
    with torch.no_grad():
        teacher, _ = student.teacher(z, t, batch, empty)
        torch.testing.assert_close(student.target(z, t, batch), teacher, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student.fake(z, t, batch)[0], teacher, rtol=1e-4, atol=1e-5)


def test_a_lora_begins_as_lcds_does_and_is_called_as_it(tiny_sd):
    lcd, dmd = (build(tiny_sd, "lora", objective=name) for name in ("lcd", "dmd"))
    assert isinstance(lcd, LoraStudent)
    first, second = lcd.trainable(), dmd.trainable()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lcd.origin() == dmd.origin()
    assert not set(dmd.partner.trainable()) & set(first)


def test_the_fakes_adapters_may_have_a_rank_of_their_own(tiny_sd):
    student = build(tiny_sd, "lora", objective="dmd", fake_lora_rank=2, lora_dropout=0.5)
    layer = student.layers[0]
    assert (layer.r["default"], layer.r["fake"]) == (4, 2)
    assert layer.scaling["fake"] == 1
    assert student.unet.peft_config["fake"].lora_dropout == 0


# With it, the gradients without it are asked for too.
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("kind", "fake"), TWO_PAIRS)
def test_gradients_reach_the_one_that_learns_alone(networks, kind, fake, checkpointing):
    """And with gradient checkpointing they are the same, whoever spoke between."""
    plain = networks(kind, fake, gan_weight=0.1)
    student = plain
    if checkpointing:
        student = networks(kind, fake, gan_weight=0.1, gradient_checkpointing=True)
        assert all(one.unet.is_gradient_checkpointing for one in student.trained())

    def gradients(one: MatchedStudent, learner: str) -> dict[str, torch.Tensor]:
        z, t, batch, empty = ask(one)
        one.teacher(z, t, batch, empty)
        if learner == "student":
            one.fake(z, t, batch)
            loss = one.student(z, t, batch).square().mean()
        else:
            one.target(z, t, batch)
            output, logits = one.learning_fake(z, t, batch, batch.noise)
            loss = output.square().mean() + logits.exp().mean()
        loss.backward()
        weights = one.trainable() | one.partner.trainable()
        found = {name: p.grad for name, p in weights.items() if p.grad is not None}
        for weight in weights.values():
            weight.grad = None
        return found

    for learner, own in (("student", student), ("fake", student.partner)):
        found = gradients(student, learner)
        assert found.keys() == own.trainable().keys()
        assert any(gradient.norm() > 0 for gradient in found.values())
        if checkpointing:
            wanted = gradients(plain, learner)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)


def test_bf16_autocast_leaves_the_student_its_gradients(networks):
    """The picture is drawn without gradients first: autocast keeps nothing of that for later."""
    student = networks("lora", "lora", mixed_precision="bf16")
    z, t, batch, _ = ask(student)
    with torch.autocast("cpu", torch.bfloat16):
        student.target(z, t, batch)
        loss = student.student(z, t, batch).square().mean()
    loss.backward()
    weights = student.trainable().values()
    assert all(weight.grad is not None and weight.dtype == torch.float32 for weight in weights)
    assert student.teacher_unet.conv_in.weight.dtype == torch.bfloat16


def test_the_first_half_gives_the_features_of_the_middle(tiny_sd):
    unet = stock_unet(tiny_sd)
    batch, _ = make_batch(unet)
    features, told = [], (batch.latents, torch.tensor([5, 50, 500]), batch.prompt_embeds.float())
    unet.mid_block.register_forward_hook(lambda *call: features.append(call[-1]))
    with torch.no_grad():
        whole = unet(*told).sample
        half = first_half(unet)(*told).sample
        assert torch.equal(unet(*told).sample, whole)  # which is as it was
    assert torch.equal(half, features[0])
    assert half.shape[1] == unet.config.block_out_channels[-1]
    assert Head(half.shape[1])(half).shape == (3,)


def test_features_of_real_latents_are_not_kept(networks):
    """They are computed again: the backward pass holds those of one network at a time."""
    student = networks("lora", "lora", gan_weight=0.1)
    z, t, batch, _ = ask(student)

    def kept(*real: torch.Tensor) -> int:
        with LiveBytes() as live:
            said = student.learning_fake(z, t, batch, *real)
        assert said[1].shape == (3 * (1 + len(real)),)
        return live.now

    assert kept(batch.noise) < 1.05 * kept()


@pytest.mark.parametrize(("kind", "fake"), TWO_PAIRS)
def test_a_checkpoint_brings_back_both(networks, tiny_sd, kind, fake):
    student = networks(kind, fake, gan_weight=0.1)
    state = {name: tensor.clone() for name, tensor in student.state().items()}
    again = build(tiny_sd, kind, objective="dmd", fake=fake, gan_weight=0.1)
    assert {k: v.shape for k, v in again.state().items()} == {k: v.shape for k, v in state.items()}
    again.load_state(state)
    z, t, batch, empty = ask(student)
    with torch.no_grad():
        assert torch.equal(again.target(z, t, batch), student.target(z, t, batch))
        for a, b in zip(again.fake(z, t, batch), student.fake(z, t, batch), strict=True):
            assert torch.equal(a, b)
        mine, theirs = (one.teacher(z, t, batch, empty)[0] for one in (again, student))
    assert torch.equal(mine, theirs)


def test_a_full_student_that_is_told_its_guidance_may_go_on_without(tiny_sd):
    """LCD's: from here on it draws as if it were told the middle of the range."""
    first = build(tiny_sd, "full", guidance_init="random")
    disturb(first.trainable().values(), scale=0.02)
    student = build(tiny_sd, "full", objective="dmd", w_min=2.0, w_max=5.0)
    student.begin_with(first.unet.state_dict(), "that")
    z, t, batch, _ = ask(student)
    said = {}
    with torch.no_grad():
        for w in (2.0, 3.5):
            told = replace(batch, w=torch.full_like(batch.w, w))
            said[w] = first.student(z, t, told)
        torch.testing.assert_close(student.target(z, t, batch), said[3.5], rtol=1e-4, atol=1e-5)
    assert (said[2.0] - said[3.5]).abs().max() > 1e-3


def test_the_student_may_begin_with_a_lora(tiny_sd, tmp_path):
    """The fake score still begins as the teacher."""
    from train.export.student import export_student

    first = build(tiny_sd, "lora")
    disturb(first.trainable().values())
    weights = load_file(export_student(first.exported(), tmp_path))
    student = build(tiny_sd, "lora", objective="dmd")
    student.begin_with({k.removeprefix("unet."): v for k, v in weights.items()}, "that")
    z, t, batch, empty = ask(student)
    with torch.no_grad():
        wanted = first.target(z, t, batch)
        torch.testing.assert_close(student.target(z, t, batch), wanted, rtol=1e-4, atol=1e-5)
        teacher, _ = student.teacher(z, t, batch, empty)
        torch.testing.assert_close(student.fake(z, t, batch)[0], teacher, rtol=1e-4, atol=1e-5)
