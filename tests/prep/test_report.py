"""report.html: what it says, that it says it safely, and that it changes nothing else."""

import base64
import hashlib
import html.parser
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from shared.wording import rate
from tests.support.sources import (
    SIDE,
    TINY_SD,
    captioned,
    encode,
    file_of,
    manifest,
    photo,
    png,
    prep,
    refusal,
    samples,
    shards,
    tree,
    write_tar,
)

HOSTILE = (
    "<script>document.title='owned'</script></style></title><img src=x onerror="
    "\"document.title='o'\">\"'&amp;{{ 7*7 }} \u202egnp.exe\u202c \x1b[31m"
)
# CJK and emoji beside it, which are to stay as they are.
PLAIN = "größer als «ein» ★ 猫 🐈"


class Page(html.parser.HTMLParser):
    """Elements, their attributes and all text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.texts, self.styles = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        inside_style = self.elements and self.elements[-1][0] == "style" and not self.styles
        (self.styles if inside_style else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(cache):
    return Page((cache / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A cache with hostile captions and keys, and rejected rows; its page."""
    folder = tmp_path_factory.mktemp("report")
    files = [*captioned(range(2))]
    texts = (HOSTILE, "long words " * 9_000, PLAIN, '{"caption": "lone \\ud800 half"}')
    for number, text in enumerate(texts):
        kind = "json" if text.startswith("{") else "txt"
        files += [(f"x{number}.png", png(40 + number)), (f"x{number}.{kind}", text.encode())]
    files += [("<b>bold</b>.png", b"no picture"), ("<b>bold</b>.txt", b"x")]
    tars = [
        write_tar(folder / "a.tar", files),
        write_tar(folder / "b.tar", captioned(range(10, 13))),
    ]
    return encode(tars, folder / "cache", report=True)


@pytest.fixture
def cache(reported, tmp_path):
    return shutil.copytree(reported, tmp_path / "cache")


def test_it_is_derived_from_the_cache_and_changes_nothing(cache):
    before = tree(cache)
    (cache / "report.html").unlink()
    assert prep("finish", "--cache", cache, "--no-report").status == 0
    assert not (cache / "report.html").exists()
    assert prep("finish", "--cache", cache).status == 0
    page = (cache / "report.html").read_bytes()
    (cache / "report.html").write_text("old")
    assert prep("report", "--cache", cache).status == 0
    assert (cache / "report.html").read_bytes() == page
    assert tree(cache) == before


def test_nothing_comes_from_elsewhere_and_nothing_runs(reported):
    page = page_of(reported)
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert not {"script-src", "connect-src"} & set(rules)
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert "url(" not in page.styles[0]
    assert "@import" not in page.styles[0]


def test_the_policy_allows_just_this_style(reported):
    page = page_of(reported)
    digest = base64.b64encode(hashlib.sha256(page.styles[0].encode()).digest()).decode()
    assert any(f"'sha256-{digest}'" in m.get("content", "") for m in page.all("meta"))


def test_hostile_text_is_shown_as_text(reported):
    page = page_of(reported)
    assert "<script>document.title='owned'</script></style></title><img src=x" in page.text
    assert "&amp;{{ 7*7 }} [U+202E]gnp.exe[U+202C] [U+001B][31m" in page.text
    assert PLAIN in page.text
    assert "<b>bold</b>" in page.text
    assert page.all("b") == [a for a in page.all("b") if not a]
    assert len(page.text) < 20_000  # the long caption is cut
    assert "long words long words" in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\ud800-\udfff\x1b]", page.text)


def test_pictures_beside_their_latents(tmp_path):
    """The PSNR is that of the two pictures in the page, which are exact at this size."""
    files = []
    for number in range(3):
        picture = file_of(photo(number, SIDE, SIDE))
        files += [(f"{number}.png", picture), (f"{number}.txt", b"a star")]
    cache = encode(write_tar(tmp_path / "a.tar", files), tmp_path / "cache", report=True)
    pictures = []
    for image in page_of(cache).all("img"):
        data = base64.b64decode(image["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as opened:
            pictures.append(np.asarray(opened.convert("RGB")).astype(float))
    originals = {np.asarray(photo(n, SIDE, SIDE)).astype(float).tobytes() for n in range(3)}
    assert {picture.tobytes() for picture in pictures[::2]} == originals
    for left, right in zip(pictures[::2], pictures[1::2], strict=True):
        wanted = 10 * math.log10(255**2 / ((left - right) ** 2).mean())
        assert f"{wanted:.1f} dB" in page_of(cache).text
    (tmp_path / "a.tar").unlink()
    assert prep("report", "--cache", cache).status == 0
    page = page_of(cache)
    assert len(page.all("img")) == 3
    assert page.text.count("source gone or changed") == 3
    assert "None compared with its latents" in page.text


def test_totals_rejections_identity_and_speed(reported):
    page, stored = page_of(reported), manifest(reported)
    assert "samples 9 rows rejected 10.0%" in page.text
    assert "cannot be decoded" in page.text
    assert stored["identity"]["vae"]["fingerprint"] in page.text
    assert stored["identity"]["text"]["fingerprints"][0] in page.text
    assert "64 × 64" in page.text
    row = json.loads((reported / "throughput.json").read_text())
    assert row["images"] == 9  # the rejected one was not encoded
    assert row["seconds"] > 0
    assert f"{rate(row['images'] / row['seconds'], 'image')} (9 in" in page.text


def test_the_latents_histogram_is_theirs(reported):
    """Area under each chart, from its path, against the latents read by NumPy."""
    stack = np.stack([s.arrays["latents"][0] for s in samples(reported).values()])
    scale = manifest(reported)["identity"]["vae"]["scaling_factor"]
    text = (reported / "report.html").read_text()
    areas = re.findall(r'<path class="area" d="M0 120((?:V[\d.]+H[\d.]+)+)V120Z"/>', text)
    assert len(areas) == 4
    values = stack.astype(np.float64).transpose(1, 0, 2, 3).reshape(4, -1) * scale
    for area, channel in zip(areas, values, strict=True):
        heights = np.array([120 - float(h) for h in re.findall(r"V([\d.]+)H", area)])
        wanted, _ = np.histogram(channel, 64, (-4, 4))
        assert np.corrcoef(heights, wanted)[0, 1] > 0.999
        assert f"std {channel.std():.2f}" in text


def test_without_the_vae_the_page_says_so(cache):
    identity = json.loads((cache / "identity.json").read_text())
    identity["model"] = "no/such/model"
    (cache / "identity.json").write_text(json.dumps(identity))
    assert prep("finish", "--cache", cache).status == 0
    page = page_of(cache)
    assert page.all("img") == []
    assert "no/such/model" in page.text
    assert len(page.all("path")) > 4  # the charts need no VAE
    assert prep("report", "--cache", cache, "--model", TINY_SD).status == 0
    assert len(page_of(cache).all("img")) == 18


def test_a_damaged_cache_is_called_so(cache):
    shards(cache)[0].unlink()
    assert "something is wrong. Files:" in prep("report", "--cache", cache).out
    page = page_of(cache)
    assert shards(cache)[0].name in page.text
    assert "is missing" in page.text


def test_an_encode_waits_only_so_long_for_pictures(cache, monkeypatch):
    from prep.config import ReportConfig
    from prep.inspect import report
    from shared.cache.paths import CachePaths

    monkeypatch.setattr(report, "ENCODE_SECONDS", 0.0)
    paths = CachePaths(cache)
    report.write_after_encode(paths, report.load_vae_for(paths, ReportConfig(cache)), 5, 2.0)
    page = page_of(cache)
    assert "1 of 9 are shown" in page.text
    assert "2.5 images/s (5 in 2.0 s" in page.text


def test_no_cache_no_page(tmp_path):
    assert "is not a cache" in refusal("report", "--cache", tmp_path / "none")
    assert not (tmp_path / "none").exists()


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PROBE = """<body><iframe id=f style="width:360px;height:9000px;border:0"></iframe><script>
const f = document.getElementById("f");
f.onload = () => { const d = f.contentDocument;
  document.title = [d.title, d.documentElement.scrollWidth, d.scripts.length].join("|"); };
f.srcdoc = __PAGE__;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser_on_a_phone(reported, tmp_path):
    """No script ran, the hostile caption is text, and 360 pixels are wide enough."""

    def dump(path):
        words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
        words += " --disable-background-networking --disable-component-update --dump-dom"
        command = [CHROMIUM, *words.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=5000", path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    dom = dump(reported / "report.html")
    assert "<title>Cache cache</title>" in dom
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in dom
    assert "<script" not in dom
    page = (reported / "report.html").read_text("utf-8")
    probe = tmp_path / "probe.html"
    text = json.dumps(page).replace("</", "<\\/")
    probe.write_text(PROBE.replace("__PAGE__", text), "utf-8")
    title = re.search("<title>(.*?)</title>", dump(probe)).group(1)
    assert title == "Cache cache|360|0"
