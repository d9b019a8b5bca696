"""`infer morph`: what it writes, and each frame against stock diffusers driven by hand."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageSequence

from infer.config import LearnConfig, MorphConfig
from infer.learn.recipe import recipe_of
from infer.morph import command, frames
from infer.morph.job import plan_job
from infer.pictures import film
from tests.support.learned import run_infer, shapes

MODEL = ("--model", "tiny-sd", "--threads", 1)
FEW = (*MODEL, "--train-batch-size", 2, "--learn-steps", 2, "--frames", 4, "--steps", 3)
LORA = "pytorch_lora_weights.safetensors"


class Morphed(NamedTuple):
    """A folder in which two pictures were morphed."""

    place: Path
    pictures: list[str]
    prompts: list[str]
    runs: list[Path]
    output: Path
    said: str


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    place = tmp_path_factory.mktemp("morphed")
    found = shapes(2, place)
    pictures, prompts = [path.name for path, _ in found], [prompt for _, prompt in found]
    words = ["morph", *pictures, "--prompts", *prompts, *FEW, "--output", "film"]
    answer = run_infer(words, place)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "film\n"
    runs = [next(place.glob(f"runs/learned/{Path(one).stem}-*")) for one in pictures]
    return Morphed(place, pictures, prompts, runs, place / "film", answer.stderr)


@pytest.fixture
def morphed(once, monkeypatch):
    monkeypatch.chdir(once.place)
    return once


def morph(cli, morphed, *words):
    answer = cli("infer", "morph", *morphed.pictures, "--prompts", *morphed.prompts, *FEW, *words)
    assert answer.status == 0, answer.err
    return Path(answer.out.rstrip("\n")), answer.err


def drawn(folder: Path) -> np.ndarray:
    files = sorted((folder / "frames").iterdir())
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def test_everything_is_written(morphed):
    names = {"frames", "strip.png", "morph.gif", "morph.json"}
    names |= {"morph.mp4"} if film.writes_mp4() else set()
    assert set(os.listdir(morphed.output)) == names
    assert sorted(os.listdir(morphed.output / "frames")) == [f"{n:03d}.png" for n in range(4)]
    pictures = drawn(morphed.output)
    assert pictures.shape == (4, 64, 64, 3)
    gif = Image.open(morphed.output / "morph.gif")
    frames_of_gif = [one.convert("RGB").copy() for one in ImageSequence.Iterator(gif)]
    assert len(frames_of_gif) == 4
    assert gif.info["duration"] == pytest.approx(1000 / 8, abs=10)
    small = np.asarray(frames_of_gif[1].resize((64, 64), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(small - pictures[1]).mean() < 5  # 256 colours
    told = json.loads((morphed.output / "morph.json").read_text())
    np.testing.assert_allclose(told["places"], [0, 1 / 3, 2 / 3, 1])
    assert told["prompts"] == morphed.prompts
    text = Image.open(morphed.output / "frames/001.png").text
    assert text["morph"] == f"{morphed.pictures[0]} to {morphed.pictures[1]} at 0.3333"
    assert str(morphed.place) not in str(text)


@pytest.mark.skipif(not film.writes_mp4(), reason="needs the extra `morph`")
def test_the_film_has_the_frames(morphed):
    import imageio.v2

    reader = imageio.v2.get_reader(morphed.output / "morph.mp4")
    shown = [np.asarray(one)[2::4, 2::4].astype(int) for one in reader]
    assert reader.get_meta_data()["fps"] == 8
    assert len(shown) == 4
    for one, other in zip(shown, drawn(morphed.output), strict=True):
        assert np.abs(one - other).mean() < 12


def test_it_says_first_what_it_will_do(morphed):
    first, second, third, fourth, *_ = morphed.said.splitlines()
    assert first == (
        f"morph {morphed.pictures[0]} into {morphed.pictures[1]} with tiny-sd: 4 frames of 64x64 "
        "px, 3 steps of DDIM, noises and embeddings interpolated, LoRAs of rank 16, learned and "
        "interpolated; into film"
    )
    assert second.startswith(f"learn {morphed.pictures[0]} as {morphed.prompts[0]!r}")
    assert third.startswith(f"learn {morphed.pictures[1]} as {morphed.prompts[1]!r}")
    assert fourth.startswith("this takes about ")
    assert re.search(r"the ends are [\d.]+ and [\d.]+ dB .*: |largest step", morphed.said)


def by_hand(morphed, a: float) -> np.ndarray:
    """The frame at `a`, by stock diffusers and NumPy: no code of ours."""
    model = Path(__file__).resolve().parents[2] / "data/tiny-sd"
    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, run in zip("ab", morphed.runs, strict=True):
        pipe.load_lora_weights(run, weight_name=LORA, adapter_name=name)
    options = {"timestep_spacing": "trailing", "clip_sample": False}
    there = DDIMInverseScheduler.from_config(pipe.scheduler.config, **options)
    back = DDIMScheduler.from_config(pipe.scheduler.config, **options)

    @torch.no_grad()
    def walk(scheduler, z, embeds):
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            z = scheduler.step(pipe.unet(z, t, embeds).sample, t, z).prev_sample
        return z

    noises, embeds = [], []
    for number in range(2):
        pipe.set_adapters(["a", "b"], [1.0 - number, float(number)])
        picture = Image.open(morphed.place / morphed.pictures[number]).convert("RGB")
        side = min(picture.size)
        assert picture.size == (side, side)
        pixels = np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS)) / 127.5 - 1
        image = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            z = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
            embeds.append(pipe.encode_prompt(morphed.prompts[number], "cpu", 1, False)[0])
        noises.append(walk(there, z, embeds[-1]))
    one, other = (noise.double().numpy().ravel() for noise in noises)
    phi = np.arccos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    noise = (np.sin((1 - a) * phi) * one + np.sin(a * phi) * other) / np.sin(phi)
    pipe.set_adapters(["a", "b"], [1 - a, a])
    z = torch.from_numpy(noise.reshape(noises[0].shape)).float()
    z = walk(back, z, (1 - a) * embeds[0] + a * embeds[1])
    with torch.no_grad():
        picture = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample[0]
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1, 3])
def test_a_frame_is_what_stock_diffusers_draws_of_both_loras(morphed, number):
    found = drawn(morphed.output)[number]
    wanted = by_hand(morphed, number / 3)
    assert np.abs(found - wanted).max() <= 2
    assert (np.abs(found - wanted) > 1).mean() < 0.01


def test_what_was_learned_is_kept(morphed, cli):
    output, said = morph(cli, morphed)
    assert (
        output
        == Path("morphed")
        / f"{morphed.output.parent.name and '-to-'.join(Path(p).stem for p in morphed.pictures)}"
    )
    for picture, run in zip(morphed.pictures, morphed.runs, strict=True):
        assert f"{picture} has been learned: {run.relative_to(morphed.place)}" in said
    assert "learn " not in said.splitlines()[1]
    np.testing.assert_array_equal(drawn(output), drawn(morphed.output))
    again, _ = morph(cli, morphed, "--frames", 3)  # beside it, not over it
    assert again == output.with_name(f"{output.name}-2")


def test_what_learn_has_learned_is_found(morphed):
    pictures = tuple(map(Path, morphed.pictures))
    job = plan_job(MorphConfig(model="tiny-sd", pictures=pictures, prompts=tuple(morphed.prompts)))
    flags = LearnConfig(model="tiny-sd")
    for lesson, picture, prompt in zip(job.lessons, pictures, morphed.prompts, strict=True):
        learned = recipe_of(flags, job.model, picture, prompt, flags.steps)
        assert lesson.recipe == learned
        assert lesson.run == learned.folder()


@pytest.mark.parametrize(
    "flag",
    [
        ["--adain"],
        pytest.param(["--attention", "1"], marks=pytest.mark.slow),
        ["--attention", "0.34"],
    ],
)
def test_refinements_change_what_is_between_the_ends_alone(morphed, cli, flag, tmp_path):
    output, said = morph(cli, morphed, *flag, "--output", tmp_path / "o")
    refined, plain = drawn(output), drawn(morphed.output)
    for end in (0, -1):
        assert np.abs(refined[end] - plain[end]).max() <= 1
    assert np.abs(refined[1:-1] - plain[1:-1]).max() > 1
    words = {"--adain": "AdaIN", "1": "attention to both ends for 3 steps",
             "0.34": "attention to both ends for 1 step,"}  # fmt: skip
    assert words[flag[-1]] in said.replace("; into", ",")


@pytest.mark.slow
def test_frames_are_respaced(morphed, cli, tmp_path):
    output, said = morph(cli, morphed, "--reschedule", "--output", tmp_path / "o")
    told = json.loads((output / "morph.json").read_text())
    before = json.loads((morphed.output / "morph.json").read_text())
    assert told["unevenness"] < before["unevenness"]
    assert told["places"] != before["places"]
    assert (told["places"][0], told["places"][-1], len(told["places"])) == (0, 1, 4)
    assert "spaced evenly" in said


def test_without_loras_the_model_draws(morphed, cli, tmp_path):
    words = (*MODEL, "--frames", 3, "--steps", 3, "--no-learn", "--output", tmp_path / "plain")
    answer = cli("infer", "morph", *morphed.pictures, "--prompts", *morphed.prompts, *words)
    assert answer.status == 0, answer.err
    assert "LoRA" not in answer.err
    assert np.abs(drawn(tmp_path / "plain")[0] - drawn(morphed.output)[0]).max() > 3


def test_sdxl_is_morphed_too(morphed, cli, tmp_path):
    words = ("--model", "tiny-xl", "--threads", 1, "--no-learn", "--frames", 3, "--steps", 2)
    output = tmp_path / "xl"
    answer = cli("infer", "morph", *morphed.pictures, "--prompts", *morphed.prompts, *words,
                 "--output", output)  # fmt: skip
    assert answer.status == 0, answer.err
    assert drawn(output).shape == (3, 64, 64, 3)


def test_without_imageio_there_is_no_mp4_and_a_note(morphed, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "writes_mp4", lambda: False)
    words = ("--no-learn", "--frames", 3, "--steps", 2, "--output", tmp_path / "o")
    answer = cli("infer", "morph", *morphed.pictures, "--prompts", *morphed.prompts, *MODEL, *words)
    assert answer.status == 0, answer.err
    output, said = tmp_path / "o", answer.err
    assert sorted(os.listdir(output)) == ["frames", "morph.gif", "morph.json", "strip.png"]
    assert "note: no MP4 is written, which needs pip install '.[morph]'" in said


def test_ctrl_c_leaves_no_half_of_it(morphed, cli, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    flags = ("--output", tmp_path / "out" / "film", "--frames", 3, "--steps", 2)
    for module, name, more in (
        (frames, "where_most_changes", ["--reschedule"]),
        (command, "write_strip", []),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            words = (*FEW, *flags, *more)
            answer = cli("infer", "morph", *morphed.pictures, "--prompts", *morphed.prompts, *words)
        assert answer.status == 130
        assert os.listdir(tmp_path / "out") == []


MISTAKES = [
    ([], 2, "which two pictures? For example: python -m infer morph cat.jpg dog.jpg --prompts"),
    (["a.jpg"], 2, "which two pictures?"),
    (["a.jpg", "b.jpg"], 2, "what do the two pictures show? Say both, as in: python -m infer"),
    (["a.jpg", "b.jpg", "--prompts", "a"], 2, "what do the two pictures show?"),
    (["a.jpg", "b.jpg", "--prompts", "a", "b"], 1, "picture a.jpg is not there; check the path"),
    (["A", "text.txt", "--prompts", "a", "b"], 1, "picture text.txt is no picture that can be"),
    (["A", "A", "--prompts", "a", "b", "--frames", "2"], 2, "--frames 2 must be at least 3"),
    (["A", "A", "--prompts", "a", "b", "--steps", "1001"], 1, "--steps 1001 must be 1 to 1000"),
    (["A", "A", "--prompts", "a", "b", "--attention", "1.5"], 2, "--attention 1.5 must be"),
    (["A", "A", "--prompts", "a", "b", "--no-learn", "--rank", "4"], 2,
     "--rank is of learning and means nothing beside --no-learn; leave it out"),
    (["A", "A", "--prompts", "a", "b", "--output", "text.txt/film"], 1, "path is a file"),
    (["A", "A", "--prompts", "a", "b", "--output", "."], 1, "is there already; remove it, or"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "status", "said"), MISTAKES)
def test_mistakes_are_told_in_one_line(cli, once, tmp_path, monkeypatch, words, status, said):
    whole = once.place / once.pictures[0]
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("no picture")
    words = [whole if word == "A" else word for word in words]
    answer = cli("infer", "morph", *words, *MODEL)
    assert answer.status == status, answer
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert said in answer.err
    assert os.listdir() == ["text.txt"]
