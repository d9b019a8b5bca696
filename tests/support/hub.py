"""A hub of one's own on loopback: as much of its API as publishing a model takes."""

import base64
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support import web


class Hub(ThreadingHTTPServer):
    """Keeps what was committed in `files`; answers `status` to everything if it is not 200."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.repos: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.status != 200:
            self.answer({"error": "no"}, self.server.status)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.server.repos.append(repo)
            self.answer({"url": f"{self.server.address}/{repo}", "name": repo})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        else:
            assert "/commit/" in self.path, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            self.answer({"commitUrl": f"{self.server.address}/a/b/commit/1", "commitOid": "1" * 40})

    def do_GET(self) -> None:
        self.answer({"error": "no such thing"}, 404)

    def answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serve(status: int = 200):
    hub = Hub(status)
    web.serve(hub)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
