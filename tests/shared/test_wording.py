"""Numbers that people read: none of them is `1 units`, `0.00 GB` or `0 samples/s`."""

import re

import pytest

from shared.cli.progress import Progress
from shared.wording import counted, duration, rate, size_of


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (counted(1, "unit"), "1 unit"),
        (counted(0, "unit"), "0 units"),
        (counted(12_345, "picture"), "12,345 pictures"),
        (counted(2, "process", "processes"), "2 processes"),
        (size_of(1), "1 byte"),
        (size_of(0), "0 bytes"),
        (size_of(999.6), "1.0 kB"),
        (size_of(3_200_000), "3.2 MB"),
        (size_of(999_960_000), "1.0 GB"),
        (size_of(2.5e15), "2,500.0 TB"),
        (duration(0.004), "4 ms"),
        (duration(0.3), "0.3 s"),
        (duration(45), "45 s"),
        (duration(150), "2.5 min"),
        (duration(8000), "2.2 h"),
        (duration(400_000), "4.6 days"),
        (rate(0.02, "sample"), "50 s/sample"),
        (rate(0.0005, "step"), "33 min/step"),
        (rate(3.44, "picture"), "3.4 pictures/s"),
        (rate(12_345.6, "picture"), "12,346 pictures/s"),
    ],
)
def test_the_unit_fits_the_number(said, wanted):
    assert said == wanted


@pytest.mark.parametrize("value", [10.0**e * k for e in range(-4, 12) for k in (1, 4.9, 9.96)])
def test_something_never_reads_as_nothing(value):
    for said in (size_of(value + 1), duration(value), rate(value, "step")):
        assert re.search("[1-9]", said), said
        assert len(said) < 24, said


def test_a_log_of_few_and_slow_steps_says_how_long_each_takes(capsys, monkeypatch):
    clock = iter([0.0, 50.0, 50.0, 50.0, 50.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Progress("distill", 2, "step") as progress:
        progress.update(1, "loss 0.1")
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "distill: 1 of 2 steps, 50 s/step, 50 s left  loss 0.1"


def test_a_log_says_one_of_one(capsys):
    with Progress("encode", 1, "picture") as progress:
        progress.update(1)
    assert capsys.readouterr().err.startswith("encode: 1 of 1 picture, ")
