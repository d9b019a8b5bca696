"""Runs of a configuration, and what they leave behind."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from train.config import DistillConfig
from train.state import checkpoint
from train.trainer.loop import distill
from train.trainer.run import Distillation
from train.trainer.setup import prepare

KINDS = ["lora", "full"]


def train(config: DistillConfig) -> Distillation:
    run = prepare(config)
    distill(run)
    return run


def metrics(run: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint.whole_checkpoints(run)]


def untimed(run: Path) -> list[dict]:
    """The same without what depends on the machine."""
    times = ("samples_per_second", "loader_wait", "peak_process_memory_bytes")
    return [{k: v for k, v in line.items() if k not in times} for line in metrics(run)]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All that the checkpoint and the export of a run hold."""
    found = {}
    folder = checkpoint.checkpoint_folder(run, step)
    files = [folder / "networks.safetensors", folder / "optimizer.safetensors"]
    files += [run / "pytorch_lora_weights.safetensors", *sorted(run.glob("unet/*.safetensors"))]
    for file in files:
        if file.exists():
            found |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
    return found
