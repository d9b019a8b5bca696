"""`make objectives`: equal budgets, the order of trainings, seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import objectives
from data.objectives import BY_NAME, RECIPES, Bench, Recipe
from data.side_by_side import Workers
from shared.cli.config import parse
from shared.errors import UserError
from shared.models.family import resolve_model
from train.comparison.cost import relative_cost
from train.config import DistillConfig, RunConfig


def bench_at(folder: Path, budget: float) -> Bench:
    return Bench(folder, budget, Workers(folder / "logs", 1))


def cost(bench: Bench, recipe: Recipe) -> float:
    """What a recipe's own training costs, by what `train compare` says of a step."""
    flags = parse(DistillConfig, objectives.training_flags(bench, recipe, 0), "train distill")
    steps = objectives.steps_of(bench, recipe)
    config = RunConfig(**vars(flags))
    return steps * relative_cost(resolve_model(objectives.MODEL), config, steps)


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in objectives.shown()[1:]]


@pytest.mark.parametrize("recipe", [objectives.shown()[0], *SLOW], ids=lambda recipe: recipe.name)
def test_a_line_costs_the_budget_with_what_it_begins_with(tmp_path: Path, recipe: Recipe) -> None:
    bench = bench_at(tmp_path, 1000.0)
    spent = sum(cost(bench, one) for one in objectives.with_beginnings(recipe))
    assert spent == pytest.approx(1000, rel=0.01)


def test_a_beginning_stands_before_what_begins_with_it() -> None:
    names = [recipe.name for recipe in RECIPES]
    assert len(BY_NAME) == len(names)
    for recipe in RECIPES:
        assert recipe.after is None or names.index(recipe.after) < names.index(recipe.name)


def test_seeds_have_runs_of_their_own(tmp_path: Path) -> None:
    bench, recipe = bench_at(tmp_path, 1.0), BY_NAME["full-dmd"]
    flags = objectives.training_flags(bench, recipe, 2)
    assert flags[flags.index("--run") + 1] == str(tmp_path / "runs" / "full-dmd-seed2")
    assert flags[flags.index("--init-student") + 1] == str(tmp_path / "runs" / "full-half-seed2")


def test_a_budget_that_is_too_small_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "relative_cost", lambda *_: 1.5)  # counting it takes seconds
    with pytest.raises(
        UserError,
        match=r"^--budget 24 is too small for full-dmd: the student first .*; give a larger one$",
    ):
        objectives.steps_of(bench_at(tmp_path, 24.0), BY_NAME["full-dmd"])


def test_a_folder_is_for_one_budget(tmp_path: Path) -> None:
    """A longer cosine is not one training of that length, and dmd would keep its beginning."""
    objectives.claim(bench_at(tmp_path, 800.0))
    objectives.claim(bench_at(tmp_path, 800.0))
    with pytest.raises(UserError, match=r"holds the table of --budget 800; give another --folder$"):
        objectives.claim(bench_at(tmp_path, 1600.0))


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-5", "1e12", "much"])
def test_a_budget_is_a_number_that_can_be_spent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setattr("sys.argv", ["objectives", "--budget", text])
    with pytest.raises(SystemExit):
        objectives.main()
    assert f"argument --budget: {text} is no number above 0 and up to " in capsys.readouterr().err
