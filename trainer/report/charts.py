"""Charts as HTML with inline SVG, for pages without scripts and external content.

    chart("Loss", [Line(step_N, loss_N, name="loss")], x=Axis.tight(step_N), y=Axis.round(loss_N))

The drawing stretches with the width of the page, while strokes and text keep their size: strokes do not
scale, and labels are HTML placed in percent. Colours are the page's custom properties --c0, --c1, ...,
--muted and --line. Consecutive points at the same spot are drawn once, so that long curves stay small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

Values = Sequence[float] | np.ndarray

COLOURS = 6
# The extent of the drawing's coordinates, which are rounded to whole units.
_SIZE = 1000
_STEPS = (1, 2, 2.5, 5, 10)


def plain(value: float) -> str:
    """Format a number for ticks and labels: 0.05, 12, 1,500, 25k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.6g}{letter}"
    return f"{value:,.6g}"


def percent(value: float) -> str:
    """Format a fraction for ticks: 12.5 %."""
    return f"{100 * value:.6g} %"


def power_of_ten(value: float) -> str:
    """Format a tick of a logarithmic axis."""
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@dataclass(frozen=True)
class Axis:
    """The range of values of an axis, and its ticks."""

    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str] = plain
    log: bool = False

    @classmethod
    def tight(cls, value_N: Values, text: Callable[[float], str] = plain) -> Axis:
        """Return an axis from the lowest to the highest value."""
        low, high = float(min(value_N)), float(max(value_N))
        if low == high:
            return cls.round(value_N, text)
        step = _step(high - low, 5)
        return cls(low, high, _multiples(math.ceil(low / step), math.floor(high / step), step), text)

    @classmethod
    def round(cls, value_N: Values, text: Callable[[float], str] = plain, ticks: int = 4) -> Axis:
        """Return an axis from the tick at or below the lowest value to the tick at or above the highest."""
        low, high = float(min(value_N)), float(max(value_N))
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        step = _step(high - low, ticks)
        # The tolerance prevents an extra tick for a value that is a multiple up to rounding.
        marks = _multiples(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9), step)
        return cls(marks[0], marks[-1], marks, text)

    @classmethod
    def decades(cls, low: float) -> Axis:
        """Return a logarithmic axis from `low` to 1, with ticks at powers of ten."""
        ticks = [10.0**exponent for exponent in range(math.ceil(math.log10(low)), 1)]
        return cls(low, 1.0, ticks, power_of_ten, log=True)

    def at(self, value_N: Values) -> np.ndarray:
        """Return places [N] from 0 to 1; values outside the axis are clipped to its ends."""
        value_N = np.clip(np.asarray(value_N, np.float64), self.low, self.high)
        if self.log:
            return np.log(value_N / self.low) / math.log(self.high / self.low)
        return (value_N - self.low) / (self.high - self.low)


def _step(extent: float, ticks: int) -> float:
    """Return the round step that divides the extent into at most `ticks` parts."""
    power = 10.0 ** math.floor(math.log10(extent / ticks))
    return next(power * step for step in _STEPS if power * step >= extent / ticks * (1 - 1e-9))


def _multiples(first: int, last: int, step: float) -> list[float]:
    # Rounded, because 3 * 0.1 would otherwise be labelled 0.30000000000000004.
    digits = 1 - math.floor(math.log10(step)) + 1
    return [round(i * step, digits) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Line:
    """A curve through the points; a curve with a `name` appears in the key."""

    x_N: Values
    y_N: Values
    name: str = ""
    colour: int | None = 0  # None: the muted colour
    dashed: bool = False

    def svg(self, x: Axis, y: Axis) -> str:
        style = "dashed" if self.dashed else "line"
        # The last stroke is too short to be visible, and draws a single point as a dot.
        points = _points(self.x_N, self.y_N, x, y)
        return f'<path class="{style} {_colour(self.colour)}" d="M{points}h.01"/>'


@dataclass(frozen=True)
class Band:
    """The area between two curves; above zeros it is the body of a histogram."""

    x_N: Values
    low_N: Values
    high_N: Values
    colour: int = 0

    def svg(self, x: Axis, y: Axis) -> str:
        there, back = _points(self.x_N, self.high_N, x, y), _points(self.x_N[::-1], self.low_N[::-1], x, y)
        return f'<path class="band {_colour(self.colour)}" d="M{there}L{back}Z"/>'


@dataclass(frozen=True)
class Dots:
    """Points of a curve, each with a text that the browser shows on hover."""

    x_N: Values
    y_N: Values
    text_N: Sequence[str]
    colour: int = 0

    def svg(self, x: Axis, y: Axis) -> str:
        # A minimal line with round ends is a disc that does not stretch with the drawing.
        places = zip(_SIZE * x.at(self.x_N), _SIZE * (1 - y.at(self.y_N)), self.text_N, strict=True)
        return "".join(
            f'<path class="dot {_colour(self.colour)}" d="M{left:.0f} {top:.0f}h.01">'
            f"<title>{escape(text)}</title></path>"
            for left, top, text in places
        )


@dataclass(frozen=True)
class Mark:
    """A vertical line at x, in the muted colour, with its label at the top."""

    x: float
    label: str

    def svg(self, x: Axis, y: Axis) -> str:
        left = _SIZE * float(x.at([self.x])[0])
        return f'<path class="dashed muted" d="M{left:.0f} 0V{_SIZE}"/>'


Drawn = Line | Band | Dots | Mark


def chart(
    title: str,
    drawn: Sequence[Drawn],
    x: Axis,
    y: Axis,
    *,
    x_title: str = "",
    value: str = "",
) -> str:
    """Return a `<figure>` with the title, the key of the named lines, the drawing (last on top) and the axes.

    value: a figure that is shown beside the title. All text is escaped.
    """
    key = "".join(f'<li class="{_colour(part.colour)}">{escape(part.name)}</li>' for part in _named(drawn))
    labels = [_label("y", "top", 1 - float(y.at([tick])[0]), y.text(tick)) for tick in y.ticks]
    labels += [_label("x", "left", float(x.at([tick])[0]), x.text(tick)) for tick in x.ticks]
    labels += [
        _label("mark", "left", float(x.at([part.x])[0]), part.label)
        for part in drawn
        if isinstance(part, Mark)
    ]
    inside = _grid(y) + "".join(part.svg(x, y) for part in drawn)
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><b>{escape(value)}</b></figcaption>'
        f'<ul class="key">{key}</ul><div class="plot">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{inside}</svg>{"".join(labels)}</div>'
        f'<p class="x-title">{escape(x_title)}</p></figure>'
    )


def standalone(title: str, drawn: Sequence[Drawn], x: Axis, y: Axis, *, x_title: str = "") -> str:
    """Return the same chart as the text of an SVG file, with the key below the axes."""
    left, top, width, height, line = 60, 44, 560, 300, 18
    below = top + height + line
    texts = [_text(left, 24, title, "start", "title"), _text(left + width / 2, below + line, x_title)]
    texts += [_text(left + width * float(x.at([tick])[0]), below, x.text(tick)) for tick in x.ticks]
    texts += [
        _text(left - 8, top + height * (1 - float(y.at([tick])[0])) + 4, y.text(tick), "end")
        for tick in y.ticks
    ]
    texts += [
        _text(left + width * float(x.at([part.x])[0]), top - 6, part.label)
        for part in drawn
        if isinstance(part, Mark)
    ]
    for row, part in enumerate(_named(drawn), 2):
        middle = below + row * line - 4
        texts.append(f'<path class="line {_colour(part.colour)}" d="M{left} {middle}h14"/>')
        texts.append(_text(left + 22, middle + 4, part.name, "start"))
    bottom = below + line * (len(_named(drawn)) + 2)
    inside = _grid(y) + "".join(part.svg(x, y) for part in drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {bottom}">'
        f"<style>{_FILE_CSS}</style>"
        f'<rect class="paper" width="100%" height="100%"/>'
        f'<svg x="{left}" y="{top}" width="{width}" height="{height}" viewBox="0 0 {_SIZE} {_SIZE}" '
        f'preserveAspectRatio="none" overflow="visible">{inside}</svg>{"".join(texts)}</svg>\n'
    )


def _named(drawn: Sequence[Drawn]) -> list[Line]:
    return [part for part in drawn if isinstance(part, Line) and part.name]


def _text(left: float, top: float, text: str, anchor: str = "middle", css_class: str = "label") -> str:
    return (
        f'<text class="{css_class}" x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _colour(colour: int | None) -> str:
    return "muted" if colour is None else f"c{colour % COLOURS}"


def _label(css_class: str, side: str, place: float, text: str) -> str:
    return f'<span class="{css_class}" style="{side}:{100 * place:.2f}%">{escape(text)}</span>'


def _grid(y: Axis) -> str:
    heights = _SIZE * (1 - y.at(y.ticks))
    return '<path class="grid" d="' + "".join(f"M0 {height:.0f}H{_SIZE}" for height in heights) + '"/>'


def _points(x_N: Values, y_N: Values, x: Axis, y: Axis) -> str:
    spot_N2 = np.rint(_SIZE * np.stack([x.at(x_N), 1 - y.at(y_N)], axis=1)).astype(int)
    moves_N = np.append(True, (np.diff(spot_N2, axis=0) != 0).any(axis=1))
    return "L".join(f"{left} {top}" for left, top in spot_N2[moves_N].tolist())


CSS = """
.chart { display: flex; flex-direction: column; height: 100%; margin: 0 }
.chart figcaption { display: flex; align-items: baseline; justify-content: space-between; gap: 12px;
  margin-bottom: 4px }
.chart figcaption b { font-size: 15px; font-variant-numeric: tabular-nums }
.plot { position: relative; height: var(--height, 230px); margin: auto 12px 24px 46px }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round }
.plot .grid { stroke: var(--line); stroke-width: 1 }
.plot .line { stroke: var(--c); stroke-width: 2 }
.plot .dashed { stroke: var(--c); stroke-width: 1.5; stroke-dasharray: 1 5 }
.plot .band { fill: var(--c); opacity: .2 }
.plot .dot { stroke: var(--c); stroke-width: 7 }
.plot span { position: absolute; font-size: 11.5px; line-height: 1; color: var(--muted); white-space: nowrap;
  font-variant-numeric: tabular-nums }
.plot .y { right: calc(100% + 10px); transform: translateY(-50%) }
.plot .x { top: calc(100% + 10px); transform: translateX(-50%) }
.plot .mark { top: -4px; padding: 3px 6px; border-radius: 6px; background: var(--card); color: var(--text);
  transform: translate(-50%, -50%) }
.x-title { margin: 2px 12px 0 46px; text-align: center; font-size: 11.5px; color: var(--muted) }
.key { display: flex; flex-wrap: wrap; gap: 2px 16px; min-height: 12px; margin: 0 0 20px; padding: 0;
  list-style: none; font-size: 12.5px; color: var(--muted) }
.key li::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 6px;
  border-radius: 3px; background: var(--c) }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) }
.c3 { --c: var(--c3) } .c4 { --c: var(--c4) } .c5 { --c: var(--c5) }
.plot .muted, .key .muted { --c: var(--muted) }
"""
# The page's light colours as plain values, because drawing programs do not support custom properties.
_FILE_CSS = """
path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round }
text { font: 12px sans-serif; fill: #647084 } .title { font: 600 14px sans-serif; fill: #16202e }
.paper { fill: #fff } .grid { stroke: #e4e8ee } .line { stroke: currentColor; stroke-width: 2 }
.dashed { stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 1 5 }
.band { fill: currentColor; opacity: .2 } .dot { stroke: currentColor; stroke-width: 7 }
.c0 { color: #2a6fdb } .c1 { color: #e07b1a } .c2 { color: #1f9d6b } .c3 { color: #8b5cd6 }
.c4 { color: #d3487f } .c5 { color: #1d9aa8 } .muted { color: #647084 }
"""
