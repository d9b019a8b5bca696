"""Hugging Face datasets, on disk and of the hub: splits, configurations, keys, damage."""

import pickle
from unittest import mock

import datasets
import pytest

from prep.sources.find import SourceError, SourceOptions, find_units
from prep.sources.tables import hf_dataset as hub_reader
from prep.synthesize.caption_files import read_captions
from prep.synthesize.config import SynthesizeConfig
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
from tests.support.tables import dataset, records, rows_of, write_parquet

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


# --- the hub ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("streaming", [False, True])
def test_the_captions_of_a_dataset_of_the_hub_without_its_pictures(hub, streaming):
    (found,) = read_captions(SynthesizeConfig((hub,), streaming=streaming))
    assert (found.source, len(found.rows)) == ("hf://someone/pictures:train", 5)
    assert all(row.caption == row.key and row.caption for row in found.rows)
    with pytest.raises(UserError, match="hf://someone/picturse"):
        read_captions(SynthesizeConfig(("hf://someone/picturse",), streaming=streaming))


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
