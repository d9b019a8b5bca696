"""What a table's columns may hold, told from their Arrow types, and the values of a row."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

# What a column may hold. A hash, numbers or a path may be a picture's, where the name says so.
PICTURE, MAYBE, TEXT, OTHER = "picture", "maybe a picture", "text", "other"


def arrow_kind(kind: pa.DataType) -> str:
    """Tell what a column of this Arrow type may hold."""
    types = pa.types
    if types.is_dictionary(kind):
        return arrow_kind(kind.value_type)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return PICTURE
    if types.is_fixed_size_binary(kind):
        return MAYBE
    if types.is_struct(kind):
        inner = {field.name: arrow_kind(field.type) for field in kind}
        if OTHER not in (inner.get("bytes", OTHER), inner.get("path", TEXT)):
            return PICTURE
        return MAYBE if inner.get("path") == TEXT else OTHER
    if is_list(kind):
        if types.is_integer(kind.value_type):
            return MAYBE
        inner_kind = arrow_kind(kind.value_type)
        # Lists of lists of numbers are pixels, not files.
        return OTHER if is_list(kind.value_type) and inner_kind != TEXT else inner_kind
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return TEXT if text or types.is_null(kind) else OTHER


def column_kinds(schema: pa.Schema) -> dict[str, str]:
    """Tell the kind of each column, and of each field of a struct, or of a list of them, within."""
    kinds = {}
    for field in schema:
        kinds[field.name] = arrow_kind(field.type)
        inner = field.type
        while is_list(inner):
            inner = inner.value_type
        if kinds[field.name] == OTHER and pa.types.is_struct(inner):
            kinds |= {f"{field.name}.{one.name}": arrow_kind(one.type) for one in inner}
    return kinds


def is_list(kind: pa.DataType) -> bool:
    """Is it a list of one of Arrow's five kinds?"""
    types = pa.types
    plain = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(plain or types.is_list_view(kind) or types.is_large_list_view(kind))


def record_of(found: pa.RecordBatch | pa.Table) -> dict[str, Any]:
    """Read the one row's values; text that is no UTF-8 as bytes, nothing where it lies deeper."""
    try:
        (record,) = found.to_pylist()
        return dict(record)
    except UnicodeDecodeError:  # Arrow does not check what it reads
        values = [_value(found.column(name)) for name in found.schema.names]
        return dict(zip(found.schema.names, values, strict=True))


def records_of(found: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Read the values of several rows, as `record_of` does."""
    try:
        return list(found.to_pylist())
    except UnicodeDecodeError:
        return [record_of(found.slice(number, 1)) for number in range(found.num_rows)]


def _value(column: pa.Array | pa.ChunkedArray) -> Any:
    try:
        (value,) = column.to_pylist()
    except UnicodeDecodeError:
        if arrow_kind(column.type) != TEXT or is_list(column.type):
            return None
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        (value,) = column.cast(pa.binary()).to_pylist()
    return value
