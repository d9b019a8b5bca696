"""Ways in which a file of a cache, a run or a model can be broken, and what must come of it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEEP = 100_000
FEW = ("cut", "a folder", "a pipe", "a list", "deep")  # of the ways below, one of each kind


def broken(content: bytes) -> dict[str, bytes | None]:
    """What may stand in a file's place; None where it is no file at all."""
    ways = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "binary": bytes(range(256)) * 4,
        "a folder": None,
        "a pipe": None,
    }
    if not content.startswith(b"{"):
        return ways  # tensors and tars: to their readers any text is what "binary" is
    return ways | {
        "not UTF-8": '{"naïve": 1}'.encode("latin-1"),
        "a list": b"[1]",
        "a number": b"3",
        "null": b"null",
        "an empty object": b"{}",
        "deep": b"[" * DEEP + b"]" * DEEP,
        "deep inside": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    }


def other_values(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A JSON object with each of its values, down to the second level, of another kind, or gone."""
    stored = json.loads(content)
    for path in paths(stored):
        for odd in ("odd", -7, [], {}, None):
            yield f"{'.'.join(path)} = {odd!r}", dumped(stored, path, odd)
        yield f"no {'.'.join(path)}", dumped(stored, path, ...)


def paths(stored: dict) -> Iterator[tuple[str, ...]]:
    for name, value in stored.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, inner) for inner in value)


def dumped(stored: dict, path: tuple[str, ...], value: object) -> bytes:
    copy = json.loads(json.dumps(stored))
    place = copy
    for name in path[:-1]:
        place = place[name]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(copy).encode()


@contextmanager
def replaced(path: Path, how: str, content: bytes | None) -> Iterator[None]:
    """`path` with another content, or as a folder or a pipe, and as it was afterwards."""
    before = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    elif how == "a folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(before)
