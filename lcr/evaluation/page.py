"""The report as one HTML page that needs nothing but itself: pictures inlined, no scripts, no requests."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from lcr.evaluation.series import Series
from lcr.evaluation.tables import compare, summarise, write_bytes, write_length, write_percent, write_rate

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1f2328; --muted: #59636e; --line: #d8dde3;
  --soft: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ground: #161b22; --text: #e6edf3; --muted: #9aa4af; --line: #30363d;
  --soft: #1d232b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p, ul { max-width: 95ch; }
ul { padding-left: 1.2rem; }
li { margin: .2rem 0; }
.muted { color: var(--muted); font-size: .9rem; }
figure { margin: 1rem 0; }
img { display: block; width: 100%; height: auto; }
.pictures { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.pictures.one { max-width: 760px; }
figure { overflow-x: auto; }
figure img { min-width: 480px; }
figure.wide img { min-width: 820px; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; background: var(--soft); }
summary { cursor: pointer; padding: .5rem .8rem; font-weight: 600; }
pre { margin: 0; padding: .25rem 1rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
.table { overflow: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th.name, td.name { text-align: left; }
thead th { position: sticky; top: 0; background: var(--soft); border-bottom: 1px solid var(--line);
  font-weight: 600; }
tbody tr:nth-child(even) td { background: var(--soft); }
"""


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def inline_picture(light: bytes, dark: bytes, description: str) -> str:
    """An `<img>` that follows the reader's colour scheme, both of its .png pictures inside."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(dark)}">'
        f'<img src="{data_url(light)}" alt="{escape(description)}"></picture>'
    )


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def write_page(
    title: str,
    series: Sequence[Series],
    heatmaps: Sequence[str],
    accuracy: str,
    state: str,
    configurations: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """The page's HTML. Everything but the pictures is escaped.

    heatmaps, accuracy, state: what `inline_picture` returned. configurations: by a name, whatever JSON can hold.
    notes: sentences on what is not shown.
    """
    one = " one" if len(heatmaps) == 1 else ""
    first = series[0].row
    asked = [
        word
        for word in (first.haystack and f"{first.haystack} haystack", first.question and f"question {first.question}")
        if word
    ]
    same = len({(s.row.task, s.row.haystack, s.row.question) for s in series}) == 1
    task = ", ".join([first.task, *asked]) if same else "several tasks"
    newest = max(row.date for s in series for row in s.cells.values())
    steps = ", ".join(f"{s.label} {s.row.checkpoint_step:,}" for s in series)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">Task: {escape(task)}. Checkpoint steps: {escape(steps)}. '
        f"Newest row: {escape(newest[:16].replace('T', ' '))} UTC.</p>",
        f"<p>{escape(compare(series))}</p>",
        f"<ul>{''.join(f'<li>{escape(summarise(s))}</li>' for s in series)}</ul>" if len(series) > 1 else "",
        *(f'<p class="muted">{escape(note)}</p>' for note in notes),
        "<h2>Exact match by length and depth</h2>",
        f'<div class="pictures{one}">',
        *(f"<figure>{heatmap}</figure>" for heatmap in heatmaps),
        "</div>",
        '<p class="muted">The number in a cell is the per cent of its samples whose answer is right in every digit. '
        "Lengths count tokens, answer included. Left of the dashed line: lengths met in training.</p>",
        "<h2>Accuracy against length</h2>",
        f'<figure class="wide">{accuracy}</figure>',
        '<p class="muted">All depths of a length together. Bands are 95% Wilson intervals; that of '
        "the digits supposes that the digits of an answer are independent, and is too narrow where they fail "
        "together.</p>",
        "<h2>Accuracy against state size</h2>",
        f'<figure class="wide">{state}</figure>',
        '<p class="muted">What the state of one sequence takes at that length, beside the part of the answers '
        "that are right; bars are 95% Wilson intervals.</p>",
        "<h2>Configuration</h2>",
        *(write_configuration(name, value) for name, value in configurations.items()),
        *([] if configurations else ['<p class="muted">No config.json was found.</p>']),
        "<h2>All cells</h2>",
        write_cells(series),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def write_configuration(name: str, value: Any) -> str:
    return (
        f"<details><summary>{escape(name)}</summary>"
        f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre></details>"
    )


def write_cells(series: Sequence[Series]) -> str:
    columns = (
        "architecture", "length", "depth", "needle at", "samples", "exact match", "95% interval", "digits right",
        "state", "tokens/s", "batch", "peak memory", "seed", "step", "commit", "jax",
    )  # fmt: skip
    head = "".join(f"<th{' class=name' if i == 0 else ''}>{escape(name)}</th>" for i, name in enumerate(columns))
    lines = []
    for one in series:
        for row in one.cells.values():
            values = (
                one.label,
                write_length(row.length),
                f"{row.depth:g}",
                f"{row.needle_position:,}",
                str(row.samples),
                f"{write_percent(row.exact_match)}%",
                f"{write_percent(row.exact_match_low)} to {write_percent(row.exact_match_high)}%",
                f"{write_percent(row.digit_accuracy)}%",
                write_bytes(row.state_bytes),
                write_rate(row.tokens_per_second),
                str(row.batch),
                write_bytes(row.peak_memory_bytes),
                str(row.seed),
                str(row.checkpoint_step),
                row.git_commit[:8] + ("*" if row.git_commit.endswith("-dirty") else ""),
                str(row.versions.get("jax", "")),
            )
            cells = "".join(
                f"<td{' class=name' if i == 0 else ''}>{escape(value)}</td>" for i, value in enumerate(values)
            )
            lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
        '<p class="muted">An asterisk: the code had changes that were not committed.</p>'
    )
