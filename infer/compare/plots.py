"""Charts as Bokeh draws them: what `Bokeh.embed.embed_item` of a page takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from infer.compare.curves import Chart, Curve
from shared.errors import UserError

# After Okabe and Ito's, which most colour-blind people tell apart; to be seen on white and black.
COLOURS = ("#2a86c8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999999")
DASHES = ("solid", "dashed", "dotted", "dotdash")
HEIGHT = 340  # pixels
Scale = Literal["linear", "log"]
MEASURES = ("step", "sample", "hour")
LEGIBLE = 1e-12  # a logarithm's least


def colour_of(run: int) -> str:
    """A run's colour, by its place."""
    return COLOURS[run % len(COLOURS)]


def dash_of(run: int) -> str:
    """How a run's lines are dashed: whole as long as colours last."""
    return DASHES[run // len(COLOURS) % len(DASHES)]


def bokeh_script() -> str:
    """BokehJS, to be put into a page. Raises UserError where Bokeh is not installed."""
    need_bokeh()
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def need_bokeh() -> None:
    """Raise UserError, with the remedy, where Bokeh is not installed."""
    try:
        import bokeh  # noqa: F401
    except ImportError:
        raise UserError(
            "the curves are drawn by Bokeh, which is not installed; "
            "pip install 'latent-distillery[compare]'"
        ) from None


def item(chart: Chart, names: Sequence[str]) -> dict[str, Any]:
    """A chart twice, with a linear and a logarithmic axis, as JSON. `names` are the runs'."""
    from bokeh.core.json_encoder import serialize_json
    from bokeh.embed import json_item
    from bokeh.layouts import column

    sources = [source_of(curve) for curve in chart.curves]
    plots = [plot(chart, sources, names, scale) for scale in scales(chart)]
    layout = column(plots[:1], sizing_mode="stretch_width", tags=plots)
    found: dict[str, Any] = json.loads(serialize_json(json_item(layout)))
    return found


def scales(chart: Chart) -> list[Scale]:
    """The axes that a chart can have: a logarithm wants numbers above 0."""
    positive = all((curve.values > LEGIBLE).all() for curve in chart.curves)
    return ["linear", "log"] if positive else ["linear"]


def source_of(curve: Curve) -> Any:
    """The points of a curve. `x` is the measure that is shown, at first the step."""
    from bokeh.models import ColumnDataSource

    columns = {name: np.asarray(getattr(curve.at, name)) for name in MEASURES}
    columns |= {"x": columns["step"], "y": curve.values}
    if curve.smooth is not None:
        columns["smooth"] = curve.smooth
    return ColumnDataSource(columns, tags=[curve.run])


def plot(chart: Chart, sources: Sequence[Any], names: Sequence[str], scale: Scale) -> Any:
    """A chart with one kind of axis; of smoothed curves the bare numbers lie thin behind."""
    from bokeh.models import BasicTickFormatter, DataRange1d, HoverTool, NumeralTickFormatter
    from bokeh.plotting import figure

    shown: Any = figure(
        height=HEIGHT, sizing_mode="stretch_width", y_axis_type=scale, tags=[scale],
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag="box_zoom", active_scroll=None, toolbar_location="above", x_axis_label="step",
        min_border_right=12, x_range=DataRange1d(only_visible=True),
        y_range=DataRange1d(only_visible=True), background_fill_color=None, border_fill_color=None,
    )  # fmt: skip
    shown.toolbar.logo = None
    shown.xaxis.formatter = NumeralTickFormatter(format="0,0.[0000]")
    shown.xaxis.ticker.desired_num_ticks = 5
    shown.yaxis.formatter = BasicTickFormatter(use_scientific=False)
    lines = []
    for curve, source in zip(chart.curves, sources, strict=True):
        style = {"line_color": colour_of(curve.run), "line_dash": dash_of(curve.run),
                 "source": source, "name": f"{names[curve.run]} {curve.label}".strip()}  # fmt: skip
        if curve.smooth is None or len(curve.values) == 1:
            dots = {name: value for name, value in style.items() if name != "line_dash"}
            lines.append(shown.scatter("x", "y", size=7, fill_color=style["line_color"], **dots))
        if curve.smooth is None:
            shown.line("x", "y", line_width=2, **style)
        else:
            shown.line("x", "y", line_width=1, line_alpha=0.35, **style)
            lines.append(shown.line("x", "smooth", line_width=2.25, **style))
    tips = [("", "$name"), ("step", "@step{0,0}"), ("sample", "@sample{0,0}"),
            ("hour", "@hour{0,0.[0000]}"), ("value", "@y{0,0.[000000]}")]  # fmt: skip
    if any(curve.smooth is not None for curve in chart.curves):
        tips.append(("smoothed", "@smooth{0,0.[000000]}"))
    shown.add_tools(HoverTool(tooltips=tips, renderers=lines, line_policy="nearest"))
    return shown
