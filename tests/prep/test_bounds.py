"""Bombs: what is read ahead is bounded by its bytes, and endless texts are rejected or cut."""

import itertools
import json
import random
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from prep.encode import decode_rows as decode
from prep.encode.decode_rows import decode_rows
from prep.encode.prefetch import map_ahead
from prep.encode.settings import Settings
from prep.encoders import tokens
from prep.encoders.text import TextEncoder
from prep.images.crop import Framing
from prep.rows.row import make_row
from prep.sources.find import SourceOptions, find_units
from prep.sources.tables import parquet
from shared.models.family import resolve_model
from tests.support.sources import TINY_XL, accounts, encode, png, write_tar

SETTINGS = Settings(Framing(64), keep_logvar=False, max_captions=1)
LARGE = "larger than --max-image-bytes"
PNG = png(1, 16, 16)


def rows_of(source, **options):
    (unit,) = find_units([str(source)], SourceOptions(**options))
    return unit.rows()


def test_no_item_is_taken_while_those_that_wait_weigh_too_much():
    taken = []

    def heavy(weight):
        for number in itertools.count():
            taken.append(number)
            yield number, weight

    for weight, waiting in ((30, 3), (1000, 0), (0, 7)):
        taken.clear()
        done = map_ahead(
            lambda item: item[0], heavy(weight), 2, 8, "decode", lambda item: item[1], 100
        )
        assert list(itertools.islice(done, 5)) == [0, 1, 2, 3, 4]
        assert len(taken) == 5 + waiting
        done.close()


class Picture(bytes):
    """A picture's bytes that say whether they are still held."""

    held = most = 0

    def __init__(self, _):
        Picture.held += 1
        Picture.most = max(Picture.most, Picture.held)

    def __del__(self):
        Picture.held -= 1


def test_few_large_pictures_wait_and_none_once_it_is_decoded(monkeypatch):
    monkeypatch.setattr(decode, "WAITING_BYTES", 4_000_000)
    metadata = {"url": "u", "similarity": 0.3}
    rows = (make_row(str(n), Picture(PNG + bytes(1_000_000)), ("a",), metadata) for n in range(40))
    samples = list(decode_rows(rows, SETTINGS, 2, 32))
    assert len(samples) == 40
    assert all(sample.pictures for sample in samples)
    assert samples[0].row.metadata == {"url": "u"}
    assert Picture.held == 0
    assert Picture.most <= 6  # those that wait, one in hand, one that was just handed on


def test_a_json_counts_as_what_it_becomes_in_memory(tmp_path, monkeypatch):
    files = []
    for n in range(8):
        nested = b'{"caption": "a", "x": [' + b"[]," * 30_000 + b"[]]}"
        files += [(f"{n}.png", PNG), (f"{n}.json", nested)]
    tar, taken = write_tar(tmp_path / "a.tar", files), []
    monkeypatch.setattr(decode, "WAITING_BYTES", 10_000_000)
    rows = (taken.append(row.key) or row for row in rows_of(tar))
    first = decode_rows(rows, SETTINGS, 2, 32)
    assert next(first).row.captions == ("a",)
    assert len(taken) <= 4
    first.close()


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_a_tables_large_rows_are_held_one_at_a_time(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1_000_000)
    size, count = 1_000_000, 16
    table = {
        "image": [random.Random(n).randbytes(size) for n in range(count)],
        "text": ["a"] * count,
    }
    if kind == "parquet":
        source = tmp_path / "a.parquet"
        pq.write_table(pa.table(table), source)
    else:
        source = tmp_path / "saved"
        datasets.Dataset.from_dict(table).save_to_disk(source)
    del table
    rows = rows_of(source)
    next(rows)
    tracemalloc.start()
    before, arrow = pa.total_allocated_bytes(), 0
    for _ in rows:
        arrow = max(arrow, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * size
    assert arrow < 6 * size


def test_a_datasets_picture_in_a_large_file_is_not_read_whole(tmp_path):
    saved = tmp_path / "saved"
    binary = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": binary, "text": datasets.Value("string")})
    pictures = [{"bytes": None, "path": str(saved / f"{name}.png")} for name in "ab"]
    table = {"image": pictures, "text": ["a", "b"]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(saved)
    (saved / "a.png").write_bytes(PNG + bytes(20_000_000))
    (saved / "b.png").write_bytes(PNG)
    tracemalloc.start()
    rows = list(rows_of(saved, max_image_bytes=1_000_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row.problem for row in rows] == [LARGE, ""]
    assert rows[1].image == PNG
    assert peak < 8_000_000


def test_endless_texts_are_rejected_with_a_reason(tmp_path):
    endless = "word " * 30_000
    files = [
        ("good.png", PNG), ("good.txt", endless[:100_000].encode()),
        ("txt.png", PNG), ("txt.txt", endless.encode()),
        ("large.png", PNG), ("large.txt", b"x" * 1_000_001),
        ("json.png", PNG), ("json.json", json.dumps({"caption": endless}).encode()),
        ("bomb.png", PNG), ("bomb.txt", b"a"), ("bomb.json", b"[" * 1_000_001),
    ]  # fmt: skip
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files:
        (folder / name).write_bytes(content)
    sources = write_tar(tmp_path / "a.tar", files), folder
    flags = {"max_reject_fraction": 1.0, "text_batch_size": 2}
    rows = accounts(encode(sources, tmp_path / "cache", **flags))
    long = "caption longer than 100,000 characters"
    expected = {
        "good": "",
        "txt": long,
        "large": long,
        "json": long,
        "bomb": "json larger than 1 MB",
    }
    found = {row["source_key"]: row["reason"] for row in rows}
    beside = {"good": "", "txt": long, "large": long, "json": long, "bomb": ""}
    assert found == expected | {f"{name}.png": reason for name, reason in beside.items()}
    assert max(len(caption) for row in rows for caption in row["captions"]) == 99_999


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(resolve_model(str(TINY_XL)), torch.device("cpu"), 4)


def test_of_a_long_caption_the_first_words_are_tokenized(encoder, monkeypatch):
    seen = []
    real = tokens._tokenized
    monkeypatch.setattr(tokens, "_tokenized", lambda *args: (seen.extend(args[1]), real(*args))[1])
    captions = ["word " * 20_000, " " * 90_000 + "a star", "a star", "x" * 100_000]
    assert encoder.truncated(captions) == [True, False, False, True]
    assert seen[0] == "word " * 819  # of the others all, one at a time
    assert seen[4:] == [captions[1], captions[3]]


def test_cutting_a_caption_changes_neither_tokens_nor_what_is_counted(encoder, monkeypatch):
    chars = "ab É\u0301ſﬁ1'sS \t\n  ,.日🏳\u200d\x1c\0\u3000Σς"
    draw = random.Random(0)
    texts = ["".join(draw.choices(chars, k=draw.randrange(90))) for _ in range(400)]
    texts += [text.replace("a", "<|endoftext|> ", 1) for text in texts[:100]]
    for tokenizer in encoder.tokenizers:
        whole = tokens.tokenized(tokenizer, texts, encoder.length)
        assert 50 < sum(whole[1]) < 450
        for enough in (9, 25, 40):
            monkeypatch.setattr(tokens, "ENOUGH", enough)
            assert tokens.tokenized(tokenizer, texts, encoder.length) == whole
        monkeypatch.undo()
