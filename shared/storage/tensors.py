"""Writing safetensors files, the same bytes for the same tensors.

safetensors' own writer lists a file's metadata in another order every time and tells a full disk by
an error of its own. Here a file is a stream of chunks, for `shared.storage.files.publish`, which
refuses in one line, and needs no second copy of the tensors in memory. Reading is safetensors' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import UserError
from shared.storage.reading import open_regular

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8  # of the first tensor


def tensor_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: its header, then one tensor after the other.

    Tensors of wide types come first, so that each lies aligned, otherwise they go by name; all keys
    of the header are sorted.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % ALIGNMENT)
    yield len(head).to_bytes(8, "little") + head
    for name in names:
        yield tensor_bytes(tensors[name])


def load_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Load the tensors of a file. Raises UserError, naming it, where it is damaged."""
    try:
        with open_regular(path):  # a pipe would be waited for
            return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file that safetensors can open; nothing where it has none."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__", {}))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the values in order, without a copy where they lie so in the CPU's memory."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return values.view(torch.uint8).numpy().data
