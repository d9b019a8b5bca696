"""`prep teach`: the teacher's answers are what it says, asked once, and never lost."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from prep.config import TeachConfig
from prep.teach import command
from prep.teach.command import teach
from prep.teach.teacher import Teacher
from shared.cache.answers import answers_spec
from shared.cache.answers_store import open_answers
from shared.cache.conditioning import load_conditioning
from shared.cache.draws import answer_generator, choose, draw_noises
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.diffusion import add_noise
from shared.errors import UserError
from shared.networks.denoiser import load_schedule
from tests.support import warm
from tests.support.sources import (
    ROOT,
    TINY_SD,
    TINY_XL,
    captioned,
    encode,
    prep,
    tree,
    write_tar,
)


def ask(cache: Path, answers: int = 2, **flags) -> None:
    teach(TeachConfig(cache=cache, answers=answers, threads=1, batch_size=4, **flags))


def answers_in(cache: Path) -> dict[str, np.ndarray]:
    """Each sample's answers `[K, 2, C, h, w]`, read as any tar."""
    found = {}
    for file in sorted((cache / "answers" / "shards").glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".answers.npy"):
                    key = member.name.removesuffix(".answers.npy")
                    found[key] = np.load(io.BytesIO(tar.extractfile(member).read()))
    return found


def copied(values) -> torch.Tensor:
    return torch.from_numpy(np.array(values))


def files(cache: Path) -> dict[str, bytes]:
    """The answers' files that count: those that the manifest names, and the records."""
    root = cache / "answers"
    named = [root / shard.file for shard in open_answers(cache).shards]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in [*named, root / "manifest.json", *sorted((root / "units").iterdir())]
    }


@pytest.fixture
def cache(tmp_path) -> Path:
    """Two tars of five and four pictures for tiny-sd."""
    tars = [write_tar(tmp_path / "a.tar", captioned(range(5))),
            write_tar(tmp_path / "b.tar", captioned(range(5, 9)))]  # fmt: skip
    return encode(tars, tmp_path / "cache")


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many questions each call of the teacher had."""
    seen, real = [], Teacher.ask

    def counted(self, questions, empty):
        seen.append(len(questions))
        return real(self, questions, empty)

    monkeypatch.setattr(Teacher, "ask", counted)
    return seen


@pytest.mark.parametrize("model", [TINY_SD, TINY_XL], ids=["sd", "xl"])
def test_answers_are_the_teachers_outputs(tmp_path, model):
    """Computed again with diffusers' UNet alone, one sample at a time."""
    views = {"views": 2, "random_crop": True, "max_captions": 2, "latents": "posterior"}
    source = write_tar(tmp_path / "a.tar", captioned(range(3)))
    cache = encode(source, tmp_path / "cache", model=str(model), **views)
    ask(cache, answers=3, num_ddim_timesteps=10)
    manifest = open_manifest(cache)
    answers = open_answers(cache, manifest)
    assert (answers.answers, answers.without) == (3, 0)
    spec = answers_spec(answers.identity, manifest.identity)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
    schedule = load_schedule(str(model))
    empty = load_conditioning(CachePaths(cache).conditioning).unconditional
    [shard] = manifest.shards
    stored = answers_in(cache)
    for number in range(3):
        key, record, arrays = shard.layout.read(cache / shard.file, number)
        for k in range(3):
            rng = answer_generator(spec, key, k)
            choice = choose(spec, rng, record["num_captions"])
            noise = np.empty((4, 8, 8), np.float32)
            eps = draw_noises(spec, rng, noise)
            mean, logvar = np.split(arrays["latents"][choice.view].astype(np.float32), 2)
            x0 = (mean + np.exp(0.5 * logvar) * eps) * manifest.identity.vae.scaling_factor
            t = torch.tensor([(choice.index + 1) * 100 - 1])
            z = add_noise(
                torch.from_numpy(x0)[None], torch.from_numpy(noise)[None], *schedule.alpha_sigma(t)
            )
            for half, text in enumerate((arrays, empty)):
                row = choice.caption if text is arrays else 0
                prompt = copied(arrays["prompt_embeds"] if text is arrays else empty.prompt_embeds)[
                    row : row + 1
                ].float()
                added = None
                if model == TINY_XL:
                    pooled = copied(
                        arrays["pooled_prompt_embeds"]
                        if text is arrays
                        else empty.pooled_prompt_embeds
                    )[row : row + 1].float()
                    ids = copied(arrays["time_ids"])[choice.view][None].float()
                    added = {"text_embeds": pooled, "time_ids": ids}
                with torch.no_grad():
                    wanted = unet(z, t, prompt, added_cond_kwargs=added).sample[0]
                found = torch.from_numpy(stored[key][k, half]).float()
                torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_new_pictures_ask_for_their_own_answers_and_no_more(cache, tmp_path, asked):
    ask(cache)
    assert sum(asked) == 9 * 2
    asked.clear()
    tars = [write_tar(tmp_path / "a.tar", captioned(range(5))),
            write_tar(tmp_path / "b.tar", captioned([5, 6, 7, 8, 20, 21, 22]))]  # fmt: skip
    encode(tars, cache)
    with pytest.raises(UserError, match=r"has changed since its answers .* `prep teach` again"):
        open_answers(cache, open_manifest(cache))
    ask(cache)
    assert sum(asked) == 3 * 2
    fresh = encode(tars, tmp_path / "fresh")
    ask(fresh)
    assert files(cache) == files(fresh)


def test_a_picture_or_caption_that_changes_is_asked_again(cache, tmp_path, asked):
    ask(cache)
    asked.clear()
    changed = captioned(range(5))
    changed[1] = (changed[1][0], b"another caption")
    write_tar(tmp_path / "a.tar", changed)
    encode([tmp_path / "a.tar", tmp_path / "b.tar"], cache)
    ask(cache)
    assert sum(asked) == 2


def test_more_answers_are_added_and_fewer_change_nothing(cache, tmp_path, asked, capsys):
    whole = Path(shutil.copytree(cache, tmp_path / "whole"))
    ask(cache, answers=1)
    ask(cache, answers=3)
    assert sum(asked) == 9 * 3
    ask(whole, answers=3)
    assert files(cache) == files(whole)
    before = tree(cache)
    asked.clear()
    ask(cache, answers=2)
    assert not asked
    assert tree(cache) == before
    assert "3 answers of each sample are there, and stay" in capsys.readouterr().err


def test_parts_together_are_the_whole(cache, tmp_path, capsys):
    whole = Path(shutil.copytree(cache, tmp_path / "whole"))
    ask(cache, part="1/2")
    assert "1 unit left to the other parts" in capsys.readouterr().out
    assert open_answers(cache) is None
    ask(cache, part="0/2")
    ask(whole)
    assert files(cache) == files(whole)


def test_batches_of_any_filling_give_the_same_answers(cache):
    """An answer does not depend on its neighbours, so adding is not told from asking at once."""
    ask(cache, answers=3)
    together = answers_in(cache)
    shutil.rmtree(cache / "answers")
    for count in (1, 2, 3):
        ask(cache, answers=count)
    newest = {shard.file for shard in open_answers(cache).shards}
    for file in (cache / "answers" / "shards").iterdir():
        if f"shards/{file.name}" not in newest:
            file.unlink()
    apart = answers_in(cache)
    assert all(np.array_equal(together[key], apart[key]) for key in together)


def test_what_is_not_finite_is_asked_in_fp32_then_left_out(cache, monkeypatch, capsys):
    real = Teacher._forward
    broken = {"bf16": [1, 2], "no": [0]}  # of a batch in bf16 two, of which fp32 mends one
    calls = []

    def overflowing(self, unet, mixed_precision, questions, empty):
        found = real(self, unet, mixed_precision, questions, empty)
        calls.append(mixed_precision)
        first = calls.count(mixed_precision) == 1
        for n in broken[mixed_precision] if first else []:
            found[n] = np.inf
        return found

    ask(cache, dry_run=True, answers=1)  # which measures, and keeps nothing
    monkeypatch.setattr(Teacher, "_forward", overflowing)
    monkeypatch.setattr(Teacher, "seconds", lambda *_: 1.0)
    ask(cache, answers=1, mixed_precision="bf16")
    answers = open_answers(cache)
    assert calls.count("no") == 2
    assert answers.retried == 2
    assert [shard.without for shard in answers.shards] == [(1,), ()]
    out = capsys.readouterr().out
    assert "1 sample without" in out
    assert "answer" in out
    said = prep("stats", "--cache", cache).out
    assert "1 of each sample by" in said
    assert "1 sample without" in said


def test_other_settings_are_refused_in_one_line(cache, tmp_path):
    ask(cache, answers=1)
    other = Path(shutil.copytree(TINY_SD, tmp_path / "other"))
    unet = UNet2DConditionModel.from_pretrained(other, subfolder="unet")
    with torch.no_grad():
        unet.conv_in.bias.neg_()
    unet.save_pretrained(other / "unet")
    for flags, what in (
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"num_ddim_timesteps": 25}, "num_ddim_timesteps is 50 there, 25 here"),
        ({"model": str(other)}, r"teacher is [0-9a-f]{16} there, [0-9a-f]{16} here"),
        ({"num_ddim_timesteps": 37}, "--num-ddim-timesteps 37 must divide 1000"),
    ):
        with pytest.raises(UserError, match=what) as error:
            ask(cache, answers=2, **flags)
        assert "\n" not in str(error.value)
    scheduler = other / "scheduler" / "scheduler_config.json"
    shutil.rmtree(other / "unet")
    shutil.copytree(TINY_SD / "unet", other / "unet")
    stored = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(stored | {"beta_end": 0.02}))
    with pytest.raises(UserError, match=r"schedule\.beta_end is 0\.0\d+ there, 0\.02 here"):
        ask(cache, answers=2, model=str(other))


def test_an_unfinished_cache_and_a_cache_that_is_none_are_refused(cache, tmp_path):
    with pytest.raises(UserError, match="is not a cache"):
        ask(tmp_path / "nothing")
    (cache / "manifest.json").unlink()
    with pytest.raises(UserError, match="is unfinished"):
        ask(cache)


def test_two_at_once_end_with_the_same_files(cache, tmp_path):
    """Real processes, which may do the same unit at the same time."""
    alone = Path(shutil.copytree(cache, tmp_path / "alone"))
    ask(alone)
    words = ["-m", "prep", "teach", "--cache", cache, "--answers", 2, "--threads", 1,
             "--batch-size", 4]  # fmt: skip
    both = [warm.start(words, ROOT, OMP_NUM_THREADS="1") for _ in range(2)]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert files(cache) == files(alone)


def test_what_another_takes_away_meanwhile_is_one_line(cache, monkeypatch):
    real = command.run_units

    def then_lose_a_record(*args):
        done = real(*args)
        next((cache / "answers" / "units").iterdir()).unlink()
        return done

    monkeypatch.setattr(command, "run_units", then_lose_a_record)
    with pytest.raises(UserError, match=r"another process has changed 1 unit .* `prep teach`"):
        ask(cache)
