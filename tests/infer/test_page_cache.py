"""The tab Cache: which samples and rows are on a page, and that what others wrote is text."""

import html.parser
import io
import json
import os
import re

import gradio as gr
import numpy as np
import pytest
import torch

from infer.page.tabs.cache import SAMPLES, CacheTab, render
from infer.page.work import browse
from infer.page.work.browse import PAGE, Browser
from shared.cache.paths import CachePaths
from shared.errors import UserError
from shared.models.vae import load_vae
from tests.support.page import HOSTILE, room_of
from tests.support.sources import captioned, encode, png, prep, write_tar


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """15 samples, two of them with hostile captions, and a rejected row with a hostile name."""
    folder = tmp_path_factory.mktemp("caches")
    files = [*captioned(range(13))]
    for number, text in enumerate((HOSTILE, "Größe <b>\u202egnp.exe")):
        files += [(f"x{number}.png", png(40 + number)), (f"x{number}.txt", text.encode())]
    files += [("<i>name.png", b"no picture"), ("<i>name.txt", HOSTILE.encode())]
    return encode([write_tar(folder / "a.tar", files)], folder / "one")


@pytest.fixture
def browser(cache):
    return Browser.open(CachePaths(cache))


def records(cache):
    """Key and captions of every sample, by the tar's own index and NumPy: no code of ours."""
    import tarfile

    found = []
    for name in sorted(os.listdir(cache / "shards")):
        with tarfile.open(cache / "shards" / name) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.loads(tar.extractfile(member).read())
                    found.append((member.name[:-5], tuple(record["captions"])))
    return found


def test_pages_hold_every_sample_once(browser, cache):
    pages = [browser.samples(number) for number in range(3)]
    assert [(len(one.items), one.more) for one in pages] == [(12, True), (3, False), (0, False)]
    shown = [(one.key, one.captions) for page in pages for one in page.items]
    assert sorted(shown) == sorted(records(cache))
    assert {(one.width, one.height) for one in pages[0].items} == {(64, 64)}
    assert pages[0].looked == "15 samples"


def test_words_are_found_in_whatever_case(browser, cache):
    found = browser.samples(0, "GRÖSSE")
    assert [one.caption for one in found.items] == ["Größe <b>\u202egnp.exe"]
    assert found.looked == "1 of 15 samples"
    common = next(word for _, captions in records(cache) for word in captions[0].split())
    wanted = sum(any(common in text for text in texts) for _, texts in records(cache))
    assert len(browser.samples(0, common).items) == min(wanted, PAGE)


def test_looking_for_words_ends_in_time_and_says_so(browser, monkeypatch):
    monkeypatch.setattr(browse, "SECONDS", -1.0)
    monkeypatch.setattr(browse, "OFTEN", 5)
    found = browser.samples(0, "nowhere")
    assert found.items == []
    assert found.looked == "looked through the first 5 of 15 samples, then time was up"


def test_a_page_reads_its_records_alone(browser, monkeypatch):
    """Of a cache of any size: as many bytes as the page's records have."""
    shard = browser.manifest.shards[0]
    file, reads = browser.cache.root / shard.file, []

    class Counting(io.FileIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    monkeypatch.setattr(type(file), "open", lambda self, *_, **__: Counting(self))
    browser.samples(1)
    assert reads == [shard.layout.head_bytes] * 3


def test_pictures_are_the_decoded_latents(browser, cache, tiny_sd):
    vae = load_vae(str(tiny_sd))
    for sample in browser.samples(0).items[:3]:
        layout = sample.shard.layout
        data = (cache / sample.shard.file).read_bytes()[sample.index * layout.stride :]
        start = layout.offsets["latents"]
        mean = np.frombuffer(data[start : start + 2 * 4 * 8 * 8], "<f2").reshape(1, 4, 8, 8)
        with torch.no_grad():
            decoded = vae.decode(torch.from_numpy(mean.astype(np.float32))).sample[0]
        wanted = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        assert np.abs(browser.picture(sample, vae) - wanted).max() <= 1


def test_rejected_rows_are_listed_with_their_reason(browser):
    found = browser.rows(0)
    (row,) = found.items
    assert (row.source_key, row.caption) == ("<i>name", HOSTILE)
    assert browser.manifest.totals.rejected == {row.reason: 1}
    assert browser.rows(0, "onERROR").items == [row]
    assert browser.rows(0, "nothing of the kind").items == []


class Page(html.parser.HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_captions_and_names_are_text(browser):
    samples = [(one, np.zeros((64, 64, 3), np.uint8)) for one in browser.samples(1).items]
    samples += [(one, None) for one in browser.samples(0).items]
    rows = render(rows=browser.rows(0).items, reasons=[(HOSTILE, 1)])
    for page in (Page(render(samples=samples, rows=None, pending="…")), Page(rows)):
        assert HOSTILE in page.text
        for tag, attributes in page.elements:
            assert tag in {"div", "figure", "img", "figcaption", "bdi", "span", "table", "thead",
                           "tbody", "tr", "th", "td"}  # fmt: skip
            assert not [name for name in attributes if name.startswith("on")]
            assert attributes.get("src", "data:").startswith("data:")
    assert "[U+202E]" in Page(render(samples=samples, rows=None, pending="")).text


def looked(tab, *what):
    return list(tab.look(*what, gr.Request(session_hash="one")))


@pytest.fixture
def tab(cache, tmp_path):
    with gr.Blocks(analytics_enabled=False):
        return CacheTab(room_of(tmp_path, tmp_path / "runs", cache.parent, "tiny-sd"))


def test_captions_come_first_and_pictures_follow(tab):
    first, *rest = looked(tab, "one", SAMPLES, "", 2)
    assert first[tab.shown].count('class="pending"') == 3
    assert "13 to 15 (15 samples)" in first[tab.note]
    last = rest[-1][tab.shown]
    assert last.count("pending") == 0
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', last)
    assert len(uris) == 3


def test_a_page_that_is_left_is_decoded_no_further(tab):
    pages = tab.look("one", SAMPLES, "", 1, gr.Request(session_hash="one"))
    next(pages)
    tab.cancel(gr.Request(session_hash="other"))
    assert next(pages)[tab.shown].count("<img") == 4
    tab.cancel(gr.Request(session_hash="one"))
    assert [tab.shown in one for one in pages] == [False]


@pytest.mark.parametrize(
    ("name", "page", "said"),
    [
        ("../one", 1, "there is no cache &#39;../one&#39; in the page&#39;s folders"),
        ("/etc", 1, "there is no cache &#39;/etc&#39;"),
        (None, 1, "choose a cache first"),
        (HOSTILE, 1, "there is no cache &#39;&lt;img src=x"),
        ("one", 0, "the page is 0; give a number from 1"),
        ("one", "2", "the page is no number"),
    ],
)
def test_what_the_page_would_not_send_is_refused_in_a_line(tab, name, page, said):
    (answer,) = looked(tab, name, SAMPLES, "", page)
    assert answer[tab.note].startswith('<p class="note bad"')
    assert said in answer[tab.note]
    assert answer[tab.shown] == ""


def test_an_unfinished_cache_says_so(cache, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/identity.json").write_bytes((cache / "identity.json").read_bytes())
    with pytest.raises(UserError, match="is unfinished: run the same"):
        Browser.open(CachePaths(tmp_path / "cut"))
    assert prep("verify", "--cache", cache).status == 0  # nothing of it was changed
