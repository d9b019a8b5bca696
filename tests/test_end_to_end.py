"""What `make demo` promises, read from its own tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole demo run."""
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, "-m", "data.demo", "--folder", folder], cwd=REPO, check=True)
    return folder


def table(folder: Path, student: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of a student's evaluation by sampler and steps."""
    rows = json.loads((folder / "runs" / student / "evaluation.json").read_text())["rows"]
    return {(row["sampler"], row["steps"]): row for row in rows}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_full_student_beats_both_solvers_at_few_steps(demo: Path) -> None:
    rows = table(demo, "full")
    for steps in (1, 2, 4):
        student = rows["student", steps]["fd"]
        assert student < rows["ddim", steps]["fd"]
        assert student < rows["dpmsolver++", steps]["fd"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_full_student_lands_near_the_teachers_solution_in_one_step(demo: Path) -> None:
    rows = table(demo, "full")
    assert rows["student", 1]["latent_mse"] <= 0.6 * rows["ddim", 1]["latent_mse"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_full_student_is_right_and_sharp_in_four_steps(demo: Path) -> None:
    rows = table(demo, "full")
    assert rows["student", 4]["accuracy"] >= 0.9 * rows["ddim", 50]["accuracy"]
    assert 0.8 <= rows["student", 4]["high_frequency"] <= 1.2
    assert rows["ddim", 50]["accuracy"] >= 0.9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_leaves_pictures_and_tables(demo: Path) -> None:
    for student in ("full", "lora"):
        for name in ("evaluation.png", "evaluation.md"):
            assert (demo / "runs" / student / name).stat().st_size > 500
    assert (demo / "drawn.png").exists()
