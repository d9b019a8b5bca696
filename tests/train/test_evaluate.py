"""`train evaluate`: the rows it writes, what they mean, and that the teacher is drawn only once."""

import dataclasses
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from shared.cache.conditioning import load_conditioning
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.models.vae import decode_latents, to_pixels
from train.config import DistillConfig, EvaluateConfig, SampleConfig
from train.evaluation import evaluate, teacher_results
from train.evaluation.artist import Artist, open_artist
from train.evaluation.heldout import load_heldout
from train.evaluation.score import Measures, Result, decode_all
from train.measures.frechet import Gaussian, frechet_distance
from train.measures.scorers import Scorer
from train.measures.shapes import features
from train.measures.space import open_space
from train.trainer.loop import distill
from train.trainer.setup import prepare

COLUMNS = {"sampler", "steps", "fd", "accuracy", "latent_mse", "high_frequency", "ms_per_image"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_cache, tiny_sd):
    folder = tmp_path_factory.mktemp("run")
    config = DistillConfig(
        model=str(tiny_sd), cache=tiny_cache, run=folder, train_batch_size=4, max_train_steps=2,
        lora_rank=4, learning_rate=1e-2, validation_steps=0, threads=1,
    )  # fmt: skip
    distill(prepare(config))
    return folder


@pytest.fixture
def held(tiny_cache, tmp_path):
    """A cache of one's own: the teacher's rows are kept in it."""
    shutil.copytree(tiny_cache, tmp_path / "held")
    return tmp_path / "held"


def with_rows(monkeypatch, teacher, student, tried: int) -> None:
    """The same table with fewer and shorter rows, for speed."""
    monkeypatch.setattr(evaluate, "REFERENCE", teacher[0])
    monkeypatch.setattr(teacher_results, "REFERENCE", teacher[0])
    monkeypatch.setattr(teacher_results, "SOLVER_SAMPLINGS", teacher[1:])
    monkeypatch.setattr(teacher_results, "TEACHER_SAMPLINGS", teacher)
    monkeypatch.setattr(teacher_results, "TRIED", tried)
    monkeypatch.setattr(evaluate, "STUDENT_SAMPLINGS", student)
    monkeypatch.setattr(evaluate, "TIMED", 2)


@pytest.fixture
def few_rows(monkeypatch):
    teacher = (("ddim", 4), ("ddim", 1), ("ddim", 2), ("dpmsolver++", 1), ("dpmsolver++", 2))
    with_rows(monkeypatch, teacher, (("student", 1), ("student", 2)), 5)


@pytest.fixture
def three_rows(monkeypatch):
    """Where it is not the rows that matter."""
    with_rows(monkeypatch, (("ddim", 2), ("ddim", 1)), (("student", 1),), 5)


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """A scorer that gives 1 where a caption has an even number of letters."""
    (tmp_path / "even_scorer.py").write_text(
        "import numpy as np\n"
        "def score(images, captions):\n"
        "    assert images.shape == (len(captions), 64, 64, 3) and images.dtype == np.uint8\n"
        "    return np.array([len(c) % 2 == 0 for c in captions], dtype=float)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "even_scorer:score"
    sys.modules.pop("even_scorer", None)


def evaluated(run, held, output, **more) -> dict:
    config = EvaluateConfig(
        run=run, eval_cache=held, num_samples=70, output=output, threads=1, **more
    )
    evaluate.evaluate(config)
    return json.loads((output / "evaluation.json").read_text())


def untimed(result: dict) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "ms_per_image"} for row in result["rows"]]


def test_rows_and_their_figures(run, held, tmp_path, few_rows, scorer, capsys):
    more = {"scorer": scorer, "guidance_scale": 3.0, "batch_size": 32}
    result = evaluated(run, held, tmp_path / "out", **more)
    rows = {(row["sampler"], row["steps"]): row for row in result["rows"]}
    assert list(rows) == [*teacher_results.TEACHER_SAMPLINGS, *evaluate.STUDENT_SAMPLINGS]
    assert all(set(row) >= COLUMNS for row in result["rows"])
    heldout = load_heldout(held, open_manifest(held), 70)
    share = np.mean([len(caption) % 2 == 0 for caption in heldout.captions])
    for (_, steps), row in rows.items():
        assert row["accuracy"] == pytest.approx(share)
        assert (row["latent_mse"] is None) == (steps != 1)
        assert row["fd"] > 0
        assert row["high_frequency"] > 0
        assert row["ms_per_image"] > 0
    assert rows["ddim", 4]["high_frequency"] == 1
    assert rows["student", 1]["ms_per_image"] < rows["ddim", 4]["ms_per_image"]
    assert (result["num_samples"], result["student"], result["scorer"]) == (70, "lora", scorer)
    assert result["guidance_scale"] == 3.0
    # The table as people read it, in the terminal and in the file.
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert table.splitlines()[0].split("|")[1].strip() == "sampler"
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + len(rows)
    assert table in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "out" / "evaluation.png"))
    assert picture.shape[2] == 3
    assert picture.std() > 5
    # 1-step latent errors and the student's latents, computed again in other batches.
    artist = (
        open_artist(run, SampleConfig(guidance_scale=3.0, threads=1, device="cpu"))
        .with_teacher(heldout.empty)
        .for_shape(heldout.shape)
    )
    artist = artist.with_spacings({("ddim", 1): rows["ddim", 1]["timestep_spacing"]})
    parts = [list(range(first, first + 14)) for first in range(0, 70, 14)]
    solution, single, student = (
        torch.cat([artist.draw(*what, heldout.texts[part], part) for part in parts])
        for what in (("ddim", 4), ("ddim", 1), ("student", 1))
    )
    error = float(((single - solution) ** 2).mean())
    assert rows["ddim", 1]["latent_mse"] == pytest.approx(error, rel=1e-3)
    error = float(((student - solution) ** 2).mean())
    assert rows["student", 1]["latent_mse"] == pytest.approx(error, rel=1e-3)
    assert rows["ddim", 1]["fd"] != rows["dpmsolver++", 2]["fd"]


@pytest.mark.slow
def test_without_a_scorer_accuracy_is_null_and_a_read_only_cache_is_no_obstacle(
    run, held, tmp_path, three_rows, capsys
):
    (held / "evaluations").write_text("in the way")
    result = evaluated(run, held, tmp_path / "out")
    assert "not kept for next time" in capsys.readouterr().out
    assert [row["accuracy"] for row in result["rows"]] == [None] * 3
    line = (tmp_path / "out" / "evaluation.md").read_text().splitlines()[2]
    assert line.split("|")[4].strip() == "-"


@pytest.mark.slow
def test_each_solver_has_its_best_spacing(run, held, tmp_path, few_rows, monkeypatch):
    monkeypatch.setattr(teacher_results, "TRIED", 70)
    result = evaluated(run, held, tmp_path / "out")
    heldout = load_heldout(held, open_manifest(held), 70)
    artist = (
        open_artist(run, SampleConfig(threads=1, device="cpu"))
        .with_teacher(heldout.empty)
        .for_shape(heldout.shape)
    )
    real = Gaussian.of(features(decode_all(artist, heldout.latents)))
    for row in result["rows"]:
        if row["sampler"] != "student" and row["steps"] != 4:
            what, distances = (row["sampler"], row["steps"]), {}
            for spacing in ("trailing", "leading", "linspace"):
                drawn = artist.with_spacings({what: spacing}).draw(*what, heldout.texts, range(70))
                images = decode_all(artist, drawn)
                distances[spacing] = frechet_distance(real, Gaussian.of(features(images)))
            assert row["fd"] == pytest.approx(min(distances.values()), rel=1e-3), what
            assert row["timestep_spacing"] == min(distances, key=distances.get)
            assert len(set(distances.values())) > 1


OTHER = [{"seed": 1}, {"guidance_scale": 4.0}, {"scorer": None}]


@pytest.mark.parametrize(
    "changes", [[], pytest.param(OTHER, marks=pytest.mark.slow)], ids=["none", "others"]
)
def test_the_second_evaluation_takes_over_the_teachers_rows(
    run, held, tmp_path, three_rows, scorer, monkeypatch, changes
):
    first = evaluated(run, held, tmp_path / "a", scorer=scorer)
    drawn = []
    draw = Artist.draw

    def watching(self, sampler, steps, texts, *more):
        drawn.append((sampler, len(texts)))
        return draw(self, sampler, steps, texts, *more)

    monkeypatch.setattr(Artist, "draw", watching)
    # What is kept is looked up, not recognised by chance: other conditions draw anew.
    (kept,) = (held / "evaluations").glob("*.json")
    stored = json.loads(kept.read_text())
    assert stored["rows"][0]["fd"] == first["rows"][0]["fd"]
    first["rows"][0]["fd"] = stored["rows"][0]["fd"] = 123456.0
    kept.write_text(json.dumps(stored))
    second = evaluated(run, held, tmp_path / "b", scorer=scorer)
    assert untimed(first) == untimed(second)
    large = {sampler for sampler, count in drawn if count > evaluate.SHOWN}
    assert large == {"student"}
    for change in changes:
        more = {"scorer": scorer} | change
        assert evaluated(run, held, tmp_path / "e", **more)["rows"][0]["fd"] != 123456


def test_the_teachers_rows_are_of_one_seed_guidance_and_scorer(tmp_path, held):
    def key(
        guidance_scale=3.0, teacher="a", space=None, scorer=None, precision_recall=False, **more
    ) -> str:
        config = EvaluateConfig(run=tmp_path, **more)
        artist = SimpleNamespace(guidance_scale=guidance_scale)
        measures = Measures(space or open_space(), scorer, precision_recall)
        return teacher_results.reference_key(config, held, 8, artist, teacher, measures)

    scorers = [Scorer("a:b", "accuracy", len), Scorer("a:b", "accuracy", len, weights="c")]
    spaces = [replace(open_space(), name="d"), replace(open_space(), name="d", weights="e")]
    others = [key(seed=1), key(4.0), key(num_samples=70), key(teacher="b")]
    others += [key(scorer=one) for one in scorers] + [key(space=one) for one in spaces]
    others.append(key(precision_recall=True))
    assert key() == key()
    assert len({key(), *others}) == 10


def test_heldout_is_read_in_order_and_scaled(tiny_cache):
    manifest = open_manifest(tiny_cache)
    heldout = load_heldout(tiny_cache, manifest, 1000)
    assert len(heldout) == 72
    assert heldout.shape == (4, 8, 8)
    layout = manifest.layouts[0]
    shard = (tiny_cache / manifest.shards[0].file).read_bytes()
    for number in (0, 41):
        part = shard[number * layout.stride : (number + 1) * layout.stride]
        _, record, arrays = layout.unpack(part)
        assert heldout.captions[number] == record["captions"][0]
        scale = manifest.identity.vae.scaling_factor
        wanted = torch.from_numpy(arrays["latents"][0, :4].astype(np.float32)) * scale
        torch.testing.assert_close(heldout.latents[number], wanted)
        text = torch.from_numpy(arrays["prompt_embeds"][0].copy())
        assert torch.equal(heldout.texts.prompt_embeds[number], text)
    empty = load_conditioning(CachePaths(tiny_cache).conditioning).unconditional
    assert torch.equal(heldout.empty.prompt_embeds, empty.prompt_embeds)


@pytest.mark.parametrize(
    ("side", "drawn", "decoded"),
    [(8, 100, 25), (32, 64, 16), (64, 16, 4), (128, 4, 1), (300, 1, 1)],
)
def test_as_many_pictures_at_once_as_a_gpu_has_room_for(tmp_path, side, drawn, decoded):
    config = EvaluateConfig(run=tmp_path, eval_cache=tmp_path)
    assert evaluate.pictures_at_once(config, (4, side, side)) == drawn
    asked = dataclasses.replace(config, batch_size=7)
    assert evaluate.pictures_at_once(asked, (4, side, side)) == 7
    seen = []

    def decode(latents):
        seen.append(len(latents))
        return SimpleNamespace(sample=latents[:, :3])

    vae = SimpleNamespace(decode=decode, device=torch.device("cpu"), dtype=torch.float32)
    latents = torch.rand(26, 4, side, side) * 2 - 1
    assert np.array_equal(decode_latents(vae, latents), to_pixels(latents[:, :3]))
    assert max(seen) == decoded
    assert sum(seen) == 26


def test_too_few_pictures_are_refused(tiny_xl_cache, tiny_cache):
    for cache, count in ((tiny_xl_cache, 1000), (tiny_cache, 64)):
        with pytest.raises(UserError, match="needs at least 65"):
            load_heldout(cache, open_manifest(cache), count)


@pytest.mark.slow
def test_the_whole_table_from_the_command_line(run, held, tmp_path, cli):
    answer = cli("train", "evaluate", "--run", run, "--eval-cache", held, "--num-samples", 70,
                 "--scorer", "data.oracle:score", "--output", tmp_path, "--threads", 1)  # fmt: skip
    assert answer.status == 0, answer.err
    result = json.loads((tmp_path / "evaluation.json").read_text())
    teacher = [("ddim", 50), *[(s, n) for s in ("ddim", "dpmsolver++") for n in (1, 2, 4, 8)]]
    wanted = [*teacher, *[("student", n) for n in (1, 2, 4, 8)]]
    assert [(row["sampler"], row["steps"]) for row in result["rows"]] == wanted
    assert all(0 <= row["accuracy"] <= 1 for row in result["rows"])
    solution = load_file(next((held / "evaluations").glob("*.safetensors")))["solution"]
    assert solution.shape == (70, 4, 8, 8)
    assert dataclasses.asdict(Result(**result["rows"][0])) == result["rows"][0]
