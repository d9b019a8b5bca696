"""What lies between two pictures, against float64 NumPy; and frames spaced by what changes."""

import numpy as np
import pytest
import torch
from torch import nn

from infer.morph.attention import blending, keeping
from infer.morph.interpolate import adain, between, lerp, slerp
from infer.morph.spacing import distances, evenest, evenly, unevenness, where_most_changes
from infer.pipelines.inversion import Prompt, psnr


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (1, 4, 8, 8)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("a", [0.0, 0.3, 0.5, 1.0])
def test_slerp_goes_along_the_great_circle(a):
    first, last = noise(1), 1.7 * noise(2)
    one, other = (t.double().numpy().ravel() for t in (first, last))
    phi = np.arccos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    wanted = (np.sin((1 - a) * phi) * one + np.sin(a * phi) * other) / np.sin(phi)
    np.testing.assert_allclose(slerp(first, last, a).numpy().ravel(), wanted, atol=1e-6)


def test_noise_stays_as_long_on_the_way_as_at_its_ends():
    first, last = noise(1), noise(2)
    first, last = first / first.norm(), last / last.norm()
    assert slerp(first, last, 0.5).norm().item() == pytest.approx(1, abs=1e-6)
    assert lerp(first, last, 0.5).norm().item() < 0.75


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_slerp_between_noises_of_one_direction_is_a_straight_line(factor):
    first = noise(1)
    torch.testing.assert_close(slerp(first, factor * first, 0.25), (0.75 + factor / 4) * first)


def test_adain_gives_each_channel_the_statistics_in_between():
    first, last, a = 2 * noise(1) + 3, noise(2) - 1, 0.25
    found = adain(noise(3), first, last, a).double().numpy()[0]
    x, one, other = (t.double().numpy()[0] for t in (noise(3), first, last))
    for c in range(4):
        mean = 0.75 * one[c].mean() + 0.25 * other[c].mean()
        std = 0.75 * one[c].std() + 0.25 * other[c].std()
        assert found[c].mean() == pytest.approx(mean, abs=1e-5)
        assert found[c].std() == pytest.approx(std, abs=1e-5)
        np.testing.assert_allclose(
            (found[c] - mean) / std, (x[c] - x[c].mean()) / x[c].std(), atol=1e-5
        )


def test_adain_leaves_the_ends_as_they_are():
    first, last = 2 * noise(1) + 3, noise(2)
    torch.testing.assert_close(adain(first, first, last, 0.0), first)
    torch.testing.assert_close(adain(last, first, last, 1.0), last)


def test_embeddings_lie_on_the_line():
    first, last = (
        Prompt(noise(1, 1, 5, 3), noise(2, 1, 6)),
        Prompt(noise(3, 1, 5, 3), noise(4, 1, 6)),
    )
    found = between(first, last, 0.4)
    torch.testing.assert_close(found.embeds, 0.6 * first.embeds + 0.4 * last.embeds)
    torch.testing.assert_close(found.pooled, 0.6 * first.pooled + 0.4 * last.pooled)
    assert between(Prompt(first.embeds), Prompt(last.embeds), 0.4).pooled is None


def test_psnr_is_that_of_its_definition():
    one = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    other = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    error = np.mean((one.astype(float) - other) ** 2)
    assert psnr(one, other) == pytest.approx(20 * np.log10(255) - 10 * np.log10(error))
    assert psnr(one, one) == np.inf


def grey(level: float) -> np.ndarray:
    return np.full((16, 16, 3), round(level), np.uint8)


def test_distances_are_those_of_the_evaluations_features():
    # A grey picture has 48 equal features, in percent, and no edges.
    wanted = np.sqrt(48) * np.array([50, 100]) / 2.55
    np.testing.assert_allclose(distances([grey(0), grey(50), grey(150)]), wanted)
    assert unevenness([grey(0), grey(50), grey(150)]) == pytest.approx(100 / 75)
    assert unevenness([grey(7)] * 3) == 1


def jump(a: float) -> np.ndarray:
    """Nothing happens but between 0.4 and 0.6."""
    return grey(200 * np.clip((a - 0.4) / 0.2, 0, 1))


def test_frames_are_spaced_by_what_changes():
    drawn = {a: jump(a) for a in evenly(6)}
    assert unevenness(list(drawn.values())) == 5
    for _ in range(18):
        a = where_most_changes(drawn)
        assert a not in drawn
        drawn[a] = jump(a)
    places = evenest(drawn, 6)
    assert (places[0], places[-1], len(places)) == (0, 1, 6)
    assert places == sorted(set(places))
    assert unevenness([drawn[a] for a in places]) < 1.3


def test_where_nothing_changes_frames_are_still_distinct():
    drawn = {a: grey(9) for a in evenly(9)}
    places = evenest(drawn, 5)
    assert len(set(places)) == 5
    assert {0.0, 1.0} <= set(places)


def test_a_true_jump_is_not_halved_for_ever():
    drawn = {a: grey(200 * (a > 0.3)) for a in evenly(3)}
    for _ in range(40):
        a = where_most_changes(drawn)
        drawn[a] = grey(200 * (a > 0.3))
    places = np.array(sorted(drawn))
    assert np.diff(places).min() > 2e-7
    assert len(evenest(drawn, 8)) == 8


class Block(nn.Module):
    """A layer whose projections have diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(3, 3), "to_k": nn.Linear(3, 3),
                                    "to_v": nn.Linear(3, 3)})  # fmt: skip
        self.attn2 = nn.ModuleDict({"to_k": nn.Linear(3, 3)})

    def forward(self, x):
        layers = [*self.attn1.values(), *self.attn2.values()]
        return [layer(x) for layer in layers]


def test_attention_sees_both_ends_in_the_first_steps():
    torch.manual_seed(0)
    model, said = nn.ModuleDict({"block": Block()}), []
    for seed in (1, 2):
        with keeping(model, 2) as kept:
            for step in range(3):
                model["block"](noise(10 * seed + step, 1, 4, 3))
        said.append(kept)
    x = noise(5, 1, 4, 3)
    plain = model["block"](x)
    with blending(model, *said, 0.3):
        steps = [model["block"](x) for _ in range(3)]
    for step in range(2):
        ends = [model["block"](noise(10 * seed + step, 1, 4, 3)) for seed in (1, 2)]
        for layer in (1, 2):  # to_k and to_v of self-attention
            wanted = 0.7 * ends[0][layer] + 0.3 * ends[1][layer]
            torch.testing.assert_close(steps[step][layer], wanted)
        for layer in (0, 3):  # queries, and keys of cross-attention
            torch.testing.assert_close(steps[step][layer], plain[layer])
    for layer in range(4):
        torch.testing.assert_close(steps[2][layer], plain[layer])
        torch.testing.assert_close(model["block"](x)[layer], plain[layer])
