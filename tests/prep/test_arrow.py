"""What tables come in: Arrow's many types, captions and pictures in odd columns, damaged files."""

import contextlib
import io

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.sources.find import SourceError, SourceOptions, find_units
from shared.errors import UserError
from tests.support.sources import encode, manifest, png, refusal, units

PNG = png(1)


def written(path, columns):
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return path


def rows_of(source, **options):
    found = find_units([str(source)], SourceOptions(**options))
    return [row for unit in found for row in unit.rows()]


STRUCT = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})
PICTURES = {
    "binary": pa.array([PNG], pa.binary()),
    "large": pa.array([PNG], pa.large_binary()),
    "view": pa.array([PNG], pa.binary_view()),
    "fixed": pa.array([PNG], pa.binary(len(PNG))),
    "dictionary": pa.array([PNG], pa.binary()).dictionary_encode(),
    "struct": pa.array([{"bytes": PNG, "path": None}], STRUCT),
    "bytes of uint8": pa.array([list(PNG)], pa.list_(pa.uint8())),
    "bytes of int8": pa.array([[b - 256 if b > 127 else b for b in PNG]], pa.list_(pa.int8())),
    "bytes of int64": pa.array([list(PNG)], pa.list_(pa.int64())),
    "fixed list": pa.array([list(PNG)], pa.list_(pa.uint8(), len(PNG))),
    "list view": pa.array([list(PNG)], pa.list_view(pa.uint8())),
    "list of bytes": pa.array([[PNG]], pa.list_(pa.binary())),
    "list of structs": pa.array([[{"bytes": PNG, "path": None}]], pa.list_(STRUCT)),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("name", ["image", "jpg"])
def test_a_picture_in_any_type_of_column(tmp_path, kind, name):
    columns = {name: PICTURES[kind], "caption": ["a"]}
    try:
        source = written(tmp_path / "a.parquet", columns)
    except pa.ArrowNotImplementedError:  # Parquet of this version has no such type
        pytest.skip("not in Parquet")
    (row,) = rows_of(source)
    assert (row.image, row.captions, row.problem) == (PNG, ("a",), "")


def test_several_pictures_in_a_row_and_none(tmp_path):
    cells = pa.array([[PNG, PNG], [], None, [None], [PNG, None]], pa.list_(pa.binary()))
    source = written(tmp_path / "a.parquet", {"image": cells, "caption": ["a"] * 5})
    assert [row.problem for row in rows_of(source)] == [
        "several pictures in a row", "no picture", "no picture", "no picture", "",
    ]  # fmt: skip


CAPTIONS = {
    "large": pa.array(["a"], pa.large_string()),
    "view": pa.array(["a"], pa.string_view()),
    "dictionary": pa.array(["a"], pa.string()).dictionary_encode(),
    "bytes": pa.array([b"\xef\xbb\xbfa"], pa.binary()),
    "utf-16": pa.array(["\ufeffa".encode("utf-16-le")], pa.binary()),
    "list": pa.array([["a"]], pa.list_(pa.string())),
    "fixed list": pa.array([["a"]], pa.list_(pa.string(), 1)),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_in_any_type_of_column(tmp_path, kind):
    source = written(tmp_path / "a.parquet", {"image": [PNG], "caption": CAPTIONS[kind]})
    (row,) = rows_of(source)
    assert (row.captions, row.problem) == (("a",), "")
    (row,) = rows_of(source, caption_column="caption")
    assert row.captions == ("a",)


def test_captions_in_a_struct_are_named_by_their_field(tmp_path):
    columns = {
        "image": [PNG], "captions": [{"en": "a", "de": "ein"}],
        "more": [[{"text": "x", "id": 1}, {"text": "y", "id": 2}]],
    }  # fmt: skip
    source = written(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=r"--caption-column NAME, such as captions\.en"):
        rows_of(source)
    assert rows_of(source, caption_column="captions.de")[0].captions == ("ein",)
    assert rows_of(source, caption_column="more.text")[0].captions == ("x", "y")
    with pytest.raises(UserError, match=r"'captions\.fr'.*has the columns image, captions, more"):
        rows_of(source, caption_column="captions.fr")


def test_text_that_is_not_utf8_costs_its_row(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"caf\xe9", b"tea"], pa.binary()).buffers()
    )
    source = written(tmp_path / "a.parquet", {"image": [PNG, PNG], "caption": texts})
    bad, good = rows_of(source)
    assert "not UTF-8" in bad.problem
    assert "--caption-encoding" in bad.problem
    assert good.captions == ("tea",)
    assert rows_of(source, caption_encoding="cp1252")[0].captions == ("café",)
    other = written(tmp_path / "b.parquet", {"image": [PNG, PNG], "caption": ["a"] * 2, "x": texts})
    assert [row.problem for row in rows_of(other)] == ["", ""]


def test_columns_without_a_value_anywhere(tmp_path):
    nothing = written(tmp_path / "a.parquet", {"image": [PNG], "caption": pa.nulls(1)})
    assert [row.problem for row in rows_of(nothing)] == ["no caption"]
    nothing = written(tmp_path / "b.parquet", {"image": pa.nulls(1), "caption": ["a"]})
    assert [row.problem for row in rows_of(nothing)] == ["no picture"]


def test_a_table_without_rows_beside_another(tmp_path):
    schema = {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}
    written(tmp_path / "a.parquet", schema)
    written(tmp_path / "b.parquet", {"image": [PNG], "caption": ["a"]})
    cache = encode(tmp_path / "*.parquet", tmp_path / "cache")
    assert manifest(cache)["totals"]["written"] == 1
    words = ("--model", "tiny-sd", "--cache", tmp_path / "c")
    line = refusal("encode", "--shards", tmp_path / "a.parquet", *words)
    assert "they have no rows" in line


def test_a_column_that_a_later_file_lacks_costs_that_file(tmp_path):
    written(tmp_path / "a.parquet", {"image": [PNG], "caption": ["a"], "alt": ["b"]})
    written(tmp_path / "b.parquet", {"image": [PNG], "caption": ["a"]})
    words = ("--model", "tiny-sd", "--cache", tmp_path / "c", "--caption-column", "alt")
    line = refusal("encode", "--shards", tmp_path / "*.parquet", *words, "--threads", 1)
    assert f"{tmp_path}/b.parquet has the columns image, caption" in line
    assert len(units(tmp_path / "c")) == 1


def arrow_file(path, table, stream):
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opened(path, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["binary", "view", "dictionary", "large", "list of structs"])
def test_arrow_files_of_both_kinds(tmp_path, stream, kind):
    table = pa.table({"image": PICTURES[kind], "caption": ["a"]})
    (row,) = rows_of(arrow_file(tmp_path / "a.arrow", table, stream))
    assert (row.image, row.captions) == (PNG, ("a",))


def test_of_several_splits_it_is_said_which_is_read(tmp_path):
    data = datasets.Dataset.from_dict({"image": [PNG], "text": ["a"]})
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "data")

    def said(source):
        with contextlib.redirect_stderr(io.StringIO()) as told:
            find_units([str(source)])
        return told.getvalue()

    told = said(tmp_path / "data")
    assert "only its split train is read; name the others to read them, too: " in told
    assert told.endswith(f"{tmp_path}/data/test\n")
    for named in ("train", "test"):
        assert said(tmp_path / "data" / named) == ""


@pytest.mark.parametrize("at", [0, 4, 50, -20, -5])
def test_a_flipped_byte_is_one_line_or_a_rejected_row(tmp_path, at):
    source = written(tmp_path / "a.parquet", {"image": [PNG] * 3, "caption": ["a"] * 3})
    data = bytearray(source.read_bytes())
    data[at] ^= 0xFF
    source.write_bytes(data)
    with contextlib.suppress(SourceError):
        rows_of(source)


def test_lists_of_pixels_are_no_files(tmp_path):
    pixels = pa.array([[[[1, 2, 3]]]], pa.list_(pa.list_(pa.list_(pa.uint8()))))
    source = written(tmp_path / "a.parquet", {"image": pixels, "caption": ["a"]})
    with pytest.raises(UserError, match="which one holds the pictures"):
        rows_of(source)


def test_a_hash_or_numbers_beside_the_picture_are_none(tmp_path):
    columns = {
        "photo": [PNG], "phash": pa.array([b"12345678"], pa.binary(8)), "tokens": [[1, 2]],
        "mask": pa.array([[1, 0]], pa.list_(pa.uint8())), "caption": ["a"],
        "audio": pa.array([{"path": "a.wav"}], pa.struct({"path": pa.string()})),
    }  # fmt: skip
    (row,) = rows_of(written(tmp_path / "a.parquet", columns))
    assert row.image == PNG
    assert row.metadata["tokens"] == [1, 2]
