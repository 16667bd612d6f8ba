"""The HTML of a report: the page's frame and style, and the elements of its sections.

These functions escape plain texts. Arguments named `body`, and results of these functions, are HTML already.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from data_pipeline.common.atomic_write import staged_file
from trainer.report import charts

NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
# The policy allows embedded images and styles, and blocks scripts and external content.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def section(title: str, body: str, remark: str = "") -> str:
    """Return a section of the page under its heading; an empty text if `body` is empty."""
    intro = f'<p class="remark">{escape(remark)}</p>' if remark else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>" if body else ""


def grid(bodies: Sequence[str], css_class: str) -> str:
    """Return a card for each body that is not empty, side by side as the width allows."""
    filled = "".join(f'<div class="card">{body}</div>' for body in bodies if body)
    return filled and f'<div class="grid {css_class}">{filled}</div>'


def table(rows: Iterable[Sequence[str]], columns: Sequence[str] = ()) -> str:
    """Return a table whose first column names the rows; names and columns are texts, other cells HTML."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    names = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f"<table>{names and f'<thead><tr>{names}</tr></thead>'}<tbody>{lines}</tbody></table>"


def scale(bar: tuple[float, float], *, tick: float | None = None, dots: Sequence[float] = ()) -> str:
    """Return a horizontal bar between two places from 0 to 1, with a tick; the first dot of two is hollow."""
    low, high = sorted(100 * place for place in bar)
    marks = "".join(f'<b style="left:{100 * place:.2f}%"></b>' for place in dots)
    across = "" if tick is None else f'<s style="left:{100 * tick:.2f}%"></s>'
    return f'<div class="scale"><u style="left:{low:.2f}%;width:{high - low:.2f}%"></u>{across}{marks}</div>'


def figure(value: object, shown: str) -> str:
    """Return a figure as shown to the reader, with its exact value for programs."""
    return f'<data value="{escape(str(value))}">{escape(shown)}</data>'


def percentage(part: float) -> str:
    """Return a fraction as text: 94.3 %."""
    return f"{100 * part:.1f}{NARROW_SPACE}%"


def percent_figure(part: float) -> str:
    """Return a fraction as a figure in percent."""
    return figure(part, percentage(part))


def image_tag(image: bytes, label: str = "") -> str:
    """Return an `<img>` that embeds an encoded image (JPEG or PNG) in the page."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    text = base64.b64encode(image).decode("ascii")
    return f'<img alt="{escape(label)}" src="data:image/{kind};base64,{text}">'


def page(name: str, subtitle: str, body: str, *, kind: str = "training") -> str:
    """Return the complete document: a report of the given `kind`, titled `name`."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(name)} &middot; lgaf</title>
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_CSS}{charts.CSS}</style></head>
<body><header><p>lgaf {escape(kind)} report</p><h1>{escape(name)}</h1><p>{escape(subtitle)}</p></header>
<main>
{body}
</main></body></html>
"""


def write_text(path: Path, text: str) -> None:
    """Write a text file, which appears only when it is complete."""
    with staged_file(path) as partial:
        # Texts can contain file names that are not valid Unicode.
        partial.write_text(text, encoding="utf-8", errors="replace")


_CSS = """
:root { color-scheme: light dark; --page: #f4f6f9; --card: #fff; --glow: #dfeaff; --track: #e9edf3;
  --line: #e4e8ee; --text: #16202e; --muted: #647084; --good: #1f8f5f; --bad: #cf3f4f;
  --c0: #2a6fdb; --c1: #e07b1a; --c2: #1f9d6b; --c3: #8b5cd6; --c4: #d3487f; --c5: #1d9aa8;
  --shadow: 0 1px 2px #1018280f, 0 6px 20px #1018280a }
@media (prefers-color-scheme: dark) { :root { --page: #0c1016; --card: #151b24; --glow: #1a2b4a;
  --track: #253041; --line: #263040; --text: #e8edf4; --muted: #909cae; --good: #4fcb98; --bad: #ff7f8a;
  --c0: #6da6ff; --c1: #f6a04d; --c2: #4fcb98; --c3: #b695f8; --c4: #f285ae; --c5: #55cbd8;
  --shadow: none } }
* { box-sizing: border-box }
body { margin: 0; padding: 36px 20px 64px; background: var(--page); color: var(--text);
  font: 15px/1.5 Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
header, main { max-width: 1120px; margin: 0 auto }
header { margin-bottom: 22px }
header p { margin: 0; font-size: 14px; color: var(--muted) }
header p:first-child { font-size: 12.5px; font-weight: 600; letter-spacing: .09em; text-transform: uppercase;
  color: var(--c0) }
h1 { margin: 2px 0; font-size: 32px; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 0 0 14px; font-size: 20px; letter-spacing: -.01em }
h3 { margin: 0; font-size: 14px; font-weight: 600 }
section { margin-top: 40px }
.note { margin: 12px 0 0; color: var(--muted); font-size: 13px }
.remark { margin: -8px 0 14px; color: var(--muted); font-size: 14px }
.card, .hero, .pair, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 14px; box-shadow: var(--shadow) }
.card { min-width: 0; padding: 18px 20px }
.grid { display: grid; gap: 16px }
.grid + .grid, .grid + .card { margin-top: 16px }
.halves, .hero { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.thirds { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); --height: 150px }
.hero { display: grid; gap: 28px 44px; margin: 0; padding: 28px 30px;
  background: radial-gradient(120% 160% at 0 0, var(--glow), transparent 60%) var(--card) }
.hero h2 { margin: 0; font-size: 14px; font-weight: 500; letter-spacing: 0; color: var(--muted) }
.hero .remark { margin: 14px 0 0; color: var(--text) }
.big { margin: 2px 0 18px; font-size: clamp(38px, 7.5vw, 60px); font-weight: 700; line-height: 1.15;
  letter-spacing: -.035em; white-space: nowrap; color: var(--c0); font-variant-numeric: tabular-nums }
.big span { font-size: .55em; font-weight: 600; color: var(--muted) }
.big i { margin: 0 .3em; font-size: .5em; font-style: normal; color: var(--muted); vertical-align: .12em }
.ends { display: flex; justify-content: space-between; margin: 6px 0 0; font-size: 12px;
  color: var(--muted) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 18px 20px;
  margin: 0; align-content: center }
dt { font-size: 12.5px; color: var(--muted) }
dd { margin: 0; font-size: 20px; font-weight: 600; letter-spacing: -.01em; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums }
.wide { grid-column: 1 / -1 }
.wide dd { font-size: 15px; letter-spacing: 0 }
.scale { position: relative; height: 8px; border-radius: 4px; background: var(--track) }
.scale u { position: absolute; top: 0; bottom: 0; min-width: 2px; border-radius: 4px;
  background: var(--c, var(--c0)) }
.scale b { position: absolute; top: 50%; width: 16px; height: 16px; border: 3px solid var(--card);
  border-radius: 50%; background: var(--c0); transform: translate(-50%, -50%) }
.scale b:has(+ b) { border-color: var(--c0); background: var(--card) }
.scale s { position: absolute; top: -4px; bottom: -4px; width: 2px; margin-left: -1px;
  background: var(--text); opacity: .55 }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; font-weight: 400 }
th:first-child { padding-left: 0; text-align: left }
th:last-child, td:last-child { padding-right: 0 }
thead th { color: var(--muted); font-size: 12.5px }
tbody th { font-weight: 600 }
tr + tr, thead + tbody tr { border-top: 1px solid var(--line) }
.table { overflow-x: auto }
.split h3 { margin-bottom: 8px }
.split tr { border: 0 }
.split th { font-weight: 400 }
.split th, .split td { padding: 5px 8px }
.split th { padding-left: 0 }
.split td:last-child { padding-right: 0; color: var(--muted); font-size: 12.5px }
.split td:nth-child(2) { width: 60% }
.split u { opacity: .35 }
.split b { width: 13px; height: 13px }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 14px;
  margin: 10px 0 22px }
.pair { margin: 0; padding: 12px; --c: var(--good) }
.wrong { --c: var(--bad) }
.pair div:first-child { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; margin-bottom: 12px }
.pair img { width: 100%; aspect-ratio: 1 }
.pair figcaption { display: flex; justify-content: space-between; margin-top: 9px; font-size: 13px }
.pair figcaption b { font-weight: 600; color: var(--c) }
img { display: block; border-radius: 8px; object-fit: cover; background: var(--track) }
.people { display: grid; gap: 16px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--images) * 64px), 1fr)) }
.people figure { margin: 0 }
.people div { display: grid; grid-template-columns: repeat(var(--images), minmax(0, 112px)); gap: 5px }
.people img { width: 100%; aspect-ratio: 1 }
.people figcaption { margin-top: 5px; font-size: 12.5px; color: var(--muted); overflow-wrap: anywhere }
details { padding: 14px 20px }
details + details { margin-top: 16px }
summary { font-weight: 600; cursor: pointer }
details table { margin-top: 10px }
details th { font-weight: 400; color: var(--muted) }
details td { white-space: normal; overflow-wrap: anywhere }
pre { margin: 12px 0 4px; overflow-x: auto; font: 13px/1.55 ui-monospace, "SF Mono", Menlo, monospace }
@media (max-width: 520px) { body { padding: 22px 14px 48px } h1 { font-size: 26px }
  .hero { padding: 22px 18px } .card { padding: 16px 14px }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) } }
"""
