"""Weights read from files: every one of them, of the right shape, and finite.

diffusers and transformers only warn where a file lacks weights, and draw them at random.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from shared.errors import UserError, first_line

M = TypeVar("M", bound=nn.Module)

# What the libraries raise for a folder, a configuration or a file that they cannot make use of:
# a number of another kind in config.json goes as far as the layer that is built with it.
UNUSABLE = (
    OSError, ValueError, RuntimeError, SafetensorError, TypeError, LookupError, AttributeError,
    ArithmeticError, AssertionError, NotImplementedError,
)  # fmt: skip


def load_whole(load: Callable[..., Any], source: str, part: str, **options: Any) -> Any:
    """Load the model that a library's `from_pretrained` reads from `source`, with all its weights.

    Raises UserError where there is none, or where it would have weights that no file gave it.
    """
    try:
        with _silent("diffusers", "transformers"):
            model, info = load(source, output_loading_info=True, **options)
    except UNUSABLE as error:  # nothing of ours is called in there
        raise UserError(f"no {part} can be read from {source!r} ({first_line(error)})") from None
    check_loaded(info, source, part)
    return check_finite(model, source, part)


@contextmanager
def _silent(*libraries: str) -> Iterator[None]:
    """Silence their warnings, tables of many lines, of what is refused here."""
    loggers = [logging.getLogger(library) for library in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_loaded(info: Mapping[str, Any], source: str, part: str) -> None:
    """Raise UserError for weights that were missing, or of another shape."""
    missing = sorted(info.get("missing_keys", ()))
    odd = sorted(entry[0] for entry in info.get("mismatched_keys", ()))  # name and both shapes
    if missing or odd:
        name = [*missing, *odd][0]
        raise UserError(
            f"{source}: its {part} lacks {len(missing) + len(odd)} weights that its config.json "
            f"asks for, {name} first; fetch the model anew"
        )


def check_finite(model: M, source: str, part: str) -> M:
    """Return the model. Raises UserError, naming the first, for weights that are not finite."""
    for name, tensor in model.named_parameters():
        if not is_finite(tensor):
            raise UserError(
                f"{source}: {name} of its {part} holds numbers that are not finite; fetch the "
                "model anew"
            )
    return model


def is_finite(tensor: Tensor) -> bool:
    """Are all numbers of a tensor finite? If their sum is, which is quick, they are."""
    total = tensor.detach().sum()
    return bool(total.isfinite()) or bool(torch.isfinite(tensor).all())
