"""Output of `lgaf eval --suite`: results.json, report.html, and every plot as an SVG file."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic_write import staged_file
from trainer.evaluation.protocol import Results
from trainer.report.page import page, section, table
from trainer.report.plots import plots, report_section


def write(folder: Path, results: Results, about: dict[str, Any]) -> None:
    """Write all files to an existing folder; each file appears only when it is complete.

    about: facts about the evaluation (checkpoint, suite, device, versions) as plain JSON values, by name.
    """
    content = {**about, "results": as_json(results)}
    _write(folder / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    body = report_section("Results", results) + _about(about)
    _write(
        folder / "report.html", page(str(about["suite"]), str(about["checkpoint"]), body, kind="evaluation")
    )
    for plot in plots(results):
        _write(folder / f"{_file_name(plot.title)}.svg", plot.file())


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


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "_", title.lower()).strip("_")


def _write(path: Path, text: str) -> None:
    with staged_file(path) as partial:
        # The path of a checkpoint is not always valid Unicode.
        partial.write_text(text, encoding="utf-8", errors="replace")
