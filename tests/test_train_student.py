"""Both kinds of student on the tiny teachers: where they start, what moves, what stays."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from shared.conditioning import TextEmbeds
from shared.diffusion import schedule_from_config
from train.batch import Batch
from train.config import DistillConfig
from train.objectives.lcd import LCD
from train.student import build_student

CPU = torch.device("cpu")
MODELS = ["tiny_sd", "tiny_xl"]
KINDS = ["full", "lora"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def model(request):
    return request.getfixturevalue(request.param)


def build(model, kind: str, **more):
    more = {"lora_rank": 4, "unet_time_cond_proj_dim": 16} | more
    config = DistillConfig(str(model), cache=None, run=None, student=kind, **more)
    return build_student(str(model), config)


def stock_unet(model) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32).eval()


def make_batch(unet, count: int = 3, seed: int = 0) -> tuple[Batch, TextEmbeds]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    xl = unet.config.addition_embed_type == "text_time"
    width = unet.config.cross_attention_dim
    ids = torch.tensor([[70, 64, 3, 0, 64, 64]], dtype=torch.int32)
    batch = Batch(
        latents=normal(count, 4, 8, 8),
        prompt_embeds=normal(count, 16, width).half(),
        pooled_prompt_embeds=normal(count, 64).half() if xl else None,
        time_ids=ids.repeat(count, 1) if xl else None,
        noise=normal(count, 4, 8, 8),
        index=torch.tensor([49, 20, 0])[:count],
        w=torch.tensor([1.0, 3.0, 5.0])[:count],
    )
    return batch, TextEmbeds(torch.zeros(1, 16, width).half(), torch.zeros(1, 64) if xl else None)


def call_stock(unet, z, t, batch: Batch) -> torch.Tensor:
    added = None
    if batch.time_ids is not None:
        pooled = batch.pooled_prompt_embeds.float()
        added = {"text_embeds": pooled, "time_ids": batch.time_ids.float()}
    with torch.no_grad():
        return unet(z, t, batch.prompt_embeds.float(), added_cond_kwargs=added).sample


def disturb(parameters, seed: int = 1, scale: float = 0.2) -> None:
    """As if trained."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=rng)


def lcd_for(model, student) -> tuple[LCD, Batch, TextEmbeds]:
    schedule = schedule_from_config(DDIMScheduler.load_config(model / "scheduler"))
    return LCD(schedule, 50, 10.0, "huber", 1e-3), *make_batch(student.unet)


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


@pytest.mark.parametrize("kind", KINDS)
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
