"""Both kinds of student on the tiny teachers: where they start, what moves, what stays."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.cache.conditioning import TextEmbeds
from shared.diffusion import schedule_from_config
from shared.errors import UserError
from train.config import DistillConfig
from train.data.batch import Batch
from train.networks.build import build_student
from train.networks.precision import COMPILED, autocast, check_speed, compile_blocks, speed_up
from train.objectives.lcd import LCD

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


class MadeOfNumbers(TorchDispatchMode):
    """Notes the operations whose tensors come neither from `known` ones nor from other operations:
    Python has made those, and would copy them to a GPU, which waits for that."""

    def __init__(self, known):
        super().__init__()
        self.known, self.found = list(known), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not {id(tensor) for tensor in tensors} <= set(map(id, self.known)):
            self.found.append(str(func))
        answer = func(*args, **(kwargs or {}))
        self.known += tree_leaves(answer)
        return answer


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sends_nothing_to_the_device(model, kind, monkeypatch):
    """Watched on torch's meta device, which like a GPU has memory of its own."""
    meta = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which has no meta
    student = build(model, kind)
    for unet in student.networks():
        unet.to(meta)
    lcd, batch, empty = lcd_for(model, student)
    lcd = replace(lcd, schedule=lcd.schedule.to(meta))
    batch, empty = batch.to(meta), empty.to(meta)
    weights = [t for unet in student.networks() for t in (*unet.parameters(), *unet.buffers())]
    mode = MadeOfNumbers(
        [*weights, *batch.tensors().values(), *vars(empty).values(), lcd.schedule.alphas_cumprod]
    )
    with mode:
        loss = lcd(batch, empty, student)
    assert loss.device == meta
    assert mode.found == []


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


def test_compilation_wants_its_tools(tmp_path, monkeypatch):
    cuda, settings = torch.device("cuda"), DistillConfig("tiny-sd", None, None, compile=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"--compile wants a C\+\+ compiler \(g\+\+, or CXX\)"):
        check_speed(settings, CPU)
    with pytest.raises(UserError, match=r"--compile wants a C compiler \(gcc, clang, or CC\)"):
        check_speed(settings, cuda)
    (tmp_path / "clang").touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"--compile wants Python's headers \(Python.h, "):
        check_speed(settings, cuda)
    (tmp_path / "Python.h").touch()
    check_speed(settings, cuda)
    check_speed(replace(settings, compile=False), cuda, sizes=3)
    with pytest.raises(UserError, match="is for latents of one size, and the cache has 3; leave"):
        check_speed(settings, cuda, sizes=3)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("allowed", [False, True])
def test_convolutions_use_tf32_only_where_it_is_allowed(allowed):
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    speed_up([], DistillConfig("tiny-sd", None, None, allow_tf32=allowed), CPU)
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_again_and_again(tiny_sd, kind):
    """Student, target and teacher take turns, adapters on and off: compiled once each."""
    student, plain = build(tiny_sd, kind), build(tiny_sd, kind)
    torch._dynamo.reset()
    counter = CompileCounter()
    for unet in student.networks():
        compile_blocks(unet, counter)
    lcd, batch, empty = lcd_for(tiny_sd, student)
    losses, graphs = [], []
    for _ in range(3):
        losses.append(lcd(batch, empty, student))
        losses[-1].backward()
        graphs.append(counter.frame_count)
    assert graphs[0] > 3
    assert graphs[0] == graphs[1] == graphs[2]
    torch.testing.assert_close(losses[-1], lcd(batch, empty, plain), rtol=1e-4, atol=1e-6)
    assert student.state().keys() == plain.state().keys()


@pytest.mark.slow
def test_compiled_by_inductor(tiny_sd):
    """Real code for the CPU, where a C++ compiler is at hand."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    student, plain = build(tiny_sd, "lora"), build(tiny_sd, "lora")
    torch._dynamo.reset()
    for unet in student.networks():
        compile_blocks(unet)
    lcd, batch, empty = lcd_for(tiny_sd, student)
    loss, wanted = lcd(batch, empty, student), lcd(batch, empty, plain)
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-5)
    loss.backward()
    wanted.backward()
    for name, parameter in student.trainable().items():
        if ".lora_B." in name:
            torch.testing.assert_close(
                parameter.grad, plain.trainable()[name].grad, rtol=1e-2, atol=1e-5
            )


@pytest.fixture
def exact():
    """fp32 that is fp32 when a test begins, and what it was when it has ended."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


def effects(student) -> set[str]:
    """What has come of the flags for speed, as torch and diffusers tell it; all or nothing."""
    processors = [p for unet in student.networks() for p in unet.attn_processors.values()]
    blocks = [
        block._compiled_call_impl is not None
        for unet in student.networks()
        for block in unet.modules()
        if type(block).__name__ in COMPILED
    ]
    tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    told = {
        "xformers": [type(processor).__name__.startswith("XFormers") for processor in processors],
        "compile": blocks,
        "tf32": tf32,
    }
    assert all(len(set(each)) == 1 for each in told.values()), told
    return {name for name, each in told.items() if each[0]}


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("how", ["xformers", "compile", "both", "tf32"])
@pytest.mark.parametrize("kind", KINDS)
def test_faster_ways_give_the_same_loss(model, kind, how):
    """On a GPU, in bf16: attention by xformers, blocks compiled by inductor, TF32."""
    device = torch.device("cuda")
    if how in ("xformers", "both"):
        pytest.importorskip("xformers")
    config = DistillConfig(
        str(model), None, None, student=kind, lora_rank=4, mixed_precision="bf16",
        attention="xformers" if how in ("xformers", "both") else "sdpa",
        compile=how in ("compile", "both"), allow_tf32=how == "tf32",
    )  # fmt: skip
    check_speed(config, device)
    torch._dynamo.reset()
    losses = []
    for faster in (False, True):
        student = build_student(str(model), config)
        for unet in student.networks():
            unet.to(device)
        if faster:
            speed_up(student.networks(), config, device)
        schedule = schedule_from_config(DDIMScheduler.load_config(model / "scheduler")).to(device)
        batch, empty = make_batch(student.unet)
        lcd = LCD(schedule, 50, 10.0, "huber", 1e-3)
        with autocast("bf16", device):
            loss = lcd(batch.to(device), empty.to(device), student)
        loss.backward()
        losses.append(loss.item())
        took = effects(student)
        wanted = {"xformers": {"xformers"}, "compile": {"compile"}, "tf32": {"tf32"},
                  "both": {"xformers", "compile"}}  # fmt: skip
        assert took == (wanted[how] if faster else set())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
