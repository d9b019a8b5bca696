"""`prep encode --shuffle-caption`: several orders of a caption's tags in the cache."""

import json

import numpy as np
import pytest

from prep.encode.caption_shuffle import Shuffle
from tests.support.sources import accounts, encode, prep, samples, tree, write_folder

SHA, OTHER = "ab" * 32, "cd" * 32
TAGS = "1girl, red hair,blue eyes , smile, hat"


def test_orders_keep_the_first_tags_and_lose_none():
    found = Shuffle(keep_tokens=2).captions([TAGS], SHA, 6)
    assert len(set(found)) == len(found) == 6  # all that three tags have
    for caption in found:
        tags = caption.split(", ")
        assert tags[:2] == ["1girl", "red hair"]
        assert sorted(tags[2:]) == ["blue eyes", "hat", "smile"]


def test_orders_depend_on_picture_seed_and_caption_alone():
    found = Shuffle().captions([TAGS], SHA, 8)
    assert found == Shuffle().captions([TAGS], SHA, 8)
    assert found[:4] == Shuffle().captions([TAGS], SHA, 4)  # more of them change none
    assert found != Shuffle(seed=1).captions([TAGS], SHA, 8)
    assert found != Shuffle().captions([TAGS], OTHER, 8)


@pytest.mark.parametrize(
    ("captions", "separator", "wanted"),
    [
        (["a sentence"], ",", {"a sentence"}),
        (["a, b"], ",", {"a, b", "b, a"}),
        (["a|b"], "|", {"a, b", "b, a"}),
        (["a,b"], "|", {"a,b"}),
        ([" , ,"], ",", {" , ,"}),
        (["a", "b"], ",", {"a", "b"}),
        ([], ",", set()),
    ],
)
def test_captions_with_few_orders(captions, separator, wanted):
    assert set(Shuffle(separator).captions(captions, SHA, 32)) == wanted


FLAGS = {"shuffle_caption": True, "max_captions": 4, "keep_tokens": 1}


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    """A folder of two pictures, one with tags, and the cache with their orders."""
    root = tmp_path_factory.mktemp("shuffle")
    folder = write_folder(root / "folder", range(2), n0=TAGS)
    return folder, encode(folder, root / "cache", **FLAGS)


def test_the_cache_holds_the_orders(shuffled, tmp_path):
    """Each is embedded as a caption of its own; a caption without tags stays one."""
    _, cache = shuffled
    found = samples(cache)
    tagged, plain = found["0000.png"], found["0001.png"]
    assert tagged.record["num_captions"] == len(set(tagged.record["captions"])) > 1
    assert plain.record["num_captions"] == 1
    listed = write_folder(tmp_path / "folder", range(1))
    rows = [{"file_name": "0000.png", "text": tagged.record["captions"]}]
    (listed / "metadata.jsonl").write_text(json.dumps(rows[0]) + "\n")
    same = samples(encode(listed, tmp_path / "listed", max_captions=4))["0000.png"]
    for name in ("prompt_embeds", "latents"):
        np.testing.assert_array_equal(same.arrays[name], tagged.arrays[name])


def test_what_is_there_is_copied_by_its_own_text(shuffled, tmp_path):
    """A picture more: the cache is that of one go, and only its captions are encoded."""
    folder, _ = shuffled
    grown = write_folder(tmp_path / "folder", range(2), n0=TAGS)
    flags = ["--shards", grown, "--model", "tiny-sd", "--cache", tmp_path / "cache", "--threads",
             1, "--latents", "mean", "--no-report", "--shuffle-caption", "--max-captions", 4,
             "--keep-tokens", 1]  # fmt: skip
    assert prep("encode", *flags).status == 0
    write_folder(grown, range(3), n0=TAGS)
    answer = prep("encode", *flags)
    assert "1 picture and 1 caption encoded" in answer.out, answer
    one_go = tmp_path / "one"
    assert prep("encode", *flags[:4], "--cache", one_go, *flags[6:]).status == 0
    kept = tree(tmp_path / "cache" / "shards")  # the shard that was replaced stays until `gc`
    assert tree(one_go / "shards").items() <= kept.items()
    assert prep("verify", "--cache", one_go, "--reencode", 3).status == 0
    assert folder != grown


def test_old_caches_keep_their_identity_and_others_are_refused(shuffled, tmp_path):
    folder, cache = shuffled
    plain = encode(folder, tmp_path / "plain", max_captions=4)
    stored = json.loads((plain / "identity.json").read_text())["preprocessing"]
    assert "shuffle" not in stored
    shuffle = json.loads((cache / "identity.json").read_text())["preprocessing"]["shuffle"]
    assert shuffle == {"separator": ",", "keep_tokens": 1, "seed": 0}
    answer = prep("encode", "--shards", folder, "--model", "tiny-sd", "--cache", plain,
                  "--max-captions", 4, "--shuffle-caption")  # fmt: skip
    assert answer.status == 1
    assert "preprocessing.shuffle" in answer.err
    assert {row["source_key"] for row in accounts(cache)} == {"0000.png", "0001.png"}
