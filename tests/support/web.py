"""An HTTP server on loopback with ranges and etags, which fails as it is told."""

import http.server
import socketserver
import threading
from collections import Counter


def serve(server: socketserver.BaseServer) -> None:
    """Let it answer in a thread, which `shutdown` ends at once and not half a second later."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()


class Server(http.server.ThreadingHTTPServer):
    """Serves bytes with ranges and etags, and fails as it is told."""

    daemon_threads = True
    request_queue_size = 128  # with 5, a sixth connection at once waits a second for its turn

    def __init__(self):
        self.files, self.faults, self.requests, self.ranges = {}, [], Counter(), True
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        server.requests[self.command] += 1
        fault = server.faults.pop(0) if server.faults and body else None
        path = self.path.partition("?")[0]
        if isinstance(fault, int):
            return self.send_error(fault)
        if path not in server.files:
            return self.send_error(404)
        data, status = server.files[path], 200
        header = self.headers.get("Range")
        part = data
        if header and server.ranges:
            first, last = header.removeprefix("bytes=").split("-")
            part, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hash(data):x}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Type", "text/html" if path.endswith("/") else "application/x-tar")
        self.end_headers()
        if body:
            self.wfile.write(part[: len(part) // 2] if fault == "break off" else part)
        return None

    def log_message(self, *words):
        pass
