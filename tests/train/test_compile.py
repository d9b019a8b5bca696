"""Compilation, and other faster ways to the same loss."""

import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.diffusion import schedule_from_config
from shared.errors import UserError
from shared.networks.precision import autocast
from tests.support.students import CPU, KINDS, MODELS, build, lcd_for, make_batch
from train.config import DistillConfig
from train.networks.build import build_student
from train.networks.precision import COMPILED, check_speed, compile_blocks, speed_up
from train.objectives.lcd import LCD


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def model(request):
    return request.getfixturevalue(request.param)


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


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("tiny_sd", "full"),
        ("tiny_xl", "lora"),  # and each part of the others is one of these
        pytest.param("tiny_sd", "lora", marks=pytest.mark.slow),
        pytest.param("tiny_xl", "full", marks=pytest.mark.slow),
    ],
    indirect=["model"],
)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_again_and_again(tiny_sd, kind):
    """Student, target and teacher take turns, adapters on and off: compiled once each."""
    student, plain = build(tiny_sd, kind), build(tiny_sd, kind)
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter  # a second, which nobody else needs

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
