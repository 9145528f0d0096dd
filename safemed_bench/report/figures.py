"""Line charts as SVG text: the same records give the same bytes, and a page gives them its own colours.

A figure is drawn in the colours of a light page, so that it is a whole picture by itself; `inline` makes it a part of
an HTML page, where every colour is a CSS variable of the same name (templates/page.css) and text has the page's font.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..core.journal import write_atomic

Scale = Literal["share", "rate", "linear", "log"]

COLOURS = {
    "ink": "#1b2128",
    "soft": "#5a6673",
    "line": "#dbe1e7",
    "blue": "#0072b2",
    "vermillion": "#d04a02",
    "green": "#00875a",
    "purple": "#a8509a",
    "orange": "#c08400",
    "sky": "#3f9bd8",
    "grey": "#7b8794",
}
"""Okabe and Ito's colours, the light ones darkened to be seen on white. No two mean the same, see `inline`."""

CYCLE = ("blue", "vermillion", "green", "purple", "orange", "sky", "grey")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""As many shapes as colours: who cannot tell the colours can tell the curves."""

DASHES = {"solid": "", "dashed": "5 2.5", "dotted": "1.4 2"}
"""SVG dash patterns; the second sign of a curve, for who cannot tell its colour."""

WIDTH, HEIGHT = 420, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 20, 38
"""Size and margins of a figure in its own units, fixed so that figures below each other line up."""

_STYLE = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 12,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "xtick.major.size": 0,
    "xtick.major.pad": 7,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
FOOT_WORDS = 98
"""Characters of the small print below a figure of a file that fit into a line."""

_STAGE_NAME = 10
"""Size of the names of stages."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line through (x, y); a NaN breaks it. band: (x, low, high) of an interval, drawn behind."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: str
    dash: str = "solid"
    marked: bool = False
    bold: bool = False
    band: tuple[tuple[float, float, float], ...] = ()
    marker: str = "o"


@dataclass(frozen=True, slots=True)
class Span:
    """A named stretch of the x axis, such as a stage of training."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line that values are to be compared with, over a stretch of the x axis."""

    label: str
    value: float
    begin: float
    end: float
    colour: str = "soft"
    dash: str = "dashed"


@dataclass(frozen=True, slots=True)
class Chart:
    """What is to be drawn. name: unique on its page.

    scale: "share" from 0 to 100%, "rate" a share from 0 to its maximum, "log" where all values are positive and far
    apart (else linear). ticks: (x, word) where the x axis is to be marked; whole numbers where there are none.
    """

    name: str
    curves: tuple[Curve, ...]
    x_end: float
    scale: Scale = "linear"
    spans: tuple[Span, ...] = ()
    levels: tuple[Level, ...] = ()
    x_label: str = "step"
    ticks: tuple[tuple[float, str], ...] = ()


def draw(chart: Chart) -> str:
    """The chart as a whole SVG document."""
    with _drawing(chart):
        out = io.StringIO()
        _figure(chart, HEIGHT, BOTTOM).savefig(out, format="svg", metadata=_NO_METADATA)
    return out.getvalue()


def save(chart: Chart, stem: Path, title: str, small: str) -> list[Path]:
    """The chart as `<stem>.svg` and `<stem>.pdf` for a paper, with its legend; returns the paths.

    title stands above the chart, small (such as the data's stamp) below it: a figure that is passed on alone still says
    what it shows.
    """
    lines = textwrap.wrap(small, FOOT_WORDS)
    foot = 8 + 10 * len(lines) + 15 * -(-len(chart.curves) // 2)
    height, bottom = HEIGHT + foot + 14, BOTTOM + foot
    written = []
    with _drawing(chart):
        figure = _figure(chart, height, bottom)
        figure.text(0.012, 1 - 12 / height, title, fontsize=11, color=COLOURS["ink"], va="center", parse_math=False)
        figure.text(0.012, 5 / height, "\n".join(lines), fontsize=7.5, color=COLOURS["soft"], parse_math=False)
        names = [_handle(curve) for curve in chart.curves]
        place = (0.5, (foot - 1) / height)
        figure.legend(handles=names, loc="upper center", bbox_to_anchor=place, ncols=2, frameon=False, fontsize=9,
                      borderpad=0, borderaxespad=0, labelspacing=0.25)  # fmt: skip
        for suffix, metadata in (("svg", _NO_METADATA), ("pdf", {"CreationDate": None, "Producer": None})):
            out = io.BytesIO()
            figure.savefig(out, format=suffix, metadata=metadata)
            path = stem.with_name(f"{stem.name}.{suffix}")
            write_atomic(path, out.getvalue())
            written.append(path)
    return written


def _handle(curve: Curve) -> Line2D:
    """A curve as the legend of a file shows it."""
    marker = curve.marker if curve.marked else ""
    dash: Any = curve.dash  # DASHES has matplotlib's own names
    return Line2D([], [], color=COLOURS[curve.colour], marker=marker, markersize=4, linestyle=dash, label=curve.label)


@contextmanager
def _drawing(chart: Chart) -> Iterator[None]:
    # "default" first: the reader's own matplotlibrc must not change what a report looks like.
    with matplotlib.style.context(["default", _STYLE, {"svg.hashsalt": chart.name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser's fonts have it
        yield


def _figure(chart: Chart, height: float, bottom: float) -> Figure:
    """The chart on a sheet of WIDTH x `height`; its axes are as large on any of them."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), frameon=False)
    FigureCanvasSVG(figure)
    size = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    axes = figure.add_axes((LEFT / WIDTH, bottom / height, size[0] / WIDTH, size[1] / height), frameon=True)
    axes.patch.set_visible(False)
    _limits(axes, chart)
    _spans(axes, chart, size[0])
    _levels(axes, chart.levels)
    for curve in chart.curves:
        _curve(axes, curve, band=0.13 if len(chart.curves) < 3 else 0.09)
    return figure


def _curve(axes: Axes, curve: Curve, band: float) -> None:
    """band: opacity of the interval, less where many lie on each other."""
    colour = COLOURS[curve.colour]
    if curve.band:
        x, low, high = zip(*curve.band, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=band, linewidth=0)
    width = 2.2 if curve.bold else 1.7
    dash: Any = (0, tuple(float(part) / width for part in DASHES[curve.dash].split())) if DASHES[curve.dash] else "-"
    x, y = zip(*curve.points, strict=True)
    axes.plot(x, y, color=colour, linestyle=dash, linewidth=width, zorder=3 + curve.bold)
    dots = curve.points if curve.marked else _alone(curve.points)
    if dots:
        size = 3.6 if curve.marker == "o" else 4.2
        axes.plot(
            *zip(*dots, strict=True),
            color=colour,
            linestyle="",
            marker=curve.marker,
            markersize=size,
            zorder=4,
            clip_on=False,
        )


def _alone(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points without a neighbour, which a line would not show."""
    gap = (math.nan, math.nan)
    padded = [gap, *points, gap]
    around = zip(padded, points, padded[2:], strict=False)
    return [here for before, here, after in around if math.isnan(before[1]) and math.isnan(after[1])]


def _limits(axes: Axes, chart: Chart) -> None:
    """Limits and ticks of both axes."""
    axes.set_xlim(0, chart.x_end or 1)
    if chart.ticks:
        axes.set_xticks([x for x, _ in chart.ticks], [word for _, word in chart.ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.set_xlabel(chart.x_label, labelpad=1)
    values = [y for curve in chart.curves for _, y in curve.points if math.isfinite(y)]
    values += [edge for curve in chart.curves for _, *edges in curve.band for edge in edges]
    values += [level.value for level in chart.levels]
    low, high = min(values, default=0.0), max(values, default=1.0)
    as_number: Callable[[float], str] = number
    if chart.scale == "log" and low > 0 and high / low > 20:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.25)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 200 else (1.0, 3.0), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        bottom, top, as_number = _linear(chart.scale, low, high)
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: as_number(v)))


def _linear(scale: Scale, low: float, high: float) -> tuple[float, float, Callable[[float], str]]:
    """Bottom, top and how a tick is written, where all values lie in [low, high]."""
    if scale == "share":
        return 0.0, 1.03, percent
    if scale == "rate":
        return 0.0, max(1.12 * high, 0.02), percent
    room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if low >= 0 else low - room), high + room, number


def number(value: float) -> str:
    """A number as a tick or a table shows it: `0.0005`, `2e-5`, `1,200`."""
    if abs(value) >= 1000 and math.isfinite(value):
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:.4g}")


def percent(value: float) -> str:
    """A share as a tick shows it: `40%`, `2.5%`."""
    return f"{100 * value:.4g}%"


def _spans(axes: Axes, chart: Chart, width: float) -> None:
    """Faint lines where a span begins, with its name above as far as there is room."""
    for i, span in enumerate(chart.spans):
        if i:
            axes.axvline(span.begin, color=COLOURS["grey"], linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        room = (span.end - span.begin) / (chart.x_end or 1) * width
        fits = int(room / (0.52 * _STAGE_NAME))
        if len(chart.spans) > 1 and fits >= min(4, len(span.name)):
            name = span.name if len(span.name) <= fits else f"{span.name[: max(fits - 1, 1)]}…"
            x = span.begin / (chart.x_end or 1)
            axes.text(
                x + (0.006 if i else 0),
                1.025,
                name,
                transform=axes.transAxes,
                fontsize=_STAGE_NAME,
                color=COLOURS["soft"],
                parse_math=False,
            )


def _levels(axes: Axes, levels: Sequence[Level]) -> None:
    for level in levels:
        axes.plot(
            (level.begin, level.end),
            (level.value, level.value),
            color=COLOURS[level.colour],
            linewidth=1,
            linestyle=(0, (1.4, 2) if level.dash == "dotted" else (4, 2)),
            zorder=2,
        )
        if level.label:
            axes.annotate(
                level.label,
                (level.end, level.value),
                (-3, 3),
                textcoords="offset points",
                ha="right",
                fontsize=_STAGE_NAME,
                color=COLOURS["soft"],
                parse_math=False,
            )


_NAMES = {value: name for name, value in COLOURS.items()}


def inline(svg: str, label: str) -> Markup:
    """An SVG document of `draw` as an element of an HTML page: no ids but those it uses, colours and font of the page.

    The width is left to the page. `label` is what a screen reader says.
    """
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)  # it would style the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r" font-family: [^;\"]*;?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{_NAMES[m[0]]})" if m[0] in _NAMES else m[0], body)
    body = re.sub(r"\s*\n\s*", " ", body)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return Markup(head + body.strip())


_SHAPES = {
    "s": "M7.5 .5h7v7h-7z",
    "^": "M11 0L15.2 7.6H6.8z",
    "D": "M11 -.6L15.6 4L11 8.6L6.4 4z",
    "v": "M11 8L15.2 .4H6.8z",
    "P": "M9.5 0h3v2.5H15v3h-2.5V8h-3V5.5H7v-3h2.5z",
    "X": "M8 0L11 2.2L14 0L15 1L12.8 4L15 7L14 8L11 5.8L8 8L7 7L9.2 4L7 1z",
}


def swatch(curve: Curve) -> Markup:
    """The line of a curve with its marker, where it is not the usual dot, for a legend."""
    dash = f' stroke-dasharray="{DASHES[curve.dash]}"' if DASHES[curve.dash] else ""
    width = 3 if curve.bold else 2.4
    colour = f"var(--{curve.colour})"
    shape = f'<path d="{_SHAPES[curve.marker]}" fill="{colour}"/>' if curve.marker in _SHAPES else ""
    return Markup(
        f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true"><path d="M1 4H21" stroke="{colour}" '
        f'stroke-width="{width}"{dash}/>{shape}</svg>'
    )
