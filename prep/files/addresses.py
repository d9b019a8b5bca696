"""Whom an address asks, and keeping to it: for addresses that somebody else wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp

WEB = {"http": 80, "https": 443}
ALL_SECONDS = 60.0  # that a server may take for one picture
CONNECT_SECONDS = 10.0


class Strayed(PermissionError):
    """A server that sends us to another one."""


def origin(url: str) -> tuple[str, ...] | None:
    """Return whom an address asks: host and port, bucket, repository; None where it is unclear."""
    try:
        parts = urlsplit(url)
        port = parts.port if parts.scheme in WEB else None
    except ValueError:
        return None
    if ".." in unquote(unquote(parts.path)).split("/") or re.search(r"[\s\\]", parts.netloc):
        return None
    if parts.scheme in WEB:
        usual = port in (None, WEB[parts.scheme])
        return ("http", (parts.hostname or "").lower(), "" if usual else str(port))
    if parts.scheme == "hf":  # hf://datasets/OWNER/NAME@REVISION/FILE
        names = (parts.netloc + parts.path).split("/")[:3]
        return ("hf", *(name.partition("@")[0] for name in names))
    return (parts.scheme, parts.netloc)


def strayed(error: BaseException) -> bool:
    """Is it for a redirect? fsspec wraps what it catches."""
    return isinstance(error, Strayed) or isinstance(error.__cause__, Strayed)


def web_options(stay: bool) -> Mapping[str, Any]:
    """Return fsspec's options for pictures: none is waited for long, `stay` allows no redirect.

    A redirect within a host, also from http to https, is followed.
    """
    return _STAYING if stay else _ROAMING


async def _stay(_: Any, __: Any, answer: aiohttp.TraceRequestRedirectParams) -> None:
    target = answer.response.headers.get("Location") or answer.response.headers.get("URI") or ""
    here = str(answer.url)
    if origin(there := urljoin(here, target)) != origin(here):
        raise Strayed(f"it redirects to {urlsplit(there).netloc}")


_TRACE = aiohttp.TraceConfig()
_TRACE.on_request_redirect.append(_stay)
_TIMEOUT = aiohttp.ClientTimeout(ALL_SECONDS, sock_connect=CONNECT_SECONDS)
# fsspec keeps a file system for each set of options, so these are made once.
_ROAMING: Mapping[str, Any] = {"client_kwargs": {"timeout": _TIMEOUT}}
_STAYING: Mapping[str, Any] = {"client_kwargs": {"timeout": _TIMEOUT, "trace_configs": [_TRACE]}}
