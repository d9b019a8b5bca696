"""The page as it is served: what it answers, what it refuses, and how the command ends."""

import json
import os
import signal
import socket
import time

import httpx
import numpy as np
import pytest
from gradio_client import Client
from PIL import Image

from infer.page import command
from tests.support import warm
from tests.support.drawing import PROMPT, draw, write_picture
from tests.support.exports import make_run
from tests.support.page import HOSTILE, form, free_port, opened

NAMED = HOSTILE.replace("/", "")
LORA = "run/lora"
SAID = 'class="note bad"'


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_cache, tiny_sd):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "lora", small_cache, tiny_sd, "sd", "lora", report_to=())
    os.link(folder / "lora/metrics.jsonl", folder / "secret.txt")
    (folder / NAMED).mkdir()
    (folder / NAMED / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory, runs, small_cache):
    with opened(tmp_path_factory.mktemp("page"), runs, small_cache.parent, "tiny-sd") as one:
        yield one


@pytest.fixture(scope="module")
def client(page):
    return Client(page.address, verbose=False, analytics_enabled=False)


@pytest.fixture
def web(page):
    with httpx.Client(base_url=page.address, trust_env=False) as one:
        yield one


def picture_of(one) -> np.ndarray:
    """A picture that the page shows, as a program gets it."""
    found = one["value"] if isinstance(one, dict) else one
    return np.asarray(Image.open(found["path"] if isinstance(found, dict) else found)).astype(int)


def note_of(answer) -> str:
    return answer[-1]


def test_a_program_draws_what_the_command_draws(client, runs, cli, tmp_path):
    student, caption, _, _, note = client.predict(**form(LORA), api_name="/draw")
    theirs = draw(cli, tmp_path / "a.png", "--run", runs / "lora", "--prompt", PROMPT, "--steps",
                  2, "--seed", 3)  # fmt: skip
    np.testing.assert_array_equal(picture_of(student), theirs)
    assert " ms</b> 2 steps of LCM, guidance built in" in caption
    assert "bad" not in note


def test_what_a_program_leaves_out_is_as_the_form_begins(client):
    answer = client.predict(what=LORA, prompt=PROMPT, teacher=False, api_name="/draw")
    assert "4 steps of LCM" in answer[1]
    answer = client.predict(what="model/tiny-sd", prompt=PROMPT, api_name="/draw")
    assert "50 steps of DDIM, guidance 3" in answer[1], answer  # which suit this model
    compared, _ = client.predict(runs=["lora"], api_name="/compare")
    assert "<iframe" in compared
    shown, note = client.predict(cache="cache", api_name="/browse")
    assert "bad" not in note, note
    assert "data:image/" in shown


def test_teacher_and_student_are_told_apart(client, cli, tmp_path):
    answer = client.predict(**form(LORA, teacher=True), api_name="/draw")
    theirs = draw(cli, tmp_path / "a.png", "--model", "tiny-sd", "--prompt", PROMPT, "--steps", 2,
                  "--seed", 3, "--guidance-scale", 2)  # fmt: skip
    np.testing.assert_array_equal(picture_of(answer[2]), theirs)
    assert "same noise" in note_of(answer)


def test_an_upload_is_begun_with(page, client, runs, cli, tmp_path):
    picture = write_picture(tmp_path / "given.png")
    with picture.open("rb") as file:
        (path,) = httpx.post(
            f"{page.address}gradio_api/upload", files={"files": file}, trust_env=False
        ).json()
    sent = {"path": path, "orig_name": "given.png", "meta": {"_type": "gradio.FileData"}}
    answer = client.predict(**form(LORA, steps=4, image=sent), api_name="/draw")
    theirs = draw(cli, tmp_path / "a.png", "--run", runs / "lora", "--prompt", PROMPT, "--steps",
                  4, "--seed", 3, "--image", picture, "--strength", 0.5)  # fmt: skip
    np.testing.assert_array_equal(picture_of(answer[0]), theirs)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (form("run/../secret.txt"), "there is no run with a student"),
        (form("model//etc/passwd"), "there is no model &#39;/etc/passwd&#39;"),
        (form(None), "choose a model first"),
        (form(f"run/{NAMED}"), "there is no run with a student &#39;&lt;img src=x"),
        (form(LORA, lora_1="../../x.safetensors"), "there is no LoRA"),
        (form(LORA, lora_3="lora", lora_3_scale=99), "a LoRA&#39;s scale is 99"),
        (form(LORA, scheduler="../x"), "there is no such scheduler"),
        (form(LORA, steps=1000), "steps is 1,000; give a number from 1 to 50"),
        (form(LORA, steps="1"), "steps is no number"),
        (form(LORA, seed=10**400), "the seed is beyond all bounds; give a number from 0"),
        (form(LORA, seed=-1), "the seed is -1; give a number from 0 to 4,294,967,295"),
        (form(LORA, prompt=" \n"), "the prompt is missing; say what the picture shall show"),
        (form(LORA, steps=1, image={"path": "/etc/passwd"}), "is no file that was uploaded here"),
    ],
)
def test_what_the_page_would_not_send_is_refused_in_a_line(client, sent, said):
    note = note_of(client.predict(**sent, api_name="/draw"))
    assert SAID in note
    assert said in note
    assert "\n" not in note
    assert "<img" not in note


def test_runs_are_compared_in_a_frame_of_their_own(client):
    shown, note = client.predict(runs=["lora"], api_name="/compare")
    assert "bad" not in note
    assert shown.startswith('<iframe class="compared" sandbox="allow-scripts" ')
    assert shown.count("<") == 2  # all of the comparison is one attribute
    for names, said in (
        ([], "choose a run first"), (["../lora"], "there is no run"), ("lora", "choose a run"),
        (["lora"] * 21, "21 runs are too many"),
    ):  # fmt: skip
        _, note = client.predict(names, api_name="/compare")
        assert SAID in note
        assert said in note


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "gradio_api/file=PAGE/../secret",
        "gradio_api/file=RUNS/secret.txt",
        "gradio_api/file=pyproject.toml",
        "gradio_api/file=https://example.com/a.png",
        "gradio_api/file=file:///etc/passwd",
        "gradio_api/proxy=https://example.com/",
        "gradio_api/run-history/buckets",
        "gradio_api/vibe-code",
        "gradio_api/deep_link?session_hash=x",
        "monitoring",
        "docs",
        "openapi.json",
    ],
)
def test_nothing_else_is_served(web, page, runs, path):
    path = path.replace("RUNS", str(runs)).replace("PAGE", str(page.room.temporary))
    answer = web.get(path)
    assert answer.status_code == 403
    assert answer.text.count("\n") <= 1
    assert "root:" not in answer.text


@pytest.mark.parametrize("url", ["https://example.com/a.png", "file:///etc/passwd", "ftp://x/y"])
def test_no_address_that_somebody_posts_is_fetched(web, url):
    sent = {"path": url, "meta": {"_type": "gradio.FileData"}}
    for route in ("gradio_api/queue/join", "gradio_api/call/draw", "gradio_api/run/draw"):
        body = {"data": list(form(LORA, image=sent).values()), "fn_index": 0, "session_hash": "x"}
        answer = web.post(route, json=body)
        assert answer.status_code == 403
        assert answer.text == "a picture is uploaded; no address is fetched\n"
    assert web.post("gradio_api/queue/join", content=b"[" * 99_999).status_code == 403
    assert web.post("gradio_api/queue/join", content=b" " * (5 << 20)).status_code == 403


def test_only_a_browser_on_this_machine_is_answered(web):
    assert web.get("/").status_code == 200
    for host, status in (("localhost:1", 200), ("evil.example", 403), ("127.0.0.1.nip.io", 403)):
        assert web.get("/config", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("route", ["gradio_api/upload", "gradio_api/queue/join"])
@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:1", "null"])
def test_another_sites_page_can_send_nothing(web, page, route, origin):
    files = sorted(page.room.temporary.rglob("*"))
    answer = web.post(route, files={"files": b"x"}, headers={"Origin": origin})
    assert answer.status_code == 403
    assert answer.text == "only the page itself may send something here\n"
    assert sorted(page.room.temporary.rglob("*")) == files


def test_the_page_itself_may_send(web, page):
    own = {"Origin": page.address.rstrip("/")}
    assert web.post("gradio_api/upload", files={"files": b"x"}, headers=own).status_code == 200


def test_the_browser_is_told_to_ask_nobody_else(web, page):
    answer = web.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    config = web.get("/config").json()
    assert config["analytics_enabled"] is False
    assert not [one for one in config["stylesheets"] or () if "//" in one]
    for sheet in ("theme.css", "gradio_api/theme.css"):
        assert "http" not in web.get(sheet).text.replace("http://www.w3.org", "")
    assert os.environ["GRADIO_TEMP_DIR"] == str(page.room.temporary)


def test_hostile_names_are_text_in_every_line(web):
    """Lists are JSON, which the browser shows as text; what is HTML is escaped."""
    for part in web.get("/config").json()["components"]:
        if part["type"] == "html":
            assert "<img" not in json.dumps(part["props"].get("value", ""))


# ---- The command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(cli, *words):
    answer = cli("infer", "page", *words)
    assert answer.out == ""
    assert answer.err.count("\n") == 1, answer.err
    return answer.status, answer.err


def test_without_gradio_it_says_how_to_get_it(cli, folder, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    said = "error: the page needs Gradio: pip install 'latent-distillery[page]'\n"
    assert refused(cli) == (1, said)


def test_a_port_in_use_is_named(cli, folder):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        status, said = refused(cli, "--port", port)
    assert status == 1
    assert f"--port {port} is in use, perhaps by another page; give another" in said


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--host", "192.0.2.1"), 1, "--host 192.0.2.1 is no address of this machine"),
        (("--host", "no such host"), 1, "--host no such host is no address of this machine"),
        (("--port", "0"), 2, "--port 0 must be from 1 to 65535"),
        (("--models", "tiny-ds"), 1, "did you mean tiny-sd?"),
        (("--device", "quantum"), 1, "--device 'quantum' is not one of"),
    ],
)
def test_mistakes_are_told_in_a_line(cli, folder, words, status, said):
    answer = refused(cli, "--port", free_port(), *words)
    assert answer[0] == status
    assert said in answer[1]


def said(process) -> bytes:
    """What it has printed so far."""
    return os.pread(process._files[0].fileno(), 100, 0)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_it_ends_cleanly(folder, number, status):
    port = free_port()
    process = warm.start(["-m", "infer", "page", "--port", port], folder, OMP_NUM_THREADS="1",
                         TMPDIR=str(folder), GRADIO_SHARE="true")  # fmt: skip
    deadline = time.monotonic() + 120
    while not said(process) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).status_code == 200
    process.send_signal(number)
    out, err = process.communicate(60)
    assert process.returncode == status, err
    assert out == f"http://127.0.0.1:{port}/\n"
    assert err.splitlines() == [
        f"page of runs/ and caches/, on cpu; open http://127.0.0.1:{port}/ in a browser, Ctrl-C "
        "ends it",
        "interrupted: every file that was written is whole",
    ]
    assert os.listdir(folder) == []  # uploads and pictures are gone
