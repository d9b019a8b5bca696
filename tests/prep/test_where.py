"""`--where` and `--max-pwatermark`: Python's answers on complete rows, "unknown" on the others."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.filters.filters import Filters
from prep.filters.where import Where
from shared.errors import UserError
from tests.support.sources import accounts, encode, file_of, manifest, photo, refusal, write_tar

ROW = {
    "similarity": 0.31, "width": 512, "WIDTH": 640, "Height": 480, "license": "cc-by", "nsfw": None,
    "tags": ["cat", "dog"], "caption": "A Red cat", "nan": float("nan"), "watermarked": False,
    "exif": {"Make": "x"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("similarity > 0.3 and license != 'nc'", True),
        ("similarity > 0.3 and license == 'nc'", False),
        ("0.3 < similarity <= 0.31", True),
        ("0.3 < similarity < 0.31", False),
        ("width == 512 and WIDTH == 640 and height == 480", True),  # exact name, else any case
        ("width * height >= 1e6", False),
        ("width // 100 == 5 and width % 100 == 12 and -width < +width", True),
        ("'cat' in tags and 'bird' not in tags", True),
        ("'bird' in tags", False),
        ("license in ('cc-by', 'cc0')", True),
        ("license not in ['cc-by', 'cc0']", False),
        ("'red' in caption", False),
        ("'red' in lower(caption)", True),
        ("len(caption) == 9 and len(tags) == 2", True),
        ("nsfw is None and nsfw == None", True),
        ("nsfw is not None", False),
        ("not watermarked", True),
        ("watermarked", False),
        ("has(license) and has('license')", True),
        ("has(pwatermark)", False),
        ("'Make' in exif", True),
        ("'a' + 'b' == 'ab'", True),
        ("  similarity\n > 0.3", None),
    ],
)
def test_answers(text, kept):
    if kept is None:
        with pytest.raises(UserError):
            Where(text)
    else:
        assert Where(text).keeps(ROW) is kept


@pytest.mark.parametrize(
    "text",
    [
        "gone > 0.3", "not gone > 0.3", "gone == 'x'", "gone != 'x'", "gone", "not gone",
        "gone in (1, 2)", "1 in gone", "len(gone) > 3", "lower(gone) == 'a'", "gone + 1 > 2",
        "nan > 0.3", "nan <= 0.3", "license > 3", "license == 3", "license != 3", "width == '512'",
        "nsfw > 0.5", "tags > 1", "len(width) > 1", "lower(width) == '1'", "width / 0 > 1",
        "1e308 * 10 * 0 > 1", "license in (1, gone)", "3 in caption", "similarity > 1 or gone > 1",
        "similarity > 0 and gone > 1", "-license > 1", "width * license == ''",
        "not (gone or watermarked)",
    ],
)  # fmt: skip
def test_what_is_unknown_is_kept_and_so_is_its_opposite(text):
    assert Where(text).keeps(ROW)
    assert Where(f"not ({text})").keeps(ROW)


def test_what_is_known_decides_in_spite_of_what_is_not():
    assert not Where("similarity > 1 and gone > 1").keeps(ROW)
    assert not Where("not (similarity > 0 or gone > 1)").keeps(ROW)
    assert not Where("has(gone) and gone > 1").keeps(ROW)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("similarity >", "invalid syntax"),
        ("similarity = 3", "invalid syntax"),
        ("", "invalid syntax"),
        ("a; b", "invalid syntax"),
        ("sin(similarity) > 1", "no function sin, only has, len, lower"),
        ("__import__('os').system('touch x')", "no function"),
        ("license.lower() == 'nc'", "no function license.lower"),
        ("license.upper", "more than a predicate"),
        ("tags[0] == 'cat'", "more than a predicate"),
        ("[x for x in tags]", "more than a predicate"),
        ("(x := 3) > 2", "more than a predicate"),
        ("lambda: 3", "more than a predicate"),
        ("f'{license}' == 'nc'", "more than a predicate"),
        ("9 ** 9 ** 9 ** 9 > 1", "more than a predicate"),
        ("~width", "more than a predicate"),
        ("1 if width else 2", "more than a predicate"),
        ("b'x' == license", "neither number"),
        ("width is 3", "use == instead"),
        ("has(1)", "name of a key"),
        ("len(tags, tags)", "one argument"),
        ("(" * 500 + "width" + ")" * 500, "parentheses"),
        ("not " * 200 + "width", "nested too deeply"),
        ("-" * 100_000 + "width", ""),
        ("width\0", "null"),
    ],
)
def test_what_it_does_not_understand_is_one_line(text, named):
    with pytest.raises(UserError) as caught:
        Where(text)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--where ")


# Well-typed expressions over rows that have every key, so that Python has an answer, too.
numbers = st.one_of(
    st.sampled_from(["a", "b", "width"]), st.integers(-9, 9).map(str),
    st.floats(-5, 5, allow_nan=False).map(repr), st.sampled_from(["len(name)", "len(tags)"]),
)  # fmt: skip
sums = st.recursive(
    numbers,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*"]), inner)
        | inner.map("(-{})".format)
    ),
    max_leaves=4,
)
strings = st.sampled_from(["name", "lower(name)", "'x'", "'nc'", "'X'", "'Nc x'", "''"])
links = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
membership = st.sampled_from(["in", "not in"])
comparisons = st.one_of(
    st.builds("{} {} {}".format, sums, links, sums),
    st.builds("{} {} {} {} {}".format, sums, links, sums, links, sums),
    st.builds("{} {} {}".format, strings, links, strings),
    st.builds("{} {} {}".format, strings, membership, strings | st.just("tags")),
    st.builds("{} {} ({}, {})".format, sums, membership, sums, sums),
    st.sampled_from(["flag", "nothing is None", "nothing is not None", "name == None"]),
)
predicates = st.recursive(
    comparisons,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner)
        | inner.map("(not {})".format)
    ),
    max_leaves=6,
)
rows = st.fixed_dictionaries(
    {
        "a": st.integers(-9, 9), "b": st.floats(-5, 5), "width": st.integers(0, 2048),
        "name": st.sampled_from(["", "x", "nc", "NC", "Nc x"]), "flag": st.booleans(),
        "tags": st.lists(st.sampled_from(["x", "nc"])), "nothing": st.none(),
    }
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(text=predicates, row=rows)
def test_complete_rows_get_pythons_answer(text, row):
    names = {**row, "lower": str.lower, "len": len, "__builtins__": {}}
    assert Where(text).keeps(row) is bool(eval(text, names)), text


@settings(max_examples=200, deadline=None)
@given(text=predicates, row=rows, missing=st.sets(st.sampled_from(["a", "b", "name", "flag"])))
def test_a_missing_key_rejects_only_what_any_value_would(text, row, missing):
    """Kleene's logic is sound: a rejection without the key stands whatever its value."""
    partial = {key: value for key, value in row.items() if key not in missing}
    if not Where(text).keeps(partial):
        assert not Where(text).keeps(row)


def test_filters_travel_to_other_processes():
    filters = pickle.loads(pickle.dumps(Filters("similarity > 0.3", 0.8)))
    assert filters.reason({"similarity": 0.1}) == "where"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0.9, "pwatermark above 0.8"), (1, "pwatermark above 0.8"), (0.8, ""), (0.1, ""),
        (None, ""), ("0.9", ""), (float("nan"), ""), ([0.9], ""),
    ],
)  # fmt: skip
def test_pwatermark(value, reason):
    assert Filters(max_pwatermark=0.8).reason({"pwatermark": value}) == reason
    assert Filters(max_pwatermark=0.8).reason({"PWATERMARK": value}) == reason
    assert Filters(max_pwatermark=0.8).reason({}) == ""


def test_filtered_rows_are_accounted_for_and_do_not_count_as_damage(tmp_path):
    metadata = [
        {"caption": "kept", "similarity": 0.4, "pwatermark": 0.1},
        {"caption": "no keys"},
        *[{"caption": "b", "similarity": 0.1}] * 5,
        *[{"caption": "c", "similarity": 0.4, "pwatermark": 0.95}] * 5,
    ]
    files = []
    for number, row in enumerate(metadata):
        # Those to be filtered are no pictures: nobody must try to decode them.
        picture = file_of(photo(number)) if number < 2 else b"no picture"
        files += [(f"{number}.png", picture), (f"{number}.json", json.dumps(row).encode())]
    tar = write_tar(tmp_path / "a.tar", files)
    flags = {"where": "similarity > 0.3", "max_pwatermark": 0.8}
    cache = encode(tar, tmp_path / "cache", max_reject_fraction=0.0, **flags)
    totals = manifest(cache)["totals"]
    assert (totals["read"], totals["written"]) == (12, 2)
    assert totals["rejected"] == {"pwatermark above 0.8": 5, "where": 5}
    assert {row["reason"] for row in accounts(cache)} == {"", "where", "pwatermark above 0.8"}
    words = ["encode", "--shards", tar, "--model", "tiny-sd", "--cache", cache, "--threads", 1]
    line = refusal(*words, "--where", "similarity > 0.35")
    assert "preprocessing.where" in line
    assert "similarity > 0.35" in line


def test_a_wrong_predicate_is_told_before_anything_starts(tmp_path):
    words = ["--model", "no-such-model", "--cache", tmp_path / "c", "--where", "open('x')"]
    line = refusal("encode", "--shards", tmp_path / "nothing.tar", *words)
    assert "there is no function open" in line
