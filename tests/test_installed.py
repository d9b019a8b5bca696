"""The wheel, installed where no checkout is: its commands, its data, and what it says it lacks."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SOURCES = ("prep", "train", "infer", "shared", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel, and our dependencies by a .pth."""
    root = Path(__file__).resolve().parents[1]
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:  # a copy, so that no build/ is left in the checkout
        path = root / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", wheels, source]
    call([*pip, *build], source)
    (wheel,) = wheels.glob("*.whl")
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    call([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], source)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def call(words, folder: Path) -> str:
    answer = run(words, folder)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def run(words, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True
    )


def test_everything_but_the_repositorys_own_data_is_there(installed, tmp_path):
    code = (
        "import prep.inspect, shared, train.objectives; from pathlib import Path;"
        "from shared.models.single_file import CONFIGS;"
        "folder = Path(prep.inspect.__file__).parent;"
        "print(folder);"
        "print(*sorted(p.name for p in CONFIGS.iterdir()));"
        "print(*[p.name for p in (folder / 'report.css', folder / 'report.html.jinja',"
        " Path(shared.__file__).parent / 'py.typed') if p.is_file()])"
    )
    where, configs, files = call([installed / "python", "-c", code], tmp_path).splitlines()
    assert Path(where).is_relative_to(installed.parent)  # not the checkout
    assert configs == "sd15 sd21 sdxl"
    assert files == "report.css report.html.jinja py.typed"


def test_the_commands_do_the_whole_job(installed, tmp_path, repo):
    """With a model of one's own: the small teacher, copied out of the repository."""
    shutil.copytree(repo / "data" / "tiny-sd", tmp_path / "mine")
    shards = repo / "data" / "pictures" / "heldout" / "00000.tar"
    prep, train = installed / "distillery-prep", installed / "distillery-train"
    words = ["encode", "--shards", shards, "--model", "mine", "--threads", 1]
    assert "report.html" in call([prep, *words], tmp_path)
    few = ["--max-train-steps", 1, "--train-batch-size", 2, "--lora-rank", 2, "--threads", 1]
    call([train, "distill", "--model", "mine", *few], tmp_path)
    assert "sample.png" in call([train, "sample", "--threads", 1], tmp_path)
    assert (tmp_path / "caches" / "mine" / "report.html").is_file()


@pytest.mark.parametrize(
    ("model", "said"),
    [("tiny-sd", "part of the repository (data/tiny-sd)"), ("sd15", "HF_HUB_OFFLINE is set")],
)
def test_what_is_missing_is_said_in_one_line(installed, tmp_path, repo, model, said):
    shards = repo / "data" / "pictures" / "heldout" / "00000.tar"
    words = ["encode", "--shards", shards, "--model", model, "--cache", "c"]
    answer = run([installed / "distillery-prep", *words], tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1, answer.stderr
    assert said in answer.stderr
