"""What the server refuses before Gradio sees it.

Gradio can do more than this page needs: fetch a URL that somebody posts, pass requests on to other
servers, store runs on the hub. Nothing of that is reached: only the paths that the page uses are,
and nothing that names a URL. The browser is told to fetch from here alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "/gradio_api"
OPEN = re.compile(
    r"/(|config/?|favicon\.ico|robots\.txt|manifest\.json|theme\.css|(assets|static|svelte)/.*"
    rf"|{API[1:]}/(queue/(join|data)/?|call/.*|run/.*|api/.*|file=.*|upload|upload_progress"
    r"|heartbeat/.*|cancel/?|reset/?|info/?|startup-events|app_id/?|theme\.css|login_check/?))"
)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # what a file's path never begins with here
UPLOAD = f"{API}/upload"
READING = {"GET", "HEAD"}
LONGEST = 4 << 20  # bytes of a request that is no upload
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused; pass on what is not, with HEADERS in the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if not refused and scope["method"] == "POST" and scope["path"] != UPLOAD:
            body = await read(receive)
            refused, receive = posted(body), again(body, receive)
        if refused:
            await PlainTextResponse(f"{refused}\n", 403)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        await self.app(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> str:
        """Why a request is refused by its address, or nothing."""
        path = scope["path"]
        if self.hosts is not None and host_of(scope) not in self.hosts:
            return "this page is opened under the address that the terminal shows"  # DNS rebinding
        if scope["method"] not in READING and is_foreign(scope):
            return "only the page itself may send something here"
        if not OPEN.fullmatch(path):
            return "this page has nothing there"
        _, asked, file = path.partition("/file=")
        if asked and (URL.match(file) or ".." in file.split("/")):
            return "this page shows no file from there"
        return ""


def host_of(scope: Scope) -> str:
    """The name by which the browser calls this machine, without its port."""
    return re.sub(r":\d+$", "", header(scope, b"host"))


def is_foreign(scope: Scope) -> bool:
    """Does a page of another address send this? Programs tell no origin."""
    origin = header(scope, b"origin")
    return bool(origin) and origin.partition("://")[2] != header(scope, b"host")


def header(scope: Scope, name: bytes) -> str:
    """A header in lower case; nothing where there is none."""
    value: bytes = dict(scope["headers"]).get(name, b"")
    return value.decode("latin-1").lower()


async def read(receive: Receive) -> bytes | None:
    """A request's body; None where it is too long."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > LONGEST:
            return None
    return body


def again(body: bytes | None, receive: Receive) -> Receive:
    """What hands out the body once more, and then what else comes."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body or b"", "more_body": False}

    return replay


def posted(body: bytes | None) -> str:
    """Why a body is refused, or nothing: no file that it names is fetched from anywhere."""
    if body is None:
        return "that is too long"
    try:
        value = json.loads(body or b"null")
    except (ValueError, RecursionError):
        return "that is no JSON"
    for file in files_named(value):
        if URL.match(file):
            return "a picture is uploaded; no address is fetched"
    return ""


def files_named(value: Any) -> Iterator[str]:
    """All that stands where Gradio would look for a file."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            if isinstance(one.get("path"), str):
                yield one["path"]
            pending += one.values()
        elif isinstance(one, list):
            pending += one
