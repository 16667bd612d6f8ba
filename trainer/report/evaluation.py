"""Output of `lgaf eval --suite`: results.json, report.html, and every plot as an SVG file."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.evaluation.protocol import Results
from trainer.report.page import page, section, table, write_text
from trainer.report.plots import plots, report_section

_LONGEST_NAME = 100


def write(folder: Path, results: Results, about: dict[str, Any]) -> None:
    """Write all files to an existing folder; each file appears only when it is complete.

    about: facts about the evaluation (checkpoint, suite, device, versions) as plain JSON values, by name.
    """
    content = {**about, "results": as_json(results)}
    write_text(folder / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    body = report_section("Results", results) + _about(about)
    write_text(
        folder / "report.html", page(str(about["suite"]), str(about["checkpoint"]), body, kind="evaluation")
    )
    found = plots(results)
    for name, plot in zip(_file_names([plot.title for plot in found]), found, strict=True):
        write_text(folder / f"{name}.svg", plot.file())


def as_json(results: Results) -> dict[str, Any]:
    """Return, for each protocol and task, its figures (rates from 0 to 1) and its convention."""
    return {
        protocol: {
            task: {"figures": scores.figures, "convention": scores.convention}
            for task, scores in tasks.items()
        }
        for protocol, tasks in results.items()
    }


def _about(about: dict[str, Any]) -> str:
    rows = [
        (name, escape(value if isinstance(value, str) else json.dumps(value)))
        for name, value in about.items()
    ]
    return section("Details", f'<div class="card table">{table(rows)}</div>')


def _file_names(titles: Sequence[str]) -> list[str]:
    """Return a different plain name for each title."""
    names: list[str] = []
    for title in titles:
        plain = re.sub(r"[^a-z0-9.-]+", "_", title.lower()).strip("_.")[:_LONGEST_NAME]
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([plain], numbered) if name not in names))
    return names
