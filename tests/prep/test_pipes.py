"""Tars from commands: read like files, and only where the user typed them."""

import json
import pickle
import time
from pathlib import Path

import pytest

from prep.sources.find import SourceError, SourceOptions, find_units
from shared.errors import UserError
from tests.support.sources import (
    captioned,
    prep,
    refusal,
    write_tar,
)

TYPED = SourceOptions(pipes=True)  # as if on the command line


def rows_of(source, **options):
    """`key -> row` of everything that a source holds."""
    units = find_units([str(source)], SourceOptions(pipes=True, **options))
    units = pickle.loads(pickle.dumps(units))  # as when they go to other processes
    return {row.key: row for unit in units for row in unit.rows()}


def damage(source, **options):
    """The line with which reading a source ends."""
    with pytest.raises(SourceError) as caught:
        rows_of(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "good.tar", captioned(range(3)))


def test_a_pipe_is_read_like_the_file(tar, tmp_path):
    assert rows_of(f"pipe:cat {tar}") == rows_of(tar)
    assert rows_of(f"pipe:gzip -c {tar} | cat") == rows_of(tar)


def test_braces_of_a_pipe(tar, tmp_path):
    write_tar(tmp_path / "b0.tar", captioned([7]))
    write_tar(tmp_path / "b1.tar", captioned([8]))
    units = find_units([f"pipe:cat {tmp_path}/b{{0..1}}.tar"], TYPED)
    assert {unit.source for unit in units} == {f"pipe:cat {tmp_path}/b{n}.tar" for n in (0, 1)}
    assert rows_of(rf"pipe:printf '%s\n' {tar} | xargs cat") == rows_of(tar)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("cat {}; exit 3", "exit status 3"),
        ("head -c 5000 {}; exit 3", "exit status 3"),
        ("head -c 5000 {}", "not a whole tar"),
        ("exit 3", "exit status 3"),
        ("true", "empty"),
        ("no-such-command", "exit status 127"),
        ("cat {}; kill -9 $$", "signal 9"),
        ("cat {} {}", "several tars in one"),
        ("echo '<html>404</html>'", "not a whole tar"),
    ],
)
def test_a_failing_command_is_never_a_silent_end(tar, command, told):
    line = damage("pipe:" + command.replace("{}", str(tar)))
    assert told in line
    assert "by hand" in line


def test_a_pipe_that_nobody_reads_to_the_end_is_ended(tmp_path):
    tar = write_tar(tmp_path / "a.tar", captioned(range(20)))
    marker = tmp_path / "pid"
    command = f"pipe:echo $$ > {marker}; cat {tar}; sleep 100"
    (unit,) = find_units([command], TYPED)
    rows = unit.rows()
    next(rows)
    rows.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{marker.read_text().strip()}").exists():
        assert time.monotonic() < deadline


def test_pipes_run_only_where_the_user_typed_them(tar, tmp_path):
    marker = tmp_path / "ran"
    command = f"pipe:touch {marker}; cat {tar}"
    (tmp_path / "run.toml").write_text(f"shards = [{json.dumps(command)}]\n")
    words = ["--model", "tiny-sd", "--cache", tmp_path / "c"]
    line = refusal("encode", "--config", tmp_path / "run.toml", *words)
    assert "run.toml: shards" in line
    assert "command line" in line
    braces = "{" + command + ",x}"  # nor by way of braces
    (tmp_path / "run.toml").write_text(f"shards = [{json.dumps(braces)}]\n")
    assert "nothing matches" in refusal("encode", "--config", tmp_path / "run.toml", *words)
    with pytest.raises(UserError, match="command line"):
        find_units([command])  # what a cache's record says, for example
    assert not marker.exists()
    assert prep("encode", "--shards", command, *words, "--threads", 1).status == 0
    assert marker.exists()
    picture = tmp_path / "sheet.png"
    marker.unlink()
    assert prep("decode", "--cache", tmp_path / "c", "--output", picture).status == 0
    assert not marker.exists()
