"""Self-attention that sees keys and values of both ends (DiffMorpher).

The ends are drawn first, and what each layer's `to_k` and `to_v` say in each step is kept. A frame
at `a` then attends to (1 - a) K_first + a K_last, and V likewise, in its first steps. Hooks on the
two projections do it, so that any attention code works, with or without LoRAs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from infer.morph.interpolate import lerp

SELF_ATTENTION = (".attn1.to_k", ".attn1.to_v")  # diffusers' names in a transformer block


Kept = dict[str, list[Tensor]]  # by layer: what its projection said in each step, `[1, L, D]`


def projections(unet: nn.Module) -> dict[str, nn.Module]:
    """A UNet's projections to keys and values of self-attention, by name."""
    named = dict(unet.named_modules())
    return {name: one for name, one in named.items() if name.endswith(SELF_ATTENTION)}


@contextmanager
def keeping(unet: nn.Module, steps: int) -> Iterator[Kept]:
    """Keep what the projections say in the first `steps` steps in which the body draws an end."""
    kept = Kept()

    def keep(name: str) -> Any:
        said = kept.setdefault(name, [])

        def note(_module: nn.Module, _input: Any, output: Tensor) -> None:
            if len(said) < steps:
                said.append(output)

        return note

    with hooked({one: keep(name) for name, one in projections(unet).items()}):
        yield kept


@contextmanager
def blending(unet: nn.Module, first: Kept, last: Kept, a: float) -> Iterator[None]:
    """Let the projections say what lies between the ends, in those steps that were kept of them."""

    def blend(name: str) -> Any:
        ends = zip(first[name], last[name], strict=True)

        def say(_module: nn.Module, _input: Any, _output: Tensor) -> Tensor | None:
            pair = next(ends, None)
            return None if pair is None else lerp(*pair, a)  # None leaves it as it is

        return say

    with hooked({one: blend(name) for name, one in projections(unet).items() if name in first}):
        yield


@contextmanager
def hooked(hooks: dict[nn.Module, Any]) -> Iterator[None]:
    """Call hooks behind modules in the body."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
