"""Report of a training run: `report.html`, a self-contained page without scripts and external content.

    write_report(run_dir, results=results, faces=..., pairs=..., splits=..., config_text=...)

The curves come from `metrics.jsonl`, the headline from `result.json`, the rest from the arguments. Sections
without data are omitted. Curves of many steps are drawn as means of neighbouring steps, within the range of
their values. All text is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common import bounded_json
from trainer.evaluation.protocol import Results
from trainer.monitoring.metrics_log import is_number, read_counted
from trainer.report.charts import Axis, Band, Dots, Drawn, Line, chart, percent
from trainer.report.page import (
    NARROW_SPACE,
    figure,
    grid,
    image_tag,
    page,
    percent_figure,
    percentage,
    scale,
    section,
    table,
    write_text,
)
from trainer.report.plots import report_section

_CURVE_POINTS = 160
_LARGEST_RESULT = 16 << 20
_IMAGES_SIDE_BY_SIDE = 6
# The keys of result.json that are shown as numbers.
_NUMBERS = (
    "verification_accuracy",
    "verification_accuracy_untrained",
    "samples_per_s",
    "steps",
    "world_size",
)


class JudgedPair(NamedTuple):
    """Two encoded images, the true answer to whether they show one person, and the network's judgement."""

    first: bytes
    second: bytes
    issame: bool
    similarity: float
    threshold: float

    @property
    def is_right(self) -> bool:
        """True if the network's judgement is correct."""
        return (self.similarity >= self.threshold) == bool(self.issame)


Splits = Mapping[str, Sequence[tuple[str, float, int]]]


def write_report(
    run_dir: Path,
    *,
    results: Results | None = None,
    faces: Sequence[tuple[bytes, str]] = (),
    pairs: Sequence[JudgedPair | tuple[bytes, bytes, bool, float, float]] = (),
    splits: Splits | None = None,
    config_text: str = "",
) -> Path:
    """Write `run_dir`/report.html and return its path; the file appears only when it is complete.

    results: the scores of the last evaluation. faces: encoded images with their labels; neighbours with the
    same label are shown together. pairs: examples of judged pairs. splits: for each nuisance its groups of
    pairs as (name, accuracy, number of pairs).

    Raises ValueError, naming the file, if the folder holds neither metrics.jsonl nor result.json, or if
    result.json is not a JSON object or has a text in place of a number.
    """
    result, metrics = _read_result(run_dir / "result.json"), _read_metrics(run_dir / "metrics.jsonl")
    if result is None and metrics is None:
        raise ValueError(
            f"{run_dir}: expected the metrics.jsonl and result.json of a run, found neither; "
            "pass the run_dir of a training that has logged some steps"
        )
    result, metrics = result or {}, metrics or _Metrics()
    body = [
        _head(result, metrics),
        _training(metrics),
        report_section("Verification", results or {}),
        _pairs([JudgedPair(*pair) for pair in pairs]),
        _split_accuracies(splits or {}, result.get("verification_accuracy")),
        _faces(faces),
        _details(result, metrics, config_text),
    ]
    path = run_dir / "report.html"
    write_text(path, page(run_dir.resolve().name, _versions(result), "\n".join(body)))
    return path


# Reading the files of a run.


@dataclass
class _Metrics:
    """The records of metrics.jsonl in the order of their steps; `evaluations` by the name of the set."""

    train: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unreadable_lines: int = 0


def _read_metrics(path: Path) -> _Metrics | None:
    if not path.is_file():
        return None
    metrics = _Metrics()
    # A run that resumes from a checkpoint logs some steps again; the later record of a step is used.
    latest: dict[tuple[str | None, int], dict[str, Any]] = {}
    records, metrics.unreadable_lines = read_counted(path.parent)
    for record in records:
        match record:
            case {"kind": "train", "step": step}:
                latest[None, step] = record
            case {"kind": "evaluation", "step": step, "set": str() as evaluated}:
                latest[evaluated, step] = record
    for (name, _), record in sorted(latest.items(), key=lambda item: item[0][1]):
        (metrics.train if name is None else metrics.evaluations.setdefault(name, [])).append(record)
    return metrics


def _read_result(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = bounded_json.read(path, _LARGEST_RESULT)
    except (OSError, ValueError):
        result = None
    if not isinstance(result, dict):
        raise ValueError(
            f"{path}: expected a JSON object, found something else; resume the run to write it again"
        )
    for key in _NUMBERS:
        if result.get(key) is not None and not is_number(result[key]):
            raise ValueError(f"{path}: {key}: expected a number, found {result[key]!r:.40}")
    return result


def _series(records: Iterable[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values [N] of the records in which the value is a finite number."""
    found = [(record["step"], record[key]) for record in records if is_number(record.get(key))]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], np.float64)


# The head of the page.


def _versions(result: dict[str, Any]) -> str:
    versions = result.get("versions")
    return " · ".join(map(" ".join, _flat(versions))) if isinstance(versions, dict) else ""


def _head(result: dict[str, Any], metrics: _Metrics) -> str:
    gain = _gain(result.get("verification_accuracy_untrained"), result.get("verification_accuracy"))
    tiles = "".join(f"<div><dt>{name}</dt><dd>{shown}</dd></div>" for name, shown in _tiles(result, metrics))
    if result.get("device") is not None:
        tiles += f'<div class="wide"><dt>device</dt><dd>{escape(str(result["device"]))}</dd></div>'
    return f'<section class="hero">{gain}<dl class="tiles">{tiles}</dl></section>' if gain or tiles else ""


def _tiles(result: dict[str, Any], metrics: _Metrics) -> Iterable[tuple[str, str]]:
    """Yield names and figures; the figures are HTML."""
    for key, name in (("samples_per_s", "samples per second"), ("steps", "steps"), ("world_size", "ranks")):
        if result.get(key) is not None:
            yield name, figure(result[key], f"{result[key]:,.0f}")
    for key, name, form in (("samples", "samples seen", "{:,.0f}"), ("loss", "last loss", "{:.3f}")):
        _, value_N = _series(metrics.train, key)
        if len(value_N):
            yield name, figure(value_N[-1], form.format(value_N[-1]))
    waiting = _data_wait_share(metrics)
    if waiting is not None:
        yield "waiting for data", percent_figure(waiting)


def _data_wait_share(metrics: _Metrics) -> float | None:
    """Return the fraction of the time of all logged steps that was spent waiting for data."""
    timed = [r for r in metrics.train if is_number(r.get("data_wait_s")) and is_number(r.get("step_s"))]
    step_s = sum(record["step_s"] for record in timed)
    return sum(record["data_wait_s"] for record in timed) / step_s if step_s else None


def _gain(untrained: float | None, trained: float | None) -> str:
    if trained is None:
        return ""
    if untrained is None:
        return f'<div><h2>verification accuracy</h2><p class="big">{percent_figure(trained)}</p></div>'
    ends = "".join(f"<span>{text}</span>" for text in ("0", "chance", f"100{NARROW_SPACE}%"))
    return (
        "<div><h2>verification accuracy, untrained &rarr; trained</h2>"
        f'<p class="big"><span>{percent_figure(untrained)}</span><i>&rarr;</i>{percent_figure(trained)}</p>'
        f"{scale((untrained, trained), tick=0.5, dots=(untrained, trained))}"
        f'<p class="ends">{ends}</p>'
        f'<p class="remark">{100 * (trained - untrained):+.1f} points by training</p></div>'
    )


# The sections. Each is empty if it has no data.


def _training(metrics: _Metrics) -> str:
    loss = _curve_chart(metrics, "loss", "Loss", lambda loss_N: f"{loss_N[-1]:.3f}")
    learning_rate = _curve_chart(
        metrics, "learning_rate", "Learning rate", lambda rate_N: f"peak {rate_N.max():.2g}", averaged=False
    )
    speed = _curve_chart(
        metrics, "samples_per_s", "Samples per second", lambda speed_N: f"median {np.median(speed_N):,.0f}"
    )
    small = [learning_rate, speed, _time_chart(metrics)]
    return section("Training", grid([loss, _accuracy_chart(metrics)], "halves") + grid(small, "thirds"))


def _curve_chart(
    metrics: _Metrics, key: str, title: str, value: Callable[[np.ndarray], str], *, averaged: bool = True
) -> str:
    """Chart one key of the training records over the steps, from 0; `value` returns the headline figure."""
    step_N, value_N = _series(metrics.train, key)
    if not len(step_N):
        return ""
    drawn, reached_N = _curve(step_N, value_N, averaged=averaged)
    x, y = Axis.tight(step_N), Axis.round([0.0, *reached_N])
    return chart(title, drawn, x, y, x_title="step", value=value(value_N))


def _curve(
    step_N: np.ndarray, value_N: np.ndarray, *, averaged: bool, colour: int = 0, name: str = ""
) -> tuple[list[Drawn], np.ndarray]:
    """Return the drawing of one curve, and the values that it reaches.

    A long averaged curve shows the means of equal segments, inside a band between their lowest and highest
    values. Any other long curve shows evenly spaced points, including both ends.
    """
    if len(step_N) <= _CURVE_POINTS:
        return [Line(step_N, value_N, name, colour)], value_N
    if not averaged:
        pick_N = np.linspace(0, len(step_N) - 1, _CURVE_POINTS).round().astype(int)
        return [Line(step_N[pick_N], value_N[pick_N], name, colour)], value_N[pick_N]
    middle_N = [part.mean() for part in np.array_split(step_N, _CURVE_POINTS)]
    stretches = np.array_split(value_N, _CURVE_POINTS)
    low_N, mean_N, high_N = (np.array([f(part) for part in stretches]) for f in (np.min, np.mean, np.max))
    band = Band(middle_N, low_N, high_N, colour=colour)
    return [band, Line(middle_N, mean_N, name, colour)], np.concatenate([low_N, high_N])


def _time_chart(metrics: _Metrics) -> str:
    drawn: list[Drawn] = []
    reached: list[np.ndarray] = [np.zeros(1)]
    steps: list[np.ndarray] = []
    for colour, (key, name) in enumerate((("step_s", "whole step"), ("data_wait_s", "waiting for data"))):
        step_N, value_N = _series(metrics.train, key)
        if len(step_N):
            curve, reached_N = _curve(step_N, 1000 * value_N, averaged=True, colour=colour, name=name)
            drawn, reached, steps = drawn + curve, [*reached, reached_N], [*steps, step_N]
    if not drawn:
        return ""
    x, y = Axis.tight(np.concatenate(steps)), Axis.round(np.concatenate(reached))
    return chart("Step time, ms", drawn, x, y, x_title="step")


def _accuracy_chart(metrics: _Metrics) -> str:
    drawn: list[Drawn] = []
    curves: list[tuple[np.ndarray, np.ndarray]] = []
    for colour, (name, records) in enumerate(metrics.evaluations.items()):
        step_N, accuracy_N = _series(records, "accuracy")
        if len(step_N):
            curves.append((step_N, accuracy_N))
            text_N = [f"{name}, step {step:,}: {percentage(a)}" for step, a in zip(*curves[-1], strict=True)]
            drawn += [Line(step_N, accuracy_N, name, colour), Dots(step_N, accuracy_N, text_N, colour)]
    if not drawn:
        return ""
    all_step_N, all_accuracy_N = map(np.concatenate, zip(*curves, strict=True))
    x, y = Axis.tight(all_step_N), Axis.round(all_accuracy_N, percent)
    last = percentage(all_accuracy_N[-1]) if len(curves) == 1 else ""
    return chart("Verification accuracy", drawn, x, y, x_title="step", value=last)


def _pairs(pairs: Sequence[JudgedPair]) -> str:
    if not pairs:
        return ""
    span = Axis.round([0.0, *(value for pair in pairs for value in (pair.similarity, pair.threshold))])
    body = ""
    for right, title in ((True, "Judged right"), (False, "Judged wrong")):
        shown = "".join(_pair_card(pair, span) for pair in pairs if pair.is_right == right)
        body += shown and f'<h3>{title}</h3><div class="pairs">{shown}</div>'
    remark = "The bar is the cosine similarity. A pair whose bar reaches the tick is judged as one person."
    return section("Pairs", body, remark)


def _pair_card(pair: JudgedPair, span: Axis) -> str:
    zero, similarity, threshold = span.at([0.0, pair.similarity, pair.threshold]).tolist()
    css_class, mark = ("right", "&#10003;") if pair.is_right else ("wrong", "&#10007;")
    return (
        f'<figure class="pair {css_class}"><div>{image_tag(pair.first)}{image_tag(pair.second)}</div>'
        f"{scale((zero, similarity), tick=threshold)}"
        f"<figcaption><b>{mark} {'one person' if pair.issame else 'two people'}</b>"
        f"{figure(pair.similarity, f'{pair.similarity:.2f}')}</figcaption></figure>"
    )


def _split_accuracies(splits: Splits, overall: float | None) -> str:
    counted = {name: [row for row in rows if row[2]] for name, rows in splits.items()}
    filled = {name: rows for name, rows in counted.items() if rows}
    least = min((accuracy for rows in filled.values() for _, accuracy, _ in rows), default=0.5)
    span = Axis(min(math.floor(10 * least) / 10, 0.5), 1.0, ticks=())
    bodies = [_split_card(name, rows, span, overall) for name, rows in filled.items()]
    remark = (
        f"Accuracy (dot) from {percent(span.low)} to {percent(span.high)}, with its 95{NARROW_SPACE}% "
        "confidence interval (bar)" + ("." if overall is None else "; the tick is the accuracy of all pairs.")
    )
    return section("By nuisance", grid(bodies, "thirds"), remark)


def _split_card(name: str, rows: Sequence[tuple[str, float, int]], span: Axis, overall: float | None) -> str:
    tick = None if overall is None else float(span.at([overall])[0])
    lines = []
    for label, accuracy, count in rows:
        low, high, here = span.at([*_wilson(accuracy, count), accuracy]).tolist()
        level = scale((low, high), tick=tick, dots=(here,))
        lines.append([label, level, percent_figure(accuracy), figure(count, f"{count:,}")])
    return f'<div class="split"><h3>{escape(name)}</h3>{table(lines)}</div>'


def _wilson(part: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a fraction `part` of `count` trials; E. B. Wilson, 1927."""
    squares = 1.96**2 / count
    centre = (part + squares / 2) / (1 + squares)
    half = math.sqrt(squares * part * (1 - part) + squares**2 / 4) / (1 + squares)
    return centre - half, centre + half


def _faces(faces: Sequence[tuple[bytes, str]]) -> str:
    people = [(label, [image for image, _ in group]) for label, group in groupby(faces, lambda face: face[1])]
    figures = "".join(
        f"<figure><div>{''.join(image_tag(image, label) for image in images)}</div>"
        f"<figcaption>{escape(label)}</figcaption></figure>"
        for label, images in people
    )
    side_by_side = min(_IMAGES_SIDE_BY_SIDE, max((len(images) for _, images in people), default=0))
    body = figures and f'<div class="card people" style="--images:{side_by_side}">{figures}</div>'
    return section("Faces of the dataset", body)


def _details(result: dict[str, Any], metrics: _Metrics, config_text: str) -> str:
    body = ""
    if config_text:
        body += f"<details open><summary>Configuration</summary><pre>{escape(config_text)}</pre></details>"
    if result:
        rows = [(name, escape(value)) for name, value in _flat(result)]
        body += f"<details><summary>Result</summary>{table(rows)}</details>"
    if metrics.unreadable_lines:
        lost = f"{metrics.unreadable_lines} lines of metrics.jsonl could not be read and are omitted."
        body = f'<p class="remark">{lost}</p>{body}'
    return section("Details", body)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield the dotted names and texts of all values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)
