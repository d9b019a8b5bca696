"""Curves of runs: which there are, their points, smoothed and thinned out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.compare.records import Measured, Numbers, Progress, Record
from shared.wording import counted
from train.measures.space import distance_title

MOST_POINTS = 2_000  # of a curve
ALL_POINTS = 30_000  # of all curves of a chart
SMOOTHED_SHARE = 25  # a curve's lines by this many are what its average looks back on
SHORTEST, LONGEST = 3, 50  # lines of it


@dataclass(frozen=True)
class Curve:
    """Numbers of a run along its training; `smooth` is their moving average, if that is shown."""

    run: int  # its place among the runs
    at: Progress
    values: Numbers
    smooth: Numbers | None = None
    label: str = ""  # more than the run's name, where it has several


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    key: str
    title: str
    curves: tuple[Curve, ...]
    thinned: int = 0  # lines of the longest curve that are not shown
    measured: bool = False  # by evaluations, not by the loss


def charts_of(records: Sequence[Record]) -> list[Chart]:
    """The losses, then what evaluations during the trainings found."""
    return [*loss_charts(records), *measured_charts(records)]


def loss_charts(records: Sequence[Record]) -> list[Chart]:
    """A chart for each kind of loss that a run has: the student's first."""
    names = {name for one in records for name in one.metrics if name.endswith("loss")}
    most = min(MOST_POINTS, ALL_POINTS // max(len(records), 1))
    charts = []
    for name in sorted(names, key=lambda name: (name != "loss", name)):
        found = [loss_curve(place, one, name) for place, one in enumerate(records)]
        curves = [curve for curve in found if curve is not None]
        longest = max((len(curve.values) for curve in curves), default=0)
        shown = tuple(thin(curve, most) for curve in curves)
        left = longest - max((len(curve.values) for curve in shown), default=0)
        charts.append(Chart(name, title_of(name), shown, left))
    return [chart for chart in charts if chart.curves]


def title_of(name: str) -> str:
    """What stands above a loss: `fake_loss` is that of the fake network."""
    network = name.removesuffix("loss").strip("_").replace("_", " ")
    return f"Loss of the {network} network" if network else "Loss"


def loss_curve(place: int, record: Record, name: str) -> Curve | None:
    """A run's curve of one loss; None where it has none."""
    values = record.metrics.get(name, np.empty(0))
    there = np.isfinite(values)
    if not there.any():
        return None
    values = values[there]
    return Curve(place, chosen(record.progress, there), values, smoothed(values))


def chosen(progress: Progress, which: NDArray[Any]) -> Progress:
    """Those of the places that are wanted."""
    return Progress(progress.step[which], progress.sample[which], progress.hour[which])


def smoothed(values: Numbers) -> Numbers:
    """The exponential moving average of lines, without the bias of its beginning (Adam's eq. 2)."""
    decay = 1 - 1 / float(np.clip(len(values) / SMOOTHED_SHARE, SHORTEST, LONGEST))
    found, average, weight = np.empty_like(values), 0.0, 0.0
    for place, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        found[place] = average / weight
    return found


def thin(curve: Curve, most: int) -> Curve:
    """The curve in at most `most` points: both ends, of each stretch the lowest and the highest."""
    count = len(curve.values)
    if count <= most:
        return curve
    edges = np.linspace(0, count, max(most // 2 - 1, 1) + 1).astype(int)
    kept = {0, count - 1}
    for start, end in pairwise(edges.tolist()):
        part = curve.values[start:end]
        kept |= {int(start + part.argmin()), int(start + part.argmax())}
    which = np.array(sorted(kept))
    smooth = None if curve.smooth is None else curve.smooth[which]
    return Curve(curve.run, chosen(curve.at, which), curve.values[which], smooth, curve.label)


def measured_charts(records: Sequence[Record]) -> list[Chart]:
    """FD and accuracy of evaluations during training: those alike in captions, FD in features."""
    lines = [one for record in records for one in record.measured]
    charts = []
    for number, kind in enumerate(dict.fromkeys(map(kind_of, lines))):
        title = f"{distance_title(kind[0])}: {kind[0]} features, {counted(kind[1], 'caption')}"
        curves = measured_curves(records, "fd", kind_of, kind)
        charts.append(Chart(f"fd-{number}", title, curves, measured=True))
    captions = attrgetter("num_samples")
    for number, count in enumerate(dict.fromkeys(map(captions, lines))):
        curves = measured_curves(records, "accuracy", captions, count)
        title = f"Accuracy: {counted(count, 'caption')}"
        charts.append(Chart(f"accuracy-{number}", title, curves, measured=True))
    return [chart for chart in charts if chart.curves]


def kind_of(line: Measured) -> tuple[str, int]:
    """What a distance depends on besides the student: only under the same they can be compared."""
    return line.features, line.num_samples


def measured_curves(
    records: Sequence[Record], name: str, key: Callable[[Measured], object], wanted: object
) -> tuple[Curve, ...]:
    """Each run's curves of one figure where `key` is as wanted, one for each number of steps."""
    curves = []
    for place, record in enumerate(records):
        alike = [one for one in record.measured if key(one) == wanted]
        told = [one for one in alike if getattr(one, name) is not None]
        for steps in sorted({one.drawing_steps for one in told}):
            lines = [one for one in told if one.drawing_steps == steps]
            values = np.array([getattr(one, name) for one in lines], np.float64)
            at, label = places_of(lines, record), f"in {counted(steps, 'step')}"
            curves.append(Curve(place, at, values, label=label))
    return tuple(curves)


def places_of(lines: Sequence[Measured], record: Record) -> Progress:
    """Where evaluations belong: hours between those of the metrics around them."""
    step = np.array([one.step for one in lines], np.float64)
    known = np.isfinite(record.progress.hour)
    steps = np.concatenate([[0.0], record.progress.step[known]])
    hours = np.concatenate([[0.0], record.progress.hour[known]])
    sample = np.array([one.samples for one in lines], np.float64)
    return Progress(step, sample, np.interp(step, steps, hours))
