"""The search for copies: training samples nearest to what was drawn, as a sheet and in words."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cache.manifest import open_manifest
from shared.errors import UserError
from shared.models.vae import load_vae
from train.config import EvaluateConfig
from train.evaluation import nearest
from train.evaluation.heldout import load_heldout
from train.evaluation.nearest import (
    Training,
    check_copies,
    nearest_samples,
    open_training,
    told,
)


@pytest.fixture
def artist(tiny_cache, tiny_sd):
    """Of a run that was trained on the cache."""
    config = SimpleNamespace(cache=tiny_cache, max_train_samples=None)
    return SimpleNamespace(
        config=config, vae=load_vae(str(tiny_sd)), device=torch.device("cpu"),
        check_cache=lambda *_: None,
    )  # fmt: skip


@pytest.fixture
def heldout(tiny_cache):
    return load_heldout(tiny_cache, open_manifest(tiny_cache), 70)


@pytest.fixture
def training(artist, heldout):
    return open_training(EvaluateConfig(nearest_samples=3), artist, heldout)


@pytest.mark.parametrize("block", [2**24, 2000])
def test_the_nearest_is_found_wherever_it_lies(training, heldout, monkeypatch, block):
    """Against all distances in float64, samples read all at once or a few at a time."""
    monkeypatch.setattr(nearest, "BLOCK", block)
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((5, *heldout.shape)).astype(np.float32))
    asked = torch.cat([heldout.latents[:10] + 0.05 * noise[:1], noise])
    samples, views, gaps = nearest_samples(asked, training, torch.device("cpu"))
    every = training.latents(range(len(training))).double().numpy()
    assert every.shape[:2] == (72, 1)
    differences = asked.double().numpy()[:, None] - every[None, :, 0]
    distances = np.sqrt((differences**2).mean((2, 3, 4)))
    np.testing.assert_array_equal(samples, distances.argmin(1))
    np.testing.assert_allclose(gaps, distances.min(1), rtol=1e-5)
    assert not views.any()
    assert gaps[:10].max() < 0.1 < gaps[10:].min()


class InMemory(Training):
    """Samples of several views that are in no cache."""

    def __init__(self, every: torch.Tensor) -> None:
        object.__setattr__(self, "every", every)

    def __len__(self) -> int:
        return len(self.every)

    def latents(self, numbers) -> torch.Tensor:
        return self.every[list(numbers)]

    def blocks(self):
        return (range(start, min(start + 4, len(self))) for start in range(0, len(self), 4))


def test_every_view_of_a_sample_is_looked_at():
    rng = np.random.default_rng(2)
    every = torch.from_numpy(rng.standard_normal((10, 3, 4, 2, 2)).astype(np.float32))
    wanted = [(0, 0), (3, 2), (4, 1), (9, 2)]
    asked = torch.stack([every[sample, view] for sample, view in wanted]) + 0.01
    samples, views, gaps = nearest_samples(asked, InMemory(every), torch.device("cpu"))
    assert list(zip(samples, views, strict=True)) == wanted
    np.testing.assert_allclose(gaps, 0.01, rtol=1e-4)


def test_copies_are_shown_first_and_told(training, heldout, artist, tmp_path):
    """Five of twenty drawn pictures are training samples but for a little noise."""
    rng = np.random.default_rng(1)
    noise = torch.from_numpy(rng.standard_normal((20, *heldout.shape)).astype(np.float32))
    drawn = 2 * noise
    drawn[5:10] = heldout.latents[30:35] + 0.01 * noise[5:10]
    others = replace(heldout.first(20), latents=0.5 * noise)
    found = check_copies(tmp_path, 5, drawn, 4, others, training, artist)
    assert (found.steps, found.searched, found.near) == (4, 72, 5)
    assert found.drawn > found.heldout
    assert found.ratio == pytest.approx(found.drawn / found.heldout)
    text = told(found, 20)
    assert "of 72 training samples" in text
    assert "5 of 20 drawn pictures lie nearer than 99 of 100 held-out ones" in text
    # Beside each drawn picture its sample: of copies the same but for the noise.
    sheet = np.asarray(Image.open(tmp_path / "evaluation-nearest.png")).astype(int)
    for row in range(5):
        top = 34 + row * (128 + 22)
        left, right = (sheet[top : top + 128, start : start + 128] for start in (4, 136))
        assert np.abs(left - right).mean() < 3
        assert left.std() > 5


def test_held_out_pictures_that_were_trained_on_tell_nothing(training, heldout, artist, tmp_path):
    same = heldout.first(10)
    found = check_copies(tmp_path, 1, same.latents, 4, same, training, artist)
    assert (found.drawn, found.heldout, found.ratio) == (0, 0, None)
    assert "nothing can be told" in told(found, 10)


def test_samples_of_another_size_are_no_help(artist, heldout):
    other = replace(heldout, latents=torch.zeros(70, 4, 16, 16))
    with pytest.raises(UserError, match=r"--nearest-samples: .* latents of 16 x 16"):
        open_training(EvaluateConfig(nearest_samples=3), artist, other)
    artist.config.max_train_samples = 10
    assert len(open_training(EvaluateConfig(nearest_samples=3), artist, heldout)) == 10
