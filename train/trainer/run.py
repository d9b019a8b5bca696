"""A run in progress, and what all its processes do together beside the steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.cache.conditioning import TextEmbeds
from shared.errors import UserError
from shared.networks.precision import autocast
from train.config import ExportConfig, RunConfig
from train.data.loader import Loader
from train.export.provenance import of_finished
from train.export.student import publish_export, write_export
from train.flag_groups import PublishFlags, names_of
from train.networks.dtensor import local
from train.networks.student import Student
from train.objectives.objective import Loss
from train.sampling.preview import Previews
from train.state import checkpoint
from train.trainer.distributed import Distributed
from train.trainer.export_command import export_checkpoint
from train.trainer.reporting.evaluating import Asked, Evaluations
from train.trainer.reporting.log_lines import EVALUATIONS, append_line
from train.trainer.reporting.metrics import Recorder
from train.trainer.trainable import Trainable


@dataclass
class Distillation:
    """A run, ready to go on after step `step`, when `position` samples have been consumed."""

    config: RunConfig
    distributed: Distributed
    student: Student
    objective: Loss
    loader: Loader
    empty: TextEmbeds
    trained: tuple[Trainable, ...]  # the student last
    scaler: torch.amp.GradScaler
    accumulation: int
    step: int
    position: int
    invariants: dict[str, Any]
    recorder: Recorder
    previews: Previews | None
    evaluations: Evaluations | None = None
    branch: int = 0  # of the checkpoints that the main process will write

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The student's, that are trained."""
        return self.trained[-1].parameters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The student's."""
        return self.trained[-1].optimizer

    @property
    def learning_rate(self) -> float:
        """The student's, before its schedule."""
        return self.trained[-1].learning_rate

    def autocast(self) -> AbstractContextManager[Any]:
        """The one dtype in which all networks compute."""
        return autocast(self.config.mixed_precision, self.distributed.device)

    def save(self) -> None:
        """Write a checkpoint, unless the weights are no longer finite. All processes enter it."""
        with self.recorder.aside():
            self.recorder.flush()
            self._check_weights()
            networks = self.distributed.gather(self.student.state())
            optimizer: dict[str, Tensor] = {}
            for one in self.trained:
                state = checkpoint.optimizer_state(one.optimizer, one.parameters)
                optimizer |= self.distributed.gather(state)
            if self.distributed.main:
                progress = checkpoint.TrainingState(
                    step=self.step,
                    position=self.position,
                    batch_size=self.loader.order.batch_size,
                    terms=self.invariants,
                    scaler=self.scaler.state_dict(),
                    branch=self.branch,
                )
                whole = checkpoint.Checkpoint(progress, networks, optimizer)
                limit = self.config.checkpoints_total_limit
                folder = checkpoint.save_checkpoint(self.config.run, whole, limit)
                self.recorder.progress.write(f"saved {folder}")
            self.distributed.wait()

    def _check_weights(self) -> None:
        weights = [weight for one in self.trained for weight in one.parameters.values()]
        parts = [local(weight).isfinite().all() for weight in weights]
        finite = self.distributed.mean(torch.stack(parts).all().float())
        if finite.item() < 1:
            batch = self.position // self.loader.order.batch_size - 1
            what = "the weights are no longer finite"
            raise UserError(self.recorder.diverged(what, self.step, batch))

    def preview(self) -> None:
        """Draw the preview prompts with the student as it stands. All processes enter it."""
        if self.previews is None:
            return
        with self.recorder.aside():
            self.recorder.catch_up()
            columns = self.previews.draw(self.student.drawing())
            if self.distributed.main:
                path, sheet = self.previews.write(columns, self.step)
                self.recorder.trackers.picture("previews", sheet, self.step)
                self.recorder.progress.write(f"drew {path}")
            self.distributed.wait()

    def evaluate(self, asked: Asked) -> bool:
        """Measure the student as it stands, unless its figures are noted already.

        All processes enter it. False where the run was `asked` to end meanwhile: then nothing is
        noted, and the resumed run begins with it.
        """
        evaluations = self.evaluations
        if evaluations is None or self.step in evaluations.noted:
            return True
        with self.recorder.aside():
            self.recorder.catch_up()
            found = evaluations.measure(self.student.drawing(), self.step, self.position, asked)
            if found is None:
                return False
            if self.distributed.main:
                append_line(self.config.run / EVALUATIONS, asdict(found))
                self.recorder.trackers.log(found.tracked(), found.step, "evaluation")
                self.recorder.progress.write(evaluations.told(found))
            evaluations.noted.add(self.step)
            self.distributed.wait()
        return True

    def export(self) -> None:
        """Write the student in diffusers' format."""
        config, student = self.config, self.student
        if self.distributed.main and self.distributed.fsdp:
            # No process has the student whole; the checkpoint does.
            same = {name: getattr(config, name) for name in names_of(PublishFlags)}
            print(f"student: {export_checkpoint(config.run, ExportConfig(**same))}")
        elif self.distributed.main:
            origin = of_finished(config.run)
            path = write_export(
                config.run, origin, student.exported(), config.run, config.export_dtype
            )
            print(f"student: {path}")
            publish_export(config.run, origin, config.run, config)
        self.distributed.wait()
