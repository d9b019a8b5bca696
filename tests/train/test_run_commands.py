"""`train sample`, `evaluate` and `export` of a run, as people type them."""

import shlex
import shutil

import pytest

from shared.cache.conditioning import load_conditioning, save_conditioning
from shared.cache.paths import CachePaths


@pytest.fixture
def words(tiny_cache, tmp_path):
    """A run of one step; later flags win."""
    return [
        "distill", "--model", "tiny-sd", "--cache", tiny_cache, "--run", tmp_path / "run",
        "--max-train-steps", 1, "--train-batch-size", 2, "--lora-rank", 2, "--threads", 1,
        "--validation-steps", 0,
    ]  # fmt: skip


@pytest.fixture
def refused(cli, tmp_path):
    """The one line with which a command is refused."""

    def run(*words) -> str:
        answer = cli("train", *words)
        line, *more = answer.err.splitlines()[-1:] or [""]
        assert not more
        assert answer.status in (1, 2), answer  # 2: the command line cannot be understood
        assert line.startswith("error: "), answer.err
        assert "Traceback" not in answer.err
        return line

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_cache):
    """A finished run, and the folder of a cache of its own."""
    from train.config import DistillConfig
    from train.trainer.loop import distill
    from train.trainer.setup import prepare

    folder = tmp_path_factory.mktemp("run")
    distill(prepare(DistillConfig(
        model="tiny-sd", cache=tiny_cache, run=folder, max_train_steps=1, train_batch_size=2,
        lora_rank=2, validation_steps=0, threads=1, num_ddim_timesteps=20,
    )))  # fmt: skip
    return folder


def test_an_unknown_prompt_says_how_to_get_it_in(refused, run):
    prompt = "a nice dog's 'day' for $5"
    line = refused("sample", "--run", run, "--prompt", prompt)
    command = shlex.split(line.partition("add it with: ")[2])  # as a shell reads it
    assert command[:5] == ["python", "-m", "prep", "embed", "--cache"]
    assert command[6:] == ["--prompts", prompt]


def test_an_embedded_prompt_is_drawn(cli, refused, run, tiny_cache, tmp_path):
    """As after `prep embed`."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_cache, copy)
    paths = CachePaths(copy)
    known = load_conditioning(paths.conditioning)
    new = known.with_prompts(["a nice dog"], known.embeds[[0]])
    save_conditioning(new, paths.conditioning, paths.tmp)
    words = ["sample", "--run", run, "--threads", 1, "--prompt", "a nice dog", "--output"]
    assert "no embedding" in refused(*words, tmp_path / "a.png")
    answer = cli("train", *words, tmp_path / "new" / "a.png", "--cache", copy)
    assert answer.status == 0
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["sample", "--prompt", "x", "--run", "nowhere"], ["nowhere is no run", "train distill"]),
        (["evaluate", "--eval-cache", "x", "--run", "nowhere"], ["nowhere is no run"]),
        (["export", "--run", "nowhere"], ["nowhere is no run"]),
    ],
    ids=lambda words: words[0],
)
def test_a_run_that_is_not_there(refused, words, parts):
    line = refused(*words)
    assert all(part in line for part in parts)


@pytest.mark.parametrize("steps", ["0", "-1", "21"])
def test_a_number_of_steps_that_cannot_be(refused, run, tiny_cache, steps):
    """A student distilled with N solver steps is drawn in 1 to N."""
    prompt = load_conditioning(CachePaths(tiny_cache).conditioning).prompts[0]
    line = refused("sample", "--run", run, "--prompt", prompt, "--steps", steps)
    assert "--steps" in line
    assert steps in line


@pytest.mark.parametrize("scale", ["1", "12"])
def test_guidance_of_a_distilled_lora(refused, run, tiny_cache, scale):
    """It would be drawn the same with every one."""
    prompt = load_conditioning(CachePaths(tiny_cache).conditioning).prompts[0]
    line = refused("sample", "--run", run, "--prompt", prompt, "--guidance-scale", scale)
    assert "--guidance-scale: a distilled LoRA is drawn without guidance" in line


def test_previews_of_a_student_with_few_solver_steps(cli, words, tmp_path):
    """The grid's 8 steps are more than such a student has; that must not end the training."""
    answer = cli("train", *words, "--num-ddim-timesteps", 4, "--validation-steps", 1)
    assert answer.status == 0, answer.err
    assert (tmp_path / "run" / "previews" / "step-00000001.png").exists()


def test_sampling_to_a_folder(refused, run, tiny_cache, tmp_path):
    prompt = load_conditioning(CachePaths(tiny_cache).conditioning).prompts[0]
    line = refused("sample", "--run", run, "--prompt", prompt, "--output", tmp_path)
    assert str(tmp_path) in line


def test_caches_of_another_model(refused, run, tiny_cache, tiny_xl_cache):
    prompt = load_conditioning(CachePaths(tiny_cache).conditioning).prompts[0]
    for words in (
        ["sample", "--run", run, "--prompt", prompt, "--cache", tiny_xl_cache],
        ["evaluate", "--run", run, "--eval-cache", tiny_xl_cache],
    ):
        line = refused(*words)
        assert str(tiny_xl_cache) in line
        assert "tiny-xl" in line
        assert "tiny-sd" in line


@pytest.mark.parametrize("scorer", ["nowhere", "nowhere:score", "os.path:nothing", ":score", "a:"])
def test_a_scorer_that_is_not_there(refused, run, tiny_cache, scorer):
    line = refused("evaluate", "--run", run, "--eval-cache", tiny_cache, "--scorer", scorer)
    assert f"--scorer {scorer}:" in line
    assert "MODULE:FUNCTION" in line


def test_export_of_a_checkpoint_that_is_not_there(refused, run):
    assert "nowhere: not a whole checkpoint" in refused(
        "export", "--run", run, "--checkpoint", "nowhere"
    )
