"""What a library tells of the world is one line; a mistake of ours is a traceback, at once."""

from unittest import mock

import fsspec
import pytest

from prep.engines import ray_cluster
from prep.files import remote
from prep.sources.find import find_units
from prep.sources.tables import hf_dataset, open_dataset
from shared.errors import UserError
from shared.storage import retry
from tests.support.sources import encode, write_folder

BUGS = (TypeError("ours"), AttributeError("ours"), NameError("ours"), AssertionError("ours"))


@pytest.fixture
def patience():
    """Nobody may wait for a mistake to go away."""
    with mock.patch.object(retry.time, "sleep", side_effect=AssertionError("tried again")):
        yield


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pipe("/bucket/a.tar", b"x" * 2048)
    yield filesystem
    filesystem.store.clear()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_reading_a_remote_file(memory, patience, bug):
    with mock.patch.object(remote.RetryingFile, "_open", side_effect=bug), \
         pytest.raises(type(bug), match="ours"):  # fmt: skip
        remote.RetryingFile("memory://bucket/a.tar").read(10)
    with mock.patch.object(type(memory), "info", side_effect=bug), \
         pytest.raises(type(bug), match="ours"):  # fmt: skip
        find_units(["memory://bucket/a.tar"])
    with mock.patch.object(type(memory), "glob", side_effect=bug), \
         pytest.raises(type(bug), match="ours"):  # fmt: skip
        find_units(["memory://bucket/*.tar"])


def test_what_the_file_system_raises_is_tried_again(memory):
    waits = []
    with mock.patch.object(retry.time, "sleep", waits.append), \
         mock.patch.object(type(memory), "info", side_effect=TimeoutError("slow")), \
         pytest.raises(UserError, match="slow"):  # fmt: skip
        find_units(["memory://bucket/a.tar"])
    assert len(waits) == retry.TRIES - 1


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_opening_a_dataset(tmp_path, bug):
    with mock.patch.object(hf_dataset, "_load", side_effect=bug), \
         pytest.raises(type(bug), match="ours"):  # fmt: skip
        hf_dataset.dataset_units(str(tmp_path), hf_dataset.SourceOptions())
    with mock.patch.object(open_dataset, "home_of", side_effect=bug), \
         mock.patch("datasets.load_from_disk"), \
         pytest.raises(type(bug), match="ours"):  # fmt: skip
        hf_dataset.dataset_units(str(tmp_path), hf_dataset.SourceOptions())


@pytest.mark.parametrize(
    "damage", ["{}", "[]", "null", '{"_data_files": 3}', "not json", '{"_data_files": [{}]}']
)
def test_a_datasets_damaged_records_are_one_line(tmp_path, damage):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text(damage)
    with pytest.raises(UserError, match="cannot be read"):
        find_units([str(tmp_path)])


def test_ray_that_does_not_start():
    ray = mock.Mock()
    ray.init.side_effect = ConnectionError("nobody there\nat all")
    with pytest.raises(UserError, match=r"Ray does not start here \(nobody there\)"):
        ray_cluster.connect(ray, None)
    ray.init.side_effect = TypeError("ours")
    with pytest.raises(TypeError, match="ours"):
        ray_cluster.connect(ray, None)
    with pytest.raises(UserError, match="'x' is no port"):
        ray_cluster.connect(ray, "host:x")


def test_a_mistake_while_a_unit_is_read_is_seen(tmp_path):
    folder = write_folder(tmp_path / "folder", range(2))
    with mock.patch("prep.sources.folders.folder.make_row", side_effect=TypeError("ours")), \
         pytest.raises(TypeError, match="ours"):  # fmt: skip
        encode(folder, tmp_path / "cache")
