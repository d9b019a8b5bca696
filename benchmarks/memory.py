"""`python -m benchmarks.memory`: which flags fit which card; writes docs/memory.md.

No weights and no GPU are needed: `train.memory.estimate` counts the published configurations on
torch's meta device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common.public_unets import SD15, SDXL
from train.config import DistillConfig
from train.memory.advice import ROOM
from train.memory.estimate import MemoryEstimate, estimate

CARDS = (12, 24, 48, 80)
RESERVED = 0.5e9  # what CUDA itself and the VAE of the previews take
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "SD 1.5, 512 px": (SD15, (64, 64)),
    "SDXL, 1024 px": (SDXL, (128, 128)),
}
# From what changes least to what costs most time.
BF16 = {"mixed_precision": "bf16"}
CHECKPOINTED = BF16 | {"gradient_checkpointing": True}
SMALL_ADAM = CHECKPOINTED | {"use_8bit_adam": True}
LADDER: list[dict[str, Any]] = [BF16, CHECKPOINTED, SMALL_ADAM]
DMD: dict[str, Any] = {"objective": "dmd"}
STUDENTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "LoRA, rank 64": ({"student": "lora"}, LADDER),
    "full": ({"student": "full"}, [*LADDER, SMALL_ADAM | {"offload_ema": True}]),
    "LoRA, rank 64, dmd": ({"student": "lora", **DMD}, LADDER),
    "full, dmd": ({"student": "full", **DMD}, LADDER),
}
ENOUGH = 4  # a micro-batch that fills a GPU's cores; below it, memory is saved instead
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "memory.md"


def flags(change: dict[str, Any]) -> str:
    """As they are typed."""
    words = []
    for name, value in change.items():
        words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


class Counted:
    """Estimates for every micro-batch from those for 1 and 2: a step's bytes grow evenly."""

    def __init__(self, one: MemoryEstimate, two: MemoryEstimate) -> None:
        self.one, self.slope = one, two.peak - one.peak

    def peak(self, batch: int) -> int:
        """Bytes at peak."""
        return self.one.peak + (batch - 1) * self.slope

    def largest(self, room: float) -> int:
        """The largest micro-batch in `room` bytes, 0 for none."""
        return max(int((room - self.one.peak) // self.slope) + 1, 0)


def count(unet: dict[str, Any], size: tuple[int, int], change: dict[str, Any]) -> Counted:
    """With accumulation, so that gradients are there all the time: the larger number."""
    config = DistillConfig(
        model="", cache=Path(), run=Path(), gradient_accumulation_steps=2, **change
    )
    one, two = (estimate(unet, replace(config, train_batch_size=batch), size) for batch in (1, 2))
    return Counted(one, two)


def rows(name: str, student: str) -> list[str]:
    """A line per card: the first flags with which at least ENOUGH samples fit, else the most."""
    (unet, size), (kind, ladder) = MODELS[name], STUDENTS[student]
    counted = [(change, count(unet, size, kind | change)) for change in ladder]
    lines = []
    for card in CARDS:
        room = card * 1e9 * ROOM - RESERVED
        fitting = [(change, one, one.largest(room)) for change, one in counted]
        enough = [found for found in fitting if found[2] >= ENOUGH]
        change, one, batch = enough[0] if enough else max(fitting, key=lambda found: found[2])
        if batch == 0:
            needed = f"{min(one.peak(1) for _, one in counted) / 1e9:.1f} GB for one sample"
            lines.append(f"| {name} | {student} | {card} GB | does not fit ({needed}) | - | - |")
            continue
        lines.append(
            f"| {name} | {student} | {card} GB | `{flags(change)}` | {batch} | "
            f"{one.peak(batch) / 1e9:.1f} GB |"
        )
    return lines


def main() -> None:
    """Write the table between the document's head and its foot."""
    table = [row for name in MODELS for student in STUDENTS for row in rows(name, student)]
    print("\n".join(table))
    head, mark, rest = DOCUMENT.read_text().partition("|---|---|---|---|---|---|\n")
    _, gap, foot = rest.partition("\n\n")
    DOCUMENT.write_text(head + mark + "\n".join(table) + gap + foot)


if __name__ == "__main__":
    main()
