"""Pictures that rows name: from the data set's own folder, host or bucket, and nowhere else."""

import base64
import http.server
import os
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.files.litter import HIDDEN
from prep.sources.find import SourceOptions, find_units
from prep.sources.tables.linked_pictures import MISSING, OUTSIDE, UNREACHABLE
from shared.storage import retry
from tests.support import web
from tests.support.sources import accounts, encode, png, refusal

PNG = png(1)
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)


def table(path, names, kind="struct"):
    """A Parquet file whose rows name their pictures."""
    cells = {
        "struct": pa.array([{"bytes": None, "path": name} for name in names], STRUCT),
        "text": pa.array(names, pa.string()),
        "list": pa.array([[{"bytes": None, "path": name}] for name in names], pa.list_(STRUCT)),
    }
    captions = [f"caption {n}" for n in range(len(names))]
    pq.write_table(pa.table({"image": cells[kind], "caption": captions}), path)
    return path


def rows_of(source, **options):
    found = find_units([str(source)], SourceOptions(**options))
    return [row for unit in found for row in unit.rows()]


def problems(source, **options):
    return [row.problem for row in rows_of(source, **options)]


class Server(http.server.ThreadingHTTPServer):
    """Serves files; a name that ends in .to redirects to what `redirects` says."""

    daemon_threads = True
    request_queue_size = 128  # with 5, a sixth connection at once waits a second for its turn

    def __init__(self, files, redirects):
        self.files, self.redirects, self.asked = files, redirects, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        web.serve(self)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        data = self.server.files.get(self.path)
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
        else:
            self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data or b"")

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(files, redirects=None):
        servers.append(Server(files, redirects or {}))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def home(tmp_path):
    """A data set's folder with a picture of its own, and one beside the folder."""
    folder = tmp_path / "home"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "own.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(png(2))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "inner.png").symlink_to(folder / "sub" / "own.png")
    os.mkfifo(folder / "pipe.png")
    return folder


OUTSIDERS = [
    "/etc/passwd", "file:///etc/passwd", "../secret.png", "sub/../../secret.png", "link.png",
    "out/secret.png", "http://127.0.0.1:9/x.png", "s3://bucket/x.png", "foo://x/y.png",
    "memory://x/y.png", "simplecache::http://127.0.0.1:9/x.png", "zip://x::/etc/x.zip",
    "zip://x.png::file:///etc/x.zip", "local:///etc/passwd", "reference://x", "::", "://",
    "http://169.254.169.254/latest/meta-data", "hf://datasets/someone/other/x.png",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["struct", "text", "list"])
def test_a_row_stays_in_its_folder(home, tmp_path, kind):
    own = ["sub/own.png", "inner.png", str(home / "sub" / "own.png"), f"file://{home}/sub/own.png"]
    lost = ["gone.png", "sub", "pipe.png", "x" * 5000, "nul\0.png"]
    source = table(home / "a.parquet", [*own, *OUTSIDERS, *lost, "._x.png", None], kind)
    assert problems(source) == [
        *[""] * len(own), *[OUTSIDE] * len(OUTSIDERS), *[MISSING] * len(lost), HIDDEN, "no picture",
    ]  # fmt: skip
    assert [row.image for row in rows_of(source)][: len(own)] == [PNG] * len(own)


def test_who_allows_it_reads_from_elsewhere_and_a_bad_row_costs_itself(home, tmp_path, serve):
    server = serve({"/x.png": png(3)}, {"/moved.png": "/x.png"})
    names = [
        str(tmp_path / "secret.png"), f"{server.url}/x.png", f"{server.url}/moved.png",
        f"{server.url}/gone.png", "foo://x/y.png", "reference://x", "http://127.0.0.1:9/x.png",
        "github://x", "http://[bad/x.png", "sub/own.png",
    ]  # fmt: skip
    source = table(home / "a.parquet", names)
    found = rows_of(source, allow_external_images=True)
    assert [row.image for row in found if not row.problem] == [png(2), png(3), png(3), PNG]
    assert [row.problem for row in found][3] == f"{UNREACHABLE} (HTTP 404)"
    assert all(row.problem.startswith(UNREACHABLE) for row in found[3:9])


def test_a_table_behind_an_address_stays_with_its_host(serve, tmp_path):
    other = serve({"/x.png": PNG})
    server = serve(
        {"/d/x.png": PNG, "/d/y.png": PNG},
        {"/d/out": f"{other.url}/x.png", "/d/meta": "http://169.254.169.254/", "/d/in": "/d/y.png"},
    )
    host = server.url.removeprefix("http://")
    names = [
        "x.png", f"{server.url}/d/y.png", f"{server.url}/d/in", f"{server.url}/d/gone",
        f"{server.url}/d/out", f"{server.url}/d/meta", f"{other.url}/x.png", "/etc/passwd",
        f"http://{host}\\@127.0.0.1:9/x", "../../x.png", f"http://{host}@{host[:-1]}/x.png",
    ]  # fmt: skip
    server.files["/d/a.parquet"] = table(tmp_path / "a.parquet", names).read_bytes()
    found = problems(f"{server.url}/d/a.parquet")
    assert found == ["", "", "", f"{UNREACHABLE} (HTTP 404)", *[OUTSIDE] * 7]
    assert other.asked == []


def test_a_table_in_a_bucket_stays_in_it():
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe("/bucket/d/x.png", PNG)
    memory.pipe("/other/x.png", PNG)
    sink = pa.BufferOutputStream()
    names = ["x.png", "memory://bucket/d/x.png", "memory://other/x.png", "s3://bucket/d/x.png"]
    cells = pa.array([{"bytes": None, "path": name} for name in names], STRUCT)
    pq.write_table(pa.table({"image": cells, "caption": ["a"] * 4}), sink)
    memory.pipe("/bucket/d/a.parquet", sink.getvalue().to_pybytes())
    assert problems("memory://bucket/d/a.parquet") == ["", "", OUTSIDE, OUTSIDE]
    memory.store.clear()


def test_a_saved_dataset_stays_in_its_folder(home, tmp_path):
    names = ["own.png", "/etc/passwd", "foo://x", "http://127.0.0.1:9/x.png"]
    pictures = [{"bytes": None, "path": name} for name in names]
    data = datasets.Dataset.from_dict(
        {"image": pictures, "text": ["a"] * 4},
        features=datasets.Features(
            image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            text=datasets.Value("string"),
        ),
    )
    data.save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "own.png").write_bytes(PNG)
    assert problems(tmp_path / "data") == ["", OUTSIDE, OUTSIDE, OUTSIDE]


def test_stock_parquet_of_datasets_holds_paths_which_are_followed(home):
    pictures = [str(home / "sub" / "own.png")] * 2
    data = datasets.Dataset.from_dict({"image": pictures, "text": ["a", "b"]})
    data.cast_column("image", datasets.Image()).to_parquet(home / "a.parquet")
    assert [row.image for row in rows_of(home / "a.parquet")] == [PNG, PNG]


def test_a_snapshot_of_the_hub_is_links_to_its_repository(tmp_path):
    repository = tmp_path / "hub" / "datasets--someone--pictures"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "1").write_bytes(PNG)
    (snapshot / "x.png").symlink_to("../../blobs/1")
    table(repository / "blobs" / "2", ["x.png"])
    (snapshot / "a.parquet").symlink_to("../../blobs/2")
    assert problems(snapshot / "a.parquet") == [""]


def test_one_bad_row_costs_one_row(home, tmp_path):
    names = ["sub/own.png", "foo://x", "s3://no-such-bucket/x.png", "/etc/passwd", "inner.png"]
    source = table(home / "a.parquet", names)
    cache = encode(source, tmp_path / "c", max_reject_fraction=1.0)
    assert [row["reason"] for row in accounts(cache)].count("") == 2
    assert [row["reason"] for row in accounts(cache)].count(OUTSIDE) == 3
    more = encode(
        source, cache, max_reject_fraction=1.0, allow_external_images=True
    )  # another flag reads the unit again
    reasons = {row["source_key"]: row["reason"] for row in accounts(more)}
    assert reasons["foo://x"].startswith(UNREACHABLE)
    assert reasons["/etc/passwd"] != OUTSIDE


URLS = {"url": ["http://127.0.0.1:9/x.png"], "caption": ["a"]}


def test_a_table_of_addresses_says_what_to_do(tmp_path, serve):
    def told(columns, *flags):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        words = ("--model", "tiny-sd", "--cache", tmp_path / "c", *flags)
        return refusal("encode", "--shards", tmp_path / "a.parquet", *words)

    assert "img2dataset" in told(URLS)
    assert "--allow-external-images" in told(URLS)
    assert "see --allow-external-images" in told(URLS, "--image-column", "url")
    account = told({**URLS, "key": ["000"], "status": ["success"]})
    assert "img2dataset's account of the tar" in account
    server = serve({"/x.png": PNG})
    named = {"URL": [f"{server.url}/x.png"], "TEXT": ["a"]}
    pq.write_table(pa.table(named), tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet", allow_external_images=True)
    assert (row.key, row.image, row.captions) == (named["URL"][0], PNG, ("a",))
    assert row.metadata["URL"] == named["URL"][0]


def test_the_flag_is_for_tables(tmp_path):
    folder = Path(__file__).parents[2] / "data" / "pictures" / "train"
    words = ("--model", "tiny-sd", "--cache", tmp_path / "c", "--allow-external-images")
    assert "--allow-external-images" in refusal("encode", "--shards", folder / "*.tar", *words)


def test_a_picture_as_text(tmp_path):
    text = base64.b64encode(PNG).decode()
    cells = [text, f"data:image/png;base64,{text}", base64.urlsafe_b64encode(PNG).decode()]
    pq.write_table(pa.table({"image": cells, "caption": ["a"] * 3}), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert [row.image for row in found] == [PNG] * 3
    assert [row.key for row in found] == ["0", "1", "2"]
    assert text not in str(found[0].metadata)
