"""Runs on a CUDA device from the first batch to the export: what only happens there."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import UserError
from shared.models.fingerprint import signs
from train.config import DistillConfig
from train.networks.build import build_student
from train.state.checkpoint import checkpoint_folder
from train.trainer.loop import distill, move, settle
from train.trainer.reporting.metrics import Moved
from train.trainer.setup import prepare

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
KINDS = ["lora", "full"]


@pytest.fixture
def config(tmp_path, tiny_cache, tiny_sd):
    """A run's flags, some of them changed."""

    def config(kind: str, run: str = "run", **more) -> DistillConfig:
        flags = {"mixed_precision": "bf16", "validation_steps": 0, "report_to": ("none",)} | more
        return DistillConfig(
            str(tiny_sd), tiny_cache, tmp_path / run, student=kind, train_batch_size=4,
            lora_rank=4, learning_rate=1e-3, device=DEVICE, **flags,
        )  # fmt: skip

    return config


def weights(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.parameters.items()}


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_signs_are_those_of_a_cpu(tiny_sd, config, kind):
    student = build_student(str(tiny_sd), config(kind))
    wanted = signs(student.networks()[-1].parameters())
    assert signs(student.networks()[-1].to(DEVICE).parameters()) == wanted


DMD = {"objective": "dmd", "fake_warmup_steps": 0, "fake_updates": 1, "gan_weight": 0.1,
       "num_student_steps": 2}  # fmt: skip


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2}, DMD], ids=["one", "two", "dmd"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(config, kind, more):
    """In bf16, once everything has been allocated: torch raises at the first thing that would."""
    run = prepare(config(kind, logging_steps=1, **more))
    batches = run.loader.batches()

    def step(number: int) -> None:
        batch = next(batches)
        moved = [move(run, one, batch) for one in run.trained]
        assert settle(run.scaler, run.distributed.device)
        run.student.after_step()
        run.recorder.record(number, number - 1, moved)

    with run.recorder:
        for number in (1, 2, 3):
            step(number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in (4, 5, 6):
                step(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            batches.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_end_to_end_and_resumed(config, kind):
    """With previews, checkpoints and an export; the second half again from its checkpoint."""
    more = {"validation_steps": 2, "checkpointing_steps": 2, "logging_steps": 1}
    straight = config(kind, max_train_steps=4, **more)
    distill(prepare(straight))
    lines = [json.loads(line) for line in (straight.run / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    peaks = [line["peak_gpu_memory_bytes"] for line in lines]
    assert 0 < peaks[0] <= peaks[-1] <= torch.cuda.max_memory_allocated()
    assert "peak_process_memory_bytes" not in lines[0]
    assert len(list((straight.run / "previews").iterdir())) == 2
    halfway = checkpoint_folder(straight.run, 2)
    distill(prepare(config(kind, "again", max_train_steps=4, resume_from_checkpoint=str(halfway),
                           **more)))  # fmt: skip
    last = [
        load_file(checkpoint_folder(straight.run.parent / run, 4) / "networks.safetensors")
        for run in ("run", "again")
    ]
    moved = load_file(halfway / "networks.safetensors")
    for name, wanted in last[0].items():
        torch.testing.assert_close(last[1][name], wanted, rtol=1e-2, atol=2e-4)
    assert not equal(last[0], moved)


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_skips_a_step_that_overflows(config, kind):
    run = prepare(config(kind, mixed_precision="fp16"))
    batches = run.loader.batches()
    run.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**100)
    before = weights(run)
    move(run, run.trained[0], next(batches))
    assert not settle(run.scaler, run.distributed.device)
    assert run.scaler.get_scale() == 2.0**99
    assert equal(weights(run), before)
    run.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    moved = move(run, run.trained[0], next(batches))
    assert moved.loss.isfinite()
    assert moved.norm.isfinite()
    assert settle(run.scaler, run.distributed.device)
    assert run.scaler.get_scale() == 2.0**10
    assert not equal(weights(run), before)
    batches.close()


def test_fp16_trains_to_the_end_with_the_scale_it_begins_with(config):
    settings = config("full", mixed_precision="fp16", max_train_steps=3, logging_steps=1)
    distill(prepare(settings))
    state = json.loads((checkpoint_folder(settings.run, 3) / "state.json").read_text())
    assert 2.0**-10 < state["scaler"]["scale"] <= 2.0**16


def test_lines_of_metrics_come_a_window_later_and_none_is_lost(config):
    """The numbers of a window are on their way while the next one's steps are taken."""
    settings = config("lora", logging_steps=2)
    run = prepare(settings)
    path = settings.run / "metrics.jsonl"

    def written() -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in path.open()]
        return [(line["step"], line["loss"]) for line in lines]

    def record(step: int, loss: float) -> None:
        values = torch.tensor([loss, 1.0], device=DEVICE)
        run.recorder.record(step, step - 1, [Moved("", values[0], values[1], 1e-3)])

    with run.recorder:
        record(1, 1.0)
        record(2, 3.0)
        assert written() == []
        record(3, 5.0)
        assert written() == []
        record(4, 7.0)
        assert written() == [(2, 2.0)]
        record(5, 9.0)
        run.recorder.flush()
        assert written() == [(2, 2.0), (4, 6.0), (5, 9.0)]
        record(6, math.nan)
        record(7, 1.0)
        with pytest.raises(UserError, match="the loss is nan at step 6"):
            run.recorder.flush()


def test_pictures_are_encoded_as_on_a_cpu(cli, tmp_path, repo):
    """In fp16 with the VAE's stream scaled, checked by encoding them again on the CPU."""
    words = ["--shards", repo / "data/pictures/heldout/00000.tar", "--model", "tiny-sd"]
    answer = cli("prep", "encode", *words, "--cache", tmp_path / "cache", "--device", DEVICE)
    assert answer.status == 0, answer.err
    identity = json.loads((tmp_path / "cache" / "identity.json").read_text())
    assert identity["shapes"]["device"] == "cuda"
    assert identity["vae"]["dtype"] == "float16"
    answer = cli(
        "prep", "verify", "--cache", tmp_path / "cache", "--reencode", 8, "--device", "cpu"
    )
    assert answer.status == 0, answer.err
