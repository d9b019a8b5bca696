"""Safetensors files that are the same bytes every time and that safetensors reads."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from shared.cache.conditioning import Conditioning, TextEmbeds, save_conditioning
from shared.storage.tensors import read_metadata, tensor_chunks

MIXED = {
    "b": torch.randn(3, 4),
    "half": torch.randn(2, 3).half(),
    "scalar": torch.tensor(3.0),
    "bf": torch.randn(5).bfloat16(),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
    "numbers": torch.arange(3),
    "double": torch.randn(2).double(),
    'a "quoted" é': torch.ones(2),
}


def written(tensors, metadata=None) -> bytes:
    return b"".join(tensor_chunks(tensors, metadata))


def test_safetensors_reads_what_was_written():
    stored = load(written(MIXED, {"b": "2", "a": "1"}))
    assert stored.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)
    assert load(written({})) == {}


def test_tensors_in_any_layout():
    wide = torch.randn(2, 3, 4, 5)
    for laid in (wide.to(memory_format=torch.channels_last), wide.transpose(1, 3), wide[:, ::2]):
        assert torch.equal(load(written({"x": laid}))["x"], laid)
    weight = torch.nn.Parameter(torch.randn(2, 2))
    assert torch.equal(load(written({"x": weight}))["x"], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_of_one_dtype_it_is_the_librarys_own_bytes(dtype):
    tensors = {name: torch.randn(3, n).to(dtype) for n, name in enumerate("zebra", 1)}
    assert written(tensors) == save(tensors)
    assert written(tensors, {"one": "entry"}) == save(tensors, {"one": "entry"})


def test_the_order_in_which_things_are_given_does_not_show(tmp_path):
    metadata = {letter: letter * 3 for letter in "qwertyuiop"}
    first = written(MIXED, metadata)
    assert written(dict(reversed(MIXED.items())), dict(reversed(metadata.items()))) == first
    (tmp_path / "x").write_bytes(first)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == metadata == read_metadata(tmp_path / "x")
    header = first[8 : 8 + int.from_bytes(first[:8], "little")]
    assert list(json.loads(header)["__metadata__"]) == sorted(metadata)
    (tmp_path / "x").write_bytes(written(MIXED))
    assert read_metadata(tmp_path / "x") == {}


def test_data_lie_aligned():
    content = written({"x": torch.zeros(1), "odd": torch.zeros(3, dtype=torch.uint8)})
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_conditioning_is_as_it_was(tmp_path):
    """Caches made before are not to change."""
    rows = torch.randn(2, 4, 3).half()
    conditioning = Conditioning(TextEmbeds(rows[:1]), ("ä", "b"), TextEmbeds(rows))
    save_conditioning(conditioning, tmp_path / "file", tmp_path / "tmp")
    tensors = {"prompts.prompt_embeds": rows, "empty.prompt_embeds": rows[:1].clone()}
    prompts = {"prompts": json.dumps(conditioning.prompts)}
    assert (tmp_path / "file").read_bytes() == save(tensors, prompts)
