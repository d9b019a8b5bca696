"""The shard's bytes, seen by tarfile, NumPy and stock webdataset, which know nothing of ours."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset

from shared.cache.layout import RECORD_BYTES, TRAILER, Field, Layout, cache_layout, fit_record

LAYOUTS = {
    "sd15": cache_layout((1, 4, 64, 64), (1, 77, 768)),
    "sdxl": cache_layout((1, 4, 128, 128), (1, 77, 2048), (1, 1280), micro_conditioning=True),
    "posterior": cache_layout((3, 8, 5, 7), (2, 16, 24)),
    "odd": cache_layout((2, 8, 3, 11), (5, 7, 3), (5, 13), micro_conditioning=True),
    "large record": Layout(cache_layout((1, 4, 8, 8), (1, 16, 64)).fields, record_bytes=5000),
}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> Layout:
    return LAYOUTS[request.param]


def make_samples(layout: Layout, count: int, seed: int = 0) -> list[tuple[str, dict, dict]]:
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        arrays = {
            field.name: rng.integers(-(2**31), 2**31, field.shape).astype(field.dtype)
            if field.dtype == "<i4"
            else rng.standard_normal(field.shape).astype(field.dtype)
            for field in layout.fields
        }
        record = {"captions": [f"number {i}, naïve ☃"], "num_captions": 1, "source_key": f"{i:06}"}
        samples.append((f"{i * 0x1234567:016x}", record, arrays))
    return samples


def shard_of(layout: Layout, samples) -> bytes:
    return b"".join(layout.pack(*sample) for sample in samples) + TRAILER


def test_stock_webdataset_decodes_the_same_arrays(layout, tmp_path):
    samples = make_samples(layout, 3)
    (tmp_path / "shard.tar").write_bytes(shard_of(layout, samples))
    dataset = webdataset.WebDataset([str(tmp_path / "shard.tar")], shardshuffle=False).decode()
    decoded = list(dataset)
    assert len(decoded) == 3
    for (key, record, arrays), sample in zip(samples, decoded, strict=True):
        assert sample["__key__"] == key
        assert sample["json"] == record
        members = {name for name in sample if not name.startswith("__")}
        assert members == {"json"} | {f"{name}.npy" for name in arrays}
        for name, array in arrays.items():
            found = sample[f"{name}.npy"]
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)


def test_offsets_and_stride_are_where_tarfile_finds_things(layout):
    samples = make_samples(layout, 4)
    data = shard_of(layout, samples)
    assert len(data) == layout.shard_bytes(4)
    assert layout.shard_bytes(0) == 1024  # the end of a tar
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {member.name: member for member in tar.getmembers()}
        assert len(members) == 4 * (1 + len(layout.fields))
        for i, (key, record, arrays) in enumerate(samples):
            start = i * layout.stride
            assert members[f"{key}.json"].offset == start
            assert json.load(tar.extractfile(f"{key}.json")) == record
            for field in layout.fields:
                member = members[f"{key}.{field.name}.npy"]
                place = start + layout.offsets[field.name]
                header = member.size - field.nbytes
                assert member.offset_data + header == place
                mine = np.frombuffer(data, field.dtype, arrays[field.name].size, place)
                np.testing.assert_array_equal(mine.reshape(field.shape), arrays[field.name])
                stock = np.load(io.BytesIO(tar.extractfile(member).read()))
                np.testing.assert_array_equal(stock, arrays[field.name])


def test_members_are_plain_ustar_with_nothing_of_the_moment(layout):
    data = shard_of(layout, make_samples(layout, 2))
    assert data == shard_of(layout, make_samples(layout, 2))
    with tarfile.open(fileobj=io.BytesIO(data), format=tarfile.USTAR_FORMAT) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert member.isreg()
            assert member.pax_headers == {}
        order = [name.partition(".")[2] for name in tar.getnames()]
    assert len(data) % 512 == 0
    wanted = ["json", "latents.npy", "pooled_prompt_embeds.npy", "prompt_embeds.npy",
              "time_ids.npy"]  # fmt: skip
    assert order[: len(order) // 2] == [name for name in wanted if name in order]


def test_what_is_packed_is_unpacked(layout):
    for key, record, arrays in make_samples(layout, 3):
        found_key, found_record, found = layout.unpack(layout.pack(key, record, arrays))
        assert (found_key, found_record) == (key, record)
        assert list(found) == [field.name for field in layout.fields]
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
            assert not found[name].flags.writeable


def test_dtypes_are_cast_and_order_is_c(layout):
    key, record, arrays = make_samples(layout, 1)[0]
    fortran = {name: np.asfortranarray(array.astype(float)) for name, array in arrays.items()}
    assert layout.pack(key, record, fortran) == layout.pack(key, record, arrays)


def test_damage_is_noticed(layout):
    key, record, arrays = make_samples(layout, 1)[0]
    good = layout.pack(key, record, arrays)
    with pytest.raises(ValueError, match="bytes where a sample has"):
        layout.unpack(good[:-1])
    last = layout.fields[-1]
    for place in (10, layout.offsets[last.name] - 100, layout.offsets[last.name] - 128 - 300):
        bad = bytearray(good)
        bad[place] ^= 1
        with pytest.raises(ValueError, match=r"header|member|due"):
            layout.unpack(bad)
    other = layout.pack("f" * 16, record, arrays)
    half = layout.offsets["latents"] - 128 - 512
    with pytest.raises(ValueError, match="another key"):
        layout.unpack(good[:half] + other[half:])
    with pytest.raises(ValueError, match=r"where .* is due|bytes where"):
        LAYOUTS["odd" if layout is not LAYOUTS["odd"] else "sd15"].unpack(good)


def test_layouts_travel_as_json(layout):
    stored = json.loads(json.dumps(layout.to_json()))
    again = Layout.from_json(stored)
    assert again == layout
    assert again.stride == layout.stride
    stored["fields"][-1]["offset"] += 512
    with pytest.raises(ValueError, match="do not follow"):
        Layout.from_json(stored)


def test_shapes_of_the_known_families():
    sdxl = LAYOUTS["sdxl"]
    names = ["latents", "pooled_prompt_embeds", "prompt_embeds", "time_ids"]
    assert [field.name for field in sdxl.fields] == names
    assert sdxl.field("time_ids") == Field("time_ids", "<i4", (1, 6))
    assert sdxl.latent_size == (128, 128)
    assert LAYOUTS["sd15"].field("time_ids") is None
    # What docs promise a reader of the disc's free space.
    assert 140_000 < LAYOUTS["sd15"].stride < 160_000
    assert 440_000 < sdxl.stride < 460_000


# ---- The record.


def test_a_record_is_json_padded_with_spaces():
    data = fit_record({"b": 1, "a": "☃"}, 64)
    assert data == '{"a":"☃","b":1}'.encode() + b" " * (64 - 17)


CAPTIONS = {
    "ascii": "a red circle on a blue field, " * 4000,  # 120,000 characters
    "snowmen": "☃" * 100_000,
    "emoji": "🟥🔵" * 50_000,
    "mixed": "naïve ☃ 🟥 circle " * 6000,
    "quotes": '"\\\n\t' * 30_000,  # each takes two bytes in JSON
    "controls": "\x01" * 100_000,  # each takes six
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_long_captions_are_cut_at_code_points(name):
    caption = CAPTIONS[name]
    record = {"captions": [caption, "short"], "num_captions": 2, "source_key": "k", "sha256": "x"}
    data = fit_record(record, RECORD_BYTES)
    assert len(data) == RECORD_BYTES
    kept = json.loads(data)
    first, second = kept["captions"]
    assert caption.startswith(first)
    assert "\N{REPLACEMENT CHARACTER}" not in first
    assert second == "short"
    assert len(first.encode()) > 100  # and as much as there is room for
    assert kept["captions_cut"] is True
    assert (kept["num_captions"], kept["source_key"]) == (2, "k")


def test_what_does_not_fit_goes_in_the_order_of_its_use():
    record = {
        "captions": ["a caption"], "num_captions": 1, "crc32": 1, "source_key": "k",
        "sha256": "s" * 64, "source": "p" * 300, "url": "u" * 300, "original_size": [5, 6],
    }  # fmt: skip
    kept = [set(json.loads(fit_record(record, size))) for size in (1024, 500, 190, 160, 120)]
    assert [set(record) - names for names in kept] == [
        set(),
        {"source"},
        {"source", "url"},
        {"source", "url", "original_size"},
        {"source", "url", "original_size", "sha256"},
    ]
    assert all("captions_cut" not in names for names in kept)


def test_many_captions_are_cut_evenly():
    captions = ["x" * 5000, "y" * 5000, "z" * 10]
    kept = json.loads(fit_record({"captions": captions, "num_captions": 3}, RECORD_BYTES))
    lengths = [len(caption) for caption in kept["captions"]]
    assert min(lengths[:2]) > 300
    assert abs(lengths[0] - lengths[1]) < 30
    assert lengths[2] == 10


@pytest.mark.parametrize(
    "record",
    [
        {"captions": ["a"], "num_captions": 1, "source_key": "folder/" * 400},
        {"captions": ["a"] * 600, "num_captions": 600, "source_key": "k"},
    ],
    ids=["a long key", "very many captions"],
)
def test_any_record_fits(record):
    """A path may have 4,096 characters, a picture 600 captions: no reason to lose a night."""
    data = fit_record(record, RECORD_BYTES)
    assert len(data) == RECORD_BYTES
    assert json.loads(data)["num_captions"] == record["num_captions"]
