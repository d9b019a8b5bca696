"""The byte layout of a shard: a USTAR tar that is at the same time a flat array.

Every sample has the same members in the same order with the same sizes, so sample i's field lies
at `i * stride + offset(field)` and no index is needed. Stock `webdataset` reads the same file as
an ordinary tar. This module is the sole owner of member names.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cache.sample_record import fit_record
from shared.storage.typed_json import record_of, typed
from shared.storage.urls import Place

BLOCK = 512  # tar's unit
NAME_BYTES = 100  # of a tar's header, which begins with the name
CHECKSUM_AT = 148  # in the header: the sum of its bytes, six octal digits
CHECKSUM = b"chksum"
NPY_HEADER = 128  # np.lib.format v1.0, for every shape that occurs here
TRAILER = bytes(2 * BLOCK)  # the end of a tar
RECORD_BYTES = 1024
FIELD_ORDER = ("latents", "pooled_prompt_embeds", "prompt_embeds", "time_ids", "answers")
AXES = {"latents": 4, "pooled_prompt_embeds": 2, "prompt_embeds": 3, "time_ids": 2, "answers": 5}
OF_SAMPLES = {"latents", "prompt_embeds"}  # every shard has these, or answers alone
DTYPES = {"answers": ("<f2", "<f4"), "time_ids": ("<i4",)}  # all else is <f2


@dataclass(frozen=True)
class Field:
    """One npy member: its name, NumPy dtype string (`<f2`, `<i4`) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array without its npy header."""
        return int(np.dtype(self.dtype).itemsize * prod(self.shape))


@dataclass(frozen=True)
class Layout:
    """What every sample of a shard looks like."""

    fields: tuple[Field, ...]
    record_bytes: int = RECORD_BYTES

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields]
        if names != [name for name in FIELD_ORDER if name in names]:
            raise ValueError(f"the fields are {names!s:.100}")

    @cached_property
    def stride(self) -> int:
        """Bytes from one sample to the next."""
        members = [self.record_bytes] + [NPY_HEADER + field.nbytes for field in self.fields]
        return sum(BLOCK + _padded(size) for size in members)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where in a sample each field's first element lies, in bytes."""
        offsets, position = {}, BLOCK + _padded(self.record_bytes)
        for field in self.fields:
            offsets[field.name] = position + BLOCK + NPY_HEADER
            position += BLOCK + _padded(NPY_HEADER + field.nbytes)
        return offsets

    def field(self, name: str) -> Field | None:
        """Return the field of that name, or None where this layout has none."""
        return next((field for field in self.fields if field.name == name), None)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        latents = self.fields[0]
        return latents.shape[-2], latents.shape[-1]

    @property
    def captions(self) -> int:
        """Captions per sample, repeated ones included."""
        return next(field.shape[0] for field in self.fields if field.name == "prompt_embeds")

    @cached_property
    def _npy_headers(self) -> dict[str, bytes]:
        return {field.name: _npy_header(field) for field in self.fields}

    def pack(
        self, key: str, record: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> bytes:
        """Pack a sample into `stride` bytes. Arrays have the layout's shapes; dtypes are cast."""
        parts = [_header(f"{key}.json", self.record_bytes), fit_record(record, self.record_bytes)]
        parts.append(_padding(self.record_bytes))
        for field in self.fields:
            array = np.ascontiguousarray(arrays[field.name], dtype=field.dtype)
            assert array.shape == field.shape, (field, array.shape)
            size = NPY_HEADER + field.nbytes
            parts.append(_header(f"{key}.{field.name}.npy", size))
            parts += self._npy_headers[field.name], array.tobytes(), _padding(size)
        sample = b"".join(parts)
        assert len(sample) == self.stride
        return sample

    def unpack(
        self, sample: bytes | memoryview
    ) -> tuple[str, dict[str, Any], dict[str, NDArray[Any]]]:
        """Return key, record and arrays (read-only views) of one sample's bytes.

        Raises ValueError where the bytes are not a sample of this layout.
        """
        view = memoryview(sample)
        if len(view) != self.stride:
            raise ValueError(f"{len(view)} bytes where a sample has {self.stride}")
        key, record = self.unpack_head(view)
        arrays = {}
        for field in self.fields:
            offset = self.offsets[field.name]
            start = offset - BLOCK - NPY_HEADER
            found = _check_member(view, start, f".{field.name}.npy", NPY_HEADER + field.nbytes)
            header = bytes(view[offset - NPY_HEADER : offset])
            if found != key or header != self._npy_headers[field.name]:
                raise ValueError(f"member {field.name} of {key} has another shape or another key")
            data = np.frombuffer(view[offset : offset + field.nbytes], dtype=field.dtype)
            arrays[field.name] = data.reshape(field.shape)
        return key, record, arrays

    @property
    def head_bytes(self) -> int:
        """Of a sample: the record and its header."""
        return BLOCK + self.record_bytes

    def unpack_head(self, head: bytes | bytearray | memoryview) -> tuple[str, dict[str, Any]]:
        """Return key and record of a sample, from its first `head_bytes`.

        Raises ValueError where they are not the beginning of a sample of this layout.
        """
        view = memoryview(head)
        key = _check_member(view, 0, ".json", self.record_bytes)
        try:
            record = json.loads(bytes(view[BLOCK : BLOCK + self.record_bytes]))
        except RecursionError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"the record of {key} is no JSON object")
        return key, record

    def read(self, shard: Place, index: int) -> tuple[str, dict[str, Any], dict[str, NDArray[Any]]]:
        """Read sample `index` of a shard, as `unpack` gives it. Raises OSError and ValueError."""
        with shard.open("rb", buffering=0) as file:  # this sample's bytes and no others
            file.seek(index * self.stride)
            return self.unpack(file.read(self.stride))

    def crc32(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """Return the checksum of a sample's arrays as stored, one field after the other."""
        crc = 0
        for field in self.fields:
            data = np.ascontiguousarray(arrays[field.name], dtype=field.dtype)
            crc = zlib.crc32(data.tobytes(), crc)
        return crc

    def shard_bytes(self, count: int) -> int:
        """Return the bytes of a shard of `count` samples."""
        return count * self.stride + len(TRAILER)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's entry: the table of fields with their offsets, and the stride."""
        return {
            "fields": [
                {**vars(field), "shape": list(field.shape), "offset": self.offsets[field.name]}
                for field in self.fields
            ],
            "record_bytes": self.record_bytes,
            "stride": self.stride,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Layout:
        """Return the inverse of `to_json`.

        Raises ValueError for what no cache has, and where stored offsets disagree with ours.
        """
        fields = typed(value.get("fields"), tuple[Mapping[str, Any], ...], "fields")
        layout = Layout(
            tuple(record_of(Field, row, ignore_unknown=True) for row in fields),
            typed(value.get("record_bytes"), int, "record_bytes"),
        )
        found = {field.name: len(field.shape) for field in layout.fields}
        sound = [
            f.dtype in DTYPES.get(f.name, ("<f2",)) and all(side > 0 for side in f.shape)
            for f in layout.fields
        ]
        of_samples = "answers" not in found and found.keys() >= OF_SAMPLES
        if (
            not all(sound)
            or layout.record_bytes < 1
            or found != {name: AXES[name] for name in found}
            or not (of_samples or found.keys() == {"answers"})
        ):
            raise ValueError("the layout is none that a cache has")
        if layout.to_json() != value:
            raise ValueError("the layout's offsets do not follow from its fields")
        return layout


def cache_layout(
    latents: Sequence[int],
    prompt_embeds: Sequence[int],
    pooled_prompt_embeds: Sequence[int] | None = None,
    micro_conditioning: bool = False,
) -> Layout:
    """Return the layout of cache format 1 for these shapes.

    latents `[views, C or 2C, h, w]`, prompt_embeds `[captions, L, D]`, pooled_prompt_embeds
    `[captions, P]`, all fp16; `time_ids` `[views, 6]` int32 with micro-conditioning.
    """
    fields = [Field("latents", "<f2", tuple(latents))]
    if pooled_prompt_embeds is not None:
        fields.append(Field("pooled_prompt_embeds", "<f2", tuple(pooled_prompt_embeds)))
    fields.append(Field("prompt_embeds", "<f2", tuple(prompt_embeds)))
    if micro_conditioning:
        fields.append(Field("time_ids", "<i4", (latents[0], 6)))
    return Layout(tuple(fields))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _padding(size: int) -> bytes:
    return bytes(_padded(size) - size)


def _header(name: str, size: int) -> bytes:
    """Return a member's header: mode 644, owner 0, time 0."""
    written = name.encode()
    assert len(written) <= NAME_BYTES, name
    nameless, total = _nameless_header(size)
    checksum = b"%06o" % (total + sum(written))
    return written.ljust(NAME_BYTES, b"\0") + nameless.replace(CHECKSUM, checksum, 1)


@cache
def _nameless_header(size: int) -> tuple[bytes, int]:
    """Return what follows the name, with a mark for the checksum, and the sum of all other bytes.

    tarfile takes a tenth of a millisecond for each, which is much where a picture takes two.
    """
    info = tarfile.TarInfo("")
    info.size = size
    header = info.tobuf(format=tarfile.USTAR_FORMAT)
    total = int(header[CHECKSUM_AT : CHECKSUM_AT + 6], 8)
    return header[NAME_BYTES:CHECKSUM_AT] + CHECKSUM + header[CHECKSUM_AT + 6 :], total


def _check_member(view: memoryview, start: int, suffix: str, size: int) -> str:
    """Return the key of the member with a header at `start`; raises ValueError for any other."""
    try:
        info = tarfile.TarInfo.frombuf(bytes(view[start : start + BLOCK]), "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(f"damaged tar header ({error})") from None
    if not info.name.endswith(suffix) or info.size != size:
        raise ValueError(f"member {info.name} ({info.size} bytes) where *{suffix} is due")
    return info.name.removesuffix(suffix)


def _npy_header(field: Field) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": field.dtype, "fortran_order": False, "shape": field.shape}
    )
    header = buffer.getvalue()
    assert len(header) == NPY_HEADER, (field, len(header))
    return header
