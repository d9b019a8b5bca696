"""The house rules that no linter checks: sizes, packaging, how the Makefile passes words on."""

import ast
import os
import re
import subprocess
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("prep", "train", "infer", "shared")
SOURCE = (*PRODUCT, "data", "benchmarks")
FILE_LINES = 300
FUNCTION_LINES = 60
DATA_BYTES = 25_000_000
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def repository_files(folder: str = ".") -> list[Path]:
    """What git tracks or would track; in a copy without git, everything but the known outputs."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder]
    answer = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if answer.returncode == 0:
        paths = [ROOT / name for name in answer.stdout.split("\0") if name]
    else:
        outputs = {".venv", "caches", "runs", "demo", "work", "__pycache__"}
        found = (ROOT / folder).rglob("*")
        paths = [p for p in found if not outputs & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


def modules() -> list[Path]:
    paths = [path for folder in SOURCE for path in repository_files(folder)]
    return [path for path in paths if path.suffix == ".py"]


def test_files_stay_short():
    paths = modules() + [path for path in repository_files("tests") if path.suffix == ".py"]
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


def test_functions_stay_short():
    long = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert long == {}


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules that this one imports as it is imported itself, not later in a function."""
    found, todo = set(), [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) | ({node.module} if names - known else set())
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            todo += ast.iter_child_nodes(node)
    return found


def circle(graph: dict[str, set[str]]) -> str:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def test_no_module_imports_itself_in_a_circle(tmp_path):
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in modules()}
    names = {path: ".".join(each).removesuffix(".__init__") for path, each in parts.items()}
    graph = {name: imported(path, set(names.values())) for path, name in names.items()}
    assert circle(graph) == ""
    # And one would be found.
    (tmp_path / "a.py").write_text("import os\nif os.sep:\n    from b import c\n")
    (tmp_path / "c.py").write_text("from a import x\ndef f():\n    import d\n")
    known = {"a", "b.c", "d"}
    graph = {"a": imported(tmp_path / "a.py", known), "b.c": imported(tmp_path / "c.py", known),
             "d": {"a"}}  # fmt: skip
    assert circle(graph) in ("a imports b.c imports a", "b.c imports a imports b.c")
    assert graph["b.c"] == {"a"}


def test_data_stays_small():
    assert sum(path.stat().st_size for path in repository_files("data")) <= DATA_BYTES


@pytest.mark.parametrize(
    ("expression", "hidden"),
    [("not slow and not gpu", True), ("slow", True), ("gpu", False), ("slow or gpu", False),
     ("", False)],
)  # fmt: skip
def test_only_tests_that_need_a_gpu_see_one(monkeypatch, expression, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=expression)))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0")


def test_tests_are_no_packages():
    """`tests/train/__init__.py` would make pytest's modules of `train` and the product's one."""
    assert [p for p in repository_files("tests") if p.name == "__init__.py"] == []


def test_no_machine_paths():
    absolute = re.compile(r"(?<![\w.~/}-])/(?:work|tmp|root|home|Users)/")
    found = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue  # a picture, an archive, weights
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if absolute.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_every_folder_with_code_is_a_package():
    """Without an __init__.py its modules would work in a checkout and be missing when installed."""
    product = [path for path in modules() if path.relative_to(ROOT).parts[0] in PRODUCT]
    assert [p for p in product if not (p.parent / "__init__.py").exists()] == []


def requirement_name(line: str) -> str:
    return re.match(r"[\w.-]+", line).group().lower().replace("_", "-")


def test_each_stage_is_part_of_a_plain_install():
    extras = PROJECT["project"]["optional-dependencies"]
    stages = {*extras["prep"], *extras["train"], *extras["infer"]}
    assert stages <= set(PROJECT["project"]["dependencies"])


def test_lock_pins_everything_exactly():
    text = (ROOT / "requirements.lock").read_text()
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    locked = {requirement_name(pin) for pin in pins}
    assert {requirement_name(line) for line in wanted} - locked == set()


@pytest.fixture
def make(tmp_path):
    """Run a `make` command line in bash, with a stand-in for Python that only prints its words."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    (tmp_path / ".stamp").touch()  # setup is done
    own = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "GNUMAKEFLAGS"}
    own |= {
        "SHARDS",
        "CAPTIONS",
        "MODEL",
        "CACHE",
        "RUN",
        "RUNS",
        "ARGS",
        "EVAL_CACHE",
        "SCORER",
        "PROMPT",
        "PICTURE",
        "PICTURES",
        "PROMPTS",
    }
    environment = {name: value for name, value in os.environ.items() if name not in own}

    def run(words: str) -> subprocess.CompletedProcess[str]:
        command = f"make -s VENV='{tmp_path}' PY='{stand_in}' {words}"
        return subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize("dry", ["", "-n "])
@pytest.mark.parametrize(
    ("unquoted", "quoted"),
    [
        ("a/{00..03}.tar", "a/{00..03}.tar"),
        ("cc12m/{00000..00099}.tar", "cc12m/{00000..00099}.tar"),
        ("{8..11}.tar", "{8..11}.tar"),
        ("2024{0..3}", "{20240..20243}"),
        ("a/{00,07,3}.tar", "a/{00,07,3}.tar"),
        ("a{,b}.tar", "a{,b}.tar"),
        (r"a\ b/{1..3}", "a b/{1..3}"),
        ("a.tar SHARDS=a.tar", "a.tar{,}"),
    ],
)
def test_unquoted_braces_are_refused(make, dry, unquoted, quoted):
    answer = make(f"{dry}prep SHARDS={unquoted} MODEL=tiny-sd CACHE=c ARGS='--note \"x y\"'")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1
    command = f"make prep SHARDS='{quoted}' MODEL='tiny-sd' CACHE='c' ARGS='--note \"x y\"'"
    assert command in answer.stderr
    assert make(command.removeprefix("make ")).returncode == 0


@pytest.mark.parametrize(
    "shards", ["a/{00..03}.tar", "a b/*.tar", "it's", "$HOME/$(x)`y`#1", "(a,b)", "pipe:cat x.tar"]
)
def test_quoted_shards_arrive_as_typed(make, shards):
    typed = shards.replace("'", r"'\''")
    answer = make(f"prep SHARDS='{typed}' MODEL=tiny-sd CACHE='my caches/c' ARGS='--note \"x y\"'")
    assert answer.stderr == ""
    words = ["-m", "prep", "encode", "--shards", shards, "--model", "tiny-sd"]
    assert answer.stdout.splitlines() == [*words, "--cache", "my caches/c", "--note", "x y"]


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        ("prep SHARDS='a b/{0..3}.tar'", ["prep", "encode", "--shards", "a b/{0..3}.tar"]),
        ("prep ARGS='--config run.toml'", ["prep", "encode", "--config", "run.toml"]),
        ("prep ARGS=--help", ["prep", "encode", "--help"]),
        ("synthesize CAPTIONS='my captions.txt' MODEL=sd15",
         ["prep", "synthesize", "--captions", "my captions.txt", "--model", "sd15"]),
        ("teach CACHE=c ARGS='--answers 4'",
         ["prep", "teach", "--cache", "c", "--answers", "4"]),
        ("train", ["train", "distill"]),
        ("train MODEL=sdxl", ["train", "distill", "--model", "sdxl"]),
        ("train CACHE= RUN='my run'", ["train", "distill", "--run", "my run"]),
        ("train ARGS='--config run.toml'", ["train", "distill", "--config", "run.toml"]),
        ("evaluate", ["train", "evaluate"]),
        ("evaluate RUN=r", ["train", "evaluate", "--run", "r"]),
        ("evaluate EVAL_CACHE=c SCORER=m:f ARGS='--seed 1'",
         ["train", "evaluate", "--eval-cache", "c", "--scorer", "m:f", "--seed", "1"]),
        ("compare RUNS='runs/a \"my run\"' ARGS='--steps 2'",
         ["train", "compare", "runs/a", "my run", "--steps", "2"]),
        ("report RUNS='runs/a \"my run\"' ARGS=--watch",
         ["infer", "compare", "runs/a", "my run", "--watch"]),
        ("draw MODEL=sd15", ["infer", "draw", "--model", "sd15"]),
        ("sample PROMPT='a cat'", ["infer", "draw", "--prompt", "a cat"]),
        ("learn PICTURE='my cat.jpg' PROMPT='a cat' ARGS='--rank 4'",
         ["infer", "learn", "my cat.jpg", "--prompt", "a cat", "--rank", "4"]),
        ("morph PICTURES='\"my cat.jpg\" dog.jpg' PROMPTS='\"a cat\" dog' MODEL=sd15",
         ["infer", "morph", "my cat.jpg", "dog.jpg", "--prompts", "a cat", "dog", "--model",
          "sd15"]),
    ],
)  # fmt: skip
def test_only_what_is_given_is_passed_on(make, words, passed):
    answer = make(words)
    assert answer.stderr == ""
    assert answer.stdout.splitlines() == ["-m", *passed]


def test_pictures_must_be_named_in_one_line(make):
    answer = make("prep MODEL=m CACHE=c")
    assert answer.returncode == 2
    assert (
        "SHARDS is missing. For example: make prep SHARDS='pictures/{00..99}.tar'" in answer.stderr
    )
    assert answer.stderr.count("\n") == 1


def test_a_variable_that_nothing_reads_is_refused(make):
    answer = make("train MODL=sd15")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "MODL is no variable of this Makefile; there are SHARDS CAPTIONS MODEL" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_help_lists_every_target(make):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    listed = [line.split()[1] for line in make("").stdout.splitlines()]
    assert listed == targets
