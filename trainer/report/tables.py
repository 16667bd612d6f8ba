"""Tables of results: one for each task, with a column for each protocol that has the task."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from data_pipeline.common.terminal import printable
from trainer.evaluation.protocol import Results, Scores
from trainer.report.page import figure, table

_LOG_COLUMNS = 200
_MISSING = "\N{EN DASH}"
_NAMES = {"auc": "AUC", "eer": "EER", "map": "mAP", "accuracy_std": "deviation"}
_RATES = {
    "tar_at_far_": "TAR@FAR ",
    "tpir_at_fpir_": "TPIR@FPIR ",
    "fnmr_at_fmr_": "FNMR@FMR ",
    "rank_": "rank ",
}
UNIT = "In percent; thresholds are cosines."


class Table(NamedTuple):
    """One task: a column for each protocol, a row for each figure; None if a protocol lacks the figure."""

    task: str
    protocols: list[str]
    rows: dict[str, list[float | None]]
    conventions: list[str]


def tables(results: Results) -> list[Table]:
    """Return the tables, in the order in which tasks occur in the results."""
    return [_table(task, scores) for task, scores in by_task(results).items()]


def by_task(results: Results) -> dict[str, dict[str, Scores]]:
    """Return the scores by task and protocol."""
    tasks: dict[str, dict[str, Scores]] = {}
    for protocol, scores_of_tasks in results.items():
        for task, scores in scores_of_tasks.items():
            tasks.setdefault(task, {})[protocol] = scores
    return tasks


def _table(task: str, of_protocol: dict[str, Scores]) -> Table:
    names = dict.fromkeys(name for scores in of_protocol.values() for name in scores.figures)
    rows = {name: [scores.figures.get(name) for scores in of_protocol.values()] for name in names}
    return Table(
        task, list(of_protocol), rows, list(dict.fromkeys(s.convention for s in of_protocol.values()))
    )


def title(name: str) -> str:
    """Return the name of a figure for readers: TAR@FAR 0.001 for tar_at_far_0.001."""
    for prefix, short in _RATES.items():
        if name.startswith(prefix):
            return short + name.removeprefix(prefix).replace("_", " ")
    return _NAMES.get(name, name.replace("_", " "))


def shown(name: str, value: float) -> str:
    """Return a figure for readers: a rate in percent with two decimals, a threshold with three."""
    return f"{value:.3f}" if name.startswith("threshold") else f"{100 * value:.2f}"


def show(results: Results) -> None:
    """Print all tables, with the conventions below them."""
    console = Console(highlight=False)
    if not console.is_terminal:  # rich would wrap a log at 80 columns
        console = Console(highlight=False, width=_LOG_COLUMNS)
    for found in tables(results):
        drawn = RichTable(box=box.SIMPLE_HEAD)
        drawn.add_column(Text(printable(found.task)))
        for protocol in found.protocols:
            drawn.add_column(Text(printable(protocol)), justify="right")
        for name, values in found.rows.items():
            drawn.add_row(Text(printable(title(name))), *(_cell(name, value) for value in values))
        console.print(drawn)
        conventions = (printable(f"  {convention}") for convention in found.conventions)
        console.print(*conventions, sep="\n", markup=False)
    console.print(f"\n{UNIT}")


def for_page(results: Results) -> str:
    """Return all tables as HTML, with the conventions below them."""
    return f'<div class="grid">{"".join(map(_html, tables(results)))}</div>'


def _html(found: Table) -> str:
    rows = [
        (title(name), *(_html_cell(name, value) for value in values)) for name, values in found.rows.items()
    ]
    notes = "".join(f'<p class="note">{escape(convention)}</p>' for convention in found.conventions)
    return f'<div class="card table">{table(rows, [found.task, *found.protocols])}{notes}</div>'


def _html_cell(name: str, value: float | None) -> str:
    cell = _cell(name, value)
    return cell if value is None else figure(value, cell)


def _cell(name: str, value: float | None) -> str:
    return _MISSING if value is None else shown(name, value)
