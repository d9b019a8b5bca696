"""metadata.jsonl, metadata.csv and their like: the rows of a folder, in whatever shape they come.

Each row becomes a dict with a `file_name`. What can mean one thing only is taken (a JSON list, rows
over several lines, semicolons, `image` for `file_name`); anything else ends in a UserError.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prep.rows.character_encoding import UnreadableText, decode_json_text, decode_text
from prep.rows.row import CAPTION_KEYS
from shared.errors import UserError, first_line
from shared.sanitize import printable

LISTS = ("metadata.jsonl", "metadata.csv", "metadata.tsv")  # the first that a folder has counts
JSON_LIST = "metadata.json"  # only where no picture has a NAME.txt: it is many tools' own
FILE_NAME = "file_name"
# Other tools' keys for it, of which a row must have one.
NAME_KEYS = (
    FILE_NAME, "filename", "image", "path", "img", "file", "file_path", "filepath", "image_path",
    "img_path", "image_file", "image_name", "image_filename", "fname",
)  # fmt: skip
EXAMPLE = '{"file_name": "a.jpg", "text": "a caption"}'

VALUE = re.compile(r"[^\s,]")  # how one begins

Rows = list[dict[str, Any]]


def read_list(path: Path, encoding: str | None) -> Rows:
    """Read the rows of a list of pictures. Raises UserError where they cannot be told."""
    data = path.read_bytes()
    is_json = path.suffix.startswith(".json")
    try:
        text = decode_json_text(data, encoding) if is_json else decode_text(data, encoding)
    except UnreadableText as error:
        raise UserError(f"{_shown(path)} is {error}") from None
    rows = json_rows(text, path) if is_json else _table_rows(text, path)
    return _named(rows, path)


def _shown(path: Path) -> str:
    return printable(str(path))


def _named(rows: Sequence[Any], path: Path) -> Rows:
    """Give every row a `file_name`, whatever key it has it under."""
    first = rows[0] if rows and isinstance(rows[0], Mapping) else {}
    usual = {key.strip().lower(): key for key in first if isinstance(key, str)}
    key = next((usual[n] for n in NAME_KEYS if isinstance(first.get(usual.get(n)), str)), FILE_NAME)
    named = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{_shown(path)}: row {number} is no object such as {EXAMPLE}")
        if not isinstance(row.get(key), str):
            raise UserError(f"{_shown(path)}: row {number} has no {key}{_instead(row)}")
        named.append(row if key == FILE_NAME else {FILE_NAME: row[key], **row})
    return named


def _instead(row: Mapping[str, Any]) -> str:
    keys = [str(key) for key in row if key is not None][:8]
    if any(key.lower() in ("url", "image_url") for key in keys):
        return ", only a URL; download the pictures first, for example with img2dataset"
    return f", only {', '.join(keys) or 'nothing'}; a row is such as {EXAMPLE}"


def json_rows(text: str, path: Path) -> list[Any]:
    """Read an object a line; else objects or a list over several lines, or an object by names."""
    try:
        rows = list(_json_lines(text, path))
        if all(isinstance(row, dict) for row in rows) and len(rows) != 1:
            return rows
    except UserError as error:
        try:
            rows = list(_json_values(text))
        except (ValueError, RecursionError):
            raise error from None  # which knows the line
    if len(rows) == 1 and isinstance(rows[0], list):
        return list(rows[0])
    if len(rows) == 1 and isinstance(rows[0], dict):
        return _by_name(rows[0])
    return rows


def _json_lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{_shown(path)} line {number}: {first_line(error)}") from None
            except RecursionError:
                raise UserError(f"{_shown(path)} line {number} is nested too deeply") from None


def _json_values(text: str) -> Iterator[Any]:
    """Yield the values that follow each other in a text, with blanks or commas between them."""
    decoder, start = json.JSONDecoder(), 0
    while found := VALUE.search(text, start):
        value, start = decoder.raw_decode(text, found.start())
        yield value


def _by_name(value: dict[str, Any]) -> list[Any]:
    """Rows of an object with a key for each picture, as kohya's meta_cap.json; else it is a row."""
    if any(key in value for key in (*NAME_KEYS, *CAPTION_KEYS)):
        return [value]
    if value and all(isinstance(said, str) for said in value.values()):
        return [{FILE_NAME: name, "text": said} for name, said in value.items()]
    if value and all(isinstance(said, dict) for said in value.values()):
        return [{FILE_NAME: name, **said} for name, said in value.items()]
    return [value]


def _table_rows(text: str, path: Path) -> list[dict[str, Any]]:
    text = text.lstrip()
    head = text.partition("\n")[0].strip()
    try:
        naming = (one for one in ",;\t|" if not _cells(head, one).isdisjoint(NAME_KEYS))
        delimiter = next(naming, "")
        if not delimiter:
            raise UserError(
                f"{_shown(path)}: its first line must name the columns, file_name and text, with "
                f"commas between them; it is {head[:100]!r}"
            )
        rows = _records(text, delimiter, blanks=f"{delimiter} " in head)
        if any(None in row for row in rows):  # `a.jpg, "one, two"`?
            rows = _records(text, delimiter, blanks=True)
    except csv.Error as error:
        raise UserError(f"{_shown(path)}: {error}; use metadata.jsonl instead") from None
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UserError(
                f"{_shown(path)}: row {number} has more cells than the heading; put captions with "
                f"{delimiter!r} in them in double quotes"
            )
    return [row for row in rows if any(row.values())]


def _records(text: str, delimiter: str, blanks: bool) -> list[dict[Any, Any]]:
    """`blanks`: are those after a delimiter no part of what follows?"""
    lines = io.StringIO(text, newline="")
    rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=blanks)
    return [
        {name.strip() if isinstance(name, str) else name: cell for name, cell in row.items()}
        for row in rows
    ]


def _cells(line: str, delimiter: str) -> set[str]:
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return {cell.strip().lower() for cell in cells}
