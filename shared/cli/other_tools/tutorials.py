"""Names of plain LoRA training scripts, as tutorials have them in a JSON file of settings."""

from __future__ import annotations

from shared.cli.other_tools.values import Taken

TAKEN: dict[str, Taken] = {
    "data_dir": "shards",
    "log_dir": "logging_dir",
    "n_epochs": "num_train_epochs",
    "lr_scheduler_name": "lr_scheduler",
}

REFUSED: dict[str, str] = {
    "ckpt_name": "files have fixed names in the run's folder, which is --run; what a run starts "
    "from is --model",
}
