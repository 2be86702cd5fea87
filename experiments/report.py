"""Draws what was evaluated: heat-maps, accuracy against length and state size, and one page with everything.

    python -m experiments.report --workdir=runs/passkey

Reads <workdir>/results.jsonl, of a single run or of a sweep, and writes <workdir>/report/: index.html, which needs no
other file, and the pictures as .png.

Exit codes: 0 the report is written; 2 there is nothing to report on, or a row cannot be read.
"""

from pathlib import Path

from absl import flags

from experiments.flags import fail, run

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run or a sweep that was evaluated.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    if not Path(WORKDIR.value).is_dir():
        fail(f"workdir={WORKDIR.value!r}: there is no such folder; expected that of a run or a sweep")

    from lcr.evaluation import describe_report, write_report
    from lcr.evaluation.results import ResultsError

    try:
        print(describe_report(write_report(WORKDIR.value)))
    except ResultsError as error:
        fail(str(error))


if __name__ == "__main__":
    run(main)
