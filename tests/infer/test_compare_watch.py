"""`infer compare --watch`: built again when a run has changed, whole at every moment."""

import json
import os
import signal
import threading
import time

import pytest

from infer.compare import watch as watching
from infer.compare.contents import gather
from infer.compare.watch import state_of, watch
from tests.support.compared import Page, copied


@pytest.fixture(scope="module")
def made(made):
    return made["lcd"]


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "LOOK", 0.02)
    monkeypatch.setattr(watching, "REST", 0.0)
    return copied(made, tmp_path / "runs" / "mine")


def append(run, step):
    line = {"step": step, "loss": 0.5, "samples_per_second": 2.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_it_writes_again_when_a_run_has_changed_and_stops_reloading_in_the_end(run, capsys):
    seen = []

    def write(contents, refresh):
        seen.append((contents.records[0].steps, refresh))
        if not refresh:
            return ""
        if len(seen) == 3:
            raise KeyboardInterrupt
        append(run, 4 + len(seen))
        return f"step {contents.records[0].steps}"

    with pytest.raises(KeyboardInterrupt):
        watch([run], gather([run]), write)
    assert seen == [(4, True), (5, True), (6, True), (6, False)]
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "step 4", "step 5",
    ]  # fmt: skip


def test_what_cannot_be_read_for_a_moment_is_told_once_and_waited_out(run, capsys):
    config, seen = (run / "config.json").read_text(), []

    def write(contents, refresh):
        seen.append(refresh)
        if len(seen) == 1:
            (run / "config.json").write_text("{")
            threading.Timer(0.3, append, (run, 9)).start()
            threading.Timer(0.6, (run / "config.json").write_text, (config,)).start()
        elif refresh:
            assert contents.records[0].steps == 9
            raise KeyboardInterrupt
        return "built"

    with pytest.raises(KeyboardInterrupt):
        watch([run], gather([run]), write)
    assert capsys.readouterr().err.count("config.json is not valid JSON") == 1


def test_a_run_that_is_damaged_at_the_start_is_told_and_joins_when_it_is_whole(run, capsys):
    other = copied(run, run.parent / "other")
    config, seen = (other / "config.json").read_text(), []
    (other / "config.json").write_text("{")

    def write(contents, refresh):
        seen.append(contents.names)
        if refresh and len(seen) == 2:
            raise KeyboardInterrupt
        (other / "config.json").write_text(config)
        return "built"

    with pytest.raises(KeyboardInterrupt):
        watch([run, other], gather([run, other]), write)
    assert seen[:2] == [["mine"], ["mine", "other"]]
    assert capsys.readouterr().err.count("left out: ") == 1


def test_everything_that_the_page_shows_is_watched(run):
    """And nothing is built where nothing has changed."""
    before = state_of([run])
    assert state_of([run]) == before
    for change in (
        lambda: append(run, 7),
        lambda: (run / "evaluations.jsonl").write_text("{}\n"),
        lambda: (run / "evaluation.json").write_text("{}"),
        lambda: (run / "previews" / "step-00000009.png").write_bytes(b""),
        lambda: os.utime(run / "config.json", (1, 1)),
        lambda: (run / "checkpoints" / "step-9").mkdir(),
    ):
        change()
        assert state_of([run]) != before
        before = state_of([run])


def test_the_command_goes_on_until_ctrl_c(run, cli, tmp_path):
    """Also for a run without metrics. Every page that can be read on the way is whole."""
    (run / "metrics.jsonl").unlink()
    page = tmp_path / "out" / "index.html"
    reloading = []

    def meanwhile():
        for step in (1, 2):
            while not (page.exists() and f"{step - 1:,} of 4" in page.read_text()):
                time.sleep(0.02)
            reloading.append('<meta name="refresh"' in page.read_text())
            assert page.read_text().rstrip().endswith("</html>")
            append(run, step)
        while "2 of 4" not in page.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=meanwhile)
    thread.start()
    answer = cli("infer", "compare", run, "--watch", "--output", tmp_path / "out")
    thread.join()
    assert answer.status == 130
    assert reloading == [True, True]
    assert [line.rpartition(", up to ")[2].split(",")[0] for line in answer.out.splitlines()] == [
        "step 0", "step 1", "step 2",
    ]  # fmt: skip
    assert '<meta name="refresh"' not in page.read_text()
    assert "2 of 4" in Page(page.read_text()).text
