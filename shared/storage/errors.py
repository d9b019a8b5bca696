"""What goes wrong with files behind URLs: worth another try or not, and how to say it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from shared.errors import UserError

EXTRAS = {"s3": "s3", "s3a": "s3"}  # protocol -> our extra; the others need a package of their own
KEYLESS = ("NoCredentialsError", "PartialCredentialsError")  # of botocore, which may be missing


def without_password(url: str) -> str:
    """Return the URL as it may be shown."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


# Python's own words for a mistake in a program; libraries have kinds of their own for what fails.
MISTAKES = (
    TypeError, AttributeError, NameError, AssertionError, LookupError, ArithmeticError, MemoryError,
    RecursionError,
)  # fmt: skip


def is_mistake(error: BaseException) -> bool:
    """Is it a bug, here or in a library, that no other try will mend and that is to be seen?"""
    return isinstance(error, MISTAKES) and type(error).__module__ == "builtins"


@contextmanager
def known_protocol(url: str, flag: str = "") -> Iterator[None]:
    """Raise UserError where fsspec does not know the URL's protocol or lacks a package for it."""
    protocol, prefix = url.partition("://")[0], f"{flag}: " if flag else ""
    try:
        yield
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install latent-distillery[{extra}]" if extra else f"{error}"
        raise UserError(f"{prefix}{protocol}:// needs another package: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{prefix}{url!r}: {error}; check the address") from None


def is_permanent(error: BaseException) -> bool:
    """Would trying again be in vain? fsspec wraps an HTTP answer in FileNotFoundError."""
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 409, 429)
    inner = error.__cause__
    if isinstance(inner, PermissionError):
        return True
    if isinstance(error, FileNotFoundError) and not isinstance(inner, KeyError | None):
        return False  # fsspec's HTTP says so of a connection that broke, too; memory:// looks up
    return type(error).__name__ in KEYLESS or isinstance(
        error,
        FileNotFoundError | PermissionError | IsADirectoryError | ImportError | NotImplementedError,
    )


def is_absence(error: BaseException) -> bool:
    """Does it say that there is no such file? That there is no such bucket is a mistake."""
    no_bucket = type(error.__cause__).__name__ == "NoSuchBucket"
    return isinstance(error, FileNotFoundError) and is_permanent(error) and not no_bucket


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error is about; botocore keeps it in the answer's metadata."""
    answer = getattr(error.__cause__ or error, "response", None)
    metadata = answer.get("ResponseMetadata", {}) if isinstance(answer, Mapping) else {}
    status = metadata.get("HTTPStatusCode")
    return status if isinstance(status, int) else _http_status(error)


def cause_of(error: BaseException) -> str:
    """Return what went wrong, in a few words."""
    if status := _http_status(error):
        return f"HTTP {status}"
    cause = error.__cause__ or error
    words = " ".join(str(cause).split())[:200]
    return f"{type(cause).__name__}: {words}" if words else type(cause).__name__


def _http_status(error: BaseException) -> int | None:
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    return status if isinstance(status, int) else None
