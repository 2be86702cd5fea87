"""Draws what was evaluated: heat-maps, accuracy against length and state size, and one page with everything.

    python -m experiments.report --workdir=runs/passkey

Reads <workdir>/results.jsonl, of a single run or of a sweep, and writes <workdir>/report/: index.html, which needs no
other file, and the pictures as .png.

Exit codes: 0 the report is written; 2 there is nothing to report on, or a row cannot be read.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments.flags import fail, run

if TYPE_CHECKING:
    from lcr.evaluation import Report

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run or a sweep that was evaluated.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    if not Path(WORKDIR.value).is_dir():
        fail(f"workdir={WORKDIR.value!r}: there is no such folder; expected that of a run or a sweep")

    from lcr.evaluation import write_report
    from lcr.evaluation.results import ResultsError

    try:
        show(write_report(WORKDIR.value))
    except ResultsError as error:
        fail(str(error))


def show(report: "Report") -> None:
    """Prints the table, and where the pictures lie."""
    print(report.table)
    print()
    for note in report.notes:
        print(note)
    for name, path in (
        *(("heat-map", heatmap) for heatmap in report.heatmaps),
        ("against length", report.accuracy),
        ("against state", report.state),
        ("page", report.page),
    ):
        print(f"{name:<15} {path}")


if __name__ == "__main__":
    run(main)
