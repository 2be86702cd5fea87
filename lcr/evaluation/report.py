"""Reads `results.jsonl` of a run or of a sweep; writes its report: pictures and one page."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lcr.evaluation import plots
from lcr.evaluation.page import inline_picture, to_png, write_page
from lcr.evaluation.results import RESULTS, ResultsError, read_rows
from lcr.evaluation.series import Series, select_series
from lcr.evaluation.tables import print_table, summarise, write_length


@dataclasses.dataclass(frozen=True)
class Report:
    """table: to be printed. heatmaps, accuracy, state: pictures. page: index.html. notes: what is not shown."""

    table: str
    heatmaps: list[Path]
    accuracy: Path
    state: Path
    page: Path
    notes: list[str]


def read_series(workdir: str | os.PathLike) -> tuple[list[Series], list[str]]:
    """The series of a workdir's rows, and notes on what is not shown. Raises ResultsError where there is no row."""
    path = Path(workdir) / RESULTS
    rows, notice = read_rows(path)
    if not rows:
        raise ResultsError(
            f"{path} has no rows: expected the results of an evaluation. "
            f"Run `python -m experiments.evaluate --workdir={workdir}`, or a sweep, first."
        )
    series, notes = select_series(rows)
    return series, [notice, *notes] if notice else notes


def write_report(workdir: str | os.PathLike) -> Report:
    """Writes `<workdir>/report/`: index.html and a .png of each picture.

    Raises ResultsError where there are no rows, or one that cannot be read.
    """
    workdir = Path(workdir)
    series, notes = read_series(workdir)
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    lengths = sorted({length for one in series for length in one.lengths})
    depths = sorted({depth for one in series for depth in one.depths})

    def picture(name: str, draw: Callable[..., Figure], *arguments: object, description: str) -> tuple[Path, str]:
        light, dark = (to_png(draw(*arguments, theme)) for theme in (plots.LIGHT, plots.DARK))
        path = folder / f"{name}.png"
        path.write_bytes(light)
        return path, inline_picture(light, dark, description)

    names = unique_names([one.label for one in series])
    heatmaps = [
        picture(f"heatmap_{name}", plots.draw_heatmap, one, lengths, depths, description=summarise(one))
        for name, one in zip(names, series, strict=True)
    ]
    accuracy = picture("accuracy", plots.draw_accuracy, series, description="Accuracy against length")
    state = picture("state", plots.draw_state, series, description="Exact match against the size of the state")
    page = folder / "index.html"
    tasks = " and ".join(sorted({one.row.task for one in series})).capitalize()
    title = f"{tasks}, {write_length(lengths[0])} to {write_length(lengths[-1])} tokens"
    html = write_page(
        title, series, [html for _, html in heatmaps], accuracy[1], state[1], read_configurations(workdir), notes
    )
    part = page.with_name("index.html.part")
    part.write_text(html, encoding="utf-8")
    part.replace(page)  # a reader never sees half a page
    return Report(print_table(series), [path for path, _ in heatmaps], accuracy[0], state[0], page, notes)


def describe_report(report: Report) -> str:
    """What a program prints at its end: the table, the notes, and where everything lies."""
    places = [("heat-map", path) for path in report.heatmaps]
    places += [("against length", report.accuracy), ("against state", report.state), ("page", report.page)]
    return "\n".join([report.table, "", *report.notes, *(f"{name:<15} {path}" for name, path in places)])


def unique_names(labels: list[str]) -> list[str]:
    """Names for files: letters, digits, dots and dashes, each different from the others."""
    names: list[str] = []
    for label in labels:
        base = name = re.sub(r"[^A-Za-z0-9.-]+", "_", label).strip("._") or "series"
        number = 1
        while name.lower() in (other.lower() for other in names):
            number += 1
            name = f"{base}_{number}"
        names.append(name)
    return names


def read_configurations(workdir: Path) -> dict[str, Any]:
    """The configuration of the run, or of each run of the sweep, that lies in this folder."""
    found = {}
    for path in [workdir / "config.json", *sorted(workdir.glob("*/config.json"))]:
        if path.exists():
            name = path.parent.name if path.parent != workdir else workdir.resolve().name
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found
