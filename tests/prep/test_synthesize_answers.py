"""`prep synthesize --answers`: what the solver's own steps compute is kept, and never lost."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from shared.cache.answers_store import open_answers
from shared.cache.conditioning import load_conditioning
from shared.cache.paths import CachePaths
from shared.networks import sampling
from tests.support.drawn import CAPTIONS, draw, lines, model_that_predicts, stored
from tests.support.sources import TINY_SD, TINY_XL, manifest, prep, refusal, tree, units

PROMPTS = "conditioning.safetensors"  # which has the first captions that there ever were


def intervals_of(seed, key, steps):
    """The order of a sample's answers, written anew."""
    return np.random.Generator(np.random.Philox(key=[seed, int(key, 16)])).permutation(steps)


def abar(t):
    """Of the tiny models' scaled linear schedule."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)[t]


def relative(found, wanted):
    return np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Ten captions, each drawn twice in four steps, of which two are kept; two units."""
    folder = tmp_path_factory.mktemp("kept")
    source = lines(folder / "captions.txt", CAPTIONS)
    draw(source, folder / "cache", **FLAGS)
    return source, folder / "cache"


FLAGS = {"per_caption": 2, "folder_units": 2, "steps": 4, "answers": 2}


@pytest.fixture
def cache(kept, tmp_path):
    return shutil.copytree(kept[1], tmp_path / "cache")


@pytest.mark.parametrize(
    ("model", "prediction"),
    [
        pytest.param(TINY_SD, "epsilon", marks=pytest.mark.slow),
        (TINY_SD, "v_prediction"),
        (TINY_XL, "epsilon"),
    ],
    ids=["eps", "v", "xl"],
)
def test_answers_are_what_the_teacher_says_at_the_points_of_the_solver(tmp_path, model, prediction):
    """With diffusers' UNet alone, one sample at a time; the last step gives the sample."""
    model, steps, scale = model_that_predicts(model, prediction, tmp_path), 4, 3.0
    cache, source = tmp_path / "cache", lines(tmp_path / "c.txt", CAPTIONS[:3])
    draw(source, cache, model=str(model), sampler="ddim", steps=steps, answers=steps, seed=5,
         guidance_scale=scale)  # fmt: skip
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
    scaling = json.loads((model / "vae/config.json").read_text())["scaling_factor"]
    empty = load_conditioning(CachePaths(cache).conditioning).unconditional

    @torch.no_grad()
    def asked(z, t, text, pooled, ids):
        added = None if pooled is None else {
            "text_embeds": torch.tensor(pooled).float(), "time_ids": torch.tensor(ids).float()
        }  # fmt: skip
        states = torch.tensor(np.array(text)).float()
        z = torch.tensor(z[None]).float()
        return unet(z, torch.tensor([t]), states, added_cond_kwargs=added).sample[0].numpy()

    found = stored(cache)
    assert len(found) == 3
    for key, (record, arrays, answers, about) in found.items():
        assert about["of"] == record["crc32"]
        order = intervals_of(5, key, steps).tolist()
        assert sorted(order) == list(range(steps))
        pooled, ids = arrays.get("pooled_prompt_embeds"), arrays.get("time_ids")
        none = None if pooled is None else empty.pooled_prompt_embeds.numpy()
        for interval, (cond, uncond, z) in zip(order, answers, strict=True):
            t = (interval + 1) * 1000 // steps - 1
            assert relative(cond, asked(z, t, arrays["prompt_embeds"], pooled, ids)) < 2e-3
            assert relative(uncond, asked(z, t, empty.prompt_embeds, none, ids)) < 2e-3
        first = answers[order.index(steps - 1)][2]
        digest = hashlib.sha256(f"5\0{0}\0{record['captions'][0]}".encode()).hexdigest()
        noise = torch.Generator().manual_seed(int(digest[:16], 16) >> 1)
        np.testing.assert_array_equal(first, torch.randn(4, 8, 8, generator=noise).half().numpy())
        cond, uncond, z = answers[order.index(0)].astype(np.float64)
        said, a, s = uncond + scale * (cond - uncond), abar(249) ** 0.5, (1 - abar(249)) ** 0.5
        x0, eps = (z - s * said) / a, said
        if prediction == "v_prediction":
            x0, eps = a * z - s * said, a * said + s * z
        last = abar(0) ** 0.5 * x0 + (1 - abar(0)) ** 0.5 * eps  # set_alpha_to_one is false
        assert relative(last / scaling, arrays["latents"][0].astype(np.float64)) < 3e-3


def test_keeping_answers_changes_no_sample(kept, tmp_path):
    source, cache = kept
    draw(source, tmp_path / "plain", **{**FLAGS, "answers": 0})
    plain, ours = tree(tmp_path / "plain"), tree(cache)
    same = {name for name in plain if name.startswith(("shards/", "units/", "samples/"))}
    assert len(same) == 6
    assert {name: ours[name] for name in same} == {name: plain[name] for name in same}
    assert "answers" not in json.loads((tmp_path / "plain/identity.json").read_text())["drawn"]
    assert not (tmp_path / "plain/answers").exists()
    for key, (_, _, answers, _) in stored(cache).items():
        assert answers.shape == (2, 3, 4, 8, 8)
        assert len(set(intervals_of(0, key, 4)[:2])) == 2


def test_parts_and_a_second_run_give_the_same_bytes(kept, tmp_path):
    source, cache = kept
    for part in ("1/2", "0/2"):
        draw(source, tmp_path / "cache", part=part, **FLAGS)
        assert not (tmp_path / "cache/answers/manifest.json").exists()
    said = prep("finish", "--cache", tmp_path / "cache", "--no-report")
    assert said.status == 0
    assert said.out.strip().endswith("; 2 answers of each")
    assert tree(tmp_path / "cache") == tree(cache)
    assert draw(source, tmp_path / "cache", **FLAGS).startswith("nothing had to be drawn")
    assert tree(tmp_path / "cache") == tree(cache)


def test_only_what_is_new_is_drawn_and_the_rest_keeps_its_answers(tmp_path):
    cache, flags = tmp_path / "cache", {**FLAGS, "folder_units": 1}
    source = lines(tmp_path / "captions.txt", CAPTIONS)
    draw(source, cache, **flags)
    former = set((cache / "answers/shards").iterdir())
    lines(source, ["something new", *CAPTIONS[2:], CAPTIONS[2]])  # two gone, one twice
    said = draw(source, cache, **flags)
    assert said.startswith("4 samples drawn, 1 caption encoded, 16 samples copied")
    draw(source, tmp_path / "anew", **flags)
    assert former < set((cache / "answers/shards").iterdir())
    assert prep("gc", "--cache", cache, "--all").status == 0
    assert tree(cache, PROMPTS) == tree(tmp_path / "anew", PROMPTS)
    draw(source, cache, **{**flags, "folder_units": 2})  # other units, nothing new
    draw(source, tmp_path / "cut", **{**flags, "folder_units": 2})
    assert prep("gc", "--cache", cache, "--all").status == 0
    assert tree(cache, PROMPTS) == tree(tmp_path / "cut", PROMPTS)


def test_answers_that_are_damaged_or_gone_are_made_again(kept, cache):
    source, whole = kept[0], tree(kept[1])
    shard = open_answers(cache).shards[0]
    path = cache / "answers" / shard.file
    content = bytearray(path.read_bytes())
    content[shard.layout.offsets["answers"]] ^= 1
    path.write_bytes(content)
    unit = next(iter(sorted((cache / "answers/units").iterdir())))
    unit.unlink()  # or the damage would not be looked at
    said = draw(source, cache, **FLAGS)
    assert said.startswith(f"1 sample drawn, 0 captions encoded, {shard.count - 1} samples copied")
    assert tree(cache) == whole
    path.unlink()
    said = draw(source, cache, **FLAGS)
    assert said.startswith(f"{shard.count} samples drawn, 0 captions encoded")
    assert tree(cache) == whole
    shutil.rmtree(cache / "answers")
    assert prep("finish", "--cache", cache, "--no-report").status == 0  # goes without
    assert not (cache / "answers").exists()
    assert draw(source, cache, **FLAGS).startswith("20 samples drawn, 0 captions encoded")
    assert tree(cache) == whole


def test_finish_does_not_fold_without_the_answers_of_a_unit(cache):
    unit = next(iter(sorted((cache / "answers/units").iterdir())))
    unit.unlink()
    said = refusal("finish", "--cache", cache, "--no-report")
    assert said == (
        f"{cache}: the answers of 1 unit are missing (first: {unit.stem}); run the same `prep "
        f"synthesize` again, or delete {cache}/answers"
    )


def test_what_is_beyond_fp16_is_drawn_again_and_else_goes_without(tmp_path, monkeypatch):
    """Outputs of 60,000 and 90,000 that guidance 3 makes zero: the sample itself is sound."""
    plain, alone = sampling.cond_and_uncond, []

    def spoiled(unet, z, t, text, empty, time_ids):
        cond, uncond = (one.clone() for one in plain(unet, z, t, text, empty, time_ids))
        alone.extend([t] * (len(z) == 1))
        beyond = [1, 2] if len(z) == 4 else [0] if len(alone) > 2 else []  # two steps a sample
        cond[beyond], uncond[beyond] = 6e4, 9e4
        return cond, uncond

    monkeypatch.setattr(sampling, "cond_and_uncond", spoiled)
    cache = tmp_path / "cache"
    said = draw(lines(tmp_path / "c.txt", CAPTIONS[:3]), cache, mixed_precision="bf16", answers=2)
    assert said.strip().endswith("; 2 answers of each, of 1 sample none")
    assert len(alone) == 4
    assert manifest(cache)["totals"]["written"] == 3
    answers = open_answers(cache)
    assert (answers.without, answers.retried) == (1, 4)
    [shard] = answers.shards
    for number, (record, _, values, about) in enumerate(stored(cache).values()):
        again = record["captions"][0] in CAPTIONS[1:3]
        assert about.get("retried", []) == ([0, 1] if again else [])
        assert (number in shard.without) == (not values.any())
    assert np.isfinite(values).all()
    assert next(iter(units(cache).values()))["notes"] == {"fp32_retries": 2}
    assert prep("verify", "--cache", cache).status == 0


MISTAKES = [
    (["--answers", 3], "--answers 3: each step of the solver gives one, and there are 2; give "
     "fewer answers or more --steps"),
    (["--answers", 1, "--guidance-scale", 1], "--answers needs the output without a caption, which "
     "--guidance-scale 1 does not compute; give another, or leave out --answers"),
    (["--answers", 1, "--steps", 30], "--steps 30 must divide 1000, the timesteps of the teacher, "
     "for --answers; the nearest that does is 25"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, words, message):
    source = lines(tmp_path / "c.txt", CAPTIONS[:1])
    said = refusal("synthesize", "--captions", source, "--model", "tiny-sd", "--cache",
                   tmp_path / "cache", "--threads", 1, "--steps", 2, *words)  # fmt: skip
    assert said == message
    assert not (tmp_path / "cache").exists()


def test_timesteps_that_training_does_not_know_are_refused(tmp_path):
    model = shutil.copytree(TINY_SD, tmp_path / "model")
    path = model / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_karras_sigmas": True}))
    said = refusal("synthesize", "--captions", lines(tmp_path / "c.txt", CAPTIONS[:1]), "--model",
                   model, "--cache", tmp_path / "cache", "--steps", 4, "--answers", 1)  # fmt: skip
    assert said.startswith("--answers: dpmsolver++ with this model's scheduler_config.json takes")


def test_settings_do_not_mix(kept, cache):
    source, _ = kept
    words = ("synthesize", "--captions", source, "--model", "tiny-sd", "--cache", cache, "--steps",
             4, "--threads", 1, "--per-caption", 2, "--folder-units", 2, "--no-report")  # fmt: skip
    for count in (0, 1):
        said = refusal(*words, "--answers", count)
        there = f"drawn.answers is 2 there, {count} here"
        assert said.startswith(f"{cache} was made with other settings: {there}")
    said = refusal("teach", "--cache", cache)
    assert said == (
        f"{cache}/answers holds answers that were kept while the samples were drawn (`prep "
        "synthesize --answers`), and others do not mix with them; delete that folder to ask the "
        "teacher anew"
    )
    shutil.rmtree(cache / "answers")
    asked = ("teach", "--cache", cache, "--answers", 1, "--threads", 1)
    assert prep(*asked).status == 0
    assert "trajectory" not in json.loads((cache / "answers/identity.json").read_text())
    assert prep("finish", "--cache", cache, "--no-report").status == 0
    said = refusal(*words, "--answers", 2)
    assert said.startswith(f"{cache}/answers holds answers of other settings: ")
