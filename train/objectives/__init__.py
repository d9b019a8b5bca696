"""Losses: each a callable on tensors and networks; and, in one table, what goes with each."""

from __future__ import annotations

from train.objectives import denoise, lcd

OBJECTIVES = {"lcd": lcd.OBJECTIVE, "denoise": denoise.OBJECTIVE}
