"""Parquet files and Hugging Face datasets: columns found, keys stable, damage told."""

import pickle
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.sources.find import SourceError, SourceOptions, estimate_rows, find_units
from prep.sources.tables import hf_dataset as hub_reader
from shared.errors import UserError
from tests.support.sources import (
    accounts,
    encode,
    manifest,
    png,
    prep,
    refusal,
    tree,
    units,
    write_folder,
)

PNG = png(1)
CAPTIONS = ["a star", "a ring", "a disc"]


def records(count, **more):
    rows = range(count)
    return {
        "image": [{"bytes": png(n), "path": f"{n:04d}.png"} for n in rows],
        "text": [f"picture number {n}" for n in rows],
        **{name: [value(n) for n in rows] for name, value in more.items()},
    }


def dataset(count, **more):
    data = datasets.Dataset.from_dict(records(count, **more))
    return data.cast_column("image", datasets.Image())


def rows_of(*sources, **options):
    """`key -> row`, read by units that went to another process."""
    found = pickle.loads(
        pickle.dumps(find_units(list(map(str, sources)), SourceOptions(**options)))
    )
    return {row.key: row for unit in found for row in unit.rows()}


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


# --- Parquet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", ["bytes", "struct"])
def test_pictures_as_bytes_or_as_a_struct(tmp_path, pictures):
    columns = records(3, similarity=lambda n: n / 10)
    if pictures == "bytes":
        columns["image"] = [picture["bytes"] for picture in columns["image"]]
    rows = rows_of(write_parquet(tmp_path / "a.parquet", columns))
    keys = ["0", "1", "2"] if pictures == "bytes" else ["0000.png", "0001.png", "0002.png"]
    assert list(rows) == keys
    assert [row.image for row in rows.values()] == [png(n) for n in range(3)]
    assert [row.captions for row in rows.values()] == [(f"picture number {n}",) for n in range(3)]
    assert [row.metadata["similarity"] for row in rows.values()] == [0, 0.1, 0.2]


def test_parquet_through_the_whole_stage(tmp_path):
    columns = records(6, license=lambda n: "nc" if n % 2 else "cc0")
    columns["image"][2] = {"bytes": b"no picture", "path": "2"}
    columns["image"][4] = None
    parquet = write_parquet(tmp_path / "a.parquet", columns)
    flags = {"max_reject_fraction": 1.0, "where": "license == 'cc0'"}
    cache = encode(parquet, tmp_path / "cache", **flags)
    assert {row["source_key"]: row["reason"] for row in accounts(cache)} == {
        "0000.png": "", "0001.png": "where", "2": "cannot be decoded", "0003.png": "where",
        "4": "no picture", "0005.png": "where",
    }  # fmt: skip
    assert manifest(cache)["totals"]["read"] == 6


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        ({"__key__": ["k"], "id": [7]}, "k"), ({"id": [7], "url": ["u"]}, "7"),
        ({"URL": ["u"]}, "u"), ({}, "0"),
    ],
)  # fmt: skip
def test_where_keys_come_from(tmp_path, columns, key):
    table = {"jpg": [PNG], "caption": ["a"], "other": ["o"], **columns}
    parquet = write_parquet(tmp_path / "a.parquet", table)
    assert list(rows_of(parquet)) == [key]
    assert list(rows_of(parquet, key_column="other")) == ["o"]


def test_columns_by_flag_and_by_type(tmp_path):
    table = {"thumb": [PNG], "photo": [png(2)], "alt": ["b"], "caption": [["", "a", "c"]]}
    parquet = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(UserError, match=r"thumb, photo, alt, caption.*--image-column"):
        rows_of(parquet)
    (row,) = rows_of(parquet, image_column="photo").values()
    assert (row.image, row.captions) == (png(2), ("a", "c"))
    assert "thumb" not in row.metadata  # nobody asked for its bytes
    (row,) = rows_of(parquet, image_column="thumb", caption_column="alt").values()
    assert (row.image, row.captions) == (PNG, ("b",))
    only = write_parquet(tmp_path / "b.parquet", {"photo": [PNG], "caption": ["a"]})
    assert next(iter(rows_of(only).values())).image == PNG


@pytest.mark.parametrize(
    ("columns", "flags", "named"),
    [
        ({"a": [1], "caption": ["x"]}, [], "--image-column"),
        ({"image": [PNG], "label": ["x"]}, [], "--caption-column"),
        ({"image": [PNG], "caption": [3]}, [], "--caption-column"),
        ({"image": [PNG], "label": ["x"]}, ["--caption-column", "lable"], "'lable'"),
        ({"image": [PNG], "caption": ["x"]}, ["--key-column", "id"], "--key-column 'id'"),
        ({"image": [PNG], "caption": ["x"], "n": [1]}, ["--image-column", "n"], "--image-column"),
    ],
)
def test_columns_that_are_not_there_are_one_line(tmp_path, columns, flags, named):
    parquet = write_parquet(tmp_path / "a.parquet", columns)
    words = ["--shards", parquet, "--model", "tiny-sd", "--cache", tmp_path / "c"]
    line = refusal("encode", *words, *flags)
    assert named in line
    assert f"has the columns {', '.join(columns)}" in line
    assert not (tmp_path / "c").exists()


def test_a_caption_column_counts_when_it_changes(tmp_path):
    parquet = write_parquet(tmp_path / "a.parquet", records(2, other=lambda n: f"other {n}"))
    cache = encode(parquet, tmp_path / "cache")
    encode(parquet, cache, caption_column="other")
    assert {row["captions"][0] for row in accounts(cache)} == {"other 0", "other 1"}


def test_pictures_too_large_are_rejected(tmp_path):
    table = {"image": [PNG, PNG + bytes(30_000)], "caption": ["a", "b"], "id": ["x", "y"]}
    rows = rows_of(write_parquet(tmp_path / "a.parquet", table), max_image_bytes=20_000)
    assert [row.problem for row in rows.values()] == ["", "larger than --max-image-bytes"]


def test_memory_is_bounded_by_the_row_groups(tmp_path):
    """100 MB of pictures are read by the row group of 10 MB."""
    count, size = 100, 1_000_000
    rng = __import__("numpy").random.default_rng(0)
    table = {"image": [rng.bytes(size) for _ in range(count)], "caption": ["a"] * count}
    parquet = write_parquet(tmp_path / "a.parquet", table, row_group_size=10)
    del table
    before, peak = pa.total_allocated_bytes(), 0
    for unit in find_units([str(parquet)]):
        for _ in unit.rows():
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 4 * 10 * size


@pytest.mark.parametrize("cut", [4, 500, -8, -1])
def test_damaged_parquet_costs_its_unit_only(tmp_path, cut):
    good = write_parquet(tmp_path / "b.parquet", records(3))
    bad = write_parquet(tmp_path / "a.parquet", records(3))
    bad.write_bytes(bad.read_bytes()[:cut])
    words = ["--model", "tiny-sd", "--cache", tmp_path / "c", "--threads", 1]
    line = refusal("encode", "--shards", bad, good, *words)
    assert "a.parquet is not a whole Parquet file" in line
    assert [unit["source"] for unit in units(tmp_path / "c").values()] == [str(good)]


def test_rows_of_parquet_are_counted_by_the_footer(tmp_path):
    (unit,) = find_units([str(write_parquet(tmp_path / "a.parquet", records(7)))])
    assert estimate_rows([unit]) == {unit.name: 7}


# --- datasets on disk ---------------------------------------------------------------------------


def test_a_saved_dataset_a_split_and_an_arrow_file(tmp_path):
    data = dataset(3)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=dataset(2)).save_to_disk(tmp_path / "two")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    wanted = rows_of(tmp_path / "one")
    assert list(wanted) == ["0000.png", "0001.png", "0002.png"]
    assert [row.image for row in wanted.values()] == [png(n) for n in range(3)]
    assert rows_of(tmp_path / "two") == wanted
    assert rows_of(arrow) == wanted
    assert len(rows_of(tmp_path / "two" / "test")) == 2


def test_a_saved_dataset_through_the_whole_stage(tmp_path):
    dataset(5).save_to_disk(tmp_path / "data")
    cache = encode(tmp_path / "data", tmp_path / "cache")
    before = tree(cache)
    assert manifest(cache)["totals"]["written"] == 5
    answer = prep("encode", "--shards", tmp_path / "data", "--model", "tiny-sd", "--cache", cache)
    assert "nothing to encode" in answer.err
    assert tree(cache) == before


def test_keys_that_repeat_across_units_stay_apart(tmp_path):
    """Each class folder of an imagefolder has its 0.png."""
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(n), "path": "0.png"} for n in range(5)], "text": ["a"] * 5}
    )
    data.save_to_disk(tmp_path / "data")
    with mock.patch.object(hub_reader, "UNIT_ROWS", 2):
        cache = encode(tmp_path / "data", tmp_path / "cache")
    assert len(units(cache)) == 3
    assert len({row["key"] for row in accounts(cache)}) == 5


def test_rows_go_to_units_by_their_key(tmp_path):
    def unit_of_row(data):
        data.save_to_disk(tmp_path / str(len(data)))
        options = SourceOptions(key_column="id", folder_units=4)
        found = find_units([str(tmp_path / str(len(data)))], options)
        assert sum(unit.rows_known for unit in found) == len(data)
        return {row.key: unit.name.partition("of4")[0].rpartition("-")[2]
                for unit in found for row in unit.rows()}  # fmt: skip

    data = dataset(12, id=lambda n: f"id {n}")
    less = unit_of_row(data.select(range(2, 12)))
    more = unit_of_row(data)
    assert len(set(more.values())) == 4
    assert {key: more[key] for key in less} == less  # two rows put in front move nobody


def test_a_dataset_without_a_train_split(tmp_path):
    datasets.DatasetDict(valid=dataset(1)).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match=f"no split train.*{tmp_path}/data/valid"):
        find_units([str(tmp_path / "data")])


def test_a_damaged_dataset_is_one_line(tmp_path):
    dataset(3).save_to_disk(tmp_path / "data")
    (arrow,) = (tmp_path / "data").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(UserError, match="data cannot be read") as caught:
        rows_of(tmp_path / "data")
    assert "\n" not in str(caught.value)


# --- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`someone/pictures` on a hub without a network: three Parquet files, two of them `train`."""
    folder = tmp_path / "hub"
    folder.mkdir()
    more = {"license": lambda n: "cc0"}
    files = {"train": [], "test": []}
    for number, (split, count) in enumerate((("train", 3), ("train", 2), ("test", 1))):
        path = folder / f"{number}.parquet"
        dataset(count, **more).to_parquet(path)
        files[split].append(str(path))

    def redirected(real):
        def load(name, config, **options):
            assert config is None
            if name != "someone/pictures":
                raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
            cache = str(tmp_path / "hf")
            return real("parquet", data_files=files, cache_dir=cache, **options)

        return load

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, redirected(getattr(datasets, name)))
    for cached in (hub_reader._load, hub_reader._stream):
        cached.cache_clear()
    yield "hf://someone/pictures"
    for cached in (hub_reader._load, hub_reader._stream):
        cached.cache_clear()


def test_a_dataset_of_the_hub(hub):
    found = find_units([hub])
    assert {unit.source for unit in found} == {"hf://someone/pictures:train"}
    assert [row.key for unit in found for row in unit.rows()] == [
        "0000.png", "0001.png", "0002.png", "0000.png", "0001.png",
    ]  # fmt: skip
    assert len(rows_of(f"{hub}:test")) == 1


def test_a_streaming_dataset_has_a_unit_for_each_shard(hub, tmp_path):
    found = pickle.loads(pickle.dumps(find_units([hub], SourceOptions(streaming=True))))
    assert len(found) == 2
    assert [len(list(unit.rows())) for unit in found] == [3, 2]
    assert [unit.state for unit in find_units([hub], SourceOptions(streaming=True))] == [
        unit.state for unit in found
    ]
    cache = encode(hub, tmp_path / "cache", streaming=True)
    assert manifest(cache)["totals"]["written"] == 5
    assert len({row["key"] for row in accounts(cache)}) == 5


@pytest.fixture
def languages(tmp_path, monkeypatch):
    """`someone/languages` with the configurations `en` and `fr`, each with a split `train`."""
    for number, name in enumerate(("en", "fr")):
        (tmp_path / "hub" / name).mkdir(parents=True)
        dataset(2 + number).to_parquet(tmp_path / "hub" / name / "train-0.parquet")
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*.parquet\n"
            for name in ("en", "fr")
        ) + "---\n"
    )  # fmt: skip

    def redirected(real):
        def load(location, *names, **options):
            assert location == "someone/languages"
            cache = str(tmp_path / "hf")
            return real(str(tmp_path / "hub"), *names, cache_dir=cache, **options)

        return load

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, redirected(getattr(datasets, name)))
    for cached in (hub_reader._load, hub_reader._stream):
        cached.cache_clear()
    yield "hf://someone/languages"
    for cached in (hub_reader._load, hub_reader._stream):
        cached.cache_clear()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_of_a_dataset(languages, streaming):
    def units_of(name, config=None):
        return find_units([name], SourceOptions(streaming=streaming, dataset_config_name=config))

    with pytest.raises(UserError, match=r"'?en'?, '?fr'?"):
        units_of(languages)
    french = units_of(languages, "fr")
    assert {unit.source for unit in french} == {f"{languages}:fr:train"}
    assert sum(len(list(unit.rows())) for unit in french) == 3
    assert units_of(f"{languages}:fr:train") == french
    assert sum(len(list(unit.rows())) for unit in units_of(f"{languages}:en:train", "fr")) == 2
    if not streaming:
        (part,) = units_of(f"{languages}:train[:1]", "en")  # a split's colon is its own
        assert part.rows_known == 1


def test_a_configuration_without_a_dataset(tmp_path):
    parquet = write_parquet(tmp_path / "a.parquet", records(1))
    words = ("--model", "tiny-sd", "--cache", tmp_path / "c", "--dataset-config-name", "fr")
    assert "--dataset-config-name" in refusal("encode", "--shards", parquet, *words)


@pytest.mark.parametrize("kind", ["parquet", "dataset", "keyed"])
def test_originals_are_found_again_with_the_columns_that_were_named(tmp_path, kind):
    columns = {
        "thumb": [png(90 + n) for n in range(3)], "photo": [png(n) for n in range(3)],
        "alt": CAPTIONS, "name": ["x", "y", "z"],
    }  # fmt: skip
    flags = ["--image-column", "photo", "--caption-column", "alt"]
    if kind == "parquet":
        source = write_parquet(tmp_path / "a{1}[2].parquet", columns)
        typed = tmp_path / "a\\{1\\}[[]2].parquet"
    else:
        typed = source = tmp_path / "data"
        datasets.Dataset.from_dict(columns).save_to_disk(source)
    flags += ["--key-column", "name"] if kind == "keyed" else []
    cache = tmp_path / "cache"
    words = ("--model", "tiny-sd", "--cache", cache, "--threads", 1)
    assert prep("encode", "--shards", typed, *words, *flags).status == 0
    answer = prep("verify", "--cache", cache, "--reencode", 3)
    assert "encoded again: 3 samples" in answer.err
    assert "not compared" not in answer.err
    assert answer.status == 0
    assert (cache / "report.html").read_text().count(" dB") >= 3


def test_another_limit_of_bytes_reads_again_what_it_may_concern(tmp_path):
    columns = records(3)
    columns["image"][1] = png(1, 300, 300)  # 200 kB
    parquet = write_parquet(tmp_path / "a.parquet", {**columns, "image": [
        one if isinstance(one, bytes) else one["bytes"] for one in columns["image"]
    ]})  # fmt: skip
    cache = tmp_path / "cache"
    reasons = []
    for limit in (50_000, 50_000, 500_000, 50_000, None):
        flags = {} if limit is None else {"max_image_bytes": limit}
        before = units(cache) if cache.exists() else {}
        encode(parquet, cache, **flags)
        reasons.append([row["reason"] for row in accounts(cache) if row["reason"]])
        assert (units(cache) == before) == (len(reasons) == 2)
    large = ["larger than --max-image-bytes"]
    assert reasons == [large, large, [], large, []]


@pytest.mark.parametrize("streaming", [False, True])
def test_mistakes_about_the_hub_are_one_line(hub, streaming):
    options = SourceOptions(streaming=streaming)
    for name, told in (
        ("hf://someone/picturse", "picturse"),
        (f"{hub}:valid", "train"),  # the splits there are
    ):
        with pytest.raises(UserError) as caught:
            find_units([name], options)
        assert name.partition(":valid")[0] in str(caught.value)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, SourceError)


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_a_dataset_keeps_in_files(tmp_path, monkeypatch, streaming):
    folder = write_folder(tmp_path / "folder", range(3))
    cache = str(tmp_path / "hf")

    def redirected(real):
        return lambda *_, **options: real(
            "imagefolder", data_dir=str(folder), cache_dir=cache, **options
        )

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, redirected(getattr(datasets, name)))
    found = find_units(["hf://someone/files"], SourceOptions(streaming=streaming))
    (folder / "0001.png").unlink()
    rows = [row for unit in found for row in unit.rows()]
    assert [row.problem for row in rows] == ["", "file missing", ""]
    assert rows[2].image == png(2)
    assert rows[2].captions == ("picture number 2",)
