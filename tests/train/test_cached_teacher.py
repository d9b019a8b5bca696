"""Training on the teacher's answers: the same loss as online, resumed, and what is refused."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch

from shared.cache.answers_store import open_answers
from shared.errors import UserError
from tests.support.answers import rewrite, teach
from tests.support.runs import KINDS, tensors, train, untimed
from tests.support.students import disturb
from train.config import ExportConfig, RunConfig
from train.memory.estimate import estimate
from train.networks.full import FullStudent
from train.trainer.export_command import export_checkpoint
from train.trainer.setup import prepare

CACHES = {"tiny_sd": "small_cache", "tiny_xl": "tiny_xl_cache"}
VELOCITY = {"prediction_type": "v_prediction"}


def copied(cache, folder):
    """A cache of one's own, to be taught."""
    return shutil.copytree(cache, folder / "cache")


@pytest.fixture
def sd(small_cache, tmp_path):
    return copied(small_cache, tmp_path)


def settings(model, cache, run="run", **more) -> RunConfig:
    more = {"train_batch_size": 6, "max_train_steps": 2, "lora_rank": 4, "validation_steps": 0,
            "logging_steps": 1, "unet_time_cond_proj_dim": 16, "report_to": (),
            "threads": 1} | more  # fmt: skip
    return RunConfig(model=str(model), cache=cache, run=cache.parent / run, **more)


def other_model(model, folder, **scheduler):
    """The same model with another scheduler."""
    other = shutil.copytree(model, folder / "other")
    path = other / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    return other


PREDICTIONS = ["epsilon", "v_prediction"]
WRITTEN = {"<f2": (1e-3, 6), "<f4": (1e-6, 1)}  # dtype -> tolerance, size of the batches
# Between them they have everything that may differ; the others mix it.
OPPOSITE = {("lora", "tiny_xl", "v_prediction", "<f2"), ("full", "tiny_sd", "epsilon", "<f4")}
EVERY = [
    pytest.param(*case, marks=[] if case in OPPOSITE else pytest.mark.slow)
    for case in itertools.product(KINDS, CACHES, PREDICTIONS, WRITTEN)
]


@pytest.mark.parametrize(("kind", "name", "prediction", "dtype"), EVERY)
def test_a_step_with_answers_is_a_step_with_the_teacher(
    request, tmp_path, kind, name, prediction, dtype
):
    """The loss on the same draws, w up to 15, the student as if trained; tiny-xl has posteriors.

    In fp32 with the batches of one that the teacher was asked in: another shape rounds otherwise,
    which w and the noisiest timesteps multiply (2.5e-6 of the loss were seen).
    """
    model = other_model(request.getfixturevalue(name), tmp_path, prediction_type=prediction)
    cache = copied(request.getfixturevalue(CACHES[name]), tmp_path)
    tolerance, batch_size = WRITTEN[dtype]
    teach(cache, model, 1, dtype=dtype)
    config = settings(
        model, cache, student=kind, w_min=2.0, w_max=15.0, train_batch_size=batch_size,
        teacher="online", proportion_empty_prompts=0.2,
    )  # fmt: skip
    online = prepare(config)
    disturb(online.parameters.values(), scale=0.05)
    read = prepare(replace(config, teacher=None))
    assert read.config.teacher == "cached"
    batches = read.loader.batches()
    for _ in range(12 // batch_size):
        batch = next(batches)
        assert batch.answers is not None
        ours = online.objective(batch, online.empty, online.student)
        theirs = online.objective(replace(batch, answers=None), online.empty, online.student)
        assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
        assert theirs > 1e-3
    batches.close()


@pytest.mark.parametrize(("objective", "kind"), [("pcm", "full"), ("tcd", "lora")])
def test_so_it_is_with_trajectory_targets(sd, tiny_sd, objective, kind):
    """On a grid that is finer than the solver's, where a step may end at a phase's edge."""
    teach(sd, tiny_sd, 1, dtype="<f4")
    config = settings(
        tiny_sd, sd, objective=objective, student=kind, num_ddim_timesteps=10, train_batch_size=8,
    )  # fmt: skip
    online, read = (prepare(replace(config, teacher=one)) for one in ("online", "cached"))
    disturb(online.parameters.values(), scale=0.05)
    batches = read.loader.batches()
    for _ in range(2):
        batch = next(batches)
        assert (batch.uniforms is not None) == (objective == "tcd")
        ours = read.objective(batch, online.empty, online.student)
        theirs = read.objective(replace(batch, answers=None), online.empty, online.student)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
        assert theirs > 1e-3
    batches.close()


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_a_run_resumes_bit_for_bit_and_no_teacher_is_asked(sd, tiny_sd, kind, monkeypatch, capsys):
    teach(sd, tiny_sd, 2)
    monkeypatch.setattr("train.networks.full.cond_and_uncond", None)
    monkeypatch.setattr("train.networks.lora.cond_and_uncond", None)
    whole = train(settings(tiny_sd, sd, "whole", student=kind, max_train_steps=4))
    assert f"teacher: 2 cached answers a sample ({sd}/answers)" in capsys.readouterr().err
    train(settings(tiny_sd, sd, student=kind))
    teach(sd, tiny_sd, 3)  # the run keeps the K that it began with
    more = settings(tiny_sd, sd, student=kind, max_train_steps=4, resume_from_checkpoint="latest")
    again = train(more)
    assert again.loader.answers.number == 2
    assert again.invariants == whole.invariants
    assert untimed(sd.parent / "run") == untimed(sd.parent / "whole")
    found, wanted = (tensors(sd.parent / run, 4) for run in ("run", "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert json.loads((sd.parent / "run/config.json").read_text())["teacher"] == "cached"
    assert "| teacher | cached |" in (sd.parent / "run/README.md").read_text()
    export_checkpoint(sd.parent / "run", ExportConfig())


def test_a_full_student_holds_no_teacher(sd, tiny_sd):
    online = prepare(settings(tiny_sd, sd, student="full"))
    teach(sd, tiny_sd, 1)
    config = settings(tiny_sd, sd, student="full")
    run = prepare(config)
    assert isinstance(run.student, FullStudent)
    assert run.student.teacher_unet is None
    assert run.student.networks() == [run.student.unet, run.student.target_unet]
    assert len(online.student.networks()) == 3
    assert online.invariants.items() <= run.invariants.items()
    assert run.invariants.keys() - online.invariants.keys() == {"answers", "answers_per_sample"}
    lora = [prepare(settings(tiny_sd, sd, teacher=where)) for where in ("online", "cached")]
    assert {one.invariants["teacher"] for one in lora} == {run.invariants["teacher"]}


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_estimate_of_memory_has_no_teacher(sd, tiny_sd, kind):
    unet = json.loads((tiny_sd / "unet/config.json").read_text())
    online, read = (
        estimate(unet, settings(tiny_sd, sd, student=kind, teacher=where), (8, 8))
        for where in ("online", "cached")
    )
    assert read.peak <= online.peak
    assert read.optimizer == online.optimizer
    assert (read.weights < online.weights) == (kind == "full")


def test_a_finer_grid_than_the_solvers(sd, tiny_sd):
    """Answers at 50 timesteps, a solver of 10 steps: from any of the 50, a tenth of all back."""
    teach(sd, tiny_sd, 1, dtype="<f4")
    run = prepare(settings(tiny_sd, sd, num_ddim_timesteps=10, train_batch_size=24))
    batches = run.loader.batches()
    batch = next(batches)
    assert batch.index.max() >= 10
    seen = {}

    class Watching:
        def student(self, z, t, batch):
            seen["start"] = t
            return torch.zeros_like(z)

        def target(self, z, t, batch):
            seen["end"] = t
            return torch.zeros_like(z)

    run.objective(batch, run.empty, Watching())
    assert torch.equal(seen["start"], (batch.index + 1) * 20 - 1)
    assert torch.equal(seen["end"], (seen["start"] - 100).clamp(min=0))
    run.student.adapters_off().__enter__()
    ours = run.objective(batch, run.empty, run.student)
    theirs = run.objective(replace(batch, answers=None), run.empty, run.student)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    batches.close()


@pytest.mark.parametrize(
    ("changes", "flags", "says"),
    [
        ({"teacher": "f" * 16}, {}, r"another teacher \(.*sd, f{16}\) than .*sd \(\w{16}\)"),
        ({"schedule": VELOCITY}, {}, "another schedule than .*: .*prediction_type.*v_prediction"),
        ({"schedule": {"beta_end": 0.5}}, {}, "another schedule than .*beta_end.*0.5"),
        ({"unconditional": "0" * 16}, {}, r"unconditional embedding \(0{16}\) than .*\(\w+\)"),
        ({}, {"num_ddim_timesteps": 100}, "--num-ddim-timesteps 100 does not divide 50,"),
        ({}, {"num_ddim_timesteps": 20}, "--num-ddim-timesteps 20 does not divide 50,"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_goes_on_online(sd, tiny_sd, changes, flags, says):
    teach(sd, tiny_sd, 1)
    if "schedule" in changes:
        before = open_answers(sd).identity.schedule
        changes = {"schedule": {**before, **changes["schedule"]}}
    rewrite(sd, **changes)
    config = settings(tiny_sd, sd, **flags)
    for wanted in (None, "cached"):
        with pytest.raises(UserError, match=says) as refused:
            prepare(replace(config, teacher=wanted))
        assert "--teacher online" in str(refused.value)
        assert "\n" not in str(refused.value)
    assert prepare(replace(config, teacher="online")).loader.answers is None


def test_no_answers_at_all(sd, tiny_sd, capsys):
    config = settings(tiny_sd, sd)
    with pytest.raises(UserError, match=r"/answers holds no answers .* --teacher online"):
        prepare(replace(config, teacher="cached"))
    assert prepare(config).config.teacher == "online"
    assert "teacher: online\n" in capsys.readouterr().err
    assert prepare(replace(config, objective="denoise")).config.teacher is None
    assert "teacher:" not in capsys.readouterr().err


def test_a_run_that_has_begun_keeps_its_way(sd, tiny_sd):
    config = settings(tiny_sd, sd, max_train_steps=1)
    train(config)
    teach(sd, tiny_sd, 2)
    further = replace(config, max_train_steps=2, resume_from_checkpoint="latest")
    assert prepare(further).config.teacher == "online"
    train(replace(further, teacher="cached"))  # told so
    further = replace(further, max_train_steps=3)
    assert prepare(further).config.teacher == "cached"
    teach(sd, tiny_sd, 1)
    with pytest.raises(UserError, match=r"than the run began with: answers_per_sample .* online"):
        prepare(further)
    rewrite(sd, seed=12)
    with pytest.raises(UserError, match=r"than the run began with: answers.* --teacher online"):
        prepare(further)
    shutil.rmtree(sd / "answers")
    with pytest.raises(UserError, match=r"holds no answers of a teacher.* --teacher online"):
        prepare(further)
    run = train(replace(further, teacher="online"))
    assert "answers" not in run.invariants


def test_the_same_command_may_add_the_flag(sd, tiny_sd):
    """`--teacher online` is no other run: it goes on by itself."""
    teach(sd, tiny_sd, 1)
    config = settings(tiny_sd, sd, max_train_steps=2)
    train(config)
    run = prepare(replace(config, teacher="online"))
    assert (run.step, run.config.teacher) == (2, "online")


def test_samples_without_answers_are_left_out(sd, tiny_sd, capsys):
    whole = prepare(settings(tiny_sd, sd))
    teach(sd, tiny_sd, 1, without={0: (0, 5)})
    run = prepare(settings(tiny_sd, sd, num_train_epochs=1))
    assert sum(run.loader.order.sizes) == sum(whole.loader.order.sizes) - 2
    assert run.config.max_train_steps == 4  # of 22 in batches of 6
    assert "; 2 samples without any left out\n" in capsys.readouterr().err
    assert run.invariants["cache"] == whole.invariants["cache"]
