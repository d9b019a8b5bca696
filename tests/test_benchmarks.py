"""The benchmarks measure what they say: real sizes, an equal loss, counted work, every row."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

import train.trainer.setup
from benchmarks import gpu
from benchmarks.common import gpu_rows
from benchmarks.common.gpu_rows import Row
from benchmarks.common.models import (
    model_folder,
    random_text_encoder,
    random_unet,
    random_vae,
    random_weights,
    write_cache,
)
from benchmarks.common.online import Online, TwoCalls, build_encoders, build_teacher
from benchmarks.common.steps import Cached, compare, flops, open_run
from prep.encoders.text import TextEncoder
from shared.models.family import resolve_model
from tests.support import warm

CPU, META = torch.device("cpu"), torch.device("meta")


def millions(network) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def test_models_have_their_published_sizes(tmp_path):
    sd15, sdxl = (str(model_folder(name, tmp_path)) for name in ("sd15", "sdxl"))
    assert millions(random_unet(sd15, META)) == pytest.approx(859.5, abs=0.1)
    assert millions(random_unet(sdxl, META)) == pytest.approx(2567.5, abs=0.1)
    assert millions(random_vae(sdxl, META)) == pytest.approx(83.7, abs=0.1)
    assert millions(random_text_encoder(sd15, "text_encoder", META)) == pytest.approx(
        123.1, abs=0.1
    )
    assert millions(random_text_encoder(sdxl, "text_encoder_2", META)) == pytest.approx(
        694.7, abs=0.1
    )
    assert [resolve_model(source).family.name for source in (sd15, sdxl)] == ["sd15", "sdxl"]


def open_trainer(folder, model="tiny-xl", **flags) -> Cached:
    source = model_folder(model, folder)
    cache = write_cache(source, folder / "cache", 64, 8)
    return Cached(open_run(source, cache, folder / "run", CPU, threads=1, **flags))


@pytest.mark.parametrize("student", ["lora", "full"])
def test_the_online_baseline_learns_the_same(tmp_path, student):
    """Two calls of a teacher apart give the loss of one batched call of the trainer's."""
    trainer = open_trainer(tmp_path, student=student, train_batch_size=2)
    run, batch = trainer.run, trainer.resident
    trainer.with_resident()  # the adapters are no longer zero
    ours = run.objective(batch, run.empty, run.student)
    theirs = run.objective(batch, run.empty, TwoCalls(run.student, build_teacher(run)))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-7)
    online = Online(run, batch, 64)
    before = [parameter.clone() for parameter in run.parameters.values()]
    targets = [p.clone() for p in run.student.networks()[-1].parameters()]
    assert online.step() > 0
    assert not all(map(torch.equal, before, run.parameters.values()))
    if student == "full":
        average = list(run.student.target_unet.parameters())
        live = list(run.student.unet.parameters())
        assert not all(map(torch.equal, average, live))
        assert all(map(torch.equal, targets, run.student.teacher_unet.parameters()))
    trainer.close()


def test_the_online_baseline_encodes_captions_as_prep_does(tmp_path):
    source = model_folder("tiny-xl", tmp_path)
    with random_weights(CPU):
        text = TextEncoder(resolve_model(str(source)), CPU, 2)
    captions = ["a red circle", "two blue squares"]
    wanted = text.encode(captions)
    ids = text.tokenizers[0](
        captions, padding="max_length", max_length=text.length, return_tensors="pt"
    ).input_ids
    trainer = open_trainer(tmp_path, train_batch_size=2)
    encoders = build_encoders(source, CPU, torch.float32, torch.float32)
    found = encoders.encode(torch.zeros(2, 3, 64, 64), ids, trainer.resident)
    torch.testing.assert_close(found.prompt_embeds.half(), wanted.prompt_embeds, rtol=0, atol=2e-3)
    torch.testing.assert_close(
        found.pooled_prompt_embeds.half(), wanted.pooled_prompt_embeds, rtol=0, atol=2e-3
    )
    assert found.latents.shape == trainer.resident.latents.shape
    trainer.close()


def test_flops_are_those_of_the_formulas():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7
    query = torch.ones(2, 4, 6, 8, requires_grad=True)  # batch, heads, tokens, width

    def attention() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()

    one = 2 * (2 * 4) * 6 * 6 * 8
    assert flops(attention) == 2 * one + 5 * one  # the backward pass computes weights again


def test_pairs_are_interleaved_in_both_orders():
    taken = []
    found = compare(lambda: taken.append("a"), lambda: taken.append("b"), 4, CPU)
    assert "".join(taken) == "abbaabba"
    assert found["ratio_quartiles"][0] <= found["ratio"] <= found["ratio_quartiles"][1]


SLOW = pytest.param("lora bf16 eager", marks=pytest.mark.slow)  # beside the online baseline


@pytest.mark.parametrize("kind", [SLOW, "full fp16 eager", "encode fp16"])
def test_a_tiny_table_has_every_figure(kind):
    found = gpu.main(["--tiny", "--device", "cpu", "--threads", "1", "--only", f"tiny-xl {kind}"])
    row = found["rows"].get(f"tiny-xl {kind}", {})
    assert "failed" not in row, row
    assert row["peak_gb"] > 0
    if "encode" in kind:
        assert row["images_per_second"] < row["vae_images_per_second"]
    else:
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["of_matmul"] > 0
    if "bf16" in kind:
        online = row["online"]
        assert online["ratio_by_flops"] > 1
        assert online["seconds_with_fp32_vae"] > 0


def test_rows_that_do_not_fit_into_the_time_are_named(capsys):
    found = gpu.main(["--tiny", "--device", "cpu", "--minutes", "0", "--threads", "1"])
    assert not found["rows"]
    assert len(found["not_measured"]) == 20
    assert "not measured: tiny-sd lora bf16 eager," in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, tmp_path):
    tried = []

    def training(row, bench, batch, ceiling):
        tried.append(batch)
        if batch > fits:
            raise torch.OutOfMemoryError
        return {}

    monkeypatch.setattr(gpu_rows, "training", training)
    bench = gpu.open_bench(False, CPU, tmp_path, 1)
    fits = 2
    assert gpu_rows.measure(Row("sd15", "full", "bf16"), bench, 1.0) == {"batch": 2}
    assert tried == [8, 4, 2]
    fits = 0
    assert gpu_rows.measure(Row("sd15", "full", "bf16"), bench, 1.0) == {"out_of_memory": True}


def test_a_row_that_fails_costs_no_other(monkeypatch, tmp_path):
    def measure(row, bench, ceiling):
        if row.student == "full":
            raise RuntimeError("no compiler\nand more")
        return {"out_of_memory": True}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "in_child", lambda row, bench, seconds: measure(row, bench, 1.0))
    found = gpu.main(["--tiny", "--device", "cpu", "--threads", "1", "--only", "tiny-sd"])
    assert found["rows"]["tiny-sd full bf16 eager"]["failed"] == "RuntimeError: no compiler"
    assert found["not_measured"] == []


COMPILED = Row("tiny-sd", "lora", "bf16", compile=True)


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Let a row's child be a shell script."""

    def answers(script: str) -> gpu.Bench:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        return gpu.open_bench(True, CPU, tmp_path, 1)

    return answers


def test_a_row_is_given_up_when_the_time_is_up(monkeypatch, tmp_path):
    def endless(row, bench, ceiling):
        while True:
            pass

    monkeypatch.setattr(gpu, "measure", endless)
    monkeypatch.setitem(gpu.EXPECTED, False, 0.0)
    table = gpu.Table([Row("tiny-sd", "lora", "bf16", compile=False)], 0.02, write=False)
    table.measure(gpu.open_bench(True, CPU, tmp_path, 1))
    assert "not done when the time was up" in str(table.figures["rows"])
    assert table.figures["total_seconds"] < 10


def runs(pid: int) -> bool:
    """Until it has died, whether or not anyone has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_compiled_row_is_ended_in_time_with_all_that_it_started(answers, tmp_path):
    bench = answers(f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    began = time.monotonic()
    assert gpu.in_child(COMPILED, bench, 0.5) == {"failed": "not done after 0 seconds"}
    assert time.monotonic() - began < 5
    pid = int((tmp_path / "pid").read_text())
    while runs(pid):
        assert time.monotonic() - began < 10
        time.sleep(0.05)


def test_a_compiled_row_is_measured_in_a_process_of_its_own(answers, monkeypatch, capsys, tmp_path):
    bench = answers('echo compiling; echo \'{"batch": 4, "samples_per_second": 8.0}\'')
    found = gpu.in_child(COMPILED, bench, 20)
    assert found == {"batch": 4, "samples_per_second": 8.0}
    assert gpu_rows.share_of_matmul(COMPILED, bench, found, 100.0) == {}
    bench.work["tiny-sd", "lora"] = 2.5  # counted in an eager row
    share = {"tflop_per_sample": 2.5, "of_matmul": 0.2}
    assert gpu_rows.share_of_matmul(COMPILED, bench, found, 100.0) == share
    assert gpu.in_child(COMPILED, answers("exit 3"), 20) == {"failed": "exit 3"}
    # And the child's own side.
    monkeypatch.setattr(gpu, "measure", lambda row, bench, ceiling: {"row": row.name})
    words = ["--tiny", "--device", "cpu", "--only", COMPILED.name, "--child", str(tmp_path)]
    gpu.main(words)
    assert json.loads(capsys.readouterr().out) == {"row": COMPILED.name}


def test_a_guess_for_sdxl_follows_what_sd15_took(tmp_path):
    table = gpu.Table(gpu.rows(("sd15", "sdxl")), 1.0, write=False)
    larger = Row("sdxl", "full", "bf16")
    assert table.expected(larger) == gpu.EXPECTED[False] * gpu.LARGER
    table.took["sd15", False] = 40.0
    assert table.expected(larger) == 40 * gpu.LARGER
    table.took["sdxl", False] = 70.0
    assert table.expected(larger) == 70
    table.took["sd15", True] = 149.0  # the next one would be ended as soon
    assert table.expected(Row("sdxl", "lora", "bf16", compile=True)) == gpu.COMPILED


def test_the_estimate_of_memory_decides_nothing_here(tmp_path, monkeypatch):
    """It refuses what has no room; here the batch is halved instead, until it has."""
    monkeypatch.setattr(train.trainer.setup, "print_memory", lambda *_: pytest.fail("not wanted"))
    open_trainer(tmp_path, "tiny-sd", train_batch_size=2).close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_and_a_clean_exit(repo):
    answer = warm.run(["-m", "benchmarks.gpu"], repo)
    assert answer.returncode == 0
    assert answer.stdout.count("\n") == 1
    assert "no CUDA device" in answer.stdout


def test_a_separate_teacher_is_measured_in_a_process_of_its_own(repo, tmp_path):
    words = ["separate_teacher", "tiny-sd", "64", "1", "1", str(tmp_path), "cpu"]
    answer = warm.run(["-m", "benchmarks.step", "--child", *words], repo)
    assert answer.returncode == 0, answer.stderr
    assert 0.1 < json.loads(answer.stdout)["peak_gb"] < 4
