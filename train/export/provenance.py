"""What a student was made from, as its model card and its scheduler have to know it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.models.family import Family, load_config, recorded_model, resolve_model
from shared.storage.urls import Place, RemotePlace
from train.config import RunConfig
from train.objectives import guidance_range, objective_of
from train.objectives.objective import Objective
from train.state.run_config import run_config

SCHEDULER_FILE = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Provenance:
    """Where a student comes from."""

    config: RunConfig  # its run's
    teacher: str  # where the teacher's files are
    cache: Place | None  # None where it is not to be asked
    steps: int  # optimizer steps taken
    standalone: bool = False  # exported as a model of its own, which is told nothing
    guidance_scale: float | None = None  # folded into that, in diffusers' meaning (w + 1)

    @property
    def objective(self) -> Objective:
        """What it was trained with."""
        return objective_of(self.config)

    @property
    def lora(self) -> bool:
        """Is it exported as a LoRA? Otherwise as a UNet."""
        return self.kind == "lora"

    @property
    def adapted(self) -> bool:
        """Was it trained as a LoRA? Otherwise as a UNet."""
        return self.config.student == "lora"

    @property
    def kind(self) -> str:
        """What the export is: `lora`, `full`, or `standalone`."""
        return "standalone" if self.standalone else self.config.student

    @property
    def vae(self) -> str | None:
        """The VAE that it is drawn with, where that is another than the model's."""
        return recorded_model(self.config.vae, "--vae") if self.config.vae else None

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The papers' w, from and to, that it was trained with."""
        return guidance_range(self.config, self.family)

    @property
    def family(self) -> Family:
        """The teacher's."""
        return resolve_model(self.teacher).family

    def scheduler(self) -> Any:
        """Build the scheduler that it is drawn with."""
        teacher = load_config(self.teacher, SCHEDULER_FILE)
        return self.objective.sampler.build(teacher, self.config)


def of_finished(run: Path) -> Provenance:
    """Tell of the student of a run that this process has finished: the user named its parts."""
    config = run_config(run)
    return Provenance(config, config.model, config.cache, config.max_train_steps)


def of_recorded(config: RunConfig, model: str | None, steps: int) -> Provenance:
    """Tell of a recorded run's student after so many steps; `model` is the teacher, if given.

    A run may come from anybody, so no address that it names is asked. Raises UserError where the
    teacher is not here.
    """
    cache = None if isinstance(config.cache, RemotePlace) else config.cache
    return Provenance(config, model or recorded_model(config.model), cache, steps)
