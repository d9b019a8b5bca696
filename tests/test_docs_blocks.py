"""Every code block of README and docs does what it says when it is typed."""

import json
import tomllib

import huggingface_hub.constants
import pytest
from support_docs import (
    LANGUAGES,
    Workspace,
    blocks,
    cut_down,
    make_hub,
    module_command,
    pages,
    unpack_pictures,
)

ALL = [block for page in pages() for block in blocks(page)]
BY_PAGE = {
    page: [b for b in ALL if b.page == page and b.language in ("sh", "python")]
    for page in dict.fromkeys(block.page for block in ALL)
}


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_block_says_what_it_is(block):
    assert block.language in LANGUAGES
    if block.language == "toml":
        tomllib.loads(block.text)
    if block.language == "json":
        json.loads(block.text)


@pytest.mark.parametrize("page", [page for page, found in BY_PAGE.items() if found])
def test_blocks_run(page, tmp_path, monkeypatch, cli):
    make_hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path)
    unpack_pictures(tmp_path / "my-pictures", 12)
    names = {}
    for block in BY_PAGE[page]:
        if block.language == "python":
            workspace.python(block.text, names)
            continue
        for words in workspace.shell(block.text):
            command = module_command(words)
            if command is not None:
                answer = cli(*cut_down(command))
                assert answer.status == 0, f"{block}: {words}\n{answer.err}{answer.out}"
