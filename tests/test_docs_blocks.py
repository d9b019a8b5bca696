"""Every code block of README and docs does what it says when it is typed.

Batch scripts are run by test_docs_slurm.py, the demo by test_end_to_end.py.
"""

import json
import tomllib

import huggingface_hub.constants
import pytest

from infer import __main__ as infer
from prep import __main__ as prep
from shared.cli.config import parse
from tests.support.docs import (
    EVALUATIONS,
    LANGUAGES,
    MORE_PICTURES,
    PICTURES,
    PREVIEWS,
    Workspace,
    blocks,
    cut_down,
    make_hub,
    make_sources,
    module_command,
    pages,
)
from tests.support.learned import few_redrawn
from train import __main__ as train

ALL = [block for page in pages() for block in blocks(page)]
BY_PAGE = {
    page: [block for block in ALL if block.page == page and block.language in ("sh", "python")]
    for page in dict.fromkeys(block.page for block in ALL)
}
# What a page takes for granted: made by these commands before its blocks run.
MINE = "make prep SHARDS=my-pictures MODEL=sd15 CACHE=caches/mine\n"
GIVEN = {
    "docs/cache-format.md": MINE,
    "docs/teacher-answers.md": MINE,
    "docs/training.md": "make prep SHARDS=my-pictures\n",
    "docs/exports.md": (
        "make prep SHARDS=my-pictures\nmake train RUN=runs/lora\n"
        "make train RUN=runs/full ARGS='--student full'\n"
    ),
    "docs/drawing.md": f"{MINE}make train MODEL=sd15 CACHE=caches/mine RUN=runs/sd15-lora\n",
    "docs/learning-pictures.md": (
        "cp my-pictures/000000.jpg cat.jpg\ncp my-pictures/000004.jpg dog.jpg\n"
    ),
    "docs/comparing.md": (
        "make prep SHARDS=my-pictures\nmake train RUN=runs/lcd\n"
        "make train RUN=runs/pcm ARGS='--objective pcm'\n"
    ),
    "docs/merging.md": (
        "make prep SHARDS=my-pictures\nmake train RUN=runs/lora\n"
        "make train RUN=runs/style ARGS='--objective denoise'\n"
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The hub and so many pictures of the pages."""
    made = {}

    def make(count):
        if count not in made:
            made[count] = tmp_path_factory.mktemp("documented")
            make_hub(made[count] / "hub")
            make_sources(made[count], count)
        return made[count]

    return make


@pytest.fixture
def workspace(request, sources, tmp_path, monkeypatch):
    """A checkout to type in, where the real models' names stand for the tiny ones."""
    sources = sources(MORE_PICTURES if request.node.get_closest_marker("slow") else PICTURES)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(sources / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    few_redrawn(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for source in sources.iterdir():
        (tmp_path / source.name).symlink_to(source)
    return Workspace(tmp_path)


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_block_says_what_it_is(block):
    assert block.language in LANGUAGES
    if block.language == "toml":
        tomllib.loads(block.text)
    if block.language == "json":
        json.loads(block.text)


CONFIGS = {
    (program, name): config
    for program, main in (("prep", prep), ("train", train), ("infer", infer))
    for name, (config, _) in main.COMMANDS.items()
}
SLOW = {("train", "evaluate"), ("train", "compare")}  # carried out in the slow tests alone
# Pages whose commands are carried out in the slow tests, and read in the fast ones.
RUN_SLOWLY = (
    "docs/recipes.md", "docs/drawing.md", "docs/exports.md", "docs/merging.md",
    "docs/comparing.md", "docs/synthesizing.md", "docs/teacher-answers.md",
    "docs/finetuning.md", "docs/learning-pictures.md",
)  # fmt: skip
QUICK = [page for page, found in BY_PAGE.items() if found and page not in RUN_SLOWLY]


@pytest.mark.parametrize("page", QUICK)
def test_blocks_run(page, workspace, cli):
    run_blocks(page, workspace, cli, SLOW, PREVIEWS if page == "README.md" else {})


@pytest.mark.parametrize("page", RUN_SLOWLY)
def test_flags_are_known(page, workspace):
    found = [command for _, command in commands_of(page, workspace)]
    assert found
    for command in found:
        read(command)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", *RUN_SLOWLY])
def test_slow_blocks_run(page, workspace, cli):
    run_blocks(page, workspace, cli, set(), PREVIEWS | EVALUATIONS)


def run_blocks(page, workspace, cli, only_read, numbers):
    """Carry out a page's blocks, with these numbers besides those of TINY.

    Of the commands in `only_read` only the flags are looked at.
    """
    for block, command in commands_of(page, workspace, python=True):
        called = (command[0], command[1])
        served = called == ("infer", "page")  # until Ctrl-C; tests/infer/test_page.py
        if "--engine" in command or called in only_read or served:  # the first: prep/test_ray.py
            read(command)
            continue
        answer = cli(*cut_down(command, numbers))
        assert answer.status == 0, f"{block}: {command}\n{answer.err}{answer.out}"


def read(command):
    """Look at a command's flags alone."""
    parse(CONFIGS[command[0], command[1]], command[2:], "")


def commands_of(page, workspace, python=False):
    """Each of our commands of a page with its block; everything else is carried out on the way.

    Python only where it is asked for: it goes on from what the commands have made.
    """
    names = {}
    for block in [GIVEN.get(page, ""), *BY_PAGE[page]]:
        if block and not isinstance(block, str) and block.language == "python":
            if python:
                workspace.python(block.text, names)
            continue
        for words in workspace.shell(block if isinstance(block, str) else block.text):
            command = module_command(words)
            if command is not None:
                yield block, command
