"""The evaluation in the model card: of the student that lies there, and of no other."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import comparison
from train.config import DistillConfig, EvaluateConfig, ExportConfig
from train.evaluation import evaluate, teacher_results
from train.trainer.export_command import export_checkpoint
from train.trainer.loop import distill
from train.trainer.setup import prepare

TEACHER = (("ddim", 2), ("ddim", 1))


@pytest.fixture
def few_rows(monkeypatch):
    """A table of two rows for the teacher and one for the student."""
    for module in (evaluate, teacher_results):
        monkeypatch.setattr(module, "REFERENCE", TEACHER[0])
    monkeypatch.setattr(teacher_results, "SOLVER_SAMPLINGS", TEACHER[1:])
    monkeypatch.setattr(teacher_results, "TEACHER_SAMPLINGS", TEACHER)
    monkeypatch.setattr(teacher_results, "TRIED", 10)
    monkeypatch.setattr(evaluate, "STUDENT_SAMPLINGS", (("student", 1),))
    monkeypatch.setattr(evaluate, "TIMED", 2)


@pytest.fixture
def held(tiny_cache, tmp_path) -> Path:
    """A cache of one's own: the teacher's rows are kept in it."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "held"))


@pytest.fixture
def config(tiny_cache, tiny_sd, tmp_path) -> DistillConfig:
    return DistillConfig(
        model=str(tiny_sd), cache=tiny_cache, run=tmp_path / "run", train_batch_size=2,
        max_train_steps=1, lora_rank=2, learning_rate=1e-2, validation_steps=0, threads=1,
        device="cpu", report_to=("none",),
    )  # fmt: skip


def assess(run: Path, cache: Path, output: Path | None = None) -> None:
    """On a CPU, with as few captions as are accepted."""
    config = EvaluateConfig(
        run=run, eval_cache=cache, num_samples=65, output=output, threads=1, device="cpu"
    )
    evaluate.evaluate(config)


@pytest.mark.slow
def test_the_card_follows_the_evaluation(config, held, tmp_path, few_rows, capsys):
    run = config.run
    distill(prepare(config))
    card = run / "README.md"
    card.write_text(
        card.read_text().replace("## Licence", "## My own words\n\nKept.\n\n## Licence")
    )
    without = card.read_text()
    assess(run, held, tmp_path / "elsewhere")
    assert card.read_text() == without
    assess(run, held)
    assert str(card) in capsys.readouterr().out
    table = (run / "evaluation.md").read_text().strip()
    assert f"## Evaluation\n\n{table}\n\n## Training" in card.read_text()
    assert card.read_text().replace(f"## Evaluation\n\n{table}\n\n", "") == without
    # Evaluated again, the table is replaced.
    (run / "README.md").write_text(card.read_text().replace("| teacher", "| an older teacher", 1))
    assess(run, held)
    assert card.read_text().count("## Evaluation") == 1
    assert "an older teacher" not in card.read_text()
    # The same student is exported with it, whatever the precision; a further trained one without.
    export_checkpoint(run, ExportConfig(export_dtype="fp16"))
    assert "## Evaluation" in card.read_text()
    first = run / "checkpoints/step-00000001"
    more = replace(config, max_train_steps=2, resume_from_checkpoint="latest")
    distill(prepare(more))
    assert (run / "evaluation.json").is_file()
    assert "## Evaluation" not in card.read_text()
    export_checkpoint(run, ExportConfig(checkpoint=str(first), output=tmp_path / "earlier"))
    assert "## Evaluation" in (tmp_path / "earlier/README.md").read_text()


def test_few_pictures_are_said_to_be_few(
    tmp_path_factory, tiny_sd, tiny_cache, tmp_path, monkeypatch, capsys
):
    runs, held = comparison.evaluated_runs(tmp_path_factory, tiny_sd, tiny_cache)
    run = shutil.copytree(runs["consistency"], tmp_path / "run")
    for name in ("evaluation.json", "evaluation.md"):
        (run / name).unlink()
    card = run / "README.md"
    card.write_text(re.sub(r"## Evaluation\n.*?(?=## )", "", card.read_text(), flags=re.S))
    assert "Few pictures" not in card.read_text()
    comparison.few_rows(monkeypatch)  # those of the teacher are in the cache
    assess(run, shutil.copytree(held, tmp_path / "held"))
    told = json.loads((run / "evaluation.json").read_text())["fd_note"]
    assert told.startswith("Few pictures: 65 for 64 features")
    assert told in capsys.readouterr().out
    assert told in (run / "evaluation.md").read_text()
    assert told in card.read_text()


def test_a_damaged_evaluation_costs_no_export(config, capsys):
    config.run.mkdir()
    (config.run / "evaluation.json").write_text("[1, 2")
    (config.run / "evaluation.md").write_text("| a table |")
    distill(prepare(config))
    assert "note: the card has no table: " in capsys.readouterr().err
    assert "a table" not in (config.run / "README.md").read_text()
