"""Training on answers that the teacher gave while it drew the samples (`prep synthesize`)."""

import shutil
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.cache.answers_store import open_answers
from shared.cache.manifest import open_manifest
from shared.errors import UserError
from tests.support.drawn import CAPTIONS, draw, lines, model_that_predicts, stored
from tests.support.runs import KINDS, metrics, tensors, train, untimed
from tests.support.students import disturb
from train.config import RunConfig
from train.trainer.setup import prepare

STEPS, KEPT = 5, 3
MODELS = [
    pytest.param("tiny_sd", "epsilon", marks=pytest.mark.slow),
    ("tiny_sd", "v_prediction"),
    ("tiny_xl", "epsilon"),
]


def settings(model, cache, run="run", **more) -> RunConfig:
    more = {"train_batch_size": 6, "max_train_steps": 2, "lora_rank": 4, "validation_steps": 0,
            "logging_steps": 1, "unet_time_cond_proj_dim": 16, "report_to": (),
            "num_ddim_timesteps": STEPS, "threads": 1} | more  # fmt: skip
    return RunConfig(model=str(model), cache=cache, run=cache.parent / run, **more)


def drawn_by(model, folder):
    """A cache of six samples with three answers each."""
    source = lines(folder / "captions.txt", CAPTIONS[:6])
    draw(source, folder / "cache", model=str(model), steps=STEPS, answers=KEPT)
    return folder / "cache"


@pytest.fixture(scope="module")
def kept(tiny_sd, tmp_path_factory):
    return drawn_by(tiny_sd, tmp_path_factory.mktemp("kept"))


@pytest.fixture
def sd(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "cache")


@pytest.mark.parametrize(("name", "prediction"), MODELS, ids=["eps", "v", "xl"])
def test_a_step_with_answers_is_a_step_with_the_teacher(request, tmp_path, name, prediction):
    """The loss on the same z_t, w up to 15, a LoRA and a full student as if trained."""
    model = model_that_predicts(request.getfixturevalue(name), prediction, tmp_path)
    cache = drawn_by(model, tmp_path)
    for kind in KINDS:
        config = settings(
            model, cache, student=kind, w_min=2.0, w_max=15.0, proportion_empty_prompts=0.2,
            teacher="online",
        )  # fmt: skip
        online = prepare(config)
        disturb(online.parameters.values(), scale=0.05)
        read = prepare(replace(config, teacher=None))
        assert read.config.teacher == "cached"
        batches = read.loader.batches()
        for _ in range(KEPT):
            batch = next(batches)
            ours = online.objective(batch, online.empty, online.student)
            theirs = online.objective(replace(batch, answers=None), online.empty, online.student)
            assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)
            assert theirs > 1e-3
        batches.close()


def alpha_sigma(index):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[(index + 1) * 1000 // STEPS - 1]
    return abar**0.5, (1 - abar) ** 0.5


def test_noise_leads_to_the_points_of_the_solver_and_each_comes_once(sd, tiny_sd):
    """In float64, from the tar alone: z_t, the outputs there, and their interval."""
    run, samples = prepare(settings(tiny_sd, sd)), stored(sd)
    by_latents = {arrays["latents"].tobytes(): key for key, (_, arrays, _, _) in samples.items()}
    batches, seen = run.loader.batches(), defaultdict(list)
    scale = open_manifest(sd).identity.vae.scaling_factor
    for _ in range(2 * KEPT):
        batch = next(batches)
        for row in range(6):
            x0, noise = batch.latents[row].double().numpy(), batch.noise[row].double().numpy()
            key = by_latents[(x0 / scale).astype(np.float16).tobytes()]
            rng = np.random.Generator(np.random.Philox(key=[0, int(key, 16)]))
            order = rng.permutation(STEPS)[:KEPT].tolist()
            index = batch.index[row].item()
            answer = samples[key][2][order.index(index)]
            np.testing.assert_array_equal(batch.answers[row], answer[:2])
            alpha, sigma = alpha_sigma(index)
            np.testing.assert_allclose(alpha * x0 + sigma * noise, answer[2], atol=2e-6, rtol=1e-5)
            seen[key].append(order.index(index))
    batches.close()
    assert len(seen) == 6
    assert all(numbers == [*range(KEPT), *range(KEPT)] for numbers in seen.values())


def test_a_dropped_caption_takes_the_output_without(sd, tiny_sd):
    one, other = (
        prepare(settings(tiny_sd, sd, proportion_empty_prompts=drop)) for drop in (0.0, 0.6)
    )
    kept, dropped = (next(run.loader.batches()) for run in (one, other))
    gone = (dropped.prompt_embeds == other.empty.prompt_embeds).flatten(1).all(1)
    assert 0 < gone.sum() < 6
    assert torch.equal(dropped.answers[gone, 0], kept.answers[gone, 1])
    assert torch.equal(dropped.answers[~gone], kept.answers[~gone])
    assert torch.equal(dropped.noise, kept.noise)


def test_a_run_resumes_bit_for_bit_and_no_teacher_is_asked(sd, tiny_sd, monkeypatch, capsys):
    monkeypatch.setattr("train.networks.lora.cond_and_uncond", None)
    whole = train(settings(tiny_sd, sd, "whole", max_train_steps=4))
    assert f"teacher: 3 cached answers a sample ({sd}/answers)" in capsys.readouterr().err
    train(settings(tiny_sd, sd))
    again = train(settings(tiny_sd, sd, max_train_steps=4, resume_from_checkpoint="latest"))
    assert again.invariants == whole.invariants
    assert untimed(sd.parent / "run") == untimed(sd.parent / "whole")
    found, wanted = (tensors(sd.parent / run, 4) for run in ("run", "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_steps_that_do_not_divide_those_of_the_solver_are_refused(sd, tiny_sd):
    config = settings(tiny_sd, sd, num_ddim_timesteps=50)
    with pytest.raises(UserError) as refused:
        prepare(config)
    assert str(refused.value) == (
        "--num-ddim-timesteps 50 does not divide 5, the timesteps of the cache's answers (`prep "
        "teach --num-ddim-timesteps` or `prep synthesize --steps`); give --num-ddim-timesteps 5 or "
        "another that divides it, or add --teacher online"
    )
    assert prepare(replace(config, teacher="online")).loader.answers is None
    assert prepare(replace(config, num_ddim_timesteps=1)).loader.answers.number == KEPT


def test_a_damaged_point_is_named(sd, tiny_sd):
    [shard] = open_answers(sd).shards
    path, layout = sd / "answers" / shard.file, shard.layout
    content = bytearray(path.read_bytes())
    size = layout.fields[0].nbytes // KEPT // 3
    for number in range(KEPT):  # z_t of each answer of the fifth sample
        at = 4 * layout.stride + layout.offsets["answers"] + (3 * number + 2) * size
        content[at : at + 2] = b"\x00\x7c"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} sample 4 holds non-finite values; see `prep ve"):
        next(prepare(settings(tiny_sd, sd)).loader.batches())


def test_from_captions_to_a_lora_by_the_commands(tmp_path, cli):
    source = lines(tmp_path / "captions.txt", CAPTIONS[:4])
    cache, run = tmp_path / "cache", tmp_path / "run"
    answer = cli("prep", "synthesize", "--captions", source, "--model", "tiny-xl", "--cache", cache,
                 "--steps", 4, "--answers", 2, "--threads", 1, "--no-report")  # fmt: skip
    assert answer.status == 0, answer.err
    assert answer.out.strip().endswith("; 2 answers of each")

    def distil(steps, *more):
        return cli("train", "distill", "--model", "tiny-xl", "--cache", cache, "--run", run,
                   "--max-train-steps", steps, "--train-batch-size", 2, "--lora-rank", 2,
                   "--num-ddim-timesteps", 4, "--threads", 1, "--report-to", "none",
                   "--logging-steps", 1, *more)  # fmt: skip

    answer = distil(2)
    assert answer.status == 0, answer.err
    assert f"teacher: 2 cached answers a sample ({cache}/answers)" in answer.err
    answer = distil(4, "--resume-from-checkpoint", "latest")
    assert answer.status == 0, answer.err
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 4]
