"""An S3 server on loopback that counts, fails and holds requests as it is told."""

import hashlib
import io
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest
import s3fs  # noqa: F401 (fsspec would, in each of the warm processes)
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.support import web
from tests.support.sources import DERIVED

ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>injected</Message></Error>"

DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"


class Server:
    """moto behind a small gate.

    `every` n answers each n-th request with status 500: before moto has seen it, or (in turn)
    after, when what was asked for has been done. `hold` delays the requests it is true of;
    `refuses` is a status that everything is answered with.
    """

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.every, self.refuses = 0, 0
        self.hold: Callable[[str, str], bool] = lambda method, path: False
        self.log: list[tuple[str, str]] = []  # method and path, with the query if there is one
        self.failed: Counter[str] = Counter()  # by method
        self.held = threading.Event()
        self.lock = threading.Lock()
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        path = environ["PATH_INFO"] + (f"?{query}" if query else "")
        with self.lock:
            self.log.append((method, path))
            number = len(self.log)
        body = read_body(environ)
        if self.hold(method, path):
            self.held.set()
            time.sleep(60)
        fails = self.every and number % self.every == 0
        if fails and number // self.every % 2:
            return self.fail(method, start)
        if self.refuses:
            start(f"{self.refuses} Refused", [("Content-Type", "application/xml")])
            return [b"" if method == "HEAD" else DENIED]
        environ["wsgi.input"] = io.BytesIO(body)
        if fails:
            list(self.app(environ, lambda *_: None))
            return self.fail(method, start)
        return self.app(environ, start)

    def fail(self, method: str, start: Callable[..., Any]) -> list[bytes]:
        self.failed[method] += 1
        start("500 Internal Server Error", [("Content-Type", "application/xml")])
        return [b"" if method == "HEAD" else ERROR]

    def calm(self) -> None:
        """Forget the requests so far and fail no more."""
        self.every, self.hold, self.refuses = 0, lambda method, path: False, 0
        self.log.clear()
        self.failed.clear()

    def count(self, method: str, part: str) -> int:
        """Requests so far of this method whose path holds `part`."""
        return sum(one == method and part in path for one, path in self.log)


def read_body(environ: dict[str, Any]) -> bytes:
    """All of it, so that an answer without a look at it leaves the connection in order."""
    if environ.get("wsgi.input_terminated"):  # sent in chunks
        return bytes(environ["wsgi.input"].read())
    return bytes(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))


@contextmanager
def serving() -> Iterator[Server]:
    """A server with the bucket `bucket`, which AWS's variables in the environment point to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    web.serve(server.server)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # botocore would try for long: ours are the tries tested
        }.items():
            patch.setenv(name, value)
        forget()
        bucket().makedirs("bucket", exist_ok=True)  # moto keeps it for all servers of a process
        try:
            yield server
        finally:
            forget()
            server.server.shutdown()


def forget() -> None:
    """Connections made before the environment changed are not used again."""
    fsspec.filesystem("s3").clear_instance_cache()


def bucket() -> Any:
    """The server's file system, as a stranger would use it."""
    return fsspec.filesystem("s3", use_listings_cache=False)


def objects(url: str) -> dict[str, str]:
    """Every object below a URL with the hash of its content, but for what is derived."""
    root = url.removeprefix("s3://")
    found = {name.removeprefix(f"{root}/"): bucket().cat_file(name) for name in bucket().find(root)}
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in sorted(found.items())
        if name not in DERIVED
    }
