"""Plots of the protocols' results: for each task ROC, CMC, error versus reject, and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trainer.evaluation.protocol import Histogram, Results, Scores
from trainer.report.charts import Axis, Band, Dots, Drawn, Line, Mark, chart, percent, standalone
from trainer.report.page import grid, percentage, section
from trainer.report.tables import UNIT, by_task, for_page

_TAR = "tar_at_far_"
_MOST_RANKS = 50
_WHOLE = Axis(0, 1, [0, 0.25, 0.5, 0.75, 1], percent)


class Plot(NamedTuple):
    """The parts of a plot: curves, axes and titles."""

    title: str
    drawn: Sequence[Drawn]
    x: Axis
    y: Axis
    x_title: str

    def figure(self) -> str:
        """Return the plot as HTML for a page."""
        return chart(self.title, self.drawn, self.x, self.y, x_title=self.x_title)

    def file(self) -> str:
        """Return the plot as the text of an SVG file."""
        return standalone(self.title, self.drawn, self.x, self.y, x_title=self.x_title)


def report_section(title: str, results: Results) -> str:
    """Return tables and plots of all results as a section of a page; empty without results."""
    if not results:
        return ""
    figures = [plot.figure() for plot in plots(results)]
    return section(title, for_page(results) + grid(figures, "halves"), UNIT)


def plots(results: Results) -> list[Plot]:
    """Return all plots that the results have data for, task by task."""
    found = []
    for task, scores in by_task(results).items():
        found += [*_roc(task, scores), *_cmc(task, scores), *_rejection(task, scores)]
        found += [
            _histogram(_name(protocol, task), of_one.histogram, of_one.figures.get("threshold"))
            for protocol, of_one in scores.items()
            if of_one.histogram is not None
        ]
    return found


def _name(protocol: str, task: str) -> str:
    return f"{protocol}, {task}"


def _roc(task: str, scores: Mapping[str, Scores]) -> list[Plot]:
    """Plot ROC curves as steps: TAR is constant up to the FAR of the next point.

    The axis begins below the lowest FAR, which shows the TAR at zero false accepts.
    """
    curves = {name: (*of_one.roc, of_one.figures) for name, of_one in scores.items() if of_one.roc}
    fars = [float(far_R[far_R > 0].min()) for far_R, _, _ in curves.values() if far_R.any()]
    if not fars:
        return []
    x = Axis.decades(min(fars) / 2)
    chance_N = np.geomspace(x.low, 1, 60)
    drawn: list[Drawn] = [Line(chance_N, chance_N, "chance", colour=None, dashed=True)]
    for colour, (name, (far_R, tar_R, figures)) in enumerate(curves.items()):
        drawn.append(Line(np.repeat(far_R, 2)[1:], np.repeat(tar_R, 2)[:-1], name, colour))
        tars = {
            float(key.removeprefix(_TAR)): value for key, value in figures.items() if key.startswith(_TAR)
        }
        text_N = [f"{name}: TAR {percentage(tar)} at FAR {far:g}" for far, tar in tars.items()]
        drawn.append(Dots(list(tars), list(tars.values()), text_N, colour))
    return [Plot(f"ROC, {task}: true accept rate", drawn, x, _WHOLE, "false accept rate")]


def _cmc(task: str, scores: Mapping[str, Scores]) -> list[Plot]:
    curves = {
        f"{protocol} {curve}".strip(): rate_R[:_MOST_RANKS]
        for protocol, of_one in scores.items()
        for curve, rate_R in of_one.cmc.items()
    }
    if not curves:
        return []
    ranks = max(map(len, curves.values()))
    drawn = [
        Line(np.arange(1, len(rate_R) + 1), rate_R, name, colour)
        for colour, (name, rate_R) in enumerate(curves.items())
    ]
    y = Axis.round([0.99, 1.0, *(float(rate_R.min()) for rate_R in curves.values())], percent)
    return [Plot(f"CMC, {task}: probes found", drawn, Axis.tight([1, ranks]), y, "rank")]


def _rejection(task: str, scores: Mapping[str, Scores]) -> list[Plot]:
    curves = {name: of_one.rejection for name, of_one in scores.items() if of_one.rejection is not None}
    if not curves:
        return []
    drawn = [
        Line(curve.rejected_R, curve.fnmr_R, f"{name}, FMR {curve.fmr:g}", colour)
        for colour, (name, curve) in enumerate(curves.items())
    ]
    y = Axis.round([0.0, 0.01, *(float(curve.fnmr_R.max()) for curve in curves.values())], percent)
    x = Axis.tight(np.concatenate([curve.rejected_R for curve in curves.values()]), percent)
    return [Plot(f"Error versus reject, {task}: false non-matches", drawn, x, y, "rejected for low quality")]


def _histogram(name: str, counts: Histogram, threshold: float | None) -> Plot:
    """Plot a histogram over the range of similarities that occur."""
    filled_B = np.flatnonzero(counts.genuine_B + counts.impostor_B)
    first, last = int(filled_B[0]), int(filled_B[-1]) + 1
    outline_N = np.repeat(counts.edge_B1[first : last + 1], 2)[1:-1]
    drawn: list[Drawn] = []
    highest = 0.0
    for kind, count_B, colour in (("two people", counts.impostor_B, 1), ("one person", counts.genuine_B, 0)):
        share_N = np.repeat(count_B[first:last] / count_B.sum(), 2)
        highest = max(highest, float(share_N.max()))
        drawn.append(Band(outline_N, np.zeros(len(outline_N)), share_N, colour=colour))
        drawn.append(Line(outline_N, share_N, f"{kind}: {count_B.sum():,} pairs", colour))
    marks = [] if threshold is None else [Mark(threshold, f"threshold {threshold:.3f}")]
    x = Axis.round([outline_N[0], outline_N[-1], *(mark.x for mark in marks)], ticks=6)
    y = Axis.round([0.0, highest], percent)
    return Plot(f"Similarity of pairs: {name}", [*drawn, *marks], x, y, "cosine similarity")
